"""One peer's own part of a round, against rounds that are written down and parameters that are
plain numbers."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator_free import local as module
from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.handoff import Assignment, RoundResult
from coordinator_free.local import KEPT, LocalLoop, Turn
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.pace import LocalConfig
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.recipe import check, feeds_back
from coordinator_free.state import Fragment, Shape, State
from dht.errors import ConfigError, RoundError

PLAIN = OuterOptimizer(OuterConfig(kind="sgd"))
PIECE = ALIGN_ELEMENTS
SAMPLES = 3  # of a step


class Parameters:
    """What is trained: a vector, and what was ever written into it."""

    def __init__(self, numel: int) -> None:
        self.w_N = torch.full((numel,), float("nan"))
        self.gradient_N = torch.zeros(numel)
        self.writes: list[tuple[int, int]] = []

    def read(self, out: Tensor, /, *, start: int, stop: int) -> Tensor:
        return out.copy_(self.w_N[start:stop])

    def write(self, vector_S: Tensor, /, *, start: int, stop: int) -> None:
        assert len(vector_S) == stop - start
        self.writes.append((start, stop))
        self.w_N[start:stop] = vector_S

    def gradient(self, out: Tensor, /) -> Tensor:
        return out.copy_(self.gradient_N)


@dataclass(kw_only=True)
class Ends:
    """How a round ends.

    Attributes:
        theta: of the fragment that it averages, afterwards.
        spans: where this peer's work is in it; None: everywhere.
        of: the round that the result is about; None: of the one that was handed in for.
        next: the round that follows; None: the next one.
        void: the swarm went on from another state instead.
        over: there is no further round.
    """

    theta: Tensor
    spans: tuple[tuple[int, int], ...] | None = None
    of: int | None = None
    next: int | None = None
    void: bool = False
    over: bool = False


@dataclass
class Swarm:
    """A session whose rounds end as the script says."""

    state: State
    script: Iterator[Ends] = field(default_factory=lambda: iter(()))
    round: int = 0
    hurried: bool = False
    handed_in: list[tuple[int, Tensor, int]] = field(default_factory=list)
    reported: list[int] = field(default_factory=list)
    waits: int = 0  # for the end of a round
    _given: bool = False
    _over: bool = False

    def next_assignment(self) -> Assignment | None:
        assert not self._given, "the next work comes after a result"
        self._given = True
        if self._over:
            return None
        return Assignment(
            round=self.round,
            seat=0,
            seats=2,
            samples=100 * self.round,
            state=self.state,
            closing=threading.Event(),
        )

    def hand_in(self, update_E: Tensor, samples: int) -> bool:
        self.handed_in.append((self.round, update_E.clone(), samples))
        return bool(update_E.isfinite().all())

    def progress(self, samples: int) -> None:
        self.reported.append(samples)

    def result(self) -> RoundResult:
        ended = next(self.script)
        self.waits += 1
        round, number = self.round, self.state.shape.fragment(self.round)
        theta_E = ended.theta.expand(self.state.shape.averaged(round)).clone()
        moments = self.state.fragments[number].vectors[1:]
        self.state = self.state.then(number, Fragment.of((theta_E, *moments)))
        self.round = round + 1 if ended.next is None else ended.next
        self._given, self._over, self.hurried = False, ended.over, False
        if ended.void:
            raise RoundError(round, "the swarm went on from another state")
        whole = ((0, len(theta_E)),)
        return RoundResult(
            round=round if ended.of is None else ended.of,
            spans=whole if ended.spans is None else ended.spans,
            members=2,
            digest=self.state.root.hex(),
            samples=self.handed_in[-1][2],
            total_samples=40,
            bytes_sent=0,
            bytes_received=0,
            allreduce_s=0.1,
            commit_s=0.1,
            round_s=0.2,
        )


@dataclass
class Play:
    """A loop among these, and what it did."""

    swarm: Swarm
    parameters: Parameters
    loop: LocalLoop

    @classmethod
    def of(
        cls,
        theta_N: Tensor,
        *script: Ends,
        round: RoundConfig | None = None,
        fragments: int = 1,
        **local: object,
    ) -> Play:
        round = round or RoundConfig(codec="fp32", fragments=fragments)
        shape = Shape.of("layout", len(theta_N), fragments, PLAIN)
        swarm = Swarm(State.begin(shape, theta_N.clone()), iter(script))
        parameters = Parameters(len(theta_N))
        settings = LocalConfig(**{"local_steps": 2, **local})  # type: ignore[arg-type]
        play = cls(swarm, parameters, LocalLoop(swarm, parameters, round, settings))
        assert play.loop.begin() is not None
        assert torch.equal(parameters.w_N, theta_N)
        return play

    def step(self, change: float | Tensor = 0.0) -> Turn | None:
        """An optimizer step that moves every parameter by this."""
        self.parameters.w_N += change
        return self.loop.stepped(SAMPLES)

    def turn(self, *changes: float | Tensor) -> Turn:
        """Steps, of which the last one ends a round."""
        *before, last = changes
        for change in before:
            assert self.step(change) is None
        turn = self.step(last)
        assert turn is not None
        return turn

    @property
    def updates(self) -> list[Tensor]:
        return [update_E for _, update_E, _ in self.swarm.handed_in]

    @property
    def w(self) -> list[float]:
        return self.parameters.w_N.tolist()  # type: ignore[no-any-return]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


def near(update: Tensor, *expected: float) -> bool:
    return torch.allclose(update, tensor(*expected), atol=1e-6)


# -- without a delay --------------------------------------------------------------------------


def test_whoever_waits_trains_on_from_the_state_and_hands_in_how_far_it_went() -> None:
    ends = [Ends(theta=tensor(10.0)), Ends(theta=tensor(20.0)), Ends(theta=tensor(30.0))]
    play = Play.of(tensor(1.0, 2.0), *ends)
    turn = play.turn(0.5, 0.25)
    assert play.w == [10.0, 10.0]  # Theta, to the bit
    play.turn(-1.0, -1.0)
    assert play.w == [20.0, 20.0]
    play.turn(tensor(1.0, 0.0), tensor(0.0, 4.0))
    assert play.w == [30.0, 30.0]
    assert [update.tolist() for update in play.updates] == [[-0.75, -0.75], [2, 2], [-1, -4]]
    assert [(round, samples) for round, _, samples in play.swarm.handed_in] == [
        (0, 6),
        (1, 6),
        (2, 6),
    ]
    assert turn.result is not None
    assert (turn.result.round, turn.steps, turn.restarted) == (0, 2, False)
    assert turn.work is not None
    assert (turn.work.round, play.loop.round, play.loop.steps) == (1, 3, 0)


def test_of_several_fragments_a_round_writes_one() -> None:
    theta_N = torch.zeros(3 * PIECE)
    ends = [Ends(theta=tensor(float(n))) for n in (10, 20, 30, 40)]
    play = Play.of(theta_N, *ends, fragments=3, local_steps=3)
    play.parameters.writes.clear()
    for n in range(4):
        play.turn(1.0)
        assert play.parameters.writes == [(PIECE * (n % 3), PIECE * (n % 3 + 1))]
        play.parameters.writes.clear()
    # A step before its turn: each fragment is trained on while others are averaged.
    assert [update[0].item() for update in play.updates] == [-1.0, -2.0, -3.0, -3.0]
    assert [part[0].item() for part in play.parameters.w_N.split(PIECE)] == [40.0, 22.0, 31.0]


def test_steps_are_shared_out_among_the_rounds() -> None:
    ends = [Ends(theta=tensor(0.0)) for _ in range(6)]
    play = Play.of(torch.zeros(3 * PIECE), *ends, fragments=3, local_steps=7)
    turns = []
    while len(turns) < 6:
        assert play.loop.due_steps == [2, 2, 3][play.loop.round % 3]
        turn = play.step()
        turns += [turn] if turn is not None else []
    assert [turn.steps for turn in turns] == [2, 2, 3, 2, 2, 3]


def test_what_was_taken_up_stays_as_others_gave_it() -> None:
    """A state is shared: whoever trains from it must not change it."""
    play = Play.of(torch.zeros(2 * PIECE), *[Ends(theta=tensor(1.0))] * 8, fragments=2)
    root = None
    for _ in range(8):
        play.turn(0.5)
        states = play.swarm.state
        again = State.of(states.shape, [fragment.vectors for fragment in states.fragments])
        assert again.root == states.root != root
        root = states.root if root is None else root


# -- delay and mixing -------------------------------------------------------------------------


def test_what_was_trained_while_the_exchange_ran_is_mixed_in_and_handed_in_whole() -> None:
    ends = [Ends(theta=tensor(v)) for v in (10.0, 20.0, 30.0)]
    play = Play.of(tensor(0.0), *ends, local_steps=4, delay_steps=2, mixing=0.25)
    for _ in range(3):
        assert play.step(1.0) is None
    assert play.step(1.0) is None  # handed in, and trained on
    assert play.updates[-1].tolist() == [-4.0]
    assert (play.swarm.waits, play.loop.round, play.loop.steps) == (0, 1, 0)
    assert play.step(0.5) is None
    turn = play.step(0.5)
    # p = 1: w = 10 + 0.25 * 1, and it is counted from ref = w - 1.
    assert turn is not None
    assert turn.steps == 4
    assert play.w == [10.25]
    assert play.step(2.0) is None
    assert play.step(2.0) is None
    # D = 9.25 - 14.25: the 1 that was trained meanwhile and the 4 since, whatever was mixed in.
    assert play.updates[-1].tolist() == [-5.0]
    play.turn(0.0, 0.0)
    assert play.w == [20.0]
    assert [samples for _, _, samples in play.swarm.handed_in] == [12, 12]


@pytest.mark.parametrize(("mixing", "expected"), [(0.0, 10.0), (0.5, 12.0), (1.0, 14.0)])
def test_mixing_keeps_its_share(mixing: float, expected: float) -> None:
    ends = [Ends(theta=tensor(10.0)), Ends(theta=tensor(20.0))]
    play = Play.of(tensor(0.0), *ends, local_steps=2, delay_steps=1, mixing=mixing)
    assert play.step(1.0) is None
    assert play.step(1.0) is None
    play.turn(4.0)
    assert play.w == [expected]
    assert play.step(1.0) is None
    assert play.updates[-1].tolist() == [-5.0]


def test_a_delay_as_long_as_a_round_takes_up_one_and_hands_in_the_next_at_one_step() -> None:
    ends = [Ends(theta=tensor(v)) for v in (10.0, 20.0)]
    play = Play.of(tensor(0.0), *ends, local_steps=2, delay_steps=2, mixing=0.5)
    assert play.step(1.0) is None
    assert play.step(1.0) is None
    turn = play.turn(1.0, 1.0)
    assert turn.result is not None
    assert turn.result.round == 0
    # p = 2: w = 10 + 1 = 11, ref = 9, and D = ref - w at once.
    assert play.w == [11.0]
    assert [update.tolist() for update in play.updates] == [[-2.0], [-2.0]]
    play.turn(0.5, 0.5)
    assert play.w == [20.5]


def test_overlapping_fragments_follow_the_same_formulas_each() -> None:
    """By hand, two fragments, two steps a round, one of them while the exchange runs."""
    ends = [Ends(theta=tensor(v)) for v in (10.0, 20.0, 30.0)]
    play = Play.of(
        torch.zeros(2 * PIECE), *ends, fragments=2, local_steps=4, delay_steps=1, mixing=0.5
    )
    for _ in range(2):
        assert play.step(1.0) is None
    turn = play.step(1.0)  # w = 3; of the first, 1 since it was handed in
    assert turn is not None
    first, second = (part[0].item() for part in play.parameters.w_N.split(PIECE))
    assert (first, second) == (10.5, 3.0)
    assert play.step(1.0) is None  # hands in the second: 4 since the beginning
    assert [update[0].item() for update in play.updates] == [-2.0, -4.0]
    assert play.step(1.0) is not None
    first, second = (part[0].item() for part in play.parameters.w_N.split(PIECE))
    assert (first, second) == (12.5, 20.5)
    assert play.step(1.0) is None
    # ref = 10.5 - 1, w = 13.5.
    assert play.updates[-1][0].item() == -4.0


# -- error feedback ---------------------------------------------------------------------------


def cut_off(update_E: Tensor, name: str) -> Tensor:
    """What a codec leaves of a vector, subtracted from it."""
    coding = codec(name)
    decoded_E = torch.zeros(len(update_E))
    coding.decode_add(coding.encode(update_E), len(update_E), 1.0, decoded_E)
    return update_E - decoded_E


@pytest.mark.parametrize("name", ["int2", "int1", "int4", "top64"])
def test_what_the_codec_cuts_off_is_in_the_next_contribution(name: str) -> None:
    numel = 2 * PIECE
    torch.manual_seed(3)
    ends = [Ends(theta=tensor(float(n))) for n in range(1, 4)]
    round = RoundConfig(codec=name)
    play = Play.of(torch.zeros(numel), *ends, round=round, local_steps=1, feedback="auto")
    residual_N = torch.zeros(numel)
    for n in range(3):
        change_N = torch.randn(numel)
        before_N = play.parameters.w_N.clone()
        play.turn(change_N)
        expected_N = residual_N + (before_N - (before_N + change_N))
        assert torch.allclose(play.updates[n], expected_N, atol=1e-6)
        if feeds_back(LocalConfig(), name):
            residual_N = cut_off(play.updates[n], name)
            assert residual_N.abs().max() > 0
    assert feeds_back(LocalConfig(), name) == codec(name).needs_feedback


def test_feedback_is_for_what_is_in_the_mean_alone() -> None:
    numel = 4 * PIECE
    torch.manual_seed(4)
    inside = ((0, PIECE), (2 * PIECE, 3 * PIECE))
    ends = [
        Ends(theta=tensor(1.0)),
        Ends(theta=tensor(2.0), spans=inside),
        Ends(theta=tensor(3.0), spans=()),
        Ends(theta=tensor(4.0)),
    ]
    round = RoundConfig(codec="int2")
    play = Play.of(torch.zeros(numel), *ends, round=round, local_steps=1)
    play.turn(torch.randn(numel))
    first_N = cut_off(play.updates[0], "int2")
    play.turn(torch.randn(numel))
    second_N = first_N.clone()  # it stays where the second is not in the mean
    for start, stop in inside:
        second_N[start:stop] = cut_off(play.updates[1], "int2")[start:stop]
    # What missed the mean is in the parameters by half, not in the residual as well.
    reference_N = torch.full((numel,), 2.0)
    before_N = play.parameters.w_N.clone()
    play.turn(change_N := torch.randn(numel))
    expected_N = second_N + reference_N - (before_N + change_N)
    assert torch.allclose(play.updates[2], expected_N, atol=1e-5)
    play.parameters.w_N.fill_(3.0)  # as if it had not trained at all
    play.turn(0.0)
    assert torch.allclose(play.updates[3], second_N, atol=1e-6)  # nothing of the third was averaged


def test_feedback_is_worked_out_in_the_bytes_that_were_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In segments of another length than the chunks, as long as no block is split."""
    monkeypatch.setattr(module, "SEGMENT", PIECE)
    numel = 3 * PIECE + 100
    torch.manual_seed(5)
    ends = [Ends(theta=tensor(1.0)), Ends(theta=tensor(1.0))]
    play = Play.of(torch.zeros(numel), *ends, round=RoundConfig(codec="int2"), local_steps=1)
    play.turn(torch.randn(numel))
    play.turn(0.0)
    assert torch.equal(play.updates[1], cut_off(play.updates[0], "int2"))


