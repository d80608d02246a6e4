from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free.codecs import codec
from coordinator_free.messages import Run, Slice
from coordinator_free.partition import (
    ALIGN_ELEMENTS,
    CHUNK_BYTES,
    CHUNK_ELEMENTS,
    chunk_elements,
    chunk_span,
    fragment_bounds,
    largest_chunk,
    runs_of,
    share,
    within,
)

runs = st.sets(st.integers(0, 200), min_size=1).map(lambda chunks: runs_of(sorted(chunks)))


@settings(deadline=None)
@given(runs, st.lists(st.text("abc", min_size=1), min_size=1, max_size=40, unique=True))
def test_slices_cover_the_runs_once_and_evenly(runs: tuple[Run, ...], reducers: list[str]) -> None:
    slices = share(runs, reducers)
    cut = [chunk for piece in slices for chunk in range(piece.start, piece.stop)]
    assert cut == [chunk for run in runs for chunk in range(run.start, run.stop)]
    shares = [sum(p.stop - p.start for p in slices if p.reducer == name) for name in reducers]
    assert max(shares) - min(shares) <= 1
    turns = [name for name, _ in itertools.groupby(piece.reducer for piece in slices)]
    assert len(turns) == len(set(turns))  # what one peer reduces is as connected as can be


def test_a_cut_as_it_has_always_been() -> None:
    # Peers of two versions must cut alike.
    assert share([Run(start=0, stop=10)], ("a", "b", "c")) == (
        Slice(reducer="a", start=0, stop=3),
        Slice(reducer="b", start=3, stop=6),
        Slice(reducer="c", start=6, stop=10),
    )
    assert share([Run(start=2, stop=4), Run(start=7, stop=9)], ("a", "b")) == (
        Slice(reducer="a", start=2, stop=4),
        Slice(reducer="b", start=7, stop=9),
    )
    assert chunk_elements(10_000, 3, 1 << 18, 4) == 4096
    assert chunk_elements(16_000_000, 5, 1 << 18, 4) == 249_856


@given(st.sets(st.integers(0, 1000)))
def test_runs_are_the_chunks_that_they_were_made_of(chunks: set[int]) -> None:
    runs = runs_of(sorted(chunks))
    assert [n for run in runs for n in range(run.start, run.stop)] == sorted(chunks)
    assert all(a.stop < b.start for a, b in itertools.pairwise(runs))


@settings(deadline=None)
@given(
    st.integers(1, 10**9) | st.integers(1, 20 * ALIGN_ELEMENTS),
    st.integers(1, 100),
    st.integers(1, 2000).map(lambda n: n * ALIGN_ELEMENTS),
    st.integers(1, 32),
)
def test_chunks_fill_a_vector_and_give_each_reducer_several(
    numel: int, reducers: int, largest: int, least: int
) -> None:
    elements = chunk_elements(numel, reducers, largest, least)
    assert elements % ALIGN_ELEMENTS == 0
    assert 0 < elements <= largest
    chunks = -(-numel // elements)
    assert chunk_span(0, elements, numel)[0] == 0
    assert chunk_span(chunks - 1, elements, numel)[1] == numel
    if elements > ALIGN_ELEMENTS:
        # Rounding a chunk's length up to whole pieces leaves the last reducer a little less.
        assert chunks > reducers * least // 2


def test_chunks_are_at_most_one_message_and_never_split_a_block() -> None:
    for name in ("fp32", "bf16", "int8", "int4", "int2", "int1", "top64", "top128"):
        coding = codec(name)
        size = largest_chunk(coding.encoded_bytes)
        assert size % ALIGN_ELEMENTS == 0
        assert ALIGN_ELEMENTS % coding.block == 0
        assert coding.encoded_bytes(size) <= CHUNK_BYTES
        assert size == CHUNK_ELEMENTS or coding.encoded_bytes(size) >= 0.99 * CHUNK_BYTES
    assert largest_chunk(lambda n: 10**9 * n) == ALIGN_ELEMENTS


@given(runs, st.integers(0, 200), st.integers(1, 200))
def test_what_of_some_runs_is_in_a_piece(some: tuple[Run, ...], start: int, length: int) -> None:
    piece = Run(start=start, stop=start + length)
    chunks = [n for run in some for n in range(run.start, run.stop)]
    assert list(within(some, piece)) == [n for n in chunks if piece.start <= n < piece.stop]


@settings(deadline=None)
@given(
    st.integers(1, 10**9) | st.integers(1, 20 * ALIGN_ELEMENTS),
    st.integers(1, 4096) | st.integers(1, 30),
)
def test_fragments_cover_a_vector_evenly_and_none_is_empty(numel: int, fragments: int) -> None:
    bounds = fragment_bounds(numel, fragments)
    assert len(bounds) == min(fragments, -(-numel // ALIGN_ELEMENTS))
    assert bounds[0][0] == 0
    assert bounds[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(bounds))
    assert all(start < stop for start, stop in bounds)
    assert all(start % ALIGN_ELEMENTS == 0 for start, _ in bounds)
    pieces = [-(-(stop - start) // ALIGN_ELEMENTS) for start, stop in bounds]
    assert max(pieces) - min(pieces) <= 1


def test_a_cut_into_fragments_as_it_has_always_been() -> None:
    # Peers of two versions must cut alike.
    assert fragment_bounds(10 * ALIGN_ELEMENTS - 1, 3) == (
        (0, 3 * ALIGN_ELEMENTS),
        (3 * ALIGN_ELEMENTS, 6 * ALIGN_ELEMENTS),
        (6 * ALIGN_ELEMENTS, 10 * ALIGN_ELEMENTS - 1),
    )
    assert fragment_bounds(5, 3) == ((0, 5),)
