"""The arithmetic of `gradient`, compiled by numba for this processor, and the same in plain numpy.

Guarantees what `kernels` does: each float operation is one correctly rounded IEEE-754 operation, in
the order that is written, so both ways give the same bits on every processor. LLVM works in lanes
only where lanes are independent; what is summed, a norm or a product of matrices, is summed in an
order of its own that no blocking and no vector width changes:

- `segment_squares` and `total`: exact squares in float64, 64 running sums over 4096 elements, those
  by halves, and then segment after segment.
- `product`: every element over its inner dimension from the first to the last, in float32. A sum in
  any other order, as every BLAS does it, would differ by machine. Independent columns fill the
  lanes, and a tile of 4 rows shares what it loads.

The steps say whether all they wrote is finite. Outputs must not overlap inputs. The numpy way is
for machines for which numba does not exist: `benchmarks/optimizers.py` says how much slower it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coordinator_free import kernels
from coordinator_free.kernels import MAGNITUDE, bits_of, kernel

Floats: TypeAlias = NDArray[np.float32]

LANES: Final = 64
SEGMENT: Final = LANES * 64
"""Elements whose squares are summed on their own: where a vector may be cut between threads."""

CACHED: Final = 2048
"""Elements between passes over several vectors, so that the later ones find them in the cache."""

# A panel of the right matrix, 32 kB, stays in the first cache while rows pass by, four at a time:
# two by four factors of the left one and four running sums fit into the 16 registers of AVX2.
ROWS: Final = 4
COLUMNS: Final = 64
DEPTH: Final = 128

_ZERO: Final = np.float32(0.0)
_INFINITY: Final = 0x7F80_0000
_AT_ONCE: Final = 32_768  # elements: numpy's scratch stays in the cache


class AdamW(NamedTuple):
    """Constants of one step, each a float64 rounded once.

    Attributes:
        scale: of the gradient, to clip it.
        beta1: of the mean.
        rest1: 1 - beta1.
        beta2: of the mean square.
        rest2: 1 - beta2.
        unbias: of the root of the mean square, 1 / sqrt(1 - beta2^t).
        eps: added to that root.
        keep: of the parameters, 1 - lr * weight_decay.
        lr: of the direction, lr / (1 - beta1^t).
    """

    scale: np.float32
    beta1: np.float32
    rest1: np.float32
    beta2: np.float32
    rest2: np.float32
    unbias: np.float32
    eps: np.float32
    keep: np.float32
    lr: np.float32


class Sgd(NamedTuple):
    """Constants of one step, as those of `AdamW`."""

    scale: np.float32
    momentum: np.float32
    keep: np.float32
    lr: np.float32


def segment_squares(values_N: Floats) -> NDArray[np.float64]:
    """The sum of squares of every `SEGMENT` elements, for `total`."""
    out_S = np.zeros(-(-len(values_N) // SEGMENT))
    if kernels.compiled():
        _segment_squares(values_N, out_S)
        return out_S
    with np.errstate(all="ignore"):
        for s in range(len(out_S)):
            segment = np.zeros(SEGMENT)
            part = values_N[s * SEGMENT : (s + 1) * SEGMENT]
            segment[: len(part)] = part
            segment *= segment
            sums = np.zeros(LANES)
            for lanes in segment.reshape(-1, LANES):
                sums += lanes
            while len(sums) > 1:
                sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
            out_S[s] = sums[0]
    return out_S


def total(squares_S: Iterable[float]) -> float:
    """Their sum, from the first to the last. Not `sum`: Python's own compensates since 3.12."""
    result = 0.0
    for square in squares_S:
        result += float(square)
    return result


def adamw_step(
    before: tuple[Floats, Floats, Floats],
    gradient_N: Floats,
    out: tuple[Floats, Floats, Floats],
    c: AdamW,
) -> bool:
    """Parameters, mean and mean square, each (N,)."""
    if kernels.compiled():
        return _adamw(*before, gradient_N, *out, *c) < _INFINITY
    with np.errstate(all="ignore"):
        for span in _spans(len(gradient_N)):
            gradient = gradient_N[span] * c.scale
            theta, mean, square = (vector[span] for vector in out)
            np.multiply(before[1][span], c.beta1, out=mean)
            mean += gradient * c.rest1
            np.multiply(before[2][span], c.beta2, out=square)
            square += gradient * gradient * c.rest2
            np.multiply(before[0][span], c.keep, out=theta)
            theta -= mean / (np.sqrt(square) * c.unbias + c.eps) * c.lr
    return all_finite(out)