def test_every_fragment_has_a_residual_of_its_own() -> None:
    torch.manual_seed(6)
    ends = [Ends(theta=tensor(0.0)) for _ in range(4)]
    round = RoundConfig(codec="int2", fragments=2)
    play = Play.of(torch.zeros(2 * PIECE), *ends, round=round, fragments=2)
    play.turn(torch.randn(2 * PIECE))
    play.parameters.w_N[PIECE:] = torch.randn(PIECE)
    play.turn(0.0)
    for _ in range(2):
        play.parameters.w_N.zero_()
        play.turn(0.0)
    for number in (0, 1):
        left_E = cut_off(play.updates[number], "int2")
        assert torch.allclose(play.updates[number + 2], left_E, atol=1e-6)


# -- rounds that were missed ------------------------------------------------------------------


def test_half_of_the_work_that_missed_its_round_is_kept_and_counts_once() -> None:
    assert KEPT == 0.5
    ends = [Ends(theta=tensor(10.0), spans=()), Ends(theta=tensor(20.0))]
    play = Play.of(tensor(0.0, 0.0), *ends, local_steps=1)
    turn = play.turn(tensor(4.0, -2.0))
    assert play.w == [12.0, 9.0]
    assert turn.result is not None
    assert not turn.result.included
    play.turn(1.0)
    # Counted from Theta: what was kept goes into the next mean.
    assert play.updates[1].tolist() == [-3.0, 0.0]
    assert play.w == [20.0, 20.0]


