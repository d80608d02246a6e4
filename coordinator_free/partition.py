"""How a vector is cut into chunks, and runs of chunks into equal parts.

Who reduces how much is decided in `planning`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from coordinator_free.messages import Run, Slice

# Every codec's block length divides this, so a chunk never splits a block.
ALIGN_ELEMENTS = 4096
CHUNK_BYTES = 1 << 21  # one message: what a message costs besides its bytes is little in this
CHUNK_ELEMENTS = 1 << 23  # of which a reducer holds a sum in float32, whatever they are encoded as


def largest_chunk(encoded_bytes: Callable[[int], int]) -> int:
    """Elements whose encoding is about `CHUNK_BYTES`, but no more than `CHUNK_ELEMENTS`.

    Args:
        encoded_bytes: the codec's, of a number of elements.
    """
    pieces = min(CHUNK_BYTES // encoded_bytes(ALIGN_ELEMENTS), CHUNK_ELEMENTS // ALIGN_ELEMENTS)
    return max(1, pieces) * ALIGN_ELEMENTS


def chunk_elements(numel: int, reducers: int, largest: int, least: int) -> int:
    """The length of a chunk with which each reducer gets the same number of them.

    Args:
        numel: length of the vector, at least 1.
        reducers: how many share it.
        largest: no longer than this, a multiple of `ALIGN_ELEMENTS`.
        least: so many chunks for each, if the vector is long enough.
    """
    each = max(least, -(-numel // (largest * reducers)))
    pieces = -(-numel // (ALIGN_ELEMENTS * reducers * each))
    return min(largest, pieces * ALIGN_ELEMENTS)


def fragment_bounds(numel: int, fragments: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each fragment of a vector, in elements: equal ones, to whole aligned pieces.

    Args:
        numel: length of the vector, at least 1.
        fragments: how many are asked for; a short vector has fewer, so that none is empty.
    """
    pieces = -(-numel // ALIGN_ELEMENTS)
    count = min(fragments, pieces)
    cuts = [min(numel, ALIGN_ELEMENTS * (pieces * n // count)) for n in range(count + 1)]
    return tuple(itertools.pairwise(cuts))


def chunk_span(index: int, elements: int, numel: int) -> tuple[int, int]:
    """(start, stop) of a chunk, in elements of the whole vector."""
    return index * elements, min((index + 1) * elements, numel)


def share(runs: Iterable[Run], reducers: Sequence[str]) -> tuple[Slice, ...]:
    """Divide runs of chunks among peers, as evenly as whole chunks can be.

    Args:
        runs: without overlap, in order.
        reducers: peer ids; with more of them than chunks some get nothing.

    Returns:
        Slices in the order of their chunks. A reducer has one, unless its share spans several runs.
    """
    runs = list(runs)
    total = sum(run.stop - run.start for run in runs)
    shares = [total * n // len(reducers) for n in range(len(reducers) + 1)]
    slices: list[Slice] = []
    before = 0  # chunks of the runs so far
    for run in runs:
        for reducer, first, last in zip(reducers, shares, shares[1:], strict=False):
            start = max(run.start, run.start + first - before)
            stop = min(run.stop, run.start + last - before)
            if start < stop:
                slices.append(Slice(start=start, stop=stop, reducer=reducer))
        before += run.stop - run.start
    return tuple(slices)


def runs_of(chunks: Iterable[int]) -> tuple[Run, ...]:
    """Chunk numbers in ascending order as runs."""
    runs: list[list[int]] = []
    for chunk in chunks:
        if runs and runs[-1][1] == chunk:
            runs[-1][1] += 1
        else:
            runs.append([chunk, chunk + 1])
    return tuple(Run(start=start, stop=stop) for start, stop in runs)


def within(runs: Iterable[Run], piece: Run) -> Sequence[int]:
    """The numbers of the chunks of these runs that are in a piece, ascending."""
    cut = [(max(run.start, piece.start), min(run.stop, piece.stop)) for run in runs]
    spans = [range(start, stop) for start, stop in cut if start < stop]
    return spans[0] if len(spans) == 1 else [chunk for span in spans for chunk in span]
