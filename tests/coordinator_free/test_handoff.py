"""Two threads and the object between them; every wait here ends by an event, never by time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from coordinator_free.handoff import Assignment, Handoff, RoundResult, SessionClosed
from dht.errors import RoundError

T = TypeVar("T")
WAIT_S = 20.0
THETA_N = torch.tensor([1.0, 2.0, 3.0])
LOCAL_N = torch.tensor([0.5, 2.0, 4.0])


def work(round: int) -> Assignment:
    return Assignment(round=round, seat=0, seats=1, theta_N=THETA_N, closing=threading.Event())


def result(round: int, *, included: bool = True) -> RoundResult:
    return RoundResult(
        round=round,
        included=included,
        members=2,
        digest="ab",
        samples=0,
        total_samples=30,
        bytes_sent=1,
        bytes_received=2,
        allreduce_s=0.1,
        round_s=0.2,
    )


class Trainer:
    """The training thread, and what it told the network."""

    def __init__(self) -> None:
        self.handoff = Handoff()
        self.pool = ThreadPoolExecutor(1)
        self.told: list[tuple[int, int]] = []
        self.submitted = threading.Event()

    def _notify(self, round: int, samples: int) -> None:
        self.told.append((round, samples))
        self.submitted.set()

    def does(self, call: Callable[[], T]) -> Future[T]:
        return self.pool.submit(call)

    def submits(self, samples: int = 7) -> Future[RoundResult]:
        """A submission that has reached the point where it waits."""
        future = self.does(lambda: self.handoff.submit(LOCAL_N.clone(), samples, self._notify))
        assert self.submitted.wait(WAIT_S)
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
    done = trainer.submits()
    assert trainer.told == [(4, 7)]
    delta_N = handoff.pseudo_gradient(4)
    assert delta_N is not None
    assert delta_N.tolist() == [0.5, 0.0, -1.0]
    assert not done.done()
    handoff.resolve(result(4))
    ended = done.result(WAIT_S)
    assert (ended.round, ended.samples, ended.total_samples) == (4, 7, 30)


def test_nobody_gets_the_pseudo_gradient_of_another_round(trainer: Trainer) -> None:
    handoff = trainer.handoff
    assert handoff.pseudo_gradient(0) is None
    handoff.assign(work(4))
    assert handoff.pseudo_gradient(4) is None
    handoff.next()
    trainer.submits()
    assert handoff.pseudo_gradient(3) is None
    assert handoff.pseudo_gradient(5) is None
    handoff.assign(work(5))
    assert handoff.pseudo_gradient(4) is None
    assert handoff.pseudo_gradient(5) is None


def test_superseded_work_is_void_and_says_so(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(old := work(4))
    handoff.next()
    done = trainer.submits()
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
    with pytest.raises(RoundError):
        handoff.submit(LOCAL_N.clone(), 7, trainer._notify)
    assert trainer.told == []
    assert handoff.pseudo_gradient(6) is None


def test_a_late_submission_gets_the_committed_result(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(given := work(4))
    handoff.next()
    handoff.resolve(result(4))
    assert given.closing.is_set()
    late = handoff.submit(LOCAL_N.clone(), 9, trainer._notify)
    assert (late.round, late.samples) == (4, 9)
    assert trainer.told == []  # the swarm did not wait, and gets nothing
    handoff.assign(work(5))
    handoff.next()
    assert not trainer.submits().done()


def test_a_result_outweighs_both_the_next_assignment_and_the_end(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    handoff.next()
    done = trainer.submits()
    handoff.resolve(result(4))
    handoff.assign(work(5))
    assert done.result(WAIT_S).round == 4
    handoff.next()
    trainer.submitted.clear()
    done = trainer.submits()
    handoff.resolve(result(5))
    handoff.close()
    assert done.result(WAIT_S).round == 5


def test_close_wakes_whoever_waits_for_work(trainer: Trainer) -> None:
    waiting = trainer.does(trainer.handoff.next)
    trainer.handoff.close()
    assert waiting.result(WAIT_S) is None


def test_close_wakes_whoever_waits_for_a_result(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(given := work(4))
    handoff.next()
    done = trainer.submits()
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
        handoff.submit(LOCAL_N.clone(), 7, trainer._notify)


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


def test_work_that_missed_its_round_counts_in_the_next_by_its_samples(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    trainer.does(handoff.next).result(WAIT_S)
    late = trainer.submits(samples=10)
    handoff.resolve(result(4, included=False))
    assert late.result(WAIT_S).samples == 10
    trainer.submitted.clear()
    handoff.assign(work(5))
    trainer.does(handoff.next).result(WAIT_S)
    twice_N = THETA_N + 3 * (LOCAL_N - THETA_N)
    both = trainer.does(lambda: handoff.submit(twice_N, 30, trainer._notify))
    assert trainer.submitted.wait(WAIT_S)
    assert trainer.told[-1] == (5, 40)
    # 30 samples of three times the change and 10 of once.
    assert torch.allclose(handoff.pseudo_gradient(5), 2.5 * (THETA_N - LOCAL_N))
    handoff.resolve(result(5))
    assert both.result(WAIT_S).samples == 40


@pytest.mark.parametrize("why", ["it counted", "a round passed", "another state", "no samples"])
def test_only_work_that_missed_the_round_before_is_carried_over(trainer: Trainer, why: str) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    trainer.does(handoff.next).result(WAIT_S)
    first = trainer.submits(samples=0 if why == "no samples" else 10)
    handoff.resolve(result(4, included=why == "it counted"))
    first.result(WAIT_S)
    if why == "another state":
        handoff.restart()
    trainer.submitted.clear()
    round = 6 if why == "a round passed" else 5
    handoff.assign(work(round))
    trainer.does(handoff.next).result(WAIT_S)
    trainer.submits(samples=30)
    assert trainer.told[-1] == (round, 30)
    assert torch.equal(handoff.pseudo_gradient(round), THETA_N - LOCAL_N)


def test_work_that_changed_nothing_leaves_the_parameters_of_all_alone(trainer: Trainer) -> None:
    handoff = trainer.handoff
    handoff.assign(work(4))
    given = trainer.does(handoff.next).result(WAIT_S)
    before = given.theta_N.clone()
    trainer.does(lambda: handoff.submit(given.theta_N, 7, trainer._notify))
    assert trainer.submitted.wait(WAIT_S)
    assert torch.equal(given.theta_N, before)
    assert not handoff.pseudo_gradient(4).any()