def test_a_part_that_missed_is_kept_by_half_and_the_rest_is_taken_up() -> None:
    numel = 3 * PIECE
    spans = ((PIECE, 2 * PIECE),)
    play = Play.of(torch.zeros(numel), Ends(theta=tensor(10.0), spans=spans), local_steps=1)
    play.turn(4.0)
    assert [part.unique().tolist() for part in play.parameters.w_N.split(PIECE)] == [
        [12.0],
        [10.0],
        [12.0],
    ]


def test_with_a_delay_what_missed_is_all_since_the_reference() -> None:
    spans = ((0, PIECE),)
    ends = [Ends(theta=tensor(10.0), spans=spans), Ends(theta=tensor(20.0))]
    play = Play.of(torch.zeros(2 * PIECE), *ends, local_steps=2, delay_steps=1, mixing=0.5)
    assert play.step(1.0) is None
    assert play.step(1.0) is None
    play.turn(2.0)
    # In the mean: 10 + 0.5 * 2. Not in it: 10 + 0.5 * (4 - 0).
    taken, missed = (part.unique().tolist() for part in play.parameters.w_N.split(PIECE))
    assert (taken, missed) == ([11.0], [12.0])
    assert play.step(0.0) is None
    # Counted from 11 - 2, and from 10.
    taken, missed = (part.unique().tolist() for part in play.updates[-1].split(PIECE))
    assert (taken, missed) == ([-2.0], [-2.0])


