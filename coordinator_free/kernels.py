"""The arithmetic of the codecs and of the outer step, compiled by numba for this processor.

One pass over the memory and no temporaries, which torch cannot do: three to thirty times as fast
(`benchmarks/codecs.py`). Where numba cannot be imported, `compiled` says so and the callers run the
same arithmetic in torch, slower, to the same bit; the tests run both.

Guarantees.
- Every float operation below is one correctly rounded IEEE-754 float32 operation, in the order
  that is written: fastmath is off, without which LLVM neither fuses a multiply with an add nor
  reorders a sum. Maxima are of integers: the bit pattern of a non-negative float grows with its
  value, and those of infinities and NaNs lie above all numbers.
- No kernel reads or writes outside its arrays, whatever bytes they hold: each index is bounded by a
  shape, or compared with one before it is used (`_places`: what a peer says it sent). Shapes are
  the callers' business: they check lengths first, and no kernel checks them again.
- Any alignment, read-only inputs, and the GIL is released throughout. Kernels hold no state.

A kernel is compiled when it is first called, or loaded from numba's cache on disk (`__pycache__`
beside this file, else the user's cache folder, else nowhere): about half a second, or some
milliseconds. Importing this module imports no numba. Signatures are explicit because numba would
otherwise compile a kernel once for every mixture of alignment and writability.

In the shapes, R rows are the blocks that share a scale, W elements wide, H bytes when encoded; of a
sparse codec's, C elements are sent.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, ParamSpec

import numpy as np

P = ParamSpec("P")

TINY: Final = 2.0**-120
"""A bf16 element not above this, and a quantisation scale below it, are sent as zero."""

MEAN_FLOOR: Final = 2.0**-110
"""An element not above this does not count in a mean: over 256 it must stay normal."""

MEAN_FACTOR: Final = 1.5
"""int2's step per mean |x|. For one Gaussian block by itself 1.248 is best (Max 1960,
doi:10.1109/TIT.1960.1057548). With error feedback what is cut off comes back, and makes the tails
longer: a larger step keeps less of it (of a Gaussian of which four fifths stay the same from round
to round 0.73 instead of 1.05 deviations), and ours learnt more with it (benchmarks/README.md)."""

INT1_LARGEST_SCALE: Final = 0x7F00
"""Bits, as bfloat16, of 2^127."""

INT2_LARGEST_SCALE: Final = 0x7EAA
"""Bits, as bfloat16, of the largest scale of which 1.5 is at most 2^127."""

MAGNITUDE: Final = 0x7FFF_FFFF
_TINY: Final = np.float32(TINY)
_TINY_BITS: Final = int(_TINY.view(np.int32))
_FLOOR: Final = np.float32(MEAN_FLOOR)
_FACTOR: Final = np.float32(MEAN_FACTOR)
_PER_256: Final = np.float32(2.0**-8)
_ROUND: Final = np.float32(1.5 * 2.0**23)
"""Added to a float32 below 2^22, it leaves that one, rounded half to even, in the lowest bits."""
_ROUND_8: Final = np.float32(1.5 * 2.0**23 + 8)
_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_ONE_AND_QUARTER: Final = np.float32(1.25)
_ONE_AND_HALF: Final = np.float32(1.5)
_SEVEN: Final = np.float32(7.0)
_EIGHT: Final = np.float32(8.0)
_127: Final = np.float32(127.0)

_lock = threading.RLock()
_loaded = False
_module: Any = None
_torch_only = False


def _numba() -> Any:
    """The module, or None where it does not load: not installed, or another numpy than it knows."""
    global _loaded, _module
    with _lock:
        if not _loaded:
            with contextlib.suppress(ImportError, OSError):
                numba = importlib.import_module("numba")
                extending = importlib.import_module("numba.extending")
                if not numba.config.DISABLE_JIT:  # somebody debugs: torch is faster than Python
                    for helper in _HELPERS:
                        extending.register_jitable(helper)
                    _module = numba
            _loaded = True
    return _module


def compiled() -> bool:
    """Whether kernels can be used; if not, callers take their torch path."""
    return not _torch_only and (_module is not None or _numba() is not None)


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Pretend that numba is missing, in all threads: for tests and for benchmarks."""
    global _torch_only
    before, _torch_only = _torch_only, True
    try:
        yield
    finally:
        _torch_only = before