def sgd_step(theta_N: Floats, gradient_N: Floats, out_N: Floats, c: Sgd) -> bool:
    """Without momentum."""
    if kernels.compiled():
        return _sgd(theta_N, gradient_N, out_N, c.scale, c.keep, c.lr) < _INFINITY
    with np.errstate(all="ignore"):
        for span in _spans(len(gradient_N)):
            np.multiply(theta_N[span], c.keep, out=out_N[span])
            out_N[span] -= gradient_N[span] * c.scale * c.lr
    return all_finite((out_N,))


def momentum_step(
    before: tuple[Floats, Floats],
    gradient_N: Floats,
    out: tuple[Floats, Floats],
    c: Sgd,
    nesterov: bool,
) -> bool:
    """Parameters and momentum, each (N,)."""
    if kernels.compiled():
        return _momentum(*before, gradient_N, *out, *c, nesterov) < _INFINITY
    with np.errstate(all="ignore"):
        for span in _spans(len(gradient_N)):
            gradient = gradient_N[span] * c.scale
            theta, m = out[0][span], out[1][span]
            np.multiply(before[1][span], c.momentum, out=m)
            m += gradient
            direction = m * c.momentum + gradient if nesterov else m
            np.multiply(before[0][span], c.keep, out=theta)
            theta -= direction * c.lr
    return all_finite(out)