@pytest.mark.parametrize("delay", [0, 1])
def test_a_result_of_a_later_round_says_nothing_about_this_work(delay: int) -> None:
    """The swarm went on without this peer: its spans are of work that it never handed in."""
    late = Ends(theta=tensor(10.0), of=3, next=4)
    ends = [late, Ends(theta=tensor(20.0))]
    play = Play.of(tensor(0.0), *ends, local_steps=1, delay_steps=delay)
    turn = play.turn(*[4.0, 0.0][: delay + 1])
    assert play.w == [12.0]
    assert turn.work is not None
    assert turn.work.round == 4


def test_a_fragment_that_moved_without_this_peer_is_taken_up_by_the_same_rule() -> None:
    """It was away for a round: what it had trained in that fragment is kept by half."""
    ends = [Ends(theta=tensor(10.0)), Ends(theta=tensor(20.0))]
    play = Play.of(torch.zeros(3 * PIECE), *ends, fragments=3, local_steps=3)
    shape = play.swarm.state.shape
    honest = play.swarm.result

    def two_rounds() -> RoundResult:
        result = honest()
        state = play.swarm.state
        assert shape.fragment(play.swarm.round) == 1
        moved = Fragment.of((torch.full((PIECE,), 50.0),))
        play.swarm.state, play.swarm.round = state.then(1, moved), 2
        return result

    play.swarm.result = two_rounds  # type: ignore[method-assign]
    play.turn(4.0)
    first, second, third = (part[0].item() for part in play.parameters.w_N.split(PIECE))
    assert (first, second, third) == (10.0, 50.0 + 0.5 * 4.0, 4.0)