class Kernel(Generic[P]):
    """A function that is compiled when first called. Any thread may be the first."""

    def __init__(self, body: Callable[P, int], arguments: tuple[str, ...]) -> None:
        functools.update_wrapper(self, body)
        self._body = body
        self._arguments = arguments
        self._run: Callable[P, int] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Run it. Arguments are those of the body, of exactly the dtypes and ranks declared."""
        run = self._run or self.compile()
        return run(*args, **kwargs)

    def compile(self) -> Callable[P, int]:
        """Load it from the disk or compile it, which takes half a second."""
        with _lock:
            if self._run is None:
                numba = _numba()
                signature = tuple(_type(numba.types, name) for name in self._arguments)
                options = {"nogil": True, "error_model": "numpy"}
                try:
                    self._run = numba.njit(signature, cache=True, **options)(self._body)
                except (RuntimeError, OSError, EOFError, pickle.UnpicklingError):
                    # Nowhere to write; a full disk; files cut short when the power failed.
                    self._run = numba.njit(signature, cache=False, **options)(self._body)
            assert self._run is not None
            return self._run


EncodeBlocks = Kernel[np.ndarray, np.ndarray, np.ndarray]
DecodeBlocks = Kernel[np.ndarray, np.ndarray, np.ndarray, np.float32, bool]


def page_layout(width: int, low: int) -> tuple[int, int, int, int]:
    """How a page of a sparse codec is laid out, see the docstring of `codecs`.

    Args:
        width: elements of the page.
        low: bits of an index that are written as they are.

    Returns:
        The elements that are sent, and the bytes at which the high parts of their indices begin,
        their codes, and the next page.
    """
    count = (width + (1 << low) - 1) >> low
    high = (count * low + 7) >> 3
    codes = high + ((2 * count + 7) >> 3)
    return count, high, codes, codes + ((2 * count + 7) >> 3)


def _type(types: Any, name: str) -> Any:
    """`float32` is a scalar; `float32[:,:]` an array that may be read only, with `!` a written."""
    writable = name.endswith("!")
    scalar, bracket, dims = name.rstrip("!").partition("[")
    if not bracket:
        return getattr(types, scalar)
    rank = dims.count(":")
    # aligned=False: loads of one element's alignment would be undefined inside a network message.
    return types.Array(getattr(types, scalar), rank, "C", readonly=not writable, aligned=False)


def kernel(*arguments: str) -> Callable[[Callable[P, int]], Kernel[P]]:
    """Declare the types of a kernel's arguments, see `_type`."""
    return lambda body: Kernel(body, arguments)


# What follows is compiled: numba's subset of Python, in which integers widen to 64 bits unless they
# are narrowed, and 64-bit lanes are half as many. Hence the casts.


def bits_of(x: Any) -> Any:
    """The bit pattern of a float32."""
    return np.float32(x).view(np.int32)


def _real(bits: Any) -> Any:
    """The float32 of a bit pattern."""
    return np.int32(bits).view(np.float32)


def _scale_bits(largest: Any, q_max: Any) -> Any:
    """The bfloat16 scale of a block, rounded up; 0 if tiny. `largest` is its max|x|, as bits."""
    bits = np.int32(bits_of(_real(largest) / q_max) + 0xFFFF) >> 16
    return 0 if _real(bits << 16) < _TINY else bits


def _shrunk(x: Any) -> Any:
    """What an element adds to a block's mean: |x| / 256, or 0 where that might be subnormal."""
    magnitude = abs(x)
    return magnitude * _PER_256 if magnitude > _FLOOR else _ZERO


def _mean(values_RW: Any, r: Any, sums: Any) -> Any:
    """The sum of a block's |x| / 256, by halves: see the docstring of `codecs`."""
    width = values_RW.shape[1]
    if width == 256:
        for i in range(128):
            sums[i] = _shrunk(values_RW[r, i]) + _shrunk(values_RW[r, np.uintp(i + 128)])
    else:
        for i in range(128):
            low = _shrunk(values_RW[r, i]) if i < width else _ZERO
            high = _shrunk(values_RW[r, np.uintp(i + 128)]) if i + 128 < width else _ZERO
            sums[i] = low + high
    for half in (64, 32, 16, 8, 4, 2, 1):
        for i in range(half):
            sums[i] += sums[i + half]
    return sums[0]


