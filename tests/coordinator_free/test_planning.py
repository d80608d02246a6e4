from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator_free.bandwidth import Rate, Trust
from coordinator_free.codecs import codec
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.messages import NO_DIGEST, WHOLE, Plan, Run, View
from coordinator_free.partition import largest_chunk
from coordinator_free.planning import (
    CHUNKS_EACH,
    CHUNKS_EACH_SLOW,
    DEADLINE_STRETCH,
    WORTH_S,
    Draft,
    Seat,
    deliveries,
    divide_again,
    draft,
    sent_by,
)

UNKNOWN = Rate(up_bps=0.0, down_bps=0.0)
MBIT = 1e6 / 8
CONFIG = RoundConfig(codec="fp32")
NUMEL = 16_000_000
LAYOUT = Layout(lengths=(NUMEL,), largest_chunk=largest_chunk(codec("fp32").encoded_bytes))
BYTES = 64e6


def seat(name: str, mbit: float = 0.0, **other: object) -> Seat:
    rate = Rate(up_bps=mbit * MBIT, down_bps=mbit * MBIT)
    fields = {"peer_id": name, "can_reduce": True, "samples": 8, "rate": rate, **other}
    return Seat(**fields)  # type: ignore[arg-type]


def planned(seats: list[Seat], pace_s: float | None = None) -> Draft:
    return draft(seats, LAYOUT, 0, CONFIG, pace_s)


def plan(drafted: Draft, names: str, round: int = 0) -> Plan:
    return Plan(
        height=1,
        round=round,
        ballot=0,
        attempt=0,
        previous=NO_DIGEST,
        base=NO_DIGEST,
        receivers=tuple(names),
        contributions=drafted.contributions,
        slices=drafted.slices,
        kept=(),
        links=drafted.links,
        expected_s=drafted.expected_s,
        numel=NUMEL,
        chunk_elements=drafted.chunk_elements,
        codec="fp32",
        exchange_s=drafted.exchange_s,
        stall_s=drafted.exchange_s / 5,
    )


def shares(drafted: Draft) -> dict[str, int]:
    return {piece.reducer: piece.stop - piece.start for piece in drafted.slices}


def test_while_nothing_is_known_all_get_the_same() -> None:
    drafted = planned([seat(name) for name in "abcd"])
    assert set(shares(drafted)) == set("abcd")
    assert max(shares(drafted).values()) - min(shares(drafted).values()) <= 1
    assert sum(shares(drafted).values()) >= 4 * CHUNKS_EACH - 3
    assert [c.omitted for c in drafted.contributions] == [0] * 4
    assert (drafted.links, drafted.expected_s) == ((), 0.0)
    assert drafted.exchange_s == CONFIG.exchange_s


def test_one_that_knows_its_link_is_not_enough_to_plan_by() -> None:
    assert planned([seat("a", 1.0), *(seat(name) for name in "bcd")]).links == ()


def test_who_has_more_bandwidth_reduces_more_and_slow_links_get_smaller_chunks() -> None:
    drafted = planned([seat("a", 200), seat("b", 100), seat("c", 100), seat("d", 100)])
    got = shares(drafted)
    assert got["a"] > 1.5 * got["b"]
    # As many, but for what rounding a chunk up to whole pieces leaves out.
    assert sum(got.values()) >= 4 * CHUNKS_EACH_SLOW * 15 / 16
    assert drafted.expected_s == pytest.approx(BYTES * 6 / (500 * MBIT), rel=0.02)


def test_where_all_links_are_fast_chunks_are_few_and_shares_equal() -> None:
    drafted = planned([seat("a", 4000), seat("b", 1000), seat("c", 900), seat("d", 600)])
    got = shares(drafted)
    assert max(got.values()) - min(got.values()) <= 1
    assert sum(got.values()) <= 4 * CHUNKS_EACH
    assert drafted.links == ()
    slower = planned([seat("a", 4000), seat("b", 1000), seat("c", 900), seat("d", 300)])
    assert shares(slower)["d"] < shares(slower)["a"]


def test_little_is_not_cut_into_less_than_is_worth_a_message() -> None:
    little = Layout(lengths=(100_000,), largest_chunk=LAYOUT.largest_chunk)
    drafted = draft([seat(name) for name in "abcd"], little, 0, RoundConfig(codec="int2"), None)
    assert len(drafted.slices) == 4
    assert set(shares(drafted).values()) == {1}


def test_who_cannot_be_dialled_and_who_has_no_work_does_only_the_rest() -> None:
    drafted = planned([seat("a", 100), seat("b", 100, can_reduce=False), seat("c", 100, samples=0)])
    assert set(shares(drafted)) == {"a", "c"}
    assert [c.peer_id for c in drafted.contributions] == ["a", "b"]


