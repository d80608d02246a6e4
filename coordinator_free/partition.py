"""Who reduces how much of the vector.

Today every reducer gets an equal share. The cut lies here, in one pure function, so that shares by
measured bandwidth replace it without touching the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from coordinator_free.messages import Slice

# Every codec's block length divides this, so a slice never splits a block.
ALIGN_ELEMENTS = 1024
CHUNK_BYTES = 1 << 20  # one message: enough for a stream's full speed, little enough to overlap


def equal_slices(numel: int, reducers: Sequence[str]) -> tuple[Slice, ...]:
    """Cut a vector into one contiguous slice for each reducer.

    Args:
        numel: length of the vector, at least 1.
        reducers: peer ids, in roster order. With more reducers than aligned pieces some get
            nothing and are not named in the result.

    Returns:
        Slices in order, without gaps, that cover [0, numel); sizes differ by at most one aligned
        piece.
    """
    pieces = -(-numel // ALIGN_ELEMENTS)
    slices = []
    for index, reducer in enumerate(reducers):
        start = pieces * index // len(reducers) * ALIGN_ELEMENTS
        stop = min(pieces * (index + 1) // len(reducers) * ALIGN_ELEMENTS, numel)
        if start < stop:
            slices.append(Slice(reducer=reducer, start=start, stop=stop))
    return tuple(slices)


def chunk_bounds(piece: Slice, chunk_elements: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each chunk of a slice, in elements of the whole vector."""
    for start in range(piece.start, piece.stop, chunk_elements):
        yield start, min(start + chunk_elements, piece.stop)


def chunk_elements(encoded_bytes: Callable[[int], int]) -> int:
    """Elements whose encoding is about `CHUNK_BYTES`, in whole aligned pieces.

    Args:
        encoded_bytes: the codec's, of a number of elements.
    """
    return max(1, CHUNK_BYTES // encoded_bytes(ALIGN_ELEMENTS)) * ALIGN_ELEMENTS