def _mean_scale_bits(scale: Any, largest: Any) -> Any:
    """The bfloat16 that is nearest to a scale, at most `largest`; 0 if tiny."""
    exact = bits_of(scale)
    bits: Any = np.int32(exact + 0x7FFF + ((exact >> 16) & 1)) >> 16
    bits = min(bits, largest)
    return 0 if _real(bits << 16) < _TINY else bits


def _threshold(magnitudes_W: Any, largest: Any, count: Any) -> Any:
    """The `count`th largest of some bit patterns, and how many are larger than it.

    Halving the range that it lies in, with a count of all in each step, is quicker than to sort or
    to make a histogram: in a loop without branches, 4096 take as long as a hundred swaps.
    """
    lower, upper, beyond = np.int64(0), np.int64(largest) + 1, np.int64(0)
    while upper - lower > 1:
        middle = np.int32((lower + upper) >> 1)
        found = np.int32(0)
        for i in range(len(magnitudes_W)):
            found += np.int32(magnitudes_W[i] >= middle)
        if found >= count:
            lower = np.int64(middle)
        else:
            upper, beyond = np.int64(middle), np.int64(found)
    return lower, beyond


def _places(pages_RH: Any, r: Any, low: Any, width: Any, places_C: Any) -> Any:
    """Read the indices of a page. False if they do not ascend within the page, or are not C."""
    count, high, codes, end = page_layout(width, low)
    found, bucket, before = 0, 0, -1
    for bit in range(2 * count):
        if (pages_RH[r, high + (bit >> 3)] >> (bit & 7)) & 1:
            if found == count:
                return False
            # Two bytes hold any index's low bits; behind the last ones is another part.
            first = found * low
            pair = np.int64(pages_RH[r, first >> 3]) | np.int64(pages_RH[r, (first >> 3) + 1]) << 8
            place = bucket << low | (pair >> (first & 7)) & ((1 << low) - 1)
            if place <= before or place >= width:
                return False
            places_C[found] = place
            before = place
            found += 1
        else:
            bucket += 1
    if (count * low) & 7 and pages_RH[r, high - 1] >> ((count * low) & 7):
        return False
    if (2 * count) & 7:
        padding = pages_RH[r, codes - 1] >> ((2 * count) & 7)
        padding |= pages_RH[r, end - 1] >> ((2 * count) & 7)
        if padding:
            return False
    return found == count


def _top_value(pages_RH: Any, r: Any, codes: Any, i: Any, scale: Any) -> Any:
    """What the ith sent element of a page decodes to; exact."""
    code = (pages_RH[r, codes + (i >> 2)] >> (2 * (i & 3))) & 3
    value = scale if code == 1 or code == 2 else _ONE_AND_HALF * scale
    return value if code > 1 else -value


_HELPERS: Final = (
    *(bits_of, _real, _scale_bits, _shrunk, _mean, _mean_scale_bits),
    *(page_layout, _threshold, _places, _top_value),
)


@kernel("float32[:]")
def largest_fp32(values_N: Any) -> Any:
    """Bits of the largest |x|."""
    largest = np.int32(0)
    for i in range(len(values_N)):
        magnitude = np.int32(bits_of(values_N[i]) & MAGNITUDE)
        if magnitude > largest:
            largest = magnitude
    return largest


