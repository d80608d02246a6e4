"""Downloads from played donors: slow, dead, frozen, busy, lying. A virtual clock, a seed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free import download as downloads
from coordinator_free import state as states
from coordinator_free.download import (
    BUSY_PATIENCE_S,
    PATIENCE_S,
    STALL_S,
    WINDOW,
    AskDigests,
    AskLeaf,
    Cancel,
    Download,
    Drop,
    Step,
)
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.state import Shape, State
from dht.errors import StateError

LAYOUT = "layout"
NUMEL = 150  # 15 + 15 leaves as they are cut here
TICK_S = 0.25
OFFER_S = 2.0


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves of 40 bytes, and a floor under the donors' speed that goes with them."""
    monkeypatch.setattr(states, "LEAF_ELEMENTS", 10)
    monkeypatch.setattr(downloads, "SLOWEST_BPS", 4.0)


def a_state(numel: int = NUMEL) -> State:
    generator = torch.Generator().manual_seed(1)
    shape = Shape.of(LAYOUT, numel, 1, OuterOptimizer(OuterConfig()))
    vectors = [[torch.randn(n, generator=generator) for n in each] for each in shape.lengths]
    return State.of(shape, vectors)


@dataclass
class Donor:
    """One uplink: leaves go one after the other, `leaf_s` each."""

    leaf_s: float = 0.1
    dies_at: float = float("inf")  # connections break
    freezes_at: float = float("inf")  # and stay open
    busy_until: float = 0.0
    has_it: bool = True
    lies: Callable[[int], bool] = lambda leaf: False
    lies_about_digests: bool = False
    free_at: float = 0.0
    sent: list[int] = field(default_factory=list)