def test_a_slow_link_sends_a_part_and_in_time_every_part() -> None:
    drafted = planned([seat(name, 100) for name in "abcd"] + [seat("e", 5)])
    omitted = {c.peer_id: c.omitted for c in drafted.contributions}
    assert omitted["e"] > WHOLE // 2
    assert all(omitted[name] == 0 for name in "abcd")
    seen: set[int] = set()
    for round in range(2 * WHOLE // (WHOLE - omitted["e"]) + 1):
        of_round = plan(drafted, "abcde", round)
        chunks = [n for run in sent_by(of_round, "e") for n in range(run.start, run.stop)]
        assert len(chunks) < of_round.chunks / 2
        seen.update(chunks)
    assert seen == set(range(of_round.chunks))
    assert sent_by(of_round, "a") == (Run(start=0, stop=of_round.chunks),)
    assert sent_by(of_round, "nobody") == ()
    mend = replace(of_round, attempt=1, base=b"\1" * 32)
    assert sent_by(mend, "e") == sent_by(mend, "a")


def test_nothing_is_left_out_of_a_short_exchange() -> None:
    drafted = draft(
        [*(seat(name, 200) for name in "abcd"), seat("e", 20)],
        replace(LAYOUT, lengths=(NUMEL // 20,)),
        0,
        CONFIG,
        None,
    )
    assert all(c.omitted == 0 for c in drafted.contributions)
    assert drafted.expected_s > 0


def test_of_links_that_are_fast_enough_nobody_is_given_more() -> None:
    drafted = planned([seat("a", 20_000), *(seat(name, 600) for name in "bcd")])
    assert max(shares(drafted).values()) - min(shares(drafted).values()) <= 1


def test_links_that_are_measured_nearly_alike_get_the_same() -> None:
    measured = {"a": 92, "b": 100, "c": 113, "d": 97}
    drafted = planned([seat(name, mbit) for name, mbit in measured.items()])
    assert max(shares(drafted).values()) - min(shares(drafted).values()) <= 1
    assert drafted.expected_s > 0


def test_a_moment_is_not_worth_planning() -> None:
    tiny = replace(LAYOUT, lengths=(100_000,))
    drafted = draft([seat("a", 100), *(seat(name, 10) for name in "bcd")], tiny, 0, CONFIG, None)
    assert max(shares(drafted).values()) - min(shares(drafted).values()) <= 1
    assert drafted.links == ()


def test_a_deadline_follows_what_is_expected_within_bounds() -> None:
    fast = planned([seat(name, 100) for name in "abcd"])
    assert fast.exchange_s == pytest.approx(4 * fast.expected_s, rel=1e-6)
    assert planned([seat(name, 100) for name in "abcd"], pace_s=12.0).exchange_s == 48.0
    assert planned([seat(name, 10_000) for name in "abcd"], pace_s=0.1).exchange_s == 15.0
    slow = planned([seat(name, 3) for name in "abcd"])
    assert CONFIG.exchange_s < slow.exchange_s <= DEADLINE_STRETCH * CONFIG.exchange_s
    assert slow.exchange_s > 1.5 * slow.expected_s


def test_a_claim_that_most_do_not_believe_does_not_count() -> None:
    liar = View(peer_id="a", up_bps=int(100 * MBIT), down_bps=int(100 * MBIT))
    honest = [seat(name, 100, views=(liar,)) for name in "bcd"]
    believed = planned([seat("a", 1000), *(replace(one, views=()) for one in honest)])
    doubted = planned([seat("a", 1000), *honest])
    assert shares(believed)["a"] > 2 * shares(doubted)["a"]
    assert max(shares(doubted).values()) - min(shares(doubted).values()) <= 1


def test_a_member_judges_the_others_by_the_plan() -> None:
    drafted = planned([seat("a", 1000), *(seat(name, 100) for name in "bcd")])
    made = plan(drafted, "abcd")
    in_time = dict.fromkeys("abc", made.expected_s)
    trust = Trust()
    trust.observe(*deliveries(made, in_time, in_time))
    assert trust.view == {}
    trust.observe(*deliveries(made, {**in_time, "a": 6 * made.expected_s}, in_time))
    assert 0 < trust.view["a"].up_bps < 1000 * MBIT / 6 * 1.01
    # A mend was planned by nobody's links, so it proves nothing about them.
    mend = replace(made, attempt=1, base=b"\1" * 32)
    assert deliveries(mend, in_time, in_time) == ({}, {})


def test_what_is_left_is_divided_by_the_same_links() -> None:
    seats = [seat("a", 300), seat("b", 100), seat("c", 100), seat("d", 100)]
    slices = divide_again(
        seats,
        [Run(start=10, stop=40), Run(start=50, stop=60)],
        receivers=("a", "b", "c"),
        reducers=("a", "b"),
        contributors={"a", "b", "c"},
    )
    got = {name: sum(p.stop - p.start for p in slices if p.reducer == name) for name in "abcd"}
    assert got["a"] + got["b"] == 40
    assert got["a"] > got["b"]


@pytest.mark.parametrize("claim", [0.001, 1e-6])
def test_one_tiny_claim_sets_neither_time_nor_deadline_nor_chunks(claim: float) -> None:
    usual = planned([seat(name, 1) for name in "abcd"])
    odd = planned([*(seat(name, 1) for name in "abc"), seat("d", claim)])
    assert usual.expected_s > WORTH_S, "else nothing is left out of it"
    assert odd.expected_s < 2 * usual.expected_s
    assert odd.exchange_s < 2 * usual.exchange_s
    assert all(piece.reducer != "d" for piece in odd.slices)