@kernel("float32[:]", "float32[:]!", "float32", "boolean")
def decode_fp32(source_N: Any, out_N: Any, weight: Any, add: Any) -> Any:
    """Weigh, then write or add; returns the bits of the largest |x| read."""
    largest = np.int32(0)
    if add:
        for i in range(len(out_N)):
            magnitude = np.int32(bits_of(source_N[i]) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
            out_N[i] += source_N[i] * weight
    else:
        for i in range(len(out_N)):
            magnitude = np.int32(bits_of(source_N[i]) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
            out_N[i] = source_N[i] * weight
    return largest


@kernel("float32[:]", "uint16[:]!")
def encode_bf16(values_N: Any, out_N: Any) -> Any:
    """Round half to even; returns the bits of the largest |x|."""
    largest = np.int32(0)
    for i in range(len(values_N)):
        bits = bits_of(values_N[i])
        magnitude = np.int32(bits & MAGNITUDE)
        if magnitude > largest:
            largest = magnitude
        rounded = np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        out_N[i] = np.uint16(rounded) if magnitude > _TINY_BITS else np.uint16(0)
    return largest


@kernel("uint16[:]")
def largest_bf16(source_N: Any) -> Any:
    """Bits, as a float32, of the largest |x|."""
    largest = np.int32(0)
    for i in range(len(source_N)):
        magnitude = np.int32(source_N[i] & 0x7FFF)
        if magnitude > largest:
            largest = magnitude
    return np.int32(largest << 16)


@kernel("uint16[:]", "float32[:]!", "float32", "boolean")
def decode_bf16(source_N: Any, out_N: Any, weight: Any, add: Any) -> Any:
    """Weigh, then write or add; returns the bits, as a float32, of the largest |x| read."""
    largest = np.int32(0)
    if add:
        for i in range(len(out_N)):
            magnitude = np.int32(source_N[i] & 0x7FFF)
            if magnitude > largest:
                largest = magnitude
            out_N[i] += _real(np.int32(source_N[i]) << 16) * weight
    else:
        for i in range(len(out_N)):
            magnitude = np.int32(source_N[i] & 0x7FFF)
            if magnitude > largest:
                largest = magnitude
            out_N[i] = _real(np.int32(source_N[i]) << 16) * weight
    return np.int32(largest << 16)


@kernel("float32[:,:]", "uint16[:]!", "uint8[:,:]!")
def encode_int8(values_RW: Any, scales_R: Any, quanta_RH: Any) -> Any:
    """Returns the bits of the largest |x|; above what the codec carries, the output is garbage."""
    wildest = np.int32(0)
    rows, width = values_RW.shape
    for r in range(rows):
        largest = np.int32(0)
        for i in range(width):
            magnitude = np.int32(bits_of(values_RW[r, i]) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
        if largest > wildest:
            wildest = largest
        bits = _scale_bits(largest, _127)
        scales_R[r] = np.uint16(bits)
        scale = _real(bits << 16) if bits > 0 else _ONE
        for i in range(width):
            quanta_RH[r, i] = np.uint8(bits_of(values_RW[r, i] / scale + _ROUND))
    return wildest


@kernel("uint16[:]", "uint8[:,:]", "float32[:,:]!", "float32", "boolean")
def decode_int8(scales_R: Any, quanta_RH: Any, out_RW: Any, weight: Any, add: Any) -> Any:
    """Weigh, then write or add. Scales have been checked."""
    rows, width = out_RW.shape
    for r in range(rows):
        scale = _real(np.int32(scales_R[r]) << 16)
        if add:
            for i in range(width):
                out_RW[r, i] += np.float32(np.int8(quanta_RH[r, i])) * scale * weight
        else:
            for i in range(width):
                out_RW[r, i] = np.float32(np.int8(quanta_RH[r, i])) * scale * weight
    return 0


@kernel("float32[:,:]", "uint16[:]!", "uint8[:,:]!")
def encode_int4(values_RW: Any, scales_R: Any, quanta_RH: Any) -> Any:
    """Returns the bits of the largest |x|; above what the codec carries, the output is garbage."""
    wildest = np.int32(0)
    rows, width = values_RW.shape
    half = quanta_RH.shape[1]
    for r in range(rows):
        largest = np.int32(0)
        for i in range(width):
            magnitude = np.int32(bits_of(values_RW[r, i]) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
        if largest > wildest:
            wildest = largest
        bits = _scale_bits(largest, _SEVEN)
        scales_R[r] = np.uint16(bits)
        scale = _real(bits << 16) if bits > 0 else _ONE
        for i in range(width - half):
            low = bits_of(values_RW[r, i] / scale + _ROUND_8) & 15
            high = bits_of(values_RW[r, np.uintp(i + half)] / scale + _ROUND_8) & 15
            quanta_RH[r, i] = np.uint8(low | high << 4)
        if half + half != width:
            last = bits_of(values_RW[r, half - 1] / scale + _ROUND_8) & 15
            quanta_RH[r, half - 1] = np.uint8(last)
    return wildest


@kernel("uint16[:]", "uint8[:,:]", "float32[:,:]!", "float32", "boolean")
def decode_int4(scales_R: Any, quanta_RH: Any, out_RW: Any, weight: Any, add: Any) -> Any:
    """Weigh, then write or add. Scales have been checked."""
    rows, width = out_RW.shape
    half = quanta_RH.shape[1]
    for r in range(rows):
        scale = _real(np.int32(scales_R[r]) << 16)
        for k in range(2):
            first = k * half
            for i in range(min(half, width - first)):
                code = np.int32((quanta_RH[r, i] >> 4 * k) & 15)
                value = (np.float32(code) - _EIGHT) * scale * weight
                if add:
                    out_RW[r, np.uintp(first + i)] += value
                else:
                    out_RW[r, np.uintp(first + i)] = value
    return 0


@kernel("float32[:,:]", "uint16[:]!", "uint8[:,:]!")
def encode_int2(values_RW: Any, scales_R: Any, quanta_RH: Any) -> Any:
    """Returns the bits of the largest |x|; above what the codec carries, the output is garbage."""
    wildest = np.int32(0)
    rows, width = values_RW.shape
    quarter = quanta_RH.shape[1]
    sums = np.empty(128, np.float32)
    for r in range(rows):
        for i in range(width):
            magnitude = np.int32(bits_of(values_RW[r, i]) & MAGNITUDE)
            if magnitude > wildest:
                wildest = magnitude
        mean = _mean(values_RW, r, sums) * _FACTOR / (np.float32(width) * _PER_256)
        bits = _mean_scale_bits(mean, INT2_LARGEST_SCALE)
        scales_R[r] = np.uint16(bits)
        # Without a scale, thresholds between which all elements of such a block lie: +0 for each.
        step = _real(bits << 16) if bits > 0 else _ONE
        middle = _ZERO if bits > 0 else -_ONE
        for i in range(quarter):
            quanta_RH[r, i] = np.uint8(0)
        for k in range(4):
            first = k * quarter
            for i in range(max(0, min(quarter, width - first))):
                x = values_RW[r, np.uintp(first + i)]
                code = np.int32(x >= -step) + np.int32(x >= middle) + np.int32(x >= step)
                quanta_RH[r, i] |= np.uint8(code << 2 * k)
    return wildest


@kernel("uint16[:]", "uint8[:,:]", "float32[:,:]!", "float32", "boolean")
def decode_int2(scales_R: Any, quanta_RH: Any, out_RW: Any, weight: Any, add: Any) -> Any:
    """Weigh, then write or add. Scales have been checked."""
    rows, width = out_RW.shape
    quarter = quanta_RH.shape[1]
    for r in range(rows):
        scale = _real(np.int32(scales_R[r]) << 16)
        for k in range(4):
            first = k * quarter
            for i in range(max(0, min(quarter, width - first))):
                code = np.int32((quanta_RH[r, i] >> 2 * k) & 3)
                value = (np.float32(code) - _ONE_AND_HALF) * scale * weight
                if add:
                    out_RW[r, np.uintp(first + i)] += value
                else:
                    out_RW[r, np.uintp(first + i)] = value
    return 0


@kernel("float32[:,:]", "uint16[:]!", "uint8[:,:]!")
def encode_int1(values_RW: Any, scales_R: Any, quanta_RH: Any) -> Any:
    """Returns the bits of the largest |x|; above what the codec carries, the output is garbage."""
    wildest = np.int32(0)
    rows, width = values_RW.shape
    eighth = quanta_RH.shape[1]
    sums = np.empty(128, np.float32)
    for r in range(rows):
        for i in range(width):
            magnitude = np.int32(bits_of(values_RW[r, i]) & MAGNITUDE)
            if magnitude > wildest:
                wildest = magnitude
        mean = _mean(values_RW, r, sums) / (np.float32(width) * _PER_256)
        bits = _mean_scale_bits(mean, INT1_LARGEST_SCALE)
        scales_R[r] = np.uint16(bits)
        # Without a scale, a threshold below which no element of such a block lies: +0 for each.
        middle = _ZERO if bits > 0 else -_ONE
        if width == 256:
            # All bits of a byte at once: narrowing to bytes is what costs.
            for i in range(32):
                code = np.int32(0)
                for k in range(8):
                    bit = np.int32(values_RW[r, np.uintp(i + 32 * k)] >= middle)
                    code = np.int32(code | np.int32(bit << k))
                quanta_RH[r, i] = np.uint8(code)
            continue
        for i in range(eighth):
            quanta_RH[r, i] = np.uint8(0)
        for k in range(8):
            first = k * eighth
            for i in range(max(0, min(eighth, width - first))):
                code = np.int32(values_RW[r, np.uintp(first + i)] >= middle)
                quanta_RH[r, i] |= np.uint8(code << k)
    return wildest


@kernel("uint16[:]", "uint8[:,:]", "float32[:,:]!", "float32", "boolean")
def decode_int1(scales_R: Any, quanta_RH: Any, out_RW: Any, weight: Any, add: Any) -> Any:
    """Weigh, then write or add. Scales have been checked."""
    rows, width = out_RW.shape
    eighth = quanta_RH.shape[1]
    for r in range(rows):
        # Both levels once for the block: scale times weight rounds alike for either sign.
        above = _real(np.int32(scales_R[r]) << 16) * weight
        for k in range(8):
            first = k * eighth
            for i in range(max(0, min(eighth, width - first))):
                value = above if (quanta_RH[r, i] >> k) & 1 else -above
                if add:
                    out_RW[r, np.uintp(first + i)] += value
                else:
                    out_RW[r, np.uintp(first + i)] = value
    return 0


@kernel("float32[:,:]", "uint16[:]!", "uint8[:,:]!", "int64")
def encode_top(values_RW: Any, scales_R: Any, pages_RH: Any, low: Any) -> Any:
    """Returns the bits of the largest |x|; above what the codec carries, the output is garbage."""
    wildest = np.int32(0)
    rows, width = values_RW.shape
    count, high, codes, end = page_layout(width, low)
    slots = 4096 >> low  # of the sum; a short page fills a part of them
    per_slot = _ONE / np.float32(slots)
    magnitudes = np.empty(width, np.int32)
    places = np.empty(count, np.int64)
    sums = np.empty(slots, np.float32)
    for r in range(rows):
        largest = np.int32(0)
        for i in range(width):
            magnitude = np.int32(bits_of(values_RW[r, i]) & MAGNITUDE)
            magnitudes[i] = magnitude
            if magnitude > largest:
                largest = magnitude
        if largest > wildest:
            wildest = largest
        least, beyond = _threshold(magnitudes, largest, count)
        spare = count - beyond  # of those that are just as large, the first
        found = 0
        for i in range(width):
            if magnitudes[i] >= least:
                if magnitudes[i] == least:
                    if spare == 0:
                        continue
                    spare -= 1
                places[found] = i
                found += 1
        for i in range(slots):
            x = abs(values_RW[r, places[i]]) if i < count else _ZERO
            sums[i] = x * per_slot if x > _FLOOR else _ZERO
        half = slots >> 1
        while half:
            for i in range(half):
                sums[i] += sums[i + half]
            half >>= 1
        mean = sums[0] / (np.float32(count) * per_slot)
        bits = _mean_scale_bits(mean, INT2_LARGEST_SCALE)
        scales_R[r] = np.uint16(bits)
        # Without a scale, thresholds between which all elements of such a page lie: +0 for each.
        step = _ONE_AND_QUARTER * _real(bits << 16) if bits > 0 else _ONE
        middle = _ZERO if bits > 0 else -_ONE
        for i in range(end):
            pages_RH[r, i] = np.uint8(0)
        for i in range(count):
            x = values_RW[r, places[i]]
            code = np.int64(x >= -step) + np.int64(x >= middle) + np.int64(x >= step)
            pages_RH[r, codes + (i >> 2)] |= np.uint8(code << 2 * (i & 3))
            bit = (places[i] >> low) + i
            pages_RH[r, high + (bit >> 3)] |= np.uint8(1 << (bit & 7))
            bit = i * low
            part = (places[i] & ((1 << low) - 1)) << (bit & 7)
            pages_RH[r, bit >> 3] |= np.uint8(part & 255)
            if part > 255:
                pages_RH[r, (bit >> 3) + 1] |= np.uint8(part >> 8)
    return wildest


@kernel("uint8[:,:]", "int64", "int64")
def check_top(pages_RH: Any, low: Any, width: Any) -> Any:
    """Returns how many pages are malformed."""
    count, _, _, _ = page_layout(width, low)
    places = np.empty(count, np.int64)
    malformed = 0
    for r in range(len(pages_RH)):
        if not _places(pages_RH, r, low, width, places):
            malformed += 1
    return malformed


@kernel("uint16[:]", "uint8[:,:]", "float32[:,:]!", "float32", "boolean", "int64")
def decode_top(scales_R: Any, pages_RH: Any, out_RW: Any, weight: Any, add: Any, low: Any) -> Any:
    """Weigh, then write or add. Scales have been checked. Returns how many pages are malformed."""
    rows, width = out_RW.shape
    count, _, codes, _ = page_layout(width, low)
    places = np.empty(count, np.int64)
    malformed = 0
    for r in range(rows):
        if not _places(pages_RH, r, low, width, places):
            malformed += 1
            continue
        scale = _real(np.int32(scales_R[r]) << 16)
        if not add:
            for i in range(width):
                out_RW[r, i] = _ZERO
        for i in range(count):
            value = _top_value(pages_RH, r, codes, i, scale) * weight
            if add:
                out_RW[r, places[i]] += value
            else:
                out_RW[r, places[i]] = value
    return malformed


@kernel("uint16[:]", "uint8[:,:]", "float32[:,:]!", "float32[:,:]!", "float32", "int64")
def add_sent_top(
    scales_R: Any, pages_RH: Any, into_RW: Any, sent_RW: Any, weight: Any, low: Any
) -> Any:
    """Weigh and add, and add the weight to `sent`. Returns how many pages are malformed."""
    rows, width = into_RW.shape
    count, _, codes, _ = page_layout(width, low)
    places = np.empty(count, np.int64)
    malformed = 0
    for r in range(rows):
        if not _places(pages_RH, r, low, width, places):
            malformed += 1
            continue
        if scales_R[r] == 0:  # a page of nothing says nothing
            continue
        scale = _real(np.int32(scales_R[r]) << 16)
        for i in range(count):
            into_RW[r, places[i]] += _top_value(pages_RH, r, codes, i, scale) * weight
            sent_RW[r, places[i]] += weight
    return malformed


@kernel("float32[:]!", "float32[:]")
def divide_by_sent(into_N: Any, sent_N: Any) -> Any:
    """`codecs.mean_of_sent`."""
    for i in range(len(into_N)):
        quotient = into_N[i] / sent_N[i]
        into_N[i] = quotient if sent_N[i] > _ZERO else _ZERO
    return 0


@kernel("float32[:]", "float32[:]", "float32[:]!", "float32")
def sgd_step(theta_N: Any, delta_N: Any, out_theta_N: Any, lr: Any) -> Any:
    """`outer.OuterOptimizer.advance`; returns the bits of the largest |x| written."""
    largest = np.int32(0)
    for i in range(len(theta_N)):
        theta = theta_N[i] - delta_N[i] * lr
        out_theta_N[i] = theta
        magnitude = np.int32(bits_of(theta) & MAGNITUDE)
        if magnitude > largest:
            largest = magnitude
    return largest


@kernel(
    "float32[:]", "float32[:]", "float32[:]", "float32[:]!", "float32[:]!", "float32", "float32"
)
def nesterov_step(
    theta_N: Any,
    m_N: Any,
    delta_N: Any,
    out_theta_N: Any,
    out_m_N: Any,
    lr: Any,
    momentum: Any,
) -> Any:
    """The same with momentum."""
    largest = np.int32(0)
    for i in range(len(theta_N)):
        m = m_N[i] * momentum + delta_N[i]
        theta = theta_N[i] - (m * momentum + delta_N[i]) * lr
        out_m_N[i] = m
        out_theta_N[i] = theta
        magnitude = np.int32(max(bits_of(m) & MAGNITUDE, bits_of(theta) & MAGNITUDE))
        if magnitude > largest:
            largest = magnitude
    return largest