class Play:
    """A download among such donors."""

    def __init__(
        self,
        donors: dict[str, Donor],
        *,
        come_at: dict[str, float] | None = None,
        numel: int = NUMEL,
    ) -> None:
        self.state = a_state(numel=numel)
        self.donors = donors
        self.come_at = come_at or {}
        self.download = Download(self.state.root, self.state.shape)
        self.now = 0.0
        self.dropped: list[Drop] = []
        self._events: list[tuple[float, int, Callable[[], list[Step]]]] = []
        self._order = itertools.count()
        self._cancelled: set[tuple[str, int]] = set()

    def run(self, limit_s: float = 1000.0) -> State:
        self._at(0.0, self._tick)
        self._at(0.0, self._offer)
        while not self.download.done:
            self.now, _, event = heapq.heappop(self._events)
            assert self.now < limit_s, "neither a state nor an error"
            self._do(event())
        return self.download.state()

    def _at(self, time: float, event: Callable[[], list[Step]]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _tick(self) -> list[Step]:
        self._at(self.now + TICK_S, self._tick)
        return self.download.tick(self.now)

    def _offer(self) -> list[Step]:
        self._at(self.now + OFFER_S, self._offer)
        there = [name for name in self.donors if self.come_at.get(name, 0.0) <= self.now]
        return self.download.offer(there, self.now)

    def _do(self, steps: list[Step]) -> None:
        for step in steps:
            match step:
                case AskDigests(name):
                    self._ask(name, None)
                case AskLeaf(name, leaf):
                    self._cancelled.discard((name, leaf))
                    self._ask(name, leaf)
                case Cancel(name, leaf):
                    self._cancelled.add((name, leaf))
                case Drop():
                    self.dropped.append(step)
        for name in self.donors:
            assert len(self._owes(name)) <= WINDOW

    def _owes(self, name: str) -> dict[int, float]:
        held = self.download._donors.get(name)
        return held.owes if held is not None else {}

    def _ask(self, name: str, leaf: int | None) -> None:
        donor, now = self.donors[name], self.now
        if now >= donor.dies_at:
            self._at(now + 0.01, lambda: self.download.failed(name, "refuses", self.now))
        elif now < donor.busy_until:
            self._at(now + 0.01, lambda: self.download.busy(name, self.now))
        elif not donor.has_it:
            self._at(now + 0.01, lambda: self.download.gone(name, self.now))
        else:
            donor.free_at = max(donor.free_at, now) + donor.leaf_s
            if donor.free_at < donor.freezes_at:
                self._at(donor.free_at, lambda: self._answer(name, leaf))

    def _answer(self, name: str, leaf: int | None) -> list[Step]:
        donor = self.donors[name]
        if self.now >= donor.dies_at:
            return self.download.failed(name, "broke off", self.now)
        if leaf is None:
            digests = self.state.digests
            if donor.lies_about_digests:
                digests[3] = digests[4]
            return self.download.digests(name, digests, self.now)
        if (name, leaf) in self._cancelled:
            return []
        donor.sent.append(leaf)
        payload = bytearray(self.state.leaf(leaf))
        if donor.lies(leaf):
            payload[0] ^= 1
        return self.download.leaf(name, leaf, bytes(payload), self.now)

    def reasons(self, name: str) -> list[str]:
        return [drop.reason for drop in self.dropped if drop.donor == name]


def assert_whole(play: Play, got: State) -> None:
    assert got.root == play.state.root
    assert got.digests == play.state.digests
    assert all(map(torch.equal, got.vectors(), play.state.vectors()))


# -- many donors ------------------------------------------------------------------------------


def test_four_donors_share_the_work_and_take_a_quarter_of_the_time() -> None:
    alone = Play({"a": Donor()})
    assert_whole(alone, alone.run())
    four = Play({name: Donor() for name in "abcd"})
    assert_whole(four, four.run())
    assert four.now < alone.now / 2.5
    assert all(5 <= len(donor.sent) <= 11 for donor in four.donors.values())


def test_a_faster_donor_gives_more() -> None:
    play = Play({"fast": Donor(leaf_s=0.05), "slow": Donor(leaf_s=0.2)})
    play.run()
    assert len(play.donors["fast"].sent) > 2.5 * len(play.donors["slow"].sent) > 0
    assert play.dropped == []


def test_the_last_leaves_of_a_slow_donor_come_from_a_fast_one() -> None:
    play = Play({"fast": Donor(leaf_s=0.01), "slow": Donor(leaf_s=5.0)})
    play.run()
    assert play.now < 5.5  # the slow one's first leaf is due then, its list of digests before
    assert play.donors["slow"].sent == []


def test_a_donor_that_comes_late_helps() -> None:
    play = Play({"a": Donor(leaf_s=0.5), "b": Donor(leaf_s=0.05)}, come_at={"b": 4.0})
    play.run()
    assert len(play.donors["b"].sent) > 10
    assert play.now < 8.0


# -- donors that fail -------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_lost_donor_owed_comes_from_the_others(frozen: bool) -> None:
    lost = Donor(freezes_at=0.5) if frozen else Donor(dies_at=0.5)
    play = Play({"lost": lost, "a": Donor(leaf_s=0.3)})
    assert_whole(play, play.run())
    assert 0 < len(lost.sent) <= 5
    # Nothing that had come was fetched again.
    assert not set(lost.sent) & set(play.donors["a"].sent)


def test_a_dawdler_is_dropped_by_the_measure_of_the_others() -> None:
    crowd = {name: Donor(leaf_s=0.1) for name in "ab"}
    play = Play({"dawdler": Donor(freezes_at=0.15), **crowd}, numel=10 * NUMEL)
    assert_whole(play, play.run())
    (drop,) = play.dropped
    assert (drop.donor, drop.reason, drop.lied) == ("dawdler", "dawdles", False)
    alone = Download(play.state.root, play.state.shape)
    alone.offer(["x"], 0.0)
    alone.digests("x", play.state.digests, 0.0)
    assert alone.tick(STALL_S + 9) == []  # the floor alone lets a leaf take ten seconds more
    assert [type(step) for step in alone.tick(STALL_S + 11)] == [Drop]


def test_a_slow_donor_is_kept_where_there_is_no_better_one() -> None:
    play = Play({"a": Donor(leaf_s=9.0)})  # a little faster than the floor
    assert_whole(play, play.run())
    assert play.dropped == []


def test_nothing_is_lost_when_all_donors_die_and_new_ones_come() -> None:
    first = {name: Donor(dies_at=0.6) for name in "ab"}
    play = Play({**first, "c": Donor()}, come_at={"c": PATIENCE_S - 4})
    assert_whole(play, play.run())
    early = {leaf for donor in first.values() for leaf in donor.sent}
    assert len(early) >= 4
    assert not early & set(play.donors["c"].sent)


def test_the_download_ends_when_nobody_is_left() -> None:
    play = Play({name: Donor(dies_at=0.6) for name in "ab"})
    with pytest.raises(StateError, match="nobody is left"):
        play.run()
    assert PATIENCE_S < play.now < PATIENCE_S + 10
    with pytest.raises(StateError, match="missing"):
        play.download.state()
    with pytest.raises(StateError, match="nobody is left"):
        Play({}).run()


def test_a_donor_that_broke_off_is_asked_again_when_nobody_else_is_left() -> None:
    play = Play({"a": Donor()})
    original = play._answer
    broken = []

    def once(name: str, leaf: int | None) -> list[Step]:
        if leaf == 7 and not broken:
            broken.append(leaf)
            return play.download.failed(name, "broke off", play.now)
        return original(name, leaf)

    play._answer = once  # type: ignore[method-assign]
    assert_whole(play, play.run())
    assert play.reasons("a") == ["broke off"]


def test_a_busy_donor_is_asked_again_later_and_one_without_the_state_is_not() -> None:
    play = Play(
        {"a": Donor(leaf_s=0.6), "busy": Donor(busy_until=5.0), "other": Donor(has_it=False)}
    )
    play.run()
    assert len(play.reasons("busy")) >= 2
    assert len(play.donors["busy"].sent) > 3
    assert play.reasons("other") == ["has not got this state"]


def test_busy_donors_are_waited_for_and_not_for_ever() -> None:
    play = Play({name: Donor(busy_until=PATIENCE_S * 2) for name in "ab"})
    assert_whole(play, play.run())
    play = Play({name: Donor(busy_until=10**9) for name in "ab"})
    with pytest.raises(StateError, match="nobody is left"):
        play.run()
    assert play.now < BUSY_PATIENCE_S + 10


def test_a_state_that_nobody_has_any_more_is_patient_at_once() -> None:
    play = Play({name: Donor(has_it=False) for name in "abc"})
    with pytest.raises(StateError, match="nobody is left"):
        play.run()
    assert play.now < 3


# -- donors that lie --------------------------------------------------------------------------


def test_a_liar_is_named_and_never_asked_again() -> None:
    play = Play({"liar": Donor(lies=lambda leaf: leaf % 2 == 1), "a": Donor()})
    assert_whole(play, play.run())
    assert play.download.liars == {"liar"}
    assert [drop.lied for drop in play.dropped] == [True]
    assert len(play.donors["liar"].sent) <= WINDOW + 1


def test_only_liars_lead_to_an_error() -> None:
    play = Play({name: Donor(lies=lambda leaf: leaf == 29) for name in "ab"})
    with pytest.raises(StateError, match="nobody is left"):
        play.run()
    assert play.download.liars == {"a", "b"}


def test_a_list_of_digests_without_the_root_is_a_lie() -> None:
    play = Play({"liar": Donor(lies_about_digests=True), "a": Donor()})
    assert_whole(play, play.run())
    assert play.download.liars == {"liar"}
    digests = play.state.digests
    for wrong in ([], digests[:-1], [*digests, digests[0]], digests[::-1], [b""] * len(digests)):
        fresh = Download(play.state.root, play.state.shape)
        assert fresh.offer(["x"], 0.0) == [AskDigests("x")]
        assert [type(step) for step in fresh.digests("x", wrong, 0.0)] == [Drop]
        assert fresh.liars == {"x"}


@pytest.mark.parametrize("payload", [b"", bytes(39), bytes(41), bytes(40)])
def test_a_leaf_of_another_length_or_content_is_a_lie(payload: bytes) -> None:
    state = a_state()
    download = Download(state.root, state.shape)
    download.offer(["x"], 0.0)
    steps = download.digests("x", state.digests, 0.0)
    assert steps == [AskLeaf("x", 0)]
    (drop,) = download.leaf("x", 0, payload, 0.1)
    assert isinstance(drop, Drop)
    assert drop.lied


def test_what_was_not_asked_for_is_ignored() -> None:
    state = a_state()
    digests = state.digests
    download = Download(state.root, state.shape)
    assert download.digests("stranger", digests, 0.0) == []
    download.offer(["x"], 0.0)
    assert download.leaf("x", 0, state.leaf(0), 0.0) == []
    download.digests("x", digests, 0.0)
    assert download.leaf("x", 5, state.leaf(5), 0.0) == []
    assert download.leaf("stranger", 0, state.leaf(0), 0.0) == []
    assert download.received == {}


# -- the law ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32))
def test_whatever_happens_the_result_is_the_state_or_an_error(seed: int) -> None:
    rng = random.Random(seed)

    def one() -> Donor:
        donor = Donor(leaf_s=rng.choice([0.01, 0.1, 0.5, 3.0]))
        fault = rng.choice(["none", "none", "dies", "freezes", "lies", "digests", "busy", "gone"])
        when = rng.uniform(0, 8)
        if fault == "dies":
            donor.dies_at = when
        elif fault == "freezes":
            donor.freezes_at = when
        elif fault == "lies":
            chance = random.Random(seed + 1)
            donor.lies = lambda leaf: chance.random() < 0.2
        elif fault == "digests":
            donor.lies_about_digests = True
        elif fault == "busy":
            donor.busy_until = when
        elif fault == "gone":
            donor.has_it = False
        return donor

    names = [f"d{number}" for number in range(rng.randint(1, 6))]
    play = Play(
        {name: one() for name in names},
        come_at={name: rng.choice([0.0, 0.0, rng.uniform(0, 15)]) for name in names},
    )
    honest = {
        name
        for name, donor in play.donors.items()
        if not donor.lies_about_digests and donor.lies is Donor.lies
    }
    lasting = [
        name
        for name in honest
        if play.donors[name].has_it
        and play.donors[name].dies_at == play.donors[name].freezes_at == float("inf")
    ]
    try:
        got = play.run()
    except StateError:
        # All who were there said that they have not got it, or nobody lasting came in time.
        patient = all(donor.has_it for donor in play.donors.values())
        assert not any(
            play.come_at[name] < (PATIENCE_S / 2 if patient else 0.1) for name in lasting
        )
    else:
        assert_whole(play, got)
    assert play.download.liars <= set(names) - honest
