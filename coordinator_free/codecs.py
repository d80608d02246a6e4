"""How a slice of the vector becomes bytes: fp32, bf16, and block-wise int8 and int4.

Layouts (little-endian; n elements; a block is 256 consecutive ones, the last may be shorter):

    fp32    n x float32
    bf16    n x bfloat16
    int8    ceil(n / 256) x bfloat16 scale, then n x int8
    int4    ceil(n / 256) x bfloat16 scale, then ceil(n / 2) bytes: element 2i is the low nibble of
            byte i, element 2i + 1 the high one, each stored as q + 8; a last lone nibble is padded
            with 0

A quantised element is q * scale, q = round_half_even(x / scale), where the scale is max|x| of the
block / q_max (127 or 7), rounded *up* to bfloat16. Hence |q| <= q_max without a clamp, and the
error is at most 0.505 * max|x| / q_max per element (half a step, and the scale's rounding).
bfloat16 for the scale, rather than float16, because pseudo-gradients fall below float16's range;
and because 8 bits of scale times 8 bits of q fit a float32, so that decoding never rounds.

Guarantees.
- The bytes depend on nothing but the values. Every operation is a correctly rounded IEEE-754 one
  (divide, round half to even, int-to-float, multiply, add), an integer one, or a comparison;
  nothing reduces a sum, and what would be subnormal on the wire is made zero (`TINY`: elements of
  bf16 and int8/int4 scales smaller than it), as processors disagree on those. x86, ARM, any vector
  width, any thread count: the same.
- `decode` and `decode_add` validate what they are given, in full, before they touch the output: a
  wrong length, a NaN, an infinity, or a magnitude above `MAX_MAGNITUDE` (for int8 and int4: a scale
  above that of `MAX_MAGNITUDE`) is a ValueError. A decoded number is always finite.
- Work is done in segments that fit the cache and that torch does not split over threads: calls run
  in worker threads side by side, with the GIL released inside each operation.

Not guaranteed: that the encoding is canonical (a q of -128 or -8 is never made, but is decoded), or
that the numbers are honest. Both sides must be little-endian: the module does not load elsewhere.

Source of the recipe: DiLoCo with int4 pseudo-gradients, arXiv:2501.18512.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from dht.errors import ConfigError

if sys.byteorder != "little":
    raise ImportError("shoal's codecs need a little-endian processor")

Buffer = bytes | bytearray | memoryview

BLOCK: Final = 256
"""Elements under one scale. Quartering it would cost 6 % more bytes of int4 for little."""

SEGMENT: Final = 32_768
"""Elements worked on at once: 128 KiB of float32, and torch's grain size, above which it would
start OpenMP threads inside every worker thread. A multiple of BLOCK, and even."""

MAX_MAGNITUDE: Final = 2.0**127
"""Largest |x| that any codec carries. Half of float32's range, so that neither bfloat16's rounding
nor a scale that was rounded up can turn a finite number into an infinite one."""

TINY: Final = 2.0**-120
"""Below this, a bf16 element or a quantisation scale is sent as zero."""

_SCALE_BYTES: Final = 2


class NonFinite(ValueError):
    """The values to encode hold a NaN, an infinity, or a magnitude above `MAX_MAGNITUDE`."""


class Codec(Protocol):
    """One way to write N float32 numbers as bytes. Stateless: any thread may use it."""

    @property
    def name(self) -> str:
        """What a run file calls it."""
        ...

    @property
    def block(self) -> int:
        """Elements that share a scale; slices cut at multiples of it encode as the whole would."""
        ...

    def encoded_bytes(self, n: int) -> int:
        """Exact size of n encoded elements."""
        ...

    def encode(self, values_N: Tensor, out: memoryview | None = None) -> memoryview:
        """Write the values as bytes.

        Args:
            values_N: (N,) float32, CPU, contiguous. Not changed.
            out: writable, contiguous, at least `encoded_bytes(N)` long; None allocates.

        Returns:
            Exactly `encoded_bytes(N)` bytes: the head of `out`, or fresh memory.

        Raises:
            NonFinite: what cannot be averaged must not be sent. `out` is as it was.
            ValueError: wrong dtype, device, shape or size of `out`.
        """
        ...

    def decode(self, payload: Buffer, n: int) -> Tensor:
        """Read n elements back.

        Returns:
            (n,) float32, CPU, freshly allocated, all finite.

        Raises:
            ValueError: as `validate`.
        """
        ...

    def decode_add(self, payload: Buffer, n: int, weight: float, into_N: Tensor) -> None:
        """Compute `into += weight * decoded`, in two roundings: a multiply, then an add.

        Args:
            payload: n encoded elements.
            n: how many; the length of `into_N`.
            weight: finite; rounded to float32 before it is used.
            into_N: (n,) float32, CPU, contiguous. Changed in place.

        Raises:
            ValueError: as `validate`, and before anything is added.
        """
        ...

    def validate(self, payload: Buffer, n: int) -> None:
        """Check a payload without decoding it; the two above do so by themselves.

        Raises:
            ValueError: wrong length, or a number that is not finite or too large.
        """
        ...


def _checked_vector(values_N: Tensor, what: str) -> Tensor:
    """Refuse what the kernels below would misread; the caller's own mistake, never a peer's."""
    if values_N.dtype != torch.float32 or values_N.device.type != "cpu":
        raise ValueError(f"{what} must be float32 on the CPU, not {values_N.dtype}")
    if values_N.ndim != 1 or not values_N.is_contiguous():
        raise ValueError(f"{what} must be one contiguous row, not {tuple(values_N.shape)}")
    return values_N.detach()


def _segments(n: int) -> Iterator[tuple[int, int]]:
    """Cut 0..n into (start, stop) of at most SEGMENT, each of whole blocks, but for a last rest."""
    whole = n - n % BLOCK
    for start in range(0, whole, SEGMENT):
        yield start, min(start + SEGMENT, whole)
    if whole < n:
        yield whole, n


def _refuse_wild(values_N: Tensor, error: type[ValueError]) -> None:
    """Raise `error` unless every |x| <= MAX_MAGNITUDE. A NaN fails each comparison."""
    for start in range(0, len(values_N), SEGMENT):
        low, high = torch.aminmax(values_N[start : start + SEGMENT])
        if not (low.item() >= -MAX_MAGNITUDE and high.item() <= MAX_MAGNITUDE):
            raise error(f"a value is not finite, or larger than {MAX_MAGNITUDE:g}")


class _Base(ABC):
    """What all codecs share: the checks, the buffers, and the walk over segments.

    Payload bytes are moved by numpy copies into aligned scratch and from it: a slice of a network
    message has any alignment and is read-only, and torch wants neither.
    """

    name: str
    block: int

    @abstractmethod
    def encoded_bytes(self, n: int) -> int: ...

    @abstractmethod
    def _write(self, values_N: Tensor, target: np.ndarray) -> None:
        """Encode into exactly as many bytes as are needed; NonFinite before the first of them."""

    @abstractmethod
    def _check(self, source: np.ndarray, n: int) -> None:
        """Raise ValueError unless all of the payload, of the right length, is sound."""

    @abstractmethod
    def _read(self, source: np.ndarray, n: int, out_N: Tensor, start: int) -> None:
        """Decode elements start .. start + len(out_N) of a sound payload; start is a segment's."""

    def encode(self, values_N: Tensor, out: memoryview | None = None) -> memoryview:
        values_N = _checked_vector(values_N, "values")
        size = self.encoded_bytes(len(values_N))
        if out is None:
            target = np.empty(size, np.uint8)
        else:
            if out.readonly or out.nbytes < size:
                raise ValueError(f"the output must be writable and have {size} bytes")
            target = np.frombuffer(out, np.uint8, count=size) if size else np.empty(0, np.uint8)
        self._write(values_N, target)
        return target.data

    def decode(self, payload: Buffer, n: int) -> Tensor:
        source = self._sound(payload, n)
        out_N = torch.empty(n, dtype=torch.float32)
        for start, stop in _segments(n):
            self._read(source, n, out_N[start:stop], start)
        return out_N

    def decode_add(self, payload: Buffer, n: int, weight: float, into_N: Tensor) -> None:
        into_N = _checked_vector(into_N, "the sum")
        if len(into_N) != n:
            raise ValueError(f"the sum has {len(into_N)} elements, not {n}")
        if not abs(weight) <= MAX_MAGNITUDE:
            raise ValueError(f"weight {weight} is not finite")
        source = self._sound(payload, n)
        scratch = torch.empty(min(n, SEGMENT), dtype=torch.float32)
        for start, stop in _segments(n):
            part = scratch[: stop - start]
            self._read(source, n, part, start)
            # Two statements and not add_(alpha=weight): that one fuses where the processor can.
            part.mul_(weight)
            into_N[start:stop].add_(part)

    def validate(self, payload: Buffer, n: int) -> None:
        self._sound(payload, n)

    def _sound(self, payload: Buffer, n: int) -> np.ndarray:
        view = memoryview(payload)
        if n < 0 or not view.c_contiguous or view.nbytes != self.encoded_bytes(n):
            raise ValueError(f"{view.nbytes} bytes are not {n} elements of {self.name}")
        if n == 0:
            return np.empty(0, np.uint8)
        source = np.frombuffer(view, np.uint8)
        self._check(source, n)
        return source


