from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free.codecs import codec
from coordinator_free.messages import Slice
from coordinator_free.partition import (
    ALIGN_ELEMENTS,
    CHUNK_BYTES,
    chunk_bounds,
    chunk_elements,
    equal_slices,
)


@settings(deadline=None)
@given(
    st.integers(1, 10**9) | st.integers(1, 20 * ALIGN_ELEMENTS),
    st.lists(st.text("abc", min_size=1), min_size=1, max_size=40, unique=True),
)
def test_slices_cover_the_vector_once_and_evenly(numel: int, reducers: list[str]) -> None:
    slices = equal_slices(numel, reducers)
    assert slices[0].start == 0
    assert slices[-1].stop == numel
    assert all(a.stop == b.start for a, b in itertools.pairwise(slices))
    named = [piece.reducer for piece in slices]
    assert named == [reducer for reducer in reducers if reducer in named]
    assert all(piece.start % ALIGN_ELEMENTS == 0 for piece in slices)
    pieces = [-(-(piece.stop - piece.start) // ALIGN_ELEMENTS) for piece in slices]
    pieces += [0] * (len(reducers) - len(slices))
    assert max(pieces) - min(pieces) <= 1


def test_a_cut_as_it_has_always_been() -> None:
    # Peers of two versions must cut alike.
    assert equal_slices(10_000, ("a", "b", "c")) == (
        Slice(reducer="a", start=0, stop=3072),
        Slice(reducer="b", start=3072, stop=6144),
        Slice(reducer="c", start=6144, stop=10_000),
    )


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 3000).map(lambda n: n * 97))
def test_chunks_cover_a_slice_once(start: int, length: int, size: int) -> None:
    piece = Slice(reducer="a", start=start, stop=start + length)
    bounds = list(chunk_bounds(piece, size))
    assert bounds[0][0] == piece.start
    assert bounds[-1][1] == piece.stop
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert all(stop - begin == size for begin, stop in bounds[:-1])
    assert 0 < bounds[-1][1] - bounds[-1][0] <= size


def test_chunks_are_about_one_message_and_never_split_a_block() -> None:
    for name in ("fp32", "bf16", "int8", "int4"):
        coding = codec(name)
        size = chunk_elements(coding.encoded_bytes)
        assert size % ALIGN_ELEMENTS == 0
        assert ALIGN_ELEMENTS % coding.block == 0
        assert 0.99 * CHUNK_BYTES <= coding.encoded_bytes(size) <= CHUNK_BYTES
    assert chunk_elements(lambda n: 10**9 * n) == ALIGN_ELEMENTS
