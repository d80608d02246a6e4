from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.shards import blocks_of

SEEDS = st.integers(min_value=0, max_value=2**64)
GOLDEN = [9, 3, 7, 0, 2]
GOLDEN_DIGEST = "418d24e25188c4a8dde91471de04c2f004a775f3527ebc749f7197f7180755e8"
ROUNDS = st.integers(min_value=0, max_value=10**6)


@given(SEEDS, ROUNDS, st.integers(1, 12), st.integers(0, 600))
def test_each_block_has_exactly_one_seat(seed, round, seats, n_blocks):
    shares = [list(blocks_of(seed, round, seat, seats, n_blocks)) for seat in range(seats)]
    assert sorted(itertools.chain(*shares)) == list(range(n_blocks))
    sizes = {len(share) for share in shares}
    assert sizes <= {n_blocks // seats, n_blocks // seats + 1}


@given(SEEDS, st.integers(1, 200), st.data())
def test_length_and_indexing_agree_with_iteration(seed, n_blocks, data):
    seats = data.draw(st.integers(1, 9))
    blocks = blocks_of(seed, 0, data.draw(st.integers(0, seats - 1)), seats, n_blocks)
    assert [blocks[i] for i in range(len(blocks))] == list(blocks)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_a_billion_blocks_cost_no_memory():
    blocks = blocks_of(1, 2, 3, 4, 10**9)
    first = [blocks[i] for i in range(1000)]
    assert len(set(first)) == 1000
    assert all(0 <= block < 10**9 for block in first)
    assert 4e8 < sum(first) / 1000 < 6e8  # spread over all, not a corner


def test_rounds_seeds_and_rosters_deal_anew():
    base = list(blocks_of(0, 0, 0, 4, 4000))
    for other in (
        blocks_of(0, 1, 0, 4, 4000),
        blocks_of(1, 0, 0, 4, 4000),
        blocks_of(0, 0, 0, 3, 4000),
    ):
        assert list(other)[:100] != base[:100]
    # Independent orders of a quarter each share about a quarter of their blocks.
    shared = len(set(base) & set(blocks_of(0, 1, 0, 4, 4000)))
    assert 150 < shared < 350


def test_the_deal_never_changes():
    """Peers of different versions must deal alike: these values are the format."""
    assert list(blocks_of(0, 0, 0, 2, 10)) == GOLDEN
    long = hashlib.sha256(repr(list(blocks_of(42, 7, 1, 3, 1000))).encode()).hexdigest()
    assert long == GOLDEN_DIGEST


@pytest.mark.parametrize(("seat", "seats", "n"), [(2, 2, 9), (-1, 2, 9), (0, 0, 9), (0, 1, -1)])
def test_impossible_seats_are_refused(seat, seats, n):
    with pytest.raises(ValueError, match=r"seat|blocks"):
        blocks_of(0, 0, seat, seats, n)