class _Fp32(_Base):
    """The values as they are: for tests, for the first round's sanity, for fast networks."""

    name = "fp32"
    block = 1

    def encoded_bytes(self, n: int) -> int:
        return 4 * n

    def _write(self, values_N: Tensor, target: np.ndarray) -> None:
        _refuse_wild(values_N, NonFinite)
        np.copyto(target.view(np.float32), values_N.numpy())

    def _check(self, source: np.ndarray, n: int) -> None:
        scratch = torch.empty(min(n, SEGMENT), dtype=torch.float32)
        for start, stop in _segments(n):
            part = scratch[: stop - start]
            self._read(source, n, part, start)
            _refuse_wild(part, ValueError)

    def _read(self, source: np.ndarray, n: int, out_N: Tensor, start: int) -> None:
        stop = start + len(out_N)
        np.copyto(out_N.numpy(), source[4 * start : 4 * stop].view(np.float32))


class _Bf16(_Base):
    """The upper half of each float32, rounded to nearest even: relative error at most 2^-8."""

    name = "bf16"
    block = 1

    def encoded_bytes(self, n: int) -> int:
        return 2 * n

    def _write(self, values_N: Tensor, target: np.ndarray) -> None:
        _refuse_wild(values_N, NonFinite)
        scratch = torch.empty(min(len(values_N), SEGMENT), dtype=torch.bfloat16)
        for start, stop in _segments(len(values_N)):
            part = scratch[: stop - start]
            # hardshrink zeroes |x| <= TINY in one pass: some processors' bfloat16 instructions
            # flush subnormals, others keep them.
            part.copy_(torch.nn.functional.hardshrink(values_N[start:stop], TINY))
            np.copyto(target[2 * start : 2 * stop].view(np.int16), part.view(torch.int16).numpy())

    def _check(self, source: np.ndarray, n: int) -> None:
        scratch = torch.empty(min(n, SEGMENT), dtype=torch.float32)
        for start, stop in _segments(n):
            part = scratch[: stop - start]
            self._read(source, n, part, start)
            _refuse_wild(part, ValueError)

    def _read(self, source: np.ndarray, n: int, out_N: Tensor, start: int) -> None:
        stop = start + len(out_N)
        raw = torch.empty(len(out_N), dtype=torch.int16)
        np.copyto(raw.numpy(), source[2 * start : 2 * stop].view(np.int16))
        out_N.copy_(raw.view(torch.bfloat16))