# -- void work, ends and hurry ----------------------------------------------------------------


@pytest.mark.parametrize("delay", [0, 1])
def test_work_that_is_void_begins_anew_from_what_the_swarm_has(delay: int) -> None:
    ends = [
        Ends(theta=tensor(5.0)),
        Ends(theta=tensor(10.0), void=True, next=7),
        Ends(theta=tensor(20.0)),
    ]
    round = RoundConfig(codec="int2")
    numel = PIECE
    torch.manual_seed(8)
    play = Play.of(torch.zeros(numel), *ends, round=round, local_steps=1, delay_steps=delay)
    changes = [torch.randn(numel) for _ in range(4)]
    for change_N in changes[: 2 + delay]:
        turn = play.step(change_N)
    assert turn is not None
    assert turn.restarted
    assert turn.result is None
    assert turn.work is not None
    assert (turn.work.round, play.loop.round, play.loop.steps) == (7, 7, 0)
    assert play.w == [10.0] * numel  # everything, whatever was trained meanwhile
    before = len(play.updates)
    play.step(-1.0)
    # No residual and no progress of before is in it.
    assert torch.equal(play.updates[before], torch.ones(numel))


def test_the_end_of_the_run_leaves_its_last_parameters() -> None:
    play = Play.of(tensor(0.0), Ends(theta=tensor(10.0), over=True), local_steps=1)
    turn = play.turn(3.0)
    assert turn.work is None
    assert turn.result is not None
    assert turn.result.round == 0
    assert play.w == [10.0]


