"""Links measured from the traffic of a played exchange; liars among eight peers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator_free.bandwidth import (
    LATE_S,
    MAX_BPS,
    MAX_SAMPLES,
    NEVER_DONE,
    RAISE,
    Delivery,
    Gauge,
    Rate,
    Trust,
    settle,
)
from coordinator_free.shares import Party, divide, times

MB = 1_000_000


class Link:
    """Carries messages at a speed; tells the bytes of those that are through."""

    def __init__(self, bps: float, message: int = 1) -> None:
        self.bps = bps
        self._message = message
        self._bytes = 0.0

    def run(self, seconds: float, load: float = 1.0) -> int:
        self._bytes += seconds * self.bps * load
        return int(self._bytes) // self._message * self._message


def watch(
    gauge: Gauge, link: Link, seconds: float, load: Callable[[float], float], every: float = 0.05
) -> None:
    """An exchange whose uplink is used as `load` says."""
    now = 0.0
    while now < seconds:
        gauge.sample(now, link.run(every, load(now)), 0)
        now += every
    gauge.finish()


def always(now: float) -> float:
    return 1.0


# -- measuring --------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [1, 65_536, MB])
@pytest.mark.parametrize("every", [0.05, 0.1])
@pytest.mark.parametrize("bps", [1e6, 12.5e6, 125e6])
def test_a_saturated_link_is_measured_within_a_few_percent(
    message: int, every: float, bps: float
) -> None:
    gauge = Gauge()
    watch(gauge, Link(bps, message), 10.0, always, every)
    # Too low by two intervals of ten seconds; with ten messages in all, by a little more.
    assert 0.94 * bps <= gauge.rate.up_bps <= 1.001 * bps
    assert gauge.rate.down_bps == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_rate_that_trembles_is_measured_near_its_mean(seed: int) -> None:
    rng = random.Random(seed)
    gauge = Gauge()
    watch(gauge, Link(5e6, 65_536), 10.0, lambda now: rng.gauss(1, 0.2))
    assert gauge.rate.up_bps == pytest.approx(5e6, rel=0.06)


def test_a_link_that_is_idle_most_of_the_time_is_measured_by_its_busy_part() -> None:
    gauge = Gauge()
    watch(gauge, Link(10e6), 30.0, lambda now: float(12 <= now < 13))
    assert 0.88 * 10e6 <= gauge.rate.up_bps <= 10e6
    # Many short ones, of half a second each.
    gauge = Gauge()
    watch(gauge, Link(10e6), 30.0, lambda now: float(now % 3 < 0.5))
    assert 0.8 * 10e6 <= gauge.rate.up_bps <= 10e6


def test_messages_that_arrive_in_bursts_are_no_speed() -> None:
    # One large message every half second: whichever instant it is seen at, the rate is not more.
    gauge = Gauge()
    watch(gauge, Link(2e6, MB), 20.0, always)
    assert 0.95 * 2e6 <= gauge.rate.up_bps <= 2e6 * 1.001


def test_what_fills_a_buffer_at_the_start_is_no_speed() -> None:
    gauge = Gauge()
    link, now, buffered = Link(1e6), 0.0, 4 * MB
    for number in range(400):
        now += 0.05
        gauge.sample(now, (buffered if number else 0) + link.run(0.05), 0)
    gauge.finish()
    assert gauge.rate.up_bps == pytest.approx(1e6, rel=0.03)


def test_exchanges_that_are_over_at_once_show_that_links_are_fast() -> None:
    """Else only one that stood still would count: 94 kB in 34 ms, and now and then in 0.4 s."""
    gauge = Gauge()
    gauge.sample(1.0, 0, 0)
    gauge.sample(1.034, 94_000, 94_000)
    gauge.finish()
    assert gauge.rate.up_bps == gauge.rate.down_bps == pytest.approx(94_000 / (3 * 0.034))
    for at in range(9):
        gauge.sample(2 + 0.05 * at, 94_000 * (at > 7), 94_000 * (at > 7))
    gauge.finish()
    assert min(gauge.rate.up_bps, gauge.rate.down_bps) > 900_000


@given(
    st.lists(
        st.tuples(st.floats(0.01, 0.3), st.sampled_from([0.0, 0.2, 1.0])), min_size=1, max_size=80
    ),
    st.sampled_from([1, 65_536, MB]),
)
def test_nothing_is_ever_measured_too_fast(steps: list[tuple[float, float]], message: int) -> None:
    gauge, link, now = Gauge(), Link(7e6, message), 0.0
    for seconds, load in steps:
        now += seconds
        through = link.run(seconds, load)
        gauge.sample(now, 5 * through, 3 * through)
    gauge.finish()
    assert gauge.rate.up_bps <= 5 * 7e6 * (1 + 1e-6) + 100
    assert gauge.rate.down_bps <= 3 * 7e6 * (1 + 1e-6) + 100


def test_both_ways_are_measured_at_once() -> None:
    gauge = Gauge()
    for number in range(200):
        gauge.sample(number / 20, number * 100_000, number * 400_000)
    gauge.finish()
    assert gauge.rate.up_bps == pytest.approx(2e6, rel=0.02)
    assert gauge.rate.down_bps == pytest.approx(8e6, rel=0.02)


def test_idle_exchanges_take_little_from_what_is_known() -> None:
    gauge = Gauge()
    watch(gauge, Link(10e6), 10.0, always)
    for _ in range(5):
        watch(gauge, Link(1e6), 10.0, lambda now: float(now < 2))
    assert gauge.rate.up_bps >= 0.88 * 10e6
    watch(gauge, Link(10e6), 10.0, always)
    assert gauge.rate.up_bps == pytest.approx(10e6, rel=0.03)


def test_a_link_that_changed_is_known_at_once() -> None:
    gauge = Gauge()
    for bps in (1e6, 10e6, 2e6):
        watch(gauge, Link(bps), 10.0, always)
        assert gauge.rate.up_bps == pytest.approx(bps, rel=0.03)


def play(gauge: Gauge, up_bps: float, down_bps: float, *, full: bool, late: bool) -> None:
    """An exchange of four seconds at a steady pace."""
    for number in range(81):
        gauge.sample(number / 20, int(number / 20 * up_bps), int(number / 20 * down_bps), full=full)
    gauge.finish(late=late)


def test_an_uplink_for_which_nothing_waited_is_measured_no_slower() -> None:
    gauge = Gauge()
    play(gauge, 10e6, 0, full=True, late=False)
    known = gauge.rate.up_bps
    for late in (False, True):  # it was given little, or others kept it waiting
        for _ in range(20):
            play(gauge, 1e6, 0, full=False, late=late)
        assert gauge.rate.up_bps == known
    play(gauge, 1e6, 0, full=True, late=False)
    assert gauge.rate.up_bps == pytest.approx(1e6, rel=0.03)


def test_a_downlink_is_measured_slower_where_it_must_have_been_the_reason() -> None:
    gauge = Gauge()
    play(gauge, 20e6, 10e6, full=True, late=False)
    known = gauge.rate.down_bps
    # Others sent what they were to send, or the uplink took the time.
    for full, late in ((False, False), (True, True), (True, False)):
        play(gauge, 1e6, 1e6, full=full, late=late)
        assert gauge.rate.down_bps == known
    play(gauge, 1e6, 1e6, full=False, late=True)
    assert gauge.rate.down_bps == pytest.approx(1e6, rel=0.03)


def test_what_was_held_up_behind_a_lost_packet_is_no_speed() -> None:
    gauge, link = Gauge(), Link(2e6)
    for number in range(81):
        through = link.run(0.05)
        held = 0.2 * 2e6 if 40 <= number < 44 else 0  # and then goes at once
        gauge.sample(number / 20, int(through - held), 0)
    gauge.finish()
    assert gauge.rate.up_bps <= 1.3 * 2e6  # without a shortest stretch it would be 1.7


def test_of_what_moved_next_to_nothing_nothing_is_learned() -> None:
    gauge = Gauge()
    gauge.finish()
    stray = [(n / 10, 160 * n) for n in range(100)]  # what still passes to one that is cut off
    nothing = [(n / 10, 0) for n in range(100)]
    for samples in ([(0.0, 0)], [(0.0, 0), (0.1, 16_000)], nothing, stray, [(1.0, 5)] * 9):
        for now, through in samples:
            gauge.sample(now, through, through)
        gauge.finish()
        assert gauge.rate == Rate(up_bps=0.0, down_bps=0.0)


def test_a_long_exchange_is_remembered_in_bounded_space() -> None:
    gauge = Gauge()
    for number in range(20 * MAX_SAMPLES):
        gauge.sample(number / 20, number * 50_000, 0)
    assert len(gauge._samples) <= MAX_SAMPLES
    gauge.finish()
    assert gauge.rate.up_bps == pytest.approx(1e6, rel=0.03)


# -- believing --------------------------------------------------------------------------------

VECTOR = 100 * MB
HONEST = Rate(up_bps=1e7, down_bps=1e8)


class Swarm:
    """Eight peers, round by round: claims, a plan, what it takes on the true links.

    A reducer's slice is done when its links are done and everybody's contributions have come.
    """

    def __init__(self, noise: Callable[[], float] = lambda: 1.0) -> None:
        self.peers = [f"p{n}" for n in range(8)]
        self.links = dict.fromkeys(self.peers, HONEST)
        self.claims: dict[str, Rate] = {}
        self.says: dict[str, dict[str, Rate]] = {}  # liars about others
        self.trusts = {peer: Trust() for peer in self.peers}
        self.believed: dict[str, Rate] = {}
        self.shares: dict[str, float] = {}
        self._noise = noise

    def round(self) -> float:
        """How many times as long it took as it had to."""
        claims = self.links | self.claims
        views: dict[str, Mapping[str, Rate]] = {p: t.view for p, t in self.trusts.items()}
        self.believed = settle(claims, views | self.says)
        planned = parties(self.believed)
        division = divide(planned)
        self.shares = dict(zip(self.peers, division.shares, strict=True))
        true = parties(self.links)
        needed = times(planned, division.shares, division.fractions)
        took = times(true, division.shares, division.fractions)
        sends = {
            party.peer_id: fraction * (1 - share) / party.up_bps
            for party, share, fraction in zip(
                true, division.shares, division.fractions, strict=True
            )
        }
        sent = max(sends.values())

        def delivery(peer: str, needed: float, took: float) -> Delivery:
            return Delivery(
                believed=self.believed[peer],
                planned_s=division.seconds_per_byte * VECTOR,
                needed_s=needed * VECTOR,
                took_s=took * VECTOR * self._noise(),
            )

        for member, trust in self.trusts.items():
            trust.observe(
                {
                    peer: delivery(peer, needed[n], max(took[n], sent))
                    for n, peer in enumerate(self.peers)
                    if peer != member and self.shares[peer]
                },
                {
                    peer: delivery(
                        peer,
                        sends[peer] * self.links[peer].up_bps / self.believed[peer].up_bps,
                        sends[peer],
                    )
                    for peer in self.peers
                    if peer != member and self.shares[member]
                },
            )
        worst = max(max(took[n], sent) for n, peer in enumerate(self.peers) if self.shares[peer])
        return worst / divide(true).seconds_per_byte

    def factor(self, peer: str) -> float:
        return self.believed[peer].up_bps / (self.links | self.claims)[peer].up_bps


def parties(rates: Mapping[str, Rate]) -> list[Party]:
    return [
        Party(peer_id=peer, up_bps=rate.up_bps, down_bps=rate.down_bps)
        for peer, rate in rates.items()
    ]


@pytest.mark.parametrize("lie", [2.0, 10.0, 1e6])
def test_who_claims_too_much_delays_one_round(lie: float) -> None:
    swarm = Swarm()
    swarm.claims = {"p3": HONEST.times(lie)}
    assert swarm.round() > 1.25
    later = [swarm.round() for _ in range(60)]
    assert max(later) < 1.25
    assert sum(took > 1.01 for took in later) <= 10  # now and then it is tried again
    assert swarm.factor("p0") == 1


@pytest.mark.parametrize(
    "claim", [lambda n: 10.0 ** (n + 1), lambda n: 10.0 if n % 2 else 1.0, lambda n: 10.0 / (n + 1)]
)
def test_another_claim_does_not_get_it_believed(claim: Callable[[int], float]) -> None:
    swarm = Swarm()
    rounds = []
    for number in range(40):
        swarm.claims = {"p3": HONEST.times(claim(number))}
        rounds.append(swarm.round())
    assert sum(took > 1.25 for took in rounds) == 1


def test_who_claims_too_little_loses_its_own_share_alone() -> None:
    swarm = Swarm()
    swarm.claims = {"p3": HONEST.times(0.1)}
    for _ in range(5):
        assert swarm.round() < 1.1
    assert swarm.shares["p3"] < 0.02
    assert min(share for peer, share in swarm.shares.items() if peer != "p3") > 0.14


def test_unequal_links_are_no_lie() -> None:
    swarm = Swarm()
    swarm.links = {p: HONEST.times(1.5**n) for n, p in enumerate(swarm.peers)}
    for _ in range(20):
        assert swarm.round() < 1.01
        assert [swarm.factor(peer) for peer in swarm.peers] == [1.0] * 8


def test_a_link_that_recovers_regains_its_share() -> None:
    swarm = Swarm()
    swarm.claims = {"p3": HONEST}
    assert swarm.round() < 1.01
    swarm.links["p3"] = HONEST.times(0.1)
    slow = [swarm.round() for _ in range(15)]
    assert max(slow[1:]) <= 1.26  # its contribution at the limit of patience, and no share
    assert swarm.shares["p3"] == 0
    swarm.links["p3"] = HONEST
    for _ in range(8 + 12):  # until it is tried again, and 1.25^11 > 10
        swarm.round()
    assert swarm.shares["p3"] == pytest.approx(1 / 8)
    assert swarm.factor("p3") == 1


@pytest.mark.parametrize("seed", range(5))
def test_honest_peers_are_believed_whatever_the_noise(seed: int) -> None:
    rng = random.Random(seed)
    swarm = Swarm(lambda: rng.uniform(0.8, 1.2))
    for _ in range(50):
        swarm.round()
        # By every single member, not only by most.
        for trust in swarm.trusts.values():
            assert all(most.up_bps >= 0.8 * HONEST.up_bps for most in trust.view.values())
    swarm = Swarm(lambda: max(0.2, rng.gauss(1, 0.2)))
    for _ in range(50):
        swarm.round()
        assert min(map(swarm.factor, swarm.peers)) >= 0.8


def test_noise_hides_no_lie() -> None:
    rng = random.Random(1)
    swarm = Swarm(lambda: rng.uniform(0.8, 1.2))
    swarm.claims = {"p3": HONEST.times(10)}
    swarm.round()
    later = [swarm.round() for _ in range(50)]
    assert sum(later) / len(later) < 1.25
    assert max(later) < 1.6


def test_fewer_than_half_convince_nobody() -> None:
    slander = {f"p{n}": Rate(up_bps=1.0, down_bps=1.0) for n in range(3, 8)}
    swarm = Swarm()
    swarm.says = dict.fromkeys(("p0", "p1", "p2"), slander)
    assert swarm.round() < 1.01
    # Nor do they cover a liar among them, by saying nothing.
    swarm.says = {"p1": {}, "p2": {}}
    swarm.claims = {"p0": HONEST.times(10)}
    assert swarm.round() > 1.25
    assert max(swarm.round() for _ in range(10)) < 1.25


@given(st.integers(1, 9), st.lists(st.floats(0, 1e30), max_size=4), st.floats(1e3, 1e6))
def test_a_median_stays_within_what_the_honest_say(
    others: int, lies: list[float], honest: float
) -> None:
    lies = lies[: (others - 1) // 2]
    said = [*lies, *[honest] * (others - len(lies)), 1e9]  # the last one of itself
    views = {f"p{n}": {f"p{others}": Rate(up_bps=bps, down_bps=bps)} for n, bps in enumerate(said)}
    claims = {f"p{n}": Rate(up_bps=1e9, down_bps=1e9) for n in range(others + 1)}
    settled = settle(claims, views)
    assert settled.pop(f"p{others}") == Rate(up_bps=honest, down_bps=honest)
    assert set(settled.values()) == {claims["p0"]}


def test_half_of_the_others_cannot_slander() -> None:
    claims = dict.fromkeys(("a", "b", "c"), HONEST)
    assert settle(claims, {"a": {"b": HONEST.times(0.1)}, "b": {}, "c": {}}) == claims


def test_what_is_unknown_is_taken_for_usual() -> None:
    unknown = Rate(up_bps=0.0, down_bps=0.0)
    known = Rate(up_bps=4e6, down_bps=0.0)
    settled = settle({"a": unknown, "b": known, "c": known.times(2)}, {})
    assert [settled[p].up_bps for p in "abc"] == [6e6, 4e6, 8e6]
    assert len({settled[p].down_bps for p in "abc"}) == 1
    assert settled["a"].down_bps == 8e6  # wide enough to hold up nobody
    assert settle({"a": unknown}, {})["a"].up_bps > 0


def test_a_downlink_that_carried_all_that_others_sent_is_not_the_slower_one() -> None:
    rates = [(2e6, 3e6), (2e6, 1.1e6), (10e6, 2e6), (2e6, 0.9e6)]
    claims = {f"p{n}": Rate(up_bps=up, down_bps=down) for n, (up, down) in enumerate(rates)}
    settled = settle(claims, {})
    assert [settled[f"p{n}"].down_bps for n in range(4)] == [3e6, 2e6, 10e6, 0.9e6]
    # What the others have seen of it counts all the same.
    views = {f"p{n}": {"p2": Rate(up_bps=1e6, down_bps=1e6)} for n in (0, 1, 3)}
    assert settle(claims, views)["p2"] == Rate(up_bps=1e6, down_bps=1e6)


def test_no_claim_is_too_wild_to_plan_with() -> None:
    wild = [5e-324, 1.0, 1e30, 1.7e308]
    claims = {f"p{n}": Rate(up_bps=bps, down_bps=bps) for n, bps in enumerate(wild)}
    views = {"p0": {"p1": Rate(up_bps=5e-324, down_bps=0.0)}, "p2": {}}
    division = divide(parties(settle(claims, views)))
    assert math.isfinite(division.seconds_per_byte)
    assert sum(division.shares) == pytest.approx(1)


def delivery(took_s: float, believed: Rate = HONEST, planned_s: float = 10.0) -> Delivery:
    return Delivery(believed=believed, planned_s=planned_s, needed_s=planned_s, took_s=took_s)


def test_where_most_are_late_nobody_is_to_blame() -> None:
    trust = Trust()
    trust.observe({"a": delivery(40), "b": delivery(45), "c": delivery(38)}, {})
    assert trust.view == {}
    trust.observe({"a": delivery(40), "b": delivery(200), "c": delivery(40)}, {})
    assert trust.view == {"b": HONEST.times(0.2)}


def test_a_moment_is_not_late() -> None:
    trust = Trust()
    trust.observe({"a": delivery(0.1, planned_s=0.1), "b": delivery(LATE_S, planned_s=0.1)}, {})
    assert trust.view == {}


def test_a_sole_reducer_is_judged_by_the_plan() -> None:
    trust = Trust()
    trust.observe({"a": delivery(100)}, {})
    assert trust.view["a"].up_bps == pytest.approx(1e6)


def test_a_slice_that_never_came_costs_most_of_a_claim() -> None:
    trust = Trust()
    trust.observe({"a": delivery(math.inf), "b": delivery(10)}, {})
    assert trust.view == {"a": HONEST.times(NEVER_DONE)}
    trust = Trust()
    trust.observe({"a": delivery(math.inf), "b": delivery(math.inf)}, {})
    assert trust.view == {}


def test_one_of_whom_nothing_is_asked_is_believed_more_and_more() -> None:
    trust = Trust()
    trust.observe({"a": delivery(100), "b": delivery(10)}, {})
    for _ in range(4):
        trust.observe({"b": delivery(10)}, {})
    assert trust.view["a"].up_bps == pytest.approx(1e6 * RAISE**4)
    for _ in range(4000):
        trust.observe({"b": delivery(10)}, {})
    assert trust.view["a"].up_bps == MAX_BPS


def test_who_left_is_forgotten() -> None:
    trust = Trust()
    trust.observe({"a": delivery(100), "b": delivery(10)}, {})
    trust.keep(["b"])
    assert trust.view == {}


@pytest.mark.parametrize("planned_s", [0.0, -1.0, math.inf, math.nan])
def test_a_plan_takes_some_time(planned_s: float) -> None:
    with pytest.raises(ValueError, match="planned"):
        delivery(1.0, planned_s=planned_s)


@pytest.mark.parametrize("bps", [-1.0, math.inf, math.nan])
def test_a_rate_is_a_number(bps: float) -> None:
    with pytest.raises(ValueError, match="bandwidth"):
        Rate(up_bps=bps, down_bps=1.0)
