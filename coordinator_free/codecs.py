"""How a slice of the vector becomes bytes: fp32, bf16, block-wise int8 to int1, or the largest few.

Layouts (little-endian; n elements; a block is 256 consecutive ones, the last may be shorter):

    fp32    n x float32
    bf16    n x bfloat16
    int8    ceil(n / 256) x bfloat16 scale, then the blocks: L bytes for one of L elements
    int4    the same with ceil(L / 2) bytes a block
    int2    the same with ceil(L / 4) bytes a block
    int1    the same with ceil(L / 8) bytes a block
    top64   ceil(n / 4096) x bfloat16 scale, then the pages, see below
    top128  the same

With K elements to a byte (1, 2, 4, 8) and H = ceil(L / K) bytes, byte i of a block holds the
elements i, i + H, i + 2H, ... from its low bits to its high ones: neighbours stay neighbours
in the lanes of a vector unit. What lies at or beyond L is padding, and zero bits.

int8 and int4: x is sent as q = round_half_even(x / scale), the scale being max|x| of the block /
q_max (127 or 7), rounded *up* to bfloat16; int8 as two's complement, int4 as q + 8. Hence
|q| <= q_max without a clamp, and the error is at most 0.505 * max|x| / q_max per element (half a
step, and the scale's rounding).

int2: one of the levels -1.5, -0.5, 0.5, 1.5 (0 to 3 in the bits) times the scale, the nearest one;
halfway, the upper one. The scale is 1.5 x the mean |x| of the block: with feedback better than the
1.25 that is best for a Gaussian alone, and unlike max|x| not at the mercy of one outlier. In bits:
with a_i = |x_i| / 256, or 0 where |x_i| <= 2^-110 (`MEAN_FLOOR`) and beyond L, the sum of a_0 ..
a_255 is taken by halves (a_i + a_(i+128) for i < 128, then those i + 64 apart, and so on to one);
times 1.5; over L / 256; rounded half to even to bfloat16; at most 0x7EAA. The error of an element
is at most max(scale / 2, |x| - 1.5 * scale), whatever the scale. Error feedback makes up for what
is cut off.

int1: -1 or 1 (0 or 1 in the bit) times the scale, 1 for +0 and -0. The scale is the mean |x| of the
block, by the same sum, without the factor of 1.5, and at most 0x7F00. The error of an element is
exactly |scale - |x||, and so at most max(scale, |x| - scale).

top64 and top128: of a page, which is 4096 consecutive elements (the last may be shorter), those of
largest |x| are sent, the lower index first where |x| is equal. With l = 6 for top64 and 5 for
top128, a page of L elements sends C = ceil(L / 2^l), which is 64 or 128 of a whole one. The page is
three strings of bits, each of whole bytes, in which bit j is bit j mod 8 of byte j // 8:

    low     C x l bits: of the ith index, ascending, the l lowest bits, at i * l
    high    2C bits: bit (ith index >> l) + i is one for each i, the others are zero
    code    C x 2 bits: of the ith of those elements, at 2i

and what is left of a string's last byte is zero. (The indices are in Elias and Fano's code: 8 bits
each for top64, of the 7.4 that there must be; and the same size whatever they are.) An element is
one of the levels -1.5, -1, 1, 1.5 (0 to 3) times the page's scale, the nearest one; halfway, the
upper. The scale is the mean |x| of those sent: with a_i = |x_i| / S of the ith, or 0 where |x_i| <=
2^-110 and from C on, S being 64 or 128, the sum of a_0 .. a_(S-1) is taken by halves; over C / S;
rounded half to even to bfloat16; at most 0x7EAA. The error of what is sent is the distance of |x|
to the nearer of scale and 1.5 * scale: what accumulates until it is sent is all of about one
magnitude, hence a level there. All else decodes to +0, and is at most the least |x| that was sent.

Error feedback: whoever encodes keeps what was lost, x - decoded, and adds it to what it encodes
next. Every codec loses less than it is given (in squares, summed over a block), so what is kept
stays bounded, and the mean of k messages is off by what is kept at the end over k.

A scale below `TINY` is sent as 0, and such a block as all +0. bfloat16 for the scale, rather than
float16, because pseudo-gradients fall below float16's range; and because 8 bits of scale times 8
bits of q fit a float32, so that decoding never rounds.

Guarantees.
- The bytes depend on nothing but the values. Every operation is a correctly rounded IEEE-754 one
  (divide, round half to even, int-to-float, multiply, add), an integer one, or a comparison; no
  multiply is fused with an add; the one sum has a fixed order; and what would be subnormal on the
  wire is made zero (`TINY`: elements of bf16 not larger than it, scales smaller), as processors
  disagree on those. x86, ARM, any vector width, any thread count, numba or torch, CPU or GPU: the
  same.
- `decode` and `decode_add` validate what they are given: a wrong length, a NaN, an infinity, or a
  magnitude above `MAX_MAGNITUDE` (for quantised ones: a scale above that of `MAX_MAGNITUDE`),
  padding that is not zero, or an index that is not above the one before it and within the page, is
  a ValueError. A decoded number is always finite; times a weight above
  one, or added to another, it may not be. fp32 and bf16 are checked in the pass that decodes them,
  so **after a ValueError the output holds anything**, and likewise `out` after encode's NonFinite.
- Scratch is constant, a few times `SEGMENT` elements, whatever the length. (On a GPU: a few times
  `DEVICE_SEGMENT`, and the encoded bytes once there and once in pinned memory.)
- Calls run in worker threads side by side: the GIL is released, and no other thread is started.

Not guaranteed: that the encoding is canonical (a q of -128 or -8 is never made, but is decoded), or
that the numbers are honest. Both sides must be little-endian: the module does not load elsewhere.

Two backends make the same bits: `kernels`, compiled by numba, one pass over the memory; and torch,
a segment at a time, which serves where numba is missing and for tensors on a GPU. The latter path
has been tested on the CPU's memory only: the copies from and to a GPU were never run.

Source of the recipe: DiLoCo with int4 pseudo-gradients, arXiv:2501.18512.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from coordinator_free import kernels
from dht.errors import ConfigError

if sys.byteorder != "little":
    raise ImportError("shoal's codecs need a little-endian processor")

Buffer = bytes | bytearray | memoryview

BLOCK: Final = 256
"""Elements under one scale. Quartering it would cost 6 % more bytes of int4 for little."""

PAGE: Final = 4096
"""Elements of which a sparse codec sends the largest."""

SEGMENT: Final = 32_768
"""Elements that torch works on at once: 128 KiB of float32, and its grain size, above which it
would start OpenMP threads inside every worker thread. A multiple of PAGE."""

DEVICE_SEGMENT: Final = 1 << 22
"""The same on a GPU, where each operation should outlast its launch."""

MAX_MAGNITUDE: Final = 2.0**127
"""Largest |x| that any codec carries. Half of float32's range, so that neither bfloat16's rounding
nor a scale that was rounded up can turn a finite number into an infinite one."""

TINY: Final = kernels.TINY

_MAX_BITS: Final = 0x7F00_0000  # MAX_MAGNITUDE's; NaNs and infinities have larger ones
_SIGNLESS: Final = 0x7FFF_FFFF
_TINY_SCALE: Final = 0x0380  # TINY's bits as bfloat16
_ONE_SCALE: Final = 0x3F80
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

    @property
    def average(self) -> str:
        """Name of the codec in which the average of what this one carried is sent back.

        One value per element of many peers' becomes many: int1 goes to the reducer, int2 back.
        """
        ...

    @property
    def needs_feedback(self) -> bool:
        """Whether so much is lost that the sender has to keep it and add it to what comes next."""
        ...

    @property
    def sparse(self) -> bool:
        """Whether few elements are sent, and a mean is over those who sent one: `SparseCodec`."""
        ...

    def encoded_bytes(self, n: int) -> int:
        """Exact size of n encoded elements."""
        ...

    def encode(self, values_N: Tensor, out: memoryview | None = None) -> memoryview:
        """Write the values as bytes.

        Args:
            values_N: (N,) float32, contiguous, on the CPU or a CUDA device. Not changed.
            out: writable, contiguous, at least `encoded_bytes(N)` long, of any alignment; None
                allocates, for a CUDA tensor pinned memory.

        Returns:
            Exactly `encoded_bytes(N)` bytes: the head of `out`, or fresh memory, or without `out`
            and for fp32 the memory of the values themselves. Those of a CUDA tensor have arrived;
            the device's current stream was not waited for beyond them.

        Raises:
            NonFinite: what cannot be averaged must not be sent. `out` holds anything.
            ValueError: wrong dtype, device, shape or size of `out`.
        """
        ...

    def decode(
        self, payload: Buffer, n: int, out_N: Tensor | None = None, weight: float | None = None
    ) -> Tensor:
        """Read n elements back.

        Args:
            payload: n encoded elements, of any alignment.
            n: how many.
            out_N: where to, (n,) float32, contiguous, on the CPU or a CUDA device; None allocates
                on the CPU. A CUDA one is written on the device's current stream.
            weight: finite; multiplies each element, rounding once, so that the first contribution
                to a sum needs no zeros before it.

        Returns:
            `out_N`, all finite (with a weight of at most one).

        Raises:
            ValueError: as `validate`; `out_N` holds anything then. Or a mistake in the arguments.
        """
        ...

    def decode_add(self, payload: Buffer, n: int, weight: float, into_N: Tensor) -> None:
        """Compute `into += weight * decoded`, in two roundings: a multiply, then an add.

        With a weight of -1 the first is exact: `decode_add(encode(x), n, -1.0, x)` leaves in x what
        encoding lost, each element rounded once; error feedback keeps that for the next message.

        Args:
            payload: n encoded elements, of any alignment.
            n: how many; the length of `into_N`.
            weight: finite; rounded to float32 before it is used.
            into_N: (n,) float32, contiguous, as `decode`'s. Changed in place.

        Raises:
            ValueError: as `validate`; `into_N` holds anything then. Or a mistake in the arguments.
        """
        ...

    def validate(self, payload: Buffer, n: int) -> None:
        """Check a payload without decoding it; the two above do so by themselves.

        Reads all of fp32 and bf16, of the others only the scales, the padding, and indices.

        Raises:
            ValueError: wrong length, or a number that is not finite or too large.
        """
        ...


class SparseCodec(Codec, Protocol):
    """A codec whose messages say nothing of most elements."""

    def decode_add_sent(
        self, payload: Buffer, n: int, weight: float, into_N: Tensor, sent_N: Tensor
    ) -> None:
        """As `decode_add`, and at the elements that were sent also `sent += weight`.

        A page whose scale is 0 counts as not sent: it has nothing to say.

        Args:
            payload: n encoded elements, of any alignment.
            n: how many; the length of `into_N` and `sent_N`.
            weight: finite, and above 0 for `mean_of_sent` to make sense of it.
            into_N: (n,) float32, contiguous, as `decode`'s. Changed in place.
            sent_N: the same, on the same device, in other memory.

        Raises:
            ValueError: as `validate`; both hold anything then. Or a mistake in the arguments.
        """
        ...


def _checked_vector(values_N: Tensor, what: str) -> Tensor:
    """Refuse what the kernels would misread; the caller's own mistake, never a peer's."""
    if values_N.dtype != torch.float32 or values_N.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{what} must be float32 on the CPU or a CUDA device, "
            f"not {values_N.dtype} on {values_N.device}"
        )
    if values_N.ndim != 1 or not values_N.is_contiguous():
        raise ValueError(f"{what} must be one contiguous row, not {tuple(values_N.shape)}")
    return values_N.detach()


def _checked_output(out_N: Tensor, n: int, weight: float) -> Tensor:
    """The same for what is written, and for what is multiplied with."""
    out_N = _checked_vector(out_N, "the output")
    if len(out_N) != n:
        raise ValueError(f"the output has {len(out_N)} elements, not {n}")
    if not abs(weight) <= MAX_MAGNITUDE:
        raise ValueError(f"weight {weight} is not finite")
    return out_N


class _Base(ABC):
    """What all codecs share: the checks, the buffers, and the choice of the backend."""

    name: str
    block: int
    average: str
    needs_feedback = False
    sparse = False

    @abstractmethod
    def encoded_bytes(self, n: int) -> int: ...

    @abstractmethod
    def _check(self, source: np.ndarray, n: int) -> None:
        """Raise ValueError unless all of the payload, of the right length, is sound."""

    @abstractmethod
    def _encode(self, values_N: np.ndarray, target: np.ndarray) -> int:
        """Encode by kernels. Returns the bits of the largest |x|."""

    @abstractmethod
    def _decode(self, source: np.ndarray, out_N: np.ndarray, weight: np.float32, add: bool) -> None:
        """Check and decode by kernels."""

    @abstractmethod
    def _write(self, part_N: Tensor, target: np.ndarray | Tensor, start: int, n: int) -> Tensor:
        """Encode by torch a segment that starts at element `start` of n. Returns bits, too."""

    @abstractmethod
    def _read(self, source: np.ndarray | Tensor, start: int, stop: int, n: int) -> Tensor:
        """Decode by torch the elements start .. stop of n, into fresh memory."""

    def encode(self, values_N: Tensor, out: memoryview | None = None) -> memoryview:
        values_N = _checked_vector(values_N, "values")
        size = self.encoded_bytes(len(values_N))
        if out is not None and (out.readonly or not out.c_contiguous or out.nbytes < size):
            raise ValueError(f"the output must be writable, contiguous and have {size} bytes")
        if size == 0:
            return memoryview(b"")
        if out is not None:
            target = np.frombuffer(out, np.uint8, count=size)
        else:
            target = _pinned(size).numpy() if values_N.is_cuda else np.empty(size, np.uint8)
        if values_N.is_cuda:
            largest = self._encode_on_device(values_N, target, pinned=out is None)
        elif kernels.compiled():
            largest = self._encode(values_N.numpy(), target)
        else:
            largest = int(self._encode_by_torch(values_N, target))
        if largest > _MAX_BITS:
            raise NonFinite(f"a value is not finite, or larger than {MAX_MAGNITUDE:g}")
        return target.data

    def decode(
        self, payload: Buffer, n: int, out_N: Tensor | None = None, weight: float | None = None
    ) -> Tensor:
        source = self._bytes(payload, n)
        if out_N is None:
            out_N = torch.empty(n, dtype=torch.float32)
        self._decode_into(source, out_N, n, 1.0 if weight is None else weight, add=False)
        return out_N

    def decode_add(self, payload: Buffer, n: int, weight: float, into_N: Tensor) -> None:
        self._decode_into(self._bytes(payload, n), into_N, n, weight, add=True)

    def validate(self, payload: Buffer, n: int) -> None:
        source = self._bytes(payload, n)
        if n:
            self._check(source, n)

    def _bytes(self, payload: Buffer, n: int) -> np.ndarray:
        """The payload, once its length is right."""
        view = memoryview(payload)
        if n < 0 or not view.c_contiguous or view.nbytes != self.encoded_bytes(n):
            raise ValueError(f"{view.nbytes} bytes are not {n} elements of {self.name}")
        return np.frombuffer(view, np.uint8) if n else np.empty(0, np.uint8)

    def _decode_into(
        self, source: np.ndarray, out_N: Tensor, n: int, weight: float, add: bool
    ) -> None:
        out_N = _checked_output(out_N, n, weight)
        if n == 0:
            return
        if kernels.compiled() and not out_N.is_cuda:
            self._decode(source, out_N.numpy(), np.float32(weight), add)
            return
        for start, stop, bytes_B in self._to_read(source, n, out_N):
            self._merge(bytes_B, start, stop, n, out_N[start:stop], weight, add)

    def _to_read(
        self, source: np.ndarray, n: int, out_N: Tensor
    ) -> Iterator[tuple[int, int, np.ndarray | Tensor]]:
        """Check a payload, bring it to where `out_N` is, and cut it for torch to decode."""
        self._check(source, n)  # for a GPU, too, by the CPU: nothing to wait for afterwards
        bytes_B = _upload(source, out_N.device) if out_N.is_cuda else source
        for start, stop in _segments(n, self.block, out_N.is_cuda):
            yield start, stop, bytes_B

    def _merge(
        self,
        source: np.ndarray | Tensor,
        start: int,
        stop: int,
        n: int,
        out_N: Tensor,
        weight: float,
        add: bool,
    ) -> None:
        """Decode by torch the elements start .. stop of n, weigh, then write or add."""
        # Two statements and not add_(alpha=weight): that one fuses where the processor can.
        part_N = self._read(source, start, stop, n).mul_(weight)
        if add:
            out_N.add_(part_N)
        else:
            out_N.copy_(part_N)

    def _encode_by_torch(self, values_N: Tensor, target: np.ndarray | Tensor) -> Tensor:
        """Encode on the device that holds the values. Returns the bits of the largest |x|."""
        n = len(values_N)
        largest = torch.zeros((), dtype=torch.int32, device=values_N.device)
        for start, stop in _segments(n, self.block, values_N.is_cuda):
            part = self._write(values_N[start:stop], target, start, n)
            largest = torch.maximum(largest, part)
        return largest

    def _encode_on_device(self, values_N: Tensor, target: np.ndarray, pinned: bool) -> int:
        """Encode on a GPU, bring the bytes here, and wait for nothing but them."""
        with torch.cuda.device(values_N.device):
            bytes_B = torch.empty(len(target), dtype=torch.uint8, device=values_N.device)
            largest = self._encode_by_torch(values_N, bytes_B)
            landed_B = torch.from_numpy(target) if pinned else _pinned(len(target))
            landed = torch.empty((), dtype=torch.int32, pin_memory=True)
            side = _side_stream(values_N.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                landed_B.copy_(bytes_B, non_blocking=True)
                landed.copy_(largest, non_blocking=True)
                # Waiting sleeps; by default it would spin on a core.
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record(side)
            bytes_B.record_stream(side)
            largest.record_stream(side)
            done.synchronize()
        if not pinned:
            np.copyto(target, landed_B.numpy())
        return int(landed)


class _Floats(_Base):
    """Codecs without scales: each element is a float of some width."""

    block = 1
    size: int

    def encoded_bytes(self, n: int) -> int:
        return self.size * n

    @abstractmethod
    def _largest(self, source: np.ndarray) -> int:
        """By a kernel: bits of the largest |x|, as a float32, of a payload."""

    def _check(self, source: np.ndarray, n: int) -> None:
        if kernels.compiled():
            self._refuse(self._largest(source))
            return
        for start, stop in _segments(n, self.block):
            self._refuse(int(_largest(self._read(source, start, stop, n))))

    @staticmethod
    def _refuse(largest: int) -> None:
        if largest > _MAX_BITS:
            raise ValueError(f"a value is not finite, or larger than {MAX_MAGNITUDE:g}")


class _Fp32(_Floats):
    """The values as they are: for tests, for the first round's sanity, for fast networks."""

    name = average = "fp32"
    size = 4

    def encode(self, values_N: Tensor, out: memoryview | None = None) -> memoryview:
        values_N = _checked_vector(values_N, "values")
        if out is not None or values_N.is_cuda or not len(values_N):
            return super().encode(values_N, out)
        own = values_N.numpy().view(np.uint8)
        try:
            self._check(own, len(values_N))
        except ValueError as error:
            raise NonFinite(str(error)) from None
        return own.data.toreadonly()

    def _encode(self, values_N: np.ndarray, target: np.ndarray) -> int:
        # Copying by a kernel would multiply by a weight of 1, which may flush subnormals.
        np.copyto(target.view(np.float32), values_N)
        return kernels.largest_fp32(values_N)

    def _largest(self, source: np.ndarray) -> int:
        return kernels.largest_fp32(source.view(np.float32))

    def _decode(self, source: np.ndarray, out_N: np.ndarray, weight: np.float32, add: bool) -> None:
        self._refuse(kernels.decode_fp32(source.view(np.float32), out_N, weight, add))

    def _write(self, part_N: Tensor, target: np.ndarray | Tensor, start: int, n: int) -> Tensor:
        _store(target, 4 * start, part_N)
        return _largest(part_N)

    def _read(self, source: np.ndarray | Tensor, start: int, stop: int, n: int) -> Tensor:
        return _load(source, 4 * start, 4 * stop).view(torch.float32)