class _Quantised(_Base):
    """Block-wise symmetric integers, see the module's docstring."""

    block = BLOCK
    q_max: int

    def __init__(self) -> None:
        bits, _ = self._scales(torch.tensor([MAX_MAGNITUDE]))
        self._largest_scale_bits = int(bits.item())

    def encoded_bytes(self, n: int) -> int:
        return self._scales_bytes(n) + self._quanta_bytes(n)

    @staticmethod
    def _scales_bytes(n: int) -> int:
        return _SCALE_BYTES * -(-n // BLOCK)

    @abstractmethod
    def _quanta_bytes(self, n: int) -> int:
        """Bytes of n integers without their scales."""

    @abstractmethod
    def _write_quanta(self, rounded_N: Tensor, target: np.ndarray) -> None:
        """Store float32 integers in -q_max .. q_max; `rounded_N` may be overwritten."""

    @abstractmethod
    def _read_quanta(self, source: np.ndarray, out_N: Tensor) -> None:
        """Load them back as float32."""

    def _write(self, values_N: Tensor, target: np.ndarray) -> None:
        n = len(values_N)
        split = self._scales_bytes(n)
        quanta = target[split:]
        # Two walks: the scales of all blocks are worked out in one go, as what they cost is the
        # ten calls into torch, not the arithmetic.
        scratch = torch.empty(min(n, SEGMENT), dtype=torch.float32)
        largest_R = torch.empty(split // _SCALE_BYTES, dtype=torch.float32)
        for start, stop in _segments(n):
            values_RB, work_RB = (
                self._rows(values_N[start:stop]),
                self._rows(scratch[: stop - start]),
            )
            rows = largest_R[start // BLOCK : start // BLOCK + len(values_RB)]
            torch.amax(torch.abs(values_RB, out=work_RB), 1, out=rows)
        _refuse_wild(largest_R, NonFinite)
        bits_R, divisor_R = self._scales(largest_R)
        np.copyto(target[:split].view(np.int16), bits_R.numpy())
        for start, stop in _segments(n):
            values_RB, work_RB = (
                self._rows(values_N[start:stop]),
                self._rows(scratch[: stop - start]),
            )
            rows = divisor_R[start // BLOCK : start // BLOCK + len(values_RB)]
            torch.div(values_RB, rows[:, None], out=work_RB)
            work_RB.round_()  # half to even
            self._write_quanta(
                work_RB.view(-1), quanta[self._quanta_bytes(start) : self._quanta_bytes(stop)]
            )

    @staticmethod
    def _rows(segment_N: Tensor) -> Tensor:
        """One row per scale: a segment is whole blocks, or the one short block at the end."""
        return segment_N.view(-1, min(BLOCK, len(segment_N)))

    def _scales(self, largest_R: Tensor) -> tuple[Tensor, Tensor]:
        """Bfloat16 bits of the scales, (R,) int16, and what to divide by, (R,) float32."""
        # By a tensor of one element: dividing by a Python number may become a multiplication by
        # its reciprocal, which rounds differently.
        scale = largest_R / torch.full((1,), float(self.q_max))
        # Rounding up, in integers: the bit pattern of a positive float grows with its value.
        bits = (scale.view(torch.int32) + 0xFFFF) >> 16
        scale = (bits << 16).view(torch.float32)
        tiny = scale < TINY
        # A block of nearly nothing: divided by 1 it rounds to zeros by itself.
        return bits.masked_fill_(tiny, 0).to(torch.int16), scale.masked_fill_(tiny, 1.0)

    def _check(self, source: np.ndarray, n: int) -> None:
        scales = self._load_scales(source, n, 0, -(-n // BLOCK))
        low, high = torch.aminmax(scales.view(torch.int16))
        # As integers: a set sign bit is negative; infinities and NaNs lie above every number.
        if low.item() < 0 or high.item() > self._largest_scale_bits:
            raise ValueError("a scale is negative, not finite or too large")
        if bool(((scales > 0) & (scales < TINY)).any()):
            raise ValueError("a scale is too small")

    def _read(self, source: np.ndarray, n: int, out_N: Tensor, start: int) -> None:
        stop = start + len(out_N)
        scales = self._load_scales(source, n, start // BLOCK, -(-stop // BLOCK))
        base = self._scales_bytes(n)
        self._read_quanta(
            source[base + self._quanta_bytes(start) : base + self._quanta_bytes(stop)], out_N
        )
        self._rows(out_N).mul_(scales.to(torch.float32)[:, None])

    @staticmethod
    def _load_scales(source: np.ndarray, n: int, first: int, last: int) -> Tensor:
        raw = source[_SCALE_BYTES * first : _SCALE_BYTES * last].view(np.int16)
        return torch.from_numpy(raw.copy()).view(torch.bfloat16)


class _Int8(_Quantised):
    """Eight bits: error at most 0.4 % of the block's largest magnitude."""

    name = "int8"
    q_max = 127

    def _quanta_bytes(self, n: int) -> int:
        return n

    def _write_quanta(self, rounded_N: Tensor, target: np.ndarray) -> None:
        np.copyto(target.view(np.int8), rounded_N.to(torch.int8).numpy())

    def _read_quanta(self, source: np.ndarray, out_N: Tensor) -> None:
        out_N.copy_(torch.from_numpy(source.view(np.int8).copy()))


class _Int4(_Quantised):
    """Four bits: error at most 7.3 % of the block's largest magnitude.

    A pair of neighbouring int8 is handled as one int16, twice as fast as strided access.
    """

    name = "int4"
    q_max = 7

    def _quanta_bytes(self, n: int) -> int:
        return -(-n // 2)

    def _write_quanta(self, rounded_N: Tensor, target: np.ndarray) -> None:
        pairs = torch.zeros(len(target), dtype=torch.int16)  # zeros: the padding of an odd end
        pairs.view(torch.int8)[: len(rounded_N)].copy_(rounded_N.add_(8.0))
        # 0000hhhh0000llll | 000000000000hhhh << 4, of which the low byte is hhhhllll.
        packed = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
        np.copyto(target, packed.numpy())

    def _read_quanta(self, source: np.ndarray, out_N: Tensor) -> None:
        packed = torch.from_numpy(source.astype(np.int16))
        pairs = (packed << 4).bitwise_or_(packed).bitwise_and_(0x0F0F)
        out_N.copy_(pairs.view(torch.int8)[: len(out_N)])
        out_N.sub_(8.0)

    def _check(self, source: np.ndarray, n: int) -> None:
        super()._check(source, n)
        if n % 2 and source[-1] & 0xF0:
            raise ValueError("the padding after the last element is not zero")


_CODECS: Final[dict[str, Codec]] = {c.name: c for c in (_Fp32(), _Bf16(), _Int8(), _Int4())}


def codec(name: str) -> Codec:
    """The codec that a run file names.

    Raises:
        ConfigError: nobody knows it.
    """
    try:
        return _CODECS[name]
    except KeyError:
        known = ", ".join(_CODECS)
        raise ConfigError(f"unknown codec {name!r}: use one of {known}") from None
