"""What benchmarks average, and how a result is checked.

Every peer makes its vector from the seed and its own number; nobody has to be sent one. The exact
weighted mean of all of them is computed once, in float64, and written to a file, against which
every peer holds each of its results. Where not everybody sent everything, a peer computes the mean
of what was sent by itself (`mean_of_sent`). All are made block by block: none needs the vectors of
all peers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 20  # elements; each has a generator of its own
SIGMA = 1e-3  # the size of a pseudo-gradient's elements, about

# How far from the exact mean a result may be: the worst element in multiples of the largest one
# that went in, and the root mean square of all in multiples of SIGMA. The first follows from how
# the format rounds, once what is sent and once what comes back. hivemind's `uniform8` cuts off what
# is beyond three standard deviations, so its worst element says little; its root mean square tells
# a slice that nobody averaged (0.2 and more with 16 peers) from rounding (0.02).
TOLERANCES = {
    "fp32": (1e-6, 1e-6),
    "bf16": (2.0**-8, 2.0**-8),
    "fp16": (2.0**-9, 2.0**-9),
    "int8": (0.0082, 0.02),
    "int4": (0.145, 0.25),
    "uniform8": (1.0, 0.1),
}


def weight(number: int) -> int:
    """How much a peer's vector counts."""
    return 1 + number % 3


def vector(seed: int, number: int, numel: int) -> NDArray[np.float32]:
    """(numel,) float32: what the peer with this number puts in."""
    out_N = np.empty(numel, np.float32)
    for start in range(0, numel, BLOCK):
        out_N[start : start + BLOCK] = _block(seed, number, start, min(BLOCK, numel - start))
    return out_N


def write_mean(path: Path, seed: int, peers: int, numel: int) -> float:
    """Write the exact weighted mean as float64.

    Returns:
        The largest magnitude of any element that any peer puts in.
    """
    total = sum(weight(number) for number in range(peers))
    largest = 0.0
    with path.open("wb") as file:
        for start in range(0, numel, BLOCK):
            mean_B = np.zeros(min(BLOCK, numel - start))
            for number in range(peers):
                block_B = _block(seed, number, start, len(mean_B))
                largest = max(largest, float(np.abs(block_B).max()))
                mean_B += weight(number) * block_B.astype(np.float64)
            (mean_B / total).tofile(file)
    return largest


def read_mean(path: Path, numel: int) -> Iterator[NDArray[np.float64]]:
    """What `write_mean` wrote, block by block."""
    with path.open("rb") as file:
        for start in range(0, numel, BLOCK):
            yield np.fromfile(file, np.float64, min(BLOCK, numel - start))


def mean_of_sent(
    seed: int, spans: Sequence[tuple[int, int, Sequence[int]]]
) -> Iterator[NDArray[np.float64]]:
    """The exact weighted mean where a peer's vector need not count everywhere, block by block.

    Args:
        seed: of the vectors.
        spans: first element, the one behind the last, and the numbers of those who are in the mean
            there, at least one; in order, without gaps, from element 0 on.
    """
    numel = spans[-1][1]
    for start in range(0, numel, BLOCK):
        length = min(BLOCK, numel - start)
        here = [span for span in spans if span[0] < start + length and start < span[1]]
        sum_B, weight_B = np.zeros(length), np.zeros(length)
        for number in sorted(set().union(*(numbers for _, _, numbers in here))):
            block_B = _block(seed, number, start, length)
            for first, stop, numbers in here:
                if number in numbers:
                    part = slice(max(0, first - start), stop - start)
                    sum_B[part] += weight(number) * block_B[part].astype(np.float64)
                    weight_B[part] += weight(number)
        yield sum_B / weight_B


def errors(
    result_N: NDArray[np.float32], mean_blocks: Iterable[NDArray[np.float64]]
) -> tuple[float, float]:
    """How far a result is from the mean: the worst element, and the root mean square.

    A result with a NaN is infinitely far.
    """
    worst, squares, start = 0.0, 0.0, 0
    for mean_B in mean_blocks:
        difference_B = result_N[start : start + len(mean_B)].astype(np.float64) - mean_B
        start += len(mean_B)
        if np.isnan(difference_B).any():
            return float("inf"), float("inf")
        worst = max(worst, float(np.abs(difference_B).max()))
        squares += float(difference_B @ difference_B)
    assert start == len(result_N), f"a mean of {start} elements for {len(result_N)}"
    return worst, (squares / len(result_N)) ** 0.5


def verified(
    codec: str, largest: float, max_error: float, rms_error: float, roundings: int = 2
) -> bool:
    """Whether a result is as close to the exact mean as the format allows.

    Args:
        codec: what travelled.
        largest: see `write_mean`.
        max_error: see `errors`.
        rms_error: see `errors`.
        roundings: how often an element is rounded on its way.
    """
    worst, rms = (roundings / 2 * tolerance for tolerance in TOLERANCES[codec])
    return max_error <= worst * largest and rms_error <= rms * SIGMA


def _block(seed: int, number: int, start: int, length: int) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.SFC64([seed, number, start]))
    block_B = generator.standard_normal(length, np.float32)
    block_B *= np.float32(SIGMA)
    return block_B