class _Bf16(_Floats):
    """The upper half of each float32, rounded to nearest even: relative error at most 2^-8."""

    name = average = "bf16"
    size = 2

    def _encode(self, values_N: np.ndarray, target: np.ndarray) -> int:
        return kernels.encode_bf16(values_N, target.view(np.uint16))

    def _largest(self, source: np.ndarray) -> int:
        return kernels.largest_bf16(source.view(np.uint16))

    def _decode(self, source: np.ndarray, out_N: np.ndarray, weight: np.float32, add: bool) -> None:
        self._refuse(kernels.decode_bf16(source.view(np.uint16), out_N, weight, add))

    def _write(self, part_N: Tensor, target: np.ndarray | Tensor, start: int, n: int) -> Tensor:
        # hardshrink zeroes |x| <= TINY in one pass: some processors' bfloat16 instructions flush
        # subnormals, others keep them.
        _store(target, 2 * start, torch.nn.functional.hardshrink(part_N, TINY).to(torch.bfloat16))
        return _largest(part_N)

    def _read(self, source: np.ndarray | Tensor, start: int, stop: int, n: int) -> Tensor:
        return _load(source, 2 * start, 2 * stop).view(torch.bfloat16).to(torch.float32)


class _Scaled(_Base):
    """Codecs with a scale for each block, all in front, and then for each what is scaled by it."""

    largest_scale: int
    """Bits, as bfloat16, of the largest scale that is accepted."""

    @abstractmethod
    def _quanta_bytes(self, n: int) -> int:
        """Size of n elements from a block's beginning on, without their scales."""

    def encoded_bytes(self, n: int) -> int:
        return self._scales_bytes(n) + self._quanta_bytes(n)

    def _scales_bytes(self, n: int) -> int:
        return _SCALE_BYTES * -(-n // self.block)

    def _blocks(
        self, encoded: np.ndarray, values_N: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Views of (scales_R, quanta_RH, values_RW): of the whole blocks, then of the short one."""
        n = len(values_N)
        split = self._scales_bytes(n)
        scales = encoded[:split].view(np.uint16)
        quanta = encoded[split:]
        whole, rest = divmod(n, self.block)
        cut = self._quanta_bytes(whole * self.block)
        if whole:
            values_RW = values_N[: whole * self.block].reshape(whole, self.block)
            yield scales[:whole], quanta[:cut].reshape(whole, -1), values_RW
        if rest:
            yield scales[whole:], quanta[cut:].reshape(1, -1), values_N[-rest:].reshape(1, rest)

    def _check_scales(self, source: np.ndarray, n: int) -> None:
        scales = source[: self._scales_bytes(n)].view(np.uint16)
        tiny = np.uint16(_TINY_SCALE)
        for start in range(0, len(scales), SEGMENT):
            part = scales[start : start + SEGMENT]
            # Unsigned: what is below `tiny` wraps to above all, as do a sign bit, infinities, NaNs.
            if ((part - tiny > self.largest_scale - _TINY_SCALE) & (part != 0)).any():
                raise ValueError("a scale is negative, not finite, too large or too small")

    def _load_blocks(
        self, source: np.ndarray | Tensor, start: int, stop: int, n: int
    ) -> tuple[Tensor, Tensor, int]:
        """For torch, the elements start .. stop of n: float32 scales_R1, quanta_RH, and W."""
        width = min(self.block, stop - start)
        scales = _load(source, self._scales_bytes(start), self._scales_bytes(stop))
        base = self._scales_bytes(n)
        quanta = _load(source, base + self._quanta_bytes(start), base + self._quanta_bytes(stop))
        scale_R = scales.view(torch.bfloat16).to(torch.float32)
        return scale_R[:, None], quanta.view(len(scale_R), -1), width


class _Quantised(_Scaled):
    """Block-wise small integers, see the module's docstring."""

    block = BLOCK
    bits: int
    encode_kernel: kernels.EncodeBlocks
    decode_kernel: kernels.DecodeBlocks

    @abstractmethod
    def _codes(self, values_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise rows. Returns (R,) bits of max|x|, (R,) int32 bfloat16 scales, (R, W) uint8."""

    @abstractmethod
    def _levels(self, codes_RW: Tensor) -> Tensor:
        """What to multiply by the scale, (R, W) float32."""

    def _quanta_bytes(self, n: int) -> int:
        whole, rest = divmod(n, BLOCK)
        return whole * (BLOCK * self.bits // 8) + -(-rest * self.bits // 8)

    def _encode(self, values_N: np.ndarray, target: np.ndarray) -> int:
        blocks = self._blocks(target, values_N)
        return max(self.encode_kernel(values, scales, quanta) for scales, quanta, values in blocks)

    def _decode(self, source: np.ndarray, out_N: np.ndarray, weight: np.float32, add: bool) -> None:
        self._check(source, len(out_N))
        for scales, quanta, out_RW in self._blocks(source, out_N):
            self.decode_kernel(scales, quanta, out_RW, weight, add)

    def _check(self, source: np.ndarray, n: int) -> None:
        self._check_scales(source, n)
        rest = n % BLOCK
        height = self._quanta_bytes(rest)
        for place in range(rest, height * 8 // self.bits):  # at most seven
            byte, shift = place % height - height, self.bits * (place // height)
            if source[byte] >> shift & ((1 << self.bits) - 1):
                raise ValueError("the padding after the last element is not zero")

    def _write(self, part_N: Tensor, target: np.ndarray | Tensor, start: int, n: int) -> Tensor:
        largest_R, scales_R, codes_RW = self._codes(part_N.view(-1, min(BLOCK, len(part_N))))
        _store(target, self._scales_bytes(start), scales_R.to(torch.int16))
        _store(target, self._scales_bytes(n) + self._quanta_bytes(start), self._packed(codes_RW))
        return largest_R.amax()

    def _read(self, source: np.ndarray | Tensor, start: int, stop: int, n: int) -> Tensor:
        scale_R1, quanta_RH, width = self._load_blocks(source, start, stop, n)
        return self._levels(self._unpacked(quanta_RH, width)).mul_(scale_R1).view(-1)

    def _packed(self, codes_RW: Tensor) -> Tensor:
        """Put the codes of H columns beside those of the next H, (R, H) uint8."""
        height = self._quanta_bytes(codes_RW.shape[1])
        packed_RH = codes_RW[:, :height].contiguous()
        for k in range(1, 8 // self.bits):
            part = codes_RW[:, k * height : (k + 1) * height]
            packed_RH[:, : part.shape[1]] |= part << self.bits * k
        return packed_RH

    def _unpacked(self, packed_RH: Tensor, width: int) -> Tensor:
        """The reverse, (R, W) uint8."""
        if self.bits == 8:
            return packed_RH
        rows, height = packed_RH.shape
        codes_RW = torch.empty(rows, width, dtype=torch.uint8, device=packed_RH.device)
        for k in range(8 // self.bits):
            part = codes_RW[:, k * height : (k + 1) * height]
            torch.bitwise_right_shift(packed_RH[:, : part.shape[1]], self.bits * k, out=part)
        return codes_RW.bitwise_and_((1 << self.bits) - 1)


class _Rounded(_Quantised):
    """int8 and int4: the nearest multiple of the scale."""

    q_max: int
    offset: int
    """Added to q before its lowest bits are kept."""

    def __init__(self) -> None:
        self.largest_scale = int(self._scales(torch.tensor([_MAX_BITS], dtype=torch.int32)))

    def _scales(self, largest_R: Tensor) -> Tensor:
        """Bfloat16 bits of the scales for these float32 bits of max|x|, (R,) int32."""
        # By a tensor of one element: dividing by a Python number may become a multiplication by
        # its reciprocal, which rounds differently.
        divisor = torch.full((1,), float(self.q_max), device=largest_R.device)
        scale_R = largest_R.view(torch.float32) / divisor
        # Rounding up, in integers: the bit pattern of a positive float grows with its value.
        bits_R = (scale_R.view(torch.int32) + 0xFFFF) >> 16
        return bits_R.masked_fill_(bits_R < _TINY_SCALE, 0)

    def _codes(self, values_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest_R = (values_RW.view(torch.int32) & _SIGNLESS).amax(1)
        scales_R = self._scales(largest_R)
        # A block of nearly nothing: divided by 1 it rounds to zeros by itself.
        divisor_R = scales_R.masked_fill(scales_R == 0, _ONE_SCALE).bitwise_left_shift_(16)
        work_RW = values_RW / divisor_R.view(torch.float32)[:, None]
        # Rounds half to even, and leaves the integer in the lowest bits.
        codes_RW = work_RW.add_(1.5 * 2.0**23 + self.offset).view(torch.int32)
        return largest_R, scales_R, codes_RW.bitwise_and_((1 << self.bits) - 1).to(torch.uint8)


class _Int8(_Rounded):
    """Eight bits: error at most 0.4 % of the block's largest magnitude."""

    name = average = "int8"
    bits, q_max, offset = 8, 127, 0
    encode_kernel, decode_kernel = kernels.encode_int8, kernels.decode_int8

    def _levels(self, codes_RW: Tensor) -> Tensor:
        return codes_RW.view(torch.int8).to(torch.float32)


class _Int4(_Rounded):
    """Four bits: error at most 7.3 % of the block's largest magnitude."""

    name = average = "int4"
    bits, q_max, offset = 4, 7, 8
    encode_kernel, decode_kernel = kernels.encode_int4, kernels.decode_int4

    def _levels(self, codes_RW: Tensor) -> Tensor:
        return codes_RW.to(torch.float32).sub_(8.0)


class _Levelled(_Quantised):
    """int2 and int1: a few levels of a scale that follows the mean magnitude."""

    factor: float
    needs_feedback = True

    def _scales(self, values_RW: Tensor) -> Tensor:
        """Bfloat16 bits of the scales, (R,) int32."""
        width = values_RW.shape[1]
        shares_RB = _shares(values_RW, BLOCK)
        return _mean_scales(shares_RB, self.factor, width / BLOCK, self.largest_scale)


class _Int2(_Levelled):
    """Two bits: what is beyond twice the block's mean magnitude is cut off; use error feedback."""

    name = average = "int2"
    bits = 2
    factor = kernels.MEAN_FACTOR
    largest_scale = kernels.INT2_LARGEST_SCALE
    encode_kernel, decode_kernel = kernels.encode_int2, kernels.decode_int2

    def _codes(self, values_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest_R = (values_RW.view(torch.int32) & _SIGNLESS).amax(1)
        scales_R = self._scales(values_RW)
        nothing_R = scales_R == 0
        step_R = scales_R.masked_fill(nothing_R, _ONE_SCALE).bitwise_left_shift_(16)
        step_R1 = step_R.view(torch.float32)[:, None]
        # Without a scale, thresholds between which all elements of such a block lie: +0 for each.
        middle_R1 = -nothing_R.to(torch.float32)[:, None]
        codes_RW = (values_RW >= -step_R1).view(torch.uint8)
        codes_RW += (values_RW >= middle_R1).view(torch.uint8)
        codes_RW += (values_RW >= step_R1).view(torch.uint8)
        return largest_R, scales_R, codes_RW

    def _levels(self, codes_RW: Tensor) -> Tensor:
        return codes_RW.to(torch.float32).sub_(1.5)


class _Int1(_Levelled):
    """One bit: the sign, and nothing of an element's magnitude; use error feedback."""

    name, average = "int1", "int2"
    bits = 1
    factor = 1.0
    largest_scale = kernels.INT1_LARGEST_SCALE
    encode_kernel, decode_kernel = kernels.encode_int1, kernels.decode_int1

    def _codes(self, values_RW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest_R = (values_RW.view(torch.int32) & _SIGNLESS).amax(1)
        scales_R = self._scales(values_RW)
        middle_R1 = -(scales_R == 0).to(torch.float32)[:, None]
        return largest_R, scales_R, (values_RW >= middle_R1).view(torch.uint8)

    def _levels(self, codes_RW: Tensor) -> Tensor:
        return codes_RW.to(torch.float32).mul_(2.0).sub_(1.0)


class _Top(_Scaled):
    """The largest of each page, by their index and in two bits; use error feedback."""

    block = PAGE
    sparse = needs_feedback = True
    average = "top128"
    largest_scale = kernels.INT2_LARGEST_SCALE

    def __init__(self, low: int) -> None:
        self._low = low
        """Bits of an index that are written as they are: one in 2^low elements is sent."""
        self._slots = PAGE >> low
        self.name = f"top{self._slots}"

    def _quanta_bytes(self, n: int) -> int:
        whole, rest = divmod(n, PAGE)
        return whole * self._page_bytes(PAGE) + self._page_bytes(rest)

    def _page_bytes(self, width: int) -> int:
        return kernels.page_layout(width, self._low)[-1]

    def _encode(self, values_N: np.ndarray, target: np.ndarray) -> int:
        return max(
            kernels.encode_top(values, scales, pages, self._low)
            for scales, pages, values in self._blocks(target, values_N)
        )

    def _check(self, source: np.ndarray, n: int) -> None:
        self._check_scales(source, n)
        if not kernels.compiled():
            for start, stop in _segments(n, PAGE):
                _, pages_RH, width = self._load_blocks(source, start, stop, n)
                self._refuse(not self._sound(*self._unpacked(pages_RH, width), width))
            return
        split = self._scales_bytes(n)
        cut = split + n // PAGE * self._page_bytes(PAGE)
        for pages, width in ((source[split:cut], PAGE), (source[cut:], n % PAGE)):
            if len(pages):
                rows_RH = pages.reshape(-1, self._page_bytes(width))
                self._refuse(kernels.check_top(rows_RH, self._low, width))

    @staticmethod
    def _refuse(malformed: int) -> None:
        if malformed:
            raise ValueError("indices do not ascend within their page, or padding is not zero")

    def _decode(self, source: np.ndarray, out_N: np.ndarray, weight: np.float32, add: bool) -> None:
        self._check_scales(source, len(out_N))
        for scales, pages, out_RW in self._blocks(source, out_N):
            self._refuse(kernels.decode_top(scales, pages, out_RW, weight, add, self._low))

    def decode_add_sent(
        self, payload: Buffer, n: int, weight: float, into_N: Tensor, sent_N: Tensor
    ) -> None:
        source = self._bytes(payload, n)
        into_N, sent_N = (_checked_output(each_N, n, weight) for each_N in (into_N, sent_N))
        if into_N.device != sent_N.device:
            raise ValueError(f"the outputs are on {into_N.device} and on {sent_N.device}")
        if n == 0:
            return
        if kernels.compiled() and not into_N.is_cuda:
            self._check_scales(source, n)
            both = (self._blocks(source, each_N.numpy()) for each_N in (into_N, sent_N))
            for (scales, pages, into_RW), (_, _, sent_RW) in zip(*both, strict=True):
                rounded = np.float32(weight)
                self._refuse(
                    kernels.add_sent_top(scales, pages, into_RW, sent_RW, rounded, self._low)
                )
            return
        for start, stop, bytes_B in self._to_read(source, n, into_N):
            scale_R1, places_RC, values_RC = self._sent(bytes_B, start, stop, n)
            weighed_RC = values_RC.mul_(weight)
            weights_RC = torch.full_like(weighed_RC, weight)
            for each_N, more_RC in ((into_N, weighed_RC), (sent_N, weights_RC)):
                rows_RW = each_N[start:stop].view(len(places_RC), -1)
                before_RC = rows_RW.gather(1, places_RC)
                after_RC = torch.where(scale_R1 == 0, before_RC, before_RC + more_RC)
                rows_RW.scatter_(1, places_RC, after_RC)

    def _write(self, part_N: Tensor, target: np.ndarray | Tensor, start: int, n: int) -> Tensor:
        values_RW = part_N.view(-1, min(PAGE, len(part_N)))
        width = values_RW.shape[1]
        count = kernels.page_layout(width, self._low)[0]
        magnitudes_RW = values_RW.view(torch.int32) & _SIGNLESS
        # Unique keys, so that which of the equal ones are largest is not the processor's choice.
        behind_W = torch.arange(PAGE - 1, PAGE - 1 - width, -1, device=part_N.device)
        keys_RC = ((magnitudes_RW.to(torch.int64) << 12) | behind_W).topk(count, 1).values
        places_RC = (PAGE - 1 - (keys_RC & (PAGE - 1))).sort(1).values
        values_RC = values_RW.gather(1, places_RC)
        shares_RS = _shares(values_RC, self._slots)
        scales_R = _mean_scales(shares_RS, 1.0, count / self._slots, self.largest_scale)
        nothing_R = scales_R == 0
        step_R = scales_R.masked_fill(nothing_R, _ONE_SCALE).bitwise_left_shift_(16)
        # 1.25 has three bits and the scale eight: exact. Without a scale as in int2.
        step_R1 = step_R.view(torch.float32)[:, None] * 1.25
        middle_R1 = -nothing_R.to(torch.float32)[:, None]
        codes_RC = (values_RC >= -step_R1).view(torch.uint8)
        codes_RC += (values_RC >= middle_R1).view(torch.uint8)
        codes_RC += (values_RC >= step_R1).view(torch.uint8)
        high_R2C = torch.zeros(len(places_RC), 2 * count, dtype=torch.uint8, device=part_N.device)
        order_C = torch.arange(count, device=part_N.device)
        high_R2C.scatter_(1, (places_RC >> self._low) + order_C, 1)
        pages_RH = torch.cat(
            [
                _bytes_of(_bits_of(places_RC, self._low)),
                _bytes_of(high_R2C),
                _bytes_of(_bits_of(codes_RC, 2)),
            ],
            dim=1,
        )
        _store(target, self._scales_bytes(start), scales_R.to(torch.int16))
        _store(target, self._scales_bytes(n) + self._quanta_bytes(start), pages_RH)
        return magnitudes_RW.amax()

    def _unpacked(self, pages_RH: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices, (R, C) int64; codes, (R, C) uint8; and what of each page must be zero.

        The indices of a page that is not sound are any numbers, the last of them may be too large.
        """
        count, high, codes, _ = kernels.page_layout(width, self._low)
        low_RB, high_RB, code_RB = (
            _bits_of(part_RH, 8)
            for part_RH in (pages_RH[:, :high], pages_RH[:, high:codes], pages_RH[:, codes:])
        )
        ends = (count * self._low, 2 * count, 2 * count)
        strings = (low_RB, high_RB, code_RB)
        padding = [bits_RB[:, end:] for bits_RB, end in zip(strings, ends, strict=True)]
        ones_R1 = high_RB[:, : 2 * count].sum(1, keepdim=True)
        padding_RB = torch.cat([*padding, (ones_R1 != count).view(torch.uint8)], dim=1)
        # Where the ones are, ascending; those that are missing are at the end.
        bit_B = torch.arange(2 * count, device=pages_RH.device)
        ones_RB = torch.where(high_RB[:, : 2 * count] == 1, bit_B, 2 * count).sort(1).values
        buckets_RC = ones_RB[:, :count] - bit_B[:count]
        lows_RC = _numbers_of(low_RB[:, : ends[0]], self._low)
        codes_RC = _numbers_of(code_RB[:, : ends[2]], 2)
        return (buckets_RC << self._low) | lows_RC, codes_RC, padding_RB

    @staticmethod
    def _sound(places_RC: Tensor, codes_RC: Tensor, padding_RB: Tensor, width: int) -> bool:
        ascending = (places_RC[:, 1:] > places_RC[:, :-1]).all()
        return bool(ascending & (places_RC < width).all() & ~padding_RB.any())

    def _sent(
        self, source: np.ndarray | Tensor, start: int, stop: int, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales, (R, 1); indices within each page, (R, C); and what was sent there, (R, C)."""
        scale_R1, pages_RH, width = self._load_blocks(source, start, stop, n)
        places_RC, codes_RC, _ = self._unpacked(pages_RH, width)
        above_RC = codes_RC.to(torch.float32).sub_(1.5)  # -1.5, -0.5, 0.5, 1.5
        levels_RC = above_RC.sign() * (above_RC.abs() * 0.5 + 0.75)
        return scale_R1, places_RC, levels_RC.mul_(scale_R1)

    def _read(self, source: np.ndarray | Tensor, start: int, stop: int, n: int) -> Tensor:
        _, places_RC, values_RC = self._sent(source, start, stop, n)
        part_RW = values_RC.new_zeros(len(places_RC), min(PAGE, stop - start))
        return part_RW.scatter_(1, places_RC, values_RC).view(-1)

    def _merge(
        self,
        source: np.ndarray | Tensor,
        start: int,
        stop: int,
        n: int,
        out_N: Tensor,
        weight: float,
        add: bool,
    ) -> None:
        # What was not sent is left alone, or +0: not changed by what is added, or the sign of it.
        _, places_RC, values_RC = self._sent(source, start, stop, n)
        rows_RW = out_N.view(len(places_RC), -1)
        values_RC.mul_(weight)
        if add:
            values_RC = rows_RW.gather(1, places_RC).add_(values_RC)
        else:
            rows_RW.zero_()
        rows_RW.scatter_(1, places_RC, values_RC)


def _bits_of(numbers_RC: Tensor, width: int) -> Tensor:
    """The `width` lowest bits of each, lowest first, one after the other, (R, C * width) uint8."""
    shift_B = torch.arange(width, dtype=numbers_RC.dtype, device=numbers_RC.device)
    bits_RCB = (numbers_RC[:, :, None] >> shift_B) & 1
    return bits_RCB.to(torch.uint8).flatten(1)


def _numbers_of(bits_RB: Tensor, width: int) -> Tensor:
    """The reverse, (R, C) uint8: at most 8 bits each."""
    shift_B = torch.arange(width, dtype=torch.uint8, device=bits_RB.device)
    bits_RCB = bits_RB.view(len(bits_RB), -1, width)
    return (bits_RCB << shift_B).sum(2, dtype=torch.uint8)


def _bytes_of(bits_RB: Tensor) -> Tensor:
    """Bits as bytes, zeros after the last, (R, H) uint8."""
    return _numbers_of(torch.nn.functional.pad(bits_RB, (0, -bits_RB.shape[1] % 8)), 8)


def mean_of_sent(into_N: Tensor, sent_N: Tensor) -> None:
    """Divide sums by the weights of those who sent something: `into /= sent`, and 0 where none did.

    Args:
        into_N: (n,) float32, contiguous, on the CPU or a CUDA device: what `decode_add_sent` added
            up. Changed in place, each element by one correctly rounded division.
        sent_N: the same, on the same device, in other memory: the sums of the weights.

    Raises:
        ValueError: a mistake in the arguments.
    """
    into_N, sent_N = _checked_vector(into_N, "sums"), _checked_vector(sent_N, "weights")
    if len(into_N) != len(sent_N) or into_N.device != sent_N.device:
        raise ValueError(f"{len(into_N)} sums, and {len(sent_N)} weights of what was sent")
    if kernels.compiled() and not into_N.is_cuda:
        kernels.divide_by_sent(into_N.numpy(), sent_N.numpy())
        return
    for start, stop in _segments(len(into_N), 1, into_N.is_cuda):
        part_N = sent_N[start:stop]
        quotient_N = into_N[start:stop] / part_N
        into_N[start:stop].copy_(quotient_N.masked_fill_(~(part_N > 0), 0.0))


def _shares(values_RB: Tensor, count: int) -> Tensor:
    """What each element adds to a mean of `count`, (R, count): zeros where rows are shorter."""
    rows, width = values_RB.shape
    shares_RC = values_RB.new_zeros(rows, count)
    shrunk_RW = torch.nn.functional.hardshrink(values_RB, kernels.MEAN_FLOOR)
    torch.abs(shrunk_RW, out=shares_RC[:, :width]).mul_(1 / count)
    return shares_RC


def _mean_scales(shares_RC: Tensor, factor: float, filled: float, largest: int) -> Tensor:
    """Bfloat16 bits of the shares' sum, times a factor, over the filled part of it, (R,) int32."""
    half = shares_RC.shape[1] // 2
    while half:
        shares_RC = shares_RC[:, :half] + shares_RC[:, half:]
        half //= 2
    divisor = torch.full((1,), filled, device=shares_RC.device)
    exact_R = (shares_RC[:, 0] * factor / divisor).view(torch.int32)
    bits_R = (exact_R + 0x7FFF + ((exact_R >> 16) & 1)) >> 16
    bits_R.clamp_(max=largest)
    return bits_R.masked_fill_(bits_R < _TINY_SCALE, 0)


def _segments(n: int, block: int, on_device: bool = False) -> Iterator[tuple[int, int]]:
    """Cut 0..n into (start, stop), each of whole blocks, but for a last rest."""
    step = DEVICE_SEGMENT if on_device else SEGMENT
    whole = n - n % block
    for start in range(0, whole, step):
        yield start, min(start + step, whole)
    if whole < n:
        yield whole, n


def _largest(part_N: Tensor) -> Tensor:
    """Bits of the largest |x|: as integers, so that a NaN is the largest of all."""
    return (part_N.view(torch.int32) & _SIGNLESS).amax()


def _load(source: np.ndarray | Tensor, start: int, stop: int) -> Tensor:
    """Bytes start .. stop, aligned and writable: a network message is neither, and torch minds."""
    if isinstance(source, Tensor):
        return source[start:stop].clone()
    return torch.from_numpy(source[start:stop].copy())


def _store(target: np.ndarray | Tensor, start: int, part: Tensor) -> None:
    """Write a contiguous tensor's bytes from byte `start`, which is of any alignment."""
    bytes_B = part.view(-1).view(torch.uint8)
    if isinstance(target, Tensor):
        target[start : start + len(bytes_B)].copy_(bytes_B)
    else:
        np.copyto(target[start : start + len(bytes_B)], bytes_B.numpy())


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where copies run, so that they neither wait for later work nor hold it up."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _upload(source: np.ndarray, device: torch.device) -> Tensor:
    """Bring bytes to a GPU; its current stream waits for them, this thread does not."""
    with torch.cuda.device(device):
        staged_B = _pinned(len(source))
        np.copyto(staged_B.numpy(), source)
        side, current = _side_stream(device), torch.cuda.current_stream()
        with torch.cuda.stream(side):
            # The allocator keeps pinned memory until the copy is over.
            landed_B = staged_B.to(device, non_blocking=True)
        current.wait_stream(side)
        landed_B.record_stream(current)
        return landed_B


_SPARSE: Final[dict[str, SparseCodec]] = {each.name: each for each in (_Top(6), _Top(5))}

_DENSE: Final = (_Fp32(), _Bf16(), _Int8(), _Int4(), _Int2(), _Int1())
_CODECS: Final[dict[str, Codec]] = {**{each.name: each for each in _DENSE}, **_SPARSE}


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


def sparse_codec(name: str) -> SparseCodec | None:
    """The codec that a run file names, if it is a sparse one; None if it is dense.

    Raises:
        ConfigError: nobody knows it.
    """
    codec(name)
    return _SPARSE.get(name)


def prepare(name: str) -> None:
    """Compile what a codec needs, or load it: up to some seconds, better before the first round.

    For a worker thread. Without a call, the first use of each operation pays.
    """
    each = codec(name)
    payload = each.encode(torch.zeros(BLOCK))
    each.validate(payload, BLOCK)
    each.decode_add(payload, BLOCK, 1.0, torch.zeros(BLOCK))
    sparse = sparse_codec(name)
    if sparse is not None:
        into_N, sent_N = torch.zeros(2, BLOCK)
        sparse.decode_add_sent(payload, BLOCK, 1.0, into_N, sent_N)
        mean_of_sent(into_N, sent_N)