def test_a_run_that_is_over_before_it_begins_is_no_work() -> None:
    shape = Shape.of("layout", 1, 1, PLAIN)
    swarm = Swarm(State.begin(shape, torch.zeros(1)), _over=True)
    parameters = Parameters(1)
    loop = LocalLoop(swarm, parameters, RoundConfig(codec="fp32"), LocalConfig())
    assert loop.begin() is None
    assert parameters.writes == []


def test_whoever_is_waited_for_hands_in_what_it_has() -> None:
    ends = [Ends(theta=tensor(10.0)), Ends(theta=tensor(20.0))]
    play = Play.of(tensor(0.0), *ends, local_steps=50)
    assert play.step(1.0) is None
    play.swarm.hurried = True
    turn = play.turn(1.0)
    assert (turn.steps, play.updates[0].tolist()) == (2, [-2.0])
    assert play.swarm.handed_in[0][2] == 2 * SAMPLES
    assert play.step(1.0) is None  # the hurry is over


def test_hurry_takes_up_what_is_under_way_first() -> None:
    ends = [Ends(theta=tensor(10.0)), Ends(theta=tensor(20.0))]
    play = Play.of(tensor(0.0), *ends, local_steps=10, delay_steps=8, mixing=1.0)
    for _ in range(10):
        assert play.step(1.0) is None
    assert len(play.updates) == 1
    assert play.step(1.0) is None
    play.swarm.hurried = True
    turn = play.step(1.0)
    assert turn is not None
    assert play.swarm.waits == 1
    assert [round for round, _, _ in play.swarm.handed_in] == [0, 1]
    # Both steps since the first are in the second, which is handed in at once.
    assert play.updates[1].tolist() == [-2.0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_work_ends_by_the_clock_as_well(clock: Callable[[float], None]) -> None:
    ends = [Ends(theta=tensor(float(n))) for n in range(3)]
    play = Play.of(tensor(0.0), *ends, local_steps=50, work_s=10.0)
    for _ in range(3):
        clock(3.0)
        assert play.step(1.0) is None
    clock(3.0)
    assert play.turn(1.0).steps == 4
    clock(9.0)
    assert play.step(1.0) is None  # from the beginning of this round
    clock(1.0)
    assert play.turn(1.0).steps == 2


def test_the_wait_for_a_round_is_none_of_the_next_ones_time(
    clock: Callable[[float], None],
) -> None:
    ends = [Ends(theta=tensor(float(n))) for n in range(3)]
    play = Play.of(tensor(0.0), *ends, local_steps=50, work_s=10.0)
    honest = play.swarm.result

    def slow() -> RoundResult:
        clock(60.0)
        return honest()

    play.swarm.result = slow  # type: ignore[method-assign]
    clock(11.0)
    assert play.turn(1.0).wait_s == 60.0
    clock(9.0)
    assert play.step(1.0) is None


def test_with_a_delay_a_rounds_time_is_from_hand_in_to_hand_in(
    clock: Callable[[float], None],
) -> None:
    ends = [Ends(theta=tensor(float(n))) for n in range(3)]
    play = Play.of(tensor(0.0), *ends, local_steps=50, delay_steps=1, work_s=10.0)
    clock(11.0)
    assert play.step(1.0) is None
    assert len(play.updates) == 1
    clock(6.0)
    assert play.step(1.0) is not None
    clock(5.0)
    assert play.step(1.0) is None
    assert len(play.updates) == 2


# -- what is not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("delay_steps", [0, 1])
def test_who_trained_something_that_is_no_number_begins_again_from_the_swarm(
    delay_steps: int,
) -> None:
    ends = [Ends(theta=tensor(float(n + 1)), spans=()) for n in range(3)]
    play = Play.of(
        torch.zeros(2 * PIECE), *ends, fragments=2, local_steps=4, delay_steps=delay_steps
    )
    turn = play.turn(float("nan"), *[0.0] * (1 + delay_steps))
    assert turn.restarted
    assert turn.result is not None
    assert turn.result.round == 0
    # The other fragment, which was in no exchange, too.
    assert play.parameters.w_N.tolist() == [1.0] * PIECE + [0.0] * PIECE
    turn = play.turn(*[0.5] * (2 + delay_steps))
    assert not turn.restarted
    assert play.updates[-1].isfinite().all()


# -- gradients --------------------------------------------------------------------------------

GRADIENT = RoundConfig(mode="gradient", target_batch=10, codec="fp32")


def test_in_gradient_mode_a_round_is_a_batch() -> None:
    ends = [Ends(theta=tensor(10.0)), Ends(theta=tensor(20.0))]
    play = Play.of(tensor(1.0, 2.0), *ends, round=GRADIENT, local_steps=30)
    play.parameters.gradient_N = tensor(0.5, -0.5)
    assert [play.step() for _ in range(3)] == [None] * 3
    turn = play.turn(0.0)  # 12 samples
    assert play.swarm.reported == [3, 6, 9, 12]
    assert play.updates[0].tolist() == [0.5, -0.5]
    assert play.swarm.handed_in[0][2] == 12
    assert turn.steps == 4
    assert play.w == [10.0, 10.0]
    play.swarm.hurried = True  # all together had enough
    play.turn(0.0)
    assert play.swarm.reported[4:] == [3]
    assert play.swarm.handed_in[1][2] == 3
    assert play.w == [20.0, 20.0]


@pytest.mark.parametrize("spans", [(), ((0, 1),), None])
def test_in_gradient_mode_all_is_as_the_swarm_has_it_whatever_happened(
    spans: tuple[tuple[int, int], ...] | None,
) -> None:
    ends = [Ends(theta=tensor(10.0), spans=spans), Ends(theta=tensor(20.0), spans=spans)]
    play = Play.of(tensor(1.0, 2.0), *ends, round=GRADIENT, local_steps=0, delay_steps=5)
    play.parameters.gradient_N = tensor(0.5, -0.5)
    for expected in (10.0, 20.0):
        play.turn(*[0.0] * 4)
        assert play.w == [expected] * 2
        assert play.updates[-1].tolist() == [0.5, -0.5]


def test_in_gradient_mode_what_is_cut_off_is_fed_back() -> None:
    torch.manual_seed(9)
    ends = [Ends(theta=tensor(1.0)), Ends(theta=tensor(2.0))]
    round = RoundConfig(mode="gradient", target_batch=3, codec="int2")
    play = Play.of(torch.zeros(PIECE), *ends, round=round, local_steps=30)
    play.parameters.gradient_N = torch.randn(PIECE)
    play.turn(0.0)
    play.turn(0.0)
    expected_N = play.parameters.gradient_N + cut_off(play.updates[0], "int2")
    assert torch.allclose(play.updates[1], expected_N, atol=1e-6)


# -- a law ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_step_is_handed_in_once_whatever_the_delay_and_the_mixing(
    data: st.DataObject,
) -> None:
    """Where a peer is in every mean, its contributions add up to the steps that it took."""
    fragments = data.draw(st.integers(1, 3))
    steps = data.draw(st.integers(fragments, 9))
    delay = data.draw(st.integers(0, steps // fragments))
    mixing = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    changes = data.draw(st.lists(st.integers(-8, 8), min_size=30, max_size=30))
    thetas = data.draw(st.lists(st.integers(-8, 8), min_size=31, max_size=31))
    play = Play.of(
        torch.zeros(fragments * PIECE),
        *(Ends(theta=tensor(float(theta))) for theta in thetas),
        fragments=fragments,
        local_steps=steps,
        delay_steps=delay,
        mixing=mixing,
    )
    trained = 0
    handed_in = [0.0] * fragments
    seen = 0
    for change in changes:
        trained += change
        play.step(float(change))
        for round, update_E, _ in play.swarm.handed_in[seen:]:
            number = round % fragments
            handed_in[number] -= update_E[0].item()
            assert handed_in[number] == pytest.approx(trained, abs=1e-3)
        seen = len(play.swarm.handed_in)


# -- what cannot be combined ------------------------------------------------------------------

IMPOSSIBLE = {
    "feedback off": (RoundConfig(codec="int2"), LocalConfig(feedback="off"), "needs what it cuts"),
    "mixing below 0": (RoundConfig(), LocalConfig(mixing=-0.1), "mixing = -0.1: use 0 to 1"),
    "mixing above 1": (RoundConfig(), LocalConfig(mixing=1.1), "mixing = 1.1: use 0 to 1"),
    "mixing NaN": (RoundConfig(), LocalConfig(mixing=float("nan")), "mixing = nan"),
    "no time to wait": (RoundConfig(), LocalConfig(communication=0.0), "communication = 0.0"),
    "all time to wait": (RoundConfig(), LocalConfig(communication=1.0), "communication = 1.0"),
    "gradients without a batch": (
        RoundConfig(mode="gradient"),
        LocalConfig(),
        "needs a target_batch",
    ),
    "a batch without gradients": (
        RoundConfig(target_batch=10),
        LocalConfig(),
        'target_batch is for mode = "gradient"',
    ),
    "a run that ends before its first cycle": (
        RoundConfig(fragments=6, rounds=5),
        LocalConfig(),
        "rounds = 5 is less than fragments = 6",
    ),
    "rounds without a step": (
        RoundConfig(fragments=6),
        LocalConfig(local_steps=5),
        "local_steps = 5 is less than fragments = 6",
    ),
    "no fragments": (RoundConfig(fragments=0), LocalConfig(), "fragments = 0: use 1 to"),
    "no quorum": (RoundConfig(quorum=math.nan), LocalConfig(), "quorum = nan: use"),
    "no time": (RoundConfig(exchange_s=0.0), LocalConfig(), "exchange_s = 0.0: use 1 to"),
    "steps back": (RoundConfig(), LocalConfig(local_steps=-1), "local_steps = -1: use 0 to"),
    "a delay before it": (RoundConfig(), LocalConfig(delay_steps=-1), "delay_steps = -1: use 0"),
}


@pytest.mark.parametrize(("round", "local", "what"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_work_together_is_refused_in_one_line(
    round: RoundConfig, local: LocalConfig, what: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check(round, local)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)
    swarm = Swarm(State.begin(Shape.of("layout", 1, 1, PLAIN), torch.zeros(1)))
    with pytest.raises(ConfigError):
        LocalLoop(swarm, Parameters(1), round, local)


@pytest.mark.parametrize(
    ("round", "local"),
    [
        (RoundConfig(), LocalConfig()),
        (RoundConfig(codec="int2"), LocalConfig()),
        (RoundConfig(codec="int2"), LocalConfig(feedback="on")),
        (RoundConfig(codec="int4"), LocalConfig(feedback="off")),
        (RoundConfig(fragments=6), LocalConfig(local_steps=30, delay_steps=5)),
        (RoundConfig(fragments=6), LocalConfig(local_steps=0, delay_steps=5)),
        (RoundConfig(fragments=6), LocalConfig(local_steps=10, delay_steps=5)),
        (RoundConfig(mode="gradient", target_batch=1), LocalConfig()),
        # In gradient mode what is for local steps does not apply, and may stay as the defaults are.
        (RoundConfig(mode="gradient", target_batch=64, fragments=6), LocalConfig(delay_steps=5)),
        (RoundConfig(), LocalConfig(mixing=0.0)),
        (RoundConfig(), LocalConfig(mixing=1.0)),
    ],
)
def test_what_can_work_together_is_not(round: RoundConfig, local: LocalConfig) -> None:
    check(round, local)
