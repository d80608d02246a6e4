"""Two threads and the object between them; every wait here ends by an event, never by time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from coordinator_free.handoff import Assignment, Handoff, RoundResult, SessionClosed
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.state import Shape, State
from dht.errors import RoundError

T = TypeVar("T")
WAIT_S = 20.0
SHAPE = Shape.of("layout", 3, 1, OuterOptimizer(OuterConfig(kind="sgd")))
STATE = State.begin(SHAPE, torch.tensor([1.0, 2.0, 3.0]))


def work(round: int) -> Assignment:
    return Assignment(
        round=round, seat=0, seats=1, samples=20, state=STATE, closing=threading.Event()
    )


def update() -> Tensor:
    return torch.tensor([0.5, 0.0, -1.0])


def result(round: int, *, included: bool = True) -> RoundResult:
    return RoundResult(
        round=round,
        spans=((0, 3),) if included else (),
        members=2,
        digest="ab",
        samples=0,
        total_samples=30,
        bytes_sent=1,
        bytes_received=2,
        allreduce_s=0.1,
        commit_s=0.1,
        round_s=0.2,
    )


class Trainer:
    """The training thread, and what it told the network."""

    def __init__(self) -> None:
        self.handoff = Handoff()
        self.pool = ThreadPoolExecutor(1)
        self.told: list[tuple[int, int]] = []
        self.handed_in = threading.Event()

    def _notify(self, round: int, samples: int) -> None:
        self.told.append((round, samples))
        self.handed_in.set()

    def does(self, call: Callable[[], T]) -> Future[T]:
        return self.pool.submit(call)

    def hands_in(self, samples: int = 7, update_E: Tensor | None = None) -> Future[RoundResult]:
        """Work that is handed in, and the wait for its round's end."""

        def call() -> RoundResult:
            self.handoff.hand_in(update() if update_E is None else update_E, samples, self._notify)
            return self.handoff.result()

        future = self.does(call)
        assert self.handed_in.wait(WAIT_S)
        return future


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture(autouse=True)
def _ended(trainer: Trainer) -> object:
    yield
    trainer.handoff.close()
    trainer.pool.shutdown()


def test_a_round_there_and_back(trainer: Trainer) -> None:
    handoff = trainer.handoff
    waiting = trainer.does(handoff.next)
    handoff.assign(given := work(4))
    assert waiting.result(WAIT_S) is given
    done = trainer.hands_in()
    assert trainer.told == [(4, 7)]
    update_E = handoff.update(4)
    assert update_E is not None
    assert update_E.tolist() == [0.5, 0.0, -1.0]
    assert not done.done()
    handoff.resolve(result(4))
    ended = done.result(WAIT_S)
    assert (ended.round, ended.samples, ended.total_samples) == (4, 7, 30)


def test_nobody_gets_the_work_of_another_round(trainer: Trainer) -> None:
    handoff = trainer.handoff
    assert handoff.update(0) is None
    handoff.assign(work(4))
    assert handoff.update(4) is None
    handoff.next()
    trainer.hands_in()
    assert handoff.update(3) is None
    assert handoff.update(5) is None
    handoff.assign(work(5))
    assert handoff.update(4) is None
    assert handoff.update(5) is None