def product(left_MK: Floats, right_KN: Floats, *, symmetric: bool = False) -> Floats:
    """The product of two matrices, (M, N).

    Args:
        left_MK: contiguous.
        right_KN: contiguous.
        symmetric: the result is known to be: half of it is computed.
    """
    out_MN = np.zeros((len(left_MK), right_KN.shape[1]), np.float32)
    if kernels.compiled():
        _product(left_MK, right_KN, out_MN, symmetric)
        return out_MN
    with np.errstate(all="ignore"):
        step = max(1, _AT_ONCE // max(1, right_KN.shape[1]))
        for start in range(0, len(left_MK), step):
            left, out = left_MK[start : start + step], out_MN[start : start + step]
            term = np.empty_like(out)
            for k in range(len(right_KN)):
                np.multiply(left[:, k, None], right_KN[k], out=term)
                out += term
    return out_MN


def _spans(numel: int) -> Iterator[slice]:
    for start in range(0, numel, _AT_ONCE):
        yield slice(start, start + _AT_ONCE)


def all_finite(vectors: tuple[Floats, ...]) -> bool:
    """Whether all of them are."""
    return all(
        np.isfinite(vector[span]).all() for vector in vectors for span in _spans(len(vector))
    )


# What follows is compiled, and returns the bits of the largest |x| written: see `kernels`.


@kernel("float32[:]", "float64[:]!")
def _segment_squares(values_N: Any, out_S: Any) -> Any:
    """The sum of squares of each segment; the last may be shorter."""
    sums = np.empty(LANES, np.float64)
    for s in range(len(out_S)):
        segment = values_N[np.uintp(s * SEGMENT) : np.uintp((s + 1) * SEGMENT)]
        for lane in range(LANES):
            sums[lane] = 0.0
        rows = len(segment) // LANES
        for row in range(rows):
            lanes = segment[np.uintp(row * LANES) : np.uintp((row + 1) * LANES)]
            for lane in range(LANES):
                sums[lane] += np.float64(lanes[lane]) * np.float64(lanes[lane])
        rest = segment[np.uintp(rows * LANES) :]
        for lane in range(len(rest)):
            sums[lane] += np.float64(rest[lane]) * np.float64(rest[lane])
        for half in (32, 16, 8, 4, 2, 1):
            for lane in range(half):
                sums[lane] += sums[lane + half]
        out_S[s] = sums[0]
    return 0


@kernel(
    *["float32[:]"] * 4,
    *["float32[:]!"] * 3,
    *["float32"] * 9,
)
def _adamw(
    theta_N: Any,
    mean_N: Any,
    square_N: Any,
    gradient_N: Any,
    out_theta_N: Any,
    out_mean_N: Any,
    out_square_N: Any,
    scale: Any,
    beta1: Any,
    rest1: Any,
    beta2: Any,
    rest2: Any,
    unbias: Any,
    eps: Any,
    keep: Any,
    lr: Any,
) -> Any:
    """One loop a vector: over more, LLVM would not look whether they overlap, and use no lanes."""
    largest = np.int32(0)
    for start in range(0, len(theta_N), CACHED):
        first, last = np.uintp(start), np.uintp(start + CACHED)
        gradient_C = gradient_N[first:last]
        before_C, after_C = mean_N[first:last], out_mean_N[first:last]
        for i in range(len(gradient_C)):
            mean = before_C[i] * beta1 + gradient_C[i] * scale * rest1
            after_C[i] = mean
            magnitude = np.int32(bits_of(mean) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
        mean_C = after_C
        before_C, after_C = square_N[first:last], out_square_N[first:last]
        for i in range(len(gradient_C)):
            gradient = gradient_C[i] * scale
            square = before_C[i] * beta2 + gradient * gradient * rest2
            after_C[i] = square
            magnitude = np.int32(bits_of(square) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
        square_C = after_C
        before_C, after_C = theta_N[first:last], out_theta_N[first:last]
        for i in range(len(gradient_C)):
            direction = mean_C[i] / (np.sqrt(square_C[i]) * unbias + eps)
            theta = before_C[i] * keep - direction * lr
            after_C[i] = theta
            magnitude = np.int32(bits_of(theta) & MAGNITUDE)
            if magnitude > largest:
                largest = magnitude
    return largest


@kernel("float32[:]", "float32[:]", "float32[:]!", "float32", "float32", "float32")
def _sgd(theta_N: Any, gradient_N: Any, out_theta_N: Any, scale: Any, keep: Any, lr: Any) -> Any:
    largest = np.int32(0)
    for i in range(len(theta_N)):
        theta = theta_N[i] * keep - gradient_N[i] * scale * lr
        out_theta_N[i] = theta
        magnitude = np.int32(bits_of(theta) & MAGNITUDE)
        if magnitude > largest:
            largest = magnitude
    return largest


@kernel(
    *["float32[:]"] * 3,
    *["float32[:]!"] * 2,
    *["float32"] * 4,
    "boolean",
)
def _momentum(
    theta_N: Any,
    m_N: Any,
    gradient_N: Any,
    out_theta_N: Any,
    out_m_N: Any,
    scale: Any,
    momentum: Any,
    keep: Any,
    lr: Any,
    nesterov: Any,
) -> Any:
    largest = np.int32(0)
    for i in range(len(theta_N)):
        gradient = gradient_N[i] * scale
        m = m_N[i] * momentum + gradient
        direction = m * momentum + gradient if nesterov else m
        theta = theta_N[i] * keep - direction * lr
        out_m_N[i] = m
        out_theta_N[i] = theta
        magnitude = np.int32(max(bits_of(m) & MAGNITUDE, bits_of(theta) & MAGNITUDE))
        if magnitude > largest:
            largest = magnitude
    return largest


@kernel("float32[:,:]", "float32[:,:]", "float32[:,:]!", "boolean")
def _product(left_MK: Any, right_KN: Any, out_MN: Any, symmetric: Any) -> Any:
    """Into zeros, which fill the tiles at the edges, too: no sum that begins at +0 is ever -0."""
    rows, inner = left_MK.shape
    columns = right_KN.shape[1]
    factors = np.empty((ROWS, DEPTH), np.float32)
    panel = np.empty((DEPTH, COLUMNS), np.float32)
    sums = np.empty((ROWS, COLUMNS), np.float32)
    for j0 in range(0, columns, COLUMNS):
        width = min(COLUMNS, columns - j0)
        needed = min(rows, j0 + width) if symmetric else rows  # what is below is mirrored
        for k0 in range(0, inner, DEPTH):
            depth = min(DEPTH, inner - k0)
            for k in range(DEPTH):
                for j in range(COLUMNS):
                    inside = k < depth and j < width
                    panel[k, j] = right_KN[np.uintp(k0 + k), np.uintp(j0 + j)] if inside else _ZERO
            for i0 in range(0, needed, ROWS):
                height = min(ROWS, rows - i0)
                for i in range(ROWS):
                    for k in range(DEPTH):
                        inside = i < height and k < depth
                        factors[i, k] = (
                            left_MK[np.uintp(i0 + i), np.uintp(k0 + k)] if inside else _ZERO
                        )
                    for j in range(COLUMNS):
                        inside = i < height and j < width
                        sums[i, j] = out_MN[np.uintp(i0 + i), np.uintp(j0 + j)] if inside else _ZERO
                for k in range(0, DEPTH, 2):
                    after = np.uintp(k + 1)
                    a00, a01 = factors[0, k], factors[0, after]
                    a10, a11 = factors[1, k], factors[1, after]
                    a20, a21 = factors[2, k], factors[2, after]
                    a30, a31 = factors[3, k], factors[3, after]
                    for j in range(COLUMNS):
                        b0, b1 = panel[k, j], panel[after, j]
                        sums[0, j] = (sums[0, j] + a00 * b0) + a01 * b1
                        sums[1, j] = (sums[1, j] + a10 * b0) + a11 * b1
                        sums[2, j] = (sums[2, j] + a20 * b0) + a21 * b1
                        sums[3, j] = (sums[3, j] + a30 * b0) + a31 * b1
                for i in range(height):
                    for j in range(width):
                        out_MN[np.uintp(i0 + i), np.uintp(j0 + j)] = sums[i, j]
    if symmetric:
        for i in range(rows):
            for j in range(i):
                out_MN[i, j] = out_MN[j, i]
    return 0
