"""Shares against a linear-programming solver, whole chunks against every division there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from coordinator_free.messages import Run
from coordinator_free.partition import runs_of, share
from coordinator_free.shares import (
    FLOOR,
    PATIENCE,
    Party,
    balance,
    cut,
    divide,
    sent,
    times,
)


def peers(*links: tuple[float, float], **roles: bool) -> list[Party]:
    return [
        Party(peer_id=f"p{n}", up_bps=up, down_bps=down, **roles)
        for n, (up, down) in enumerate(links)
    ]


def full(parties: Sequence[Party]) -> list[float]:
    return [float(party.contributes) for party in parties]


def needs(
    parties: Sequence[Party], shares: Sequence[float], fractions: Sequence[float]
) -> list[tuple[float, float]]:
    """(up, down) seconds per byte, straight from the programme."""
    receivers, contributed = sum(p.receives for p in parties), sum(fractions)
    return [
        (
            (f * (1 - s) + s * (receivers - p.receives)) / p.up_bps,
            (p.receives * (1 - s) + s * (contributed - f)) / p.down_bps,
        )
        for p, s, f in zip(parties, shares, fractions, strict=True)
    ]


def makespan(
    parties: Sequence[Party], shares: Sequence[float], fractions: Sequence[float]
) -> float:
    return max(max(both) for both in needs(parties, shares, fractions))


def solver(parties: Sequence[Party], fractions: Sequence[float]) -> float:
    """The smallest T by scipy."""
    count, scale = len(parties), max(max(p.up_bps, p.down_bps) for p in parties)
    receivers, contributed = sum(p.receives for p in parties), sum(fractions)
    rows, bounds = [], []
    for n, (party, fraction) in enumerate(zip(parties, fractions, strict=True)):
        for own, per_share, bps in (
            (fraction, receivers - party.receives - fraction, party.up_bps),
            (party.receives, contributed - fraction - party.receives, party.down_bps),
        ):
            row = [0.0] * (count + 1)
            row[n], row[count] = per_share, -bps / scale
            rows.append(row)
            bounds.append(-own)
    found = linprog(
        [0.0] * count + [1.0],
        A_ub=rows,
        b_ub=bounds,
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[1.0],
        bounds=[(0, 1 if p.reduces else 0) for p in parties] + [(0, None)],
        method="highs",
    )
    assert found.status == 0
    return float(found.fun) / scale


def usable(parties: Sequence[Party]) -> bool:
    return all(any(getattr(p, r) for p in parties) for r in ("contributes", "receives", "reduces"))


def groups(most: int, spread: float = 4.0) -> st.SearchStrategy[list[Party]]:
    """Peers of all roles; their links differ by up to 10^spread, and some do not at all."""
    bps = st.one_of(
        st.sampled_from([1e4, 1e6, 2e6]),
        st.floats(4, 4 + spread).map(lambda exponent: float(10**exponent)),
    )
    likely = st.sampled_from([True, True, False])
    party = st.builds(
        Party,
        peer_id=st.just("x"),
        up_bps=bps,
        down_bps=bps,
        contributes=likely,
        receives=likely,
        reduces=likely,
    )
    named = st.lists(party, min_size=1, max_size=most).map(
        lambda some: [
            Party(
                peer_id=f"p{n}",
                up_bps=p.up_bps,
                down_bps=p.down_bps,
                contributes=p.contributes,
                receives=p.receives,
                reduces=p.reduces,
            )
            for n, p in enumerate(some)
        ]
    )
    return named.filter(usable)


@st.composite
def exchanges(draw: st.DrawFn, most: int) -> tuple[list[Party], list[float]]:
    parties = draw(groups(most))
    fraction = st.sampled_from([1.0, 1.0, 0.5, FLOOR]) | st.floats(FLOOR, 1)
    return parties, [draw(fraction) if party.contributes else 0.0 for party in parties]


# -- shares -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(exchanges(8))
def test_no_solver_finds_a_shorter_exchange(exchange: tuple[list[Party], list[float]]) -> None:
    parties, fractions = exchange
    shares = balance(parties, fractions)
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)
    assert all(0 <= s <= 1 and (p.reduces or s == 0) for p, s in zip(parties, shares, strict=True))
    took = makespan(parties, shares, fractions)
    assert max(times(parties, shares, fractions)) == pytest.approx(took, rel=1e-9, abs=1e-20)
    assert took == pytest.approx(solver(parties, fractions), rel=1e-7, abs=1e-15)


@settings(deadline=None, max_examples=60)
@given(exchanges(3))
def test_no_point_of_a_grid_is_better(exchange: tuple[list[Party], list[float]]) -> None:
    parties, fractions = exchange
    steps = 40
    best = min(
        makespan(parties, [k / steps for k in point], fractions)
        for point in itertools.product(range(steps + 1), repeat=len(parties))
        if sum(point) == steps
        and all(p.reduces or k == 0 for p, k in zip(parties, point, strict=True))
    )
    assert makespan(parties, balance(parties, fractions), fractions) <= best * (1 + 1e-9) + 1e-18


def test_equal_peers_share_equally() -> None:
    for count in (1, 2, 3, 7, 100):
        assert balance(peers(*[(1e6, 1e7)] * count)) == pytest.approx([1 / count] * count)


def test_all_reducers_finish_together() -> None:
    parties = peers((4e6, 1e8), (5e6, 1e8), (6e6, 1e8), (7e6, 1e8), (5e6, 1e7))
    shares = balance(parties)
    assert min(shares) > 0
    assert times(parties, shares) == pytest.approx([makespan(parties, shares, [1.0] * 5)] * 5)


def test_two_peers_move_the_same_whoever_reduces() -> None:
    # Each sends and gets the whole vector in any case: nothing is gained by an uneven cut.
    assert balance(peers((1e6, 1e6), (1e6, 1e6))) == (0.5, 0.5)
    parties = peers((1e4, 1e5), (1e8, 1e8))
    for part in (0.0, 0.3, 1.0, balance(parties)[0]):
        assert makespan(parties, [part, 1 - part], [1.0] * 2) == pytest.approx(1e-4)


def test_a_sole_receiver_reduces_what_it_cannot_send() -> None:
    collector, worker = peers((1e5, 1e7), (1e6, 1e6))
    worker = Party(peer_id="w", up_bps=1e6, down_bps=1e6, receives=False)
    own, rest = balance([collector, worker])
    assert own >= 0.9 - 1e-9  # (1 - s) / 1e5 <= 1 / 1e6
    assert makespan([collector, worker], [own, rest], [1.0] * 2) == pytest.approx(1e-6)


def test_an_auxiliary_peer_takes_the_load_off_the_others() -> None:
    parties = peers((1e6, 1e8), (1e6, 1e8), (1e6, 1e8))
    helper = Party(peer_id="h", up_bps=1e9, down_bps=1e9, contributes=False, receives=False)
    alone = makespan(parties, balance(parties), [1.0] * 3)
    shares = balance([*parties, helper])
    helped = makespan([*parties, helper], shares, [1.0] * 3 + [0.0])
    assert shares[3] > 0.9
    assert helped < 0.76 * alone  # 1 instead of 4/3: contributions alone


def test_a_client_too_slow_to_reduce_leaves_the_others_their_pace() -> None:
    fast = [(1e7, 1e8)] * 3 + [(2e7, 1e8)]
    parties = peers(*fast, (1e5, 1e8))
    shares = balance(parties)
    assert shares[4] == 0
    assert times(parties, shares)[4] == pytest.approx(1e-5)
    # They finish together long before it, the fast one with more than its equal share.
    assert times(parties, shares)[:4] == pytest.approx([times(parties, shares)[0]] * 4)
    assert times(parties, shares)[0] < 2e-7
    assert shares[3] > 2 * shares[0]


@pytest.mark.parametrize("lacking", ["contributes", "receives", "reduces"])
def test_an_exchange_without_somebody_for_each_part_is_refused(lacking: str) -> None:
    parties = peers((1e6, 1e6), (1e6, 1e6), **{lacking: False})
    for refused in (balance, divide):
        with pytest.raises(ValueError, match="needs"):
            refused(parties)


@pytest.mark.parametrize("bps", [0.0, -1.0, math.inf, math.nan])
def test_a_link_has_a_speed(bps: float) -> None:
    with pytest.raises(ValueError, match="bytes per second"):
        peers((1e6, bps))


# -- fractions --------------------------------------------------------------------------------


def unhurried(parties: Sequence[Party]) -> float:
    """T0 by the solver: the smallest T for a majority, others' links taken for infinite.

    A slow peer is freed by its links alone: it still contributes, receives, and may not reduce.
    """
    best = math.inf
    numbers = range(len(parties))
    roles = [
        [n for n in numbers if parties[n].contributes],
        [n for n in numbers if parties[n].receives],
    ]
    for size in range(len(parties)):
        for freed in itertools.combinations(numbers, size):
            if any(2 * len(set(role) - set(freed)) <= len(role) for role in roles):
                continue
            some = [
                Party(
                    peer_id=p.peer_id,
                    up_bps=1e30 if n in freed else p.up_bps,
                    down_bps=1e30 if n in freed else p.down_bps,
                    contributes=p.contributes,
                    receives=p.receives,
                    reduces=p.reduces and n not in freed,
                )
                for n, p in enumerate(parties)
            ]
            if usable(some):
                best = min(best, makespan(some, balance(some), full(some)))
    return best


@settings(deadline=None, max_examples=150)
@given(groups(6))
def test_slow_peers_stretch_an_exchange_by_no_more_than_the_patience(parties: list[Party]) -> None:
    division = divide(parties)
    shares, fractions = division.shares, division.fractions
    limit = PATIENCE * unhurried(parties) * (1 + 1e-9) + 1e-18
    ups, downs = zip(*needs(parties, shares, fractions), strict=True)
    late = {n for n, party in enumerate(parties) if party.peer_id in division.late}
    receivers = {n for n, party in enumerate(parties) if party.receives}
    assert 2 * len(late & receivers) < len(receivers)
    assert all(downs[n] > limit * (1 - 1e-6) and shares[n] == 0 for n in late)
    for n, party in enumerate(parties):
        assert n in late or downs[n] <= limit
        assert FLOOR <= fractions[n] <= 1 if party.contributes else fractions[n] == 0
        assert ups[n] <= limit or (fractions[n] == FLOOR and shares[n] == 0)
        # No contribution is smaller than it must be.
        if FLOOR < fractions[n] < 1 and shares[n] == 0:
            assert ups[n] == pytest.approx(limit, rel=1e-6)
    counted = [up for up in ups if up <= limit]
    counted += [down for n, down in enumerate(downs) if n not in late]
    assert division.seconds_per_byte == pytest.approx(max(counted), rel=1e-9, abs=1e-20)
    assert division.seconds_per_byte <= limit
    assert math.fsum(shares) == pytest.approx(1, abs=1e-12)


def test_everybody_contributes_in_full_where_that_takes_hardly_longer() -> None:
    parties = peers((1e7, 1e8), (1e7, 1e8), (1e7, 1e8), (6.1e6, 1e8))
    division = divide(parties)
    assert division.fractions == (1.0,) * 4
    assert division.shares == balance(parties)


def test_a_slow_uplink_sends_what_it_can_in_time() -> None:
    parties = peers(*[(1e7, 1e8)] * 7, (1e6, 1e7))
    in_full = max(times(parties, balance(parties)))
    division = divide(parties)
    assert in_full == pytest.approx(1 / 1e6)
    assert division.seconds_per_byte < 0.24 * in_full
    assert division.fractions[:7] == (1.0,) * 7
    assert division.fractions[7] == pytest.approx(division.seconds_per_byte * 1e6)
    assert division.late == ()


def test_a_slow_downlink_comes_late_and_holds_nobody_up() -> None:
    parties = peers(*[(1e7, 1e8)] * 7, (1e7, 1e6))
    division = divide(parties)
    assert division.late == ("p7",)
    assert division.shares[7] == 0
    assert division.fractions == (1.0,) * 8
    assert division.seconds_per_byte < 0.2e-6


def test_where_most_are_slow_nobody_is_cut_short() -> None:
    # One hub that could reduce everything in no time: home links set the pace all the same.
    parties = peers((1e9, 1e9), *[(2e6, 1e7)] * 8)
    division = divide(parties)
    assert division.fractions == (1.0,) * 9
    assert division.shares[0] > 0.9


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([FLOOR, 0.1, 0.3, 0.9, 1.0]) | st.floats(FLOOR, 1), min_size=33),
    st.integers(0, 2**40),
    st.integers(1, 60),
)
def test_in_time_every_chunk_is_sent(fractions: list[float], turn: int, chunks: int) -> None:
    left = set(range(chunks))
    for number in range(32):
        runs = sent(chunks, fractions[number], turn + number)
        here = {chunk for run in runs for chunk in range(run.start, run.stop)}
        assert here
        assert fractions[number] < 1 or here == set(range(chunks))
        left -= here
    assert not left


def test_a_fraction_is_spread_evenly_over_all_slices() -> None:
    for fraction, turn, size in itertools.product((FLOOR, 0.2, 0.7), (0, 1, 1000), (8, 50, 400)):
        chosen = {c for run in sent(4000, fraction, turn) for c in range(run.start, run.stop)}
        for start in range(0, 4000, size):
            assert abs(len(chosen & set(range(start, start + size))) - fraction * size) <= 2


def test_peers_that_send_a_fraction_send_different_parts() -> None:
    parts = [
        {chunk for run in sent(100, 0.25, 7 + seat) for chunk in range(run.start, run.stop)}
        for seat in range(3)
    ]
    assert not parts[0] & parts[1]
    assert not parts[1] & parts[2]


# -- whole chunks -----------------------------------------------------------------------------

runs = st.sets(st.integers(0, 200), min_size=1).map(lambda chunks: runs_of(sorted(chunks)))


@settings(deadline=None)
@given(runs, st.integers(1, 40))
def test_equal_peers_get_the_equal_cut(runs: tuple[Run, ...], count: int) -> None:
    parties = peers(*[(1e6, 3e6)] * count)
    assert cut(parties, balance(parties), runs) == share(runs, [p.peer_id for p in parties])
    assert cut(parties, [1 / count] * count, runs) == share(runs, [p.peer_id for p in parties])


@settings(deadline=None)
@given(runs, exchanges(12))
def test_slices_cover_the_runs_once_and_in_order(
    runs: tuple[Run, ...], exchange: tuple[list[Party], list[float]]
) -> None:
    parties, fractions = exchange
    slices = cut(parties, balance(parties, fractions), runs, fractions)
    chunks = [chunk for piece in slices for chunk in range(piece.start, piece.stop)]
    assert chunks == [chunk for run in runs for chunk in range(run.start, run.stop)]
    turns = [name for name, _ in itertools.groupby(piece.reducer for piece in slices)]
    assert len(turns) == len(set(turns))  # what one peer reduces is as connected as can be
    assert set(turns) <= {party.peer_id for party in parties if party.reduces}


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), exchanges(4))
def test_no_division_into_whole_chunks_is_better(
    chunks: int, exchange: tuple[list[Party], list[float]]
) -> None:
    parties, fractions = exchange
    slices = cut(parties, balance(parties, fractions), [Run(start=0, stop=chunks)], fractions)
    counts = {piece.reducer: piece.stop - piece.start for piece in slices}
    took = makespan(parties, [counts.get(p.peer_id, 0) / chunks for p in parties], fractions)
    best = min(
        makespan(parties, [count / chunks for count in point], fractions)
        for point in itertools.product(range(chunks + 1), repeat=len(parties))
        if sum(point) == chunks
        and all(p.reduces or count == 0 for p, count in zip(parties, point, strict=True))
    )
    assert took <= best * (1 + 1e-9) + 1e-18


def test_a_share_below_half_a_chunk_is_no_slice() -> None:
    parties = peers((1e7, 1e8), (1e7, 1e8), (1e7, 1e8), (5e6, 1e8))
    slices = cut(parties, [0.33, 0.33, 0.33, 0.01], [Run(start=0, stop=12)])
    assert [(piece.start, piece.stop, piece.reducer) for piece in slices] == [
        (0, 4, "p0"),
        (4, 8, "p1"),
        (8, 12, "p2"),
    ]


def test_many_peers_are_divided_in_a_moment() -> None:
    parties = peers(*[(10.0 ** (5 + n % 7 / 2), 1e8) for n in range(1000)])
    division = divide(parties)
    slices = cut(parties, division.shares, [Run(start=0, stop=4000)], division.fractions)
    assert slices[-1].stop == 4000