def test_superseded_work_is_void_and_says_so(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(old := work(4))
    handoff.next()
    done = trainer.hands_in()
    handoff.assign(new := work(4))  # the same round, from another state
    with pytest.raises(RoundError) as void:
        done.result(WAIT_S)
    assert void.value.round == 4
    assert old.closing.is_set()
    assert not new.closing.is_set()
    assert handoff.next() is new


def test_work_that_was_superseded_before_it_was_handed_in_is_void(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.next()
    handoff.assign(work(6))
    handoff.hand_in(update(), 7, trainer._notify)
    with pytest.raises(RoundError):
        handoff.result()
    assert trainer.told == []
    assert handoff.update(6) is None


def test_work_that_comes_late_gets_the_committed_result(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(given := work(4))
    handoff.next()
    handoff.resolve(result(4))
    assert given.closing.is_set()
    handoff.hand_in(update(), 9, trainer._notify)
    late = handoff.result()
    assert (late.round, late.samples) == (4, 9)
    assert trainer.told == []  # the swarm did not wait, and gets nothing
    handoff.assign(work(5))
    handoff.next()
    assert not trainer.hands_in().done()


def test_a_result_outweighs_both_the_next_assignment_and_the_end(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.next()
    done = trainer.hands_in()
    handoff.resolve(result(4))
    handoff.assign(work(5))
    assert done.result(WAIT_S).round == 4
    handoff.next()
    trainer.handed_in.clear()
    done = trainer.hands_in()
    handoff.resolve(result(5))
    handoff.close()
    assert done.result(WAIT_S).round == 5


def test_a_result_outlives_the_end_of_the_next_round(trainer: Trainer) -> None:
    """Whoever trains on while others average may ask for it after they have ended another one."""
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.next()
    handoff.hand_in(update(), 7, trainer._notify)
    handoff.resolve(result(4))
    handoff.assign(work(5))
    handoff.resolve(result(5, included=False))
    handoff.assign(work(6))
    mine = handoff.result()
    assert (mine.round, mine.included, mine.samples) == (4, True, 7)
    handoff.next()
    handoff.assign(work(8))
    handoff.resolve(result(7))  # the sixth ended elsewhere
    assert handoff.result().round == 7
    handoff.restart()
    handoff.assign(work(4))
    handoff.next()
    waiting = trainer.hands_in()
    assert not waiting.done()
    handoff.resolve(result(4, included=False))
    assert not waiting.result(WAIT_S).included


def test_close_wakes_whoever_waits_for_work(trainer: Trainer) -> None:
    waiting = trainer.does(trainer.handoff.next)
    trainer.handoff.close()
    assert waiting.result(WAIT_S) is None


def test_close_wakes_whoever_waits_for_a_result(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(given := work(4))
    handoff.next()
    done = trainer.hands_in()
    handoff.close()
    with pytest.raises(SessionClosed):
        done.result(WAIT_S)
    assert given.closing.is_set()


def test_nothing_begins_after_the_end(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.close()
    assert handoff.next() is None
    with pytest.raises(SessionClosed):
        handoff.hand_in(update(), 7, trainer._notify)
    with pytest.raises(SessionClosed):
        handoff.result()


def test_work_is_handed_out_once_and_not_when_its_round_is_over(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(given := work(4))
    assert handoff.next() is given
    handoff.resolve(result(5))
    handoff.assign(work(5))
    again = trainer.does(handoff.next)
    with pytest.raises(TimeoutError):
        again.result(0.05)
    handoff.assign(fresh := work(6))
    assert again.result(WAIT_S) is fresh


def test_only_the_round_under_way_can_be_closed(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.close_work(4)
    handoff.assign(given := work(4))
    handoff.close_work(3)
    assert not given.closing.is_set()
    handoff.close_work(4)
    assert given.closing.is_set()


def test_handing_in_waits_for_nobody_and_what_was_handed_in_stays_until_the_next_work(
    trainer: Trainer,
) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.next()
    update_E = update()
    handoff.hand_in(update_E, 7, trainer._notify)  # in this thread: it would never return
    assert handoff.update(4) is update_E
    handoff.resolve(result(4))
    assert handoff.update(4) is update_E  # who missed the round may still ask for it
    handoff.assign(work(5))
    assert handoff.update(4) is handoff.update(5) is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_work_that_is_not_finite_counts_for_nothing(trainer: Trainer, wrong: float) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.next()
    done = trainer.hands_in(update_E=torch.tensor([0.0, wrong, 1.0]))
    assert trainer.told == [(4, 0)]
    handoff.resolve(result(4, included=False))
    assert done.result(WAIT_S).samples == 0


def test_hurried_is_who_owes_work_that_the_others_wait_for(trainer: Trainer) -> None:
    handoff = trainer.handoff
    assert not handoff.hurried
    handoff.assign(work(4))
    handoff.next()
    assert not handoff.hurried
    handoff.close_work(4)
    assert handoff.hurried
    trainer.hands_in()
    assert not handoff.hurried  # it is there
    handoff.assign(work(5))
    assert not handoff.hurried
    handoff.close()
    assert handoff.hurried  # whoever trains on finds out that it is over


def test_the_round_is_that_of_the_work_that_was_taken(trainer: Trainer) -> None:
    handoff = trainer.handoff
    assert handoff.round == 0
    handoff.assign(work(4))
    handoff.next()
    handoff.assign(work(6))
    assert handoff.round == 4


def test_an_assignment_says_what_its_round_averages() -> None:
    shape = Shape.of("layout", 3 * ALIGN_ELEMENTS, 3, OuterOptimizer(OuterConfig()))
    theta_N = torch.arange(3.0 * ALIGN_ELEMENTS)
    state = State.begin(shape, theta_N.clone())
    given = [dataclasses.replace(work(round), state=state) for round in range(5)]
    assert [one.fragment for one in given] == [0, 1, 2, 0, 1]
    assert all(torch.equal(one.theta_N, theta_N) for one in given)


def test_spans_say_whether_work_is_in_the_mean() -> None:
    assert result(1).included
    assert not result(1, included=False).included
