"""Between the network's loop and the training thread: work one way, results the other.

Everything here may be called from either thread; the training side blocks, the network side never
does.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coordinator_free.state import State
from dht.errors import RoundError, SwarmError

logger = logging.getLogger(__name__)


class SessionClosed(SwarmError):
    """The session ended while the training thread waited for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Work for one round.

    Attributes:
        round: index of the round.
        seat: this peer's number among `seats`; blocks of data are dealt out by it.
        seats: how many train in this round.
        samples: what the swarm had been trained on before this round.
        state: to train from; the round averages one of its fragments.
        closing: set when the others wait: hand in what there is.
    """

    round: int
    seat: int
    seats: int
    samples: int
    state: State
    closing: threading.Event

    @property
    def fragment(self) -> int:
        """Number of the fragment that this round averages."""
        return self.state.shape.fragment(self.round)

    @property
    def theta_N(self) -> Tensor:
        """(N,) float32 parameters to train from. Never to be changed."""
        return self.state.theta_N


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """How a round ended.

    Attributes:
        round: its index.
        spans: where in the averaged fragment this peer's work is in the mean: (start, stop) in
            elements of that, ascending.
        members: how many peers contributed.
        digest: root of the state after it, hex; equal on all peers.
        samples: this peer's.
        total_samples: of all contributors.
        bytes_sent: by this peer since the round before, of any kind.
        bytes_received: the same, the other way.
        allreduce_s: seconds from the plan to the complete average; 0 if it was fetched instead.
        commit_s: seconds from the plan to the commit; 0 likewise.
        round_s: seconds since the round before.
    """

    round: int
    spans: tuple[tuple[int, int], ...]
    members: int
    digest: str
    samples: int
    total_samples: int
    bytes_sent: int
    bytes_received: int
    allreduce_s: float
    commit_s: float
    round_s: float

    @property
    def included(self) -> bool:
        """Whether this peer's work is in the average."""
        return bool(self.spans)


class Handoff:
    """One assignment at a time, what was handed in for it, and the newest result."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._assignment: Assignment | None = None
        self._taken: Assignment | None = None  # what the training thread works on
        self._update_E: Tensor | None = None
        self._samples = 0
        self._result: RoundResult | None = None
        self._own: RoundResult | None = None  # of the round of what was taken, if it ended
        self._closed = False

    # -- the training thread ------------------------------------------------------------------

    def next(self) -> Assignment | None:
        """Wait for work that was not handed out yet; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._fresh())
            if self._closed or self._assignment is None:
                return None
            self._taken = self._assignment
            return self._assignment

    def hand_in(self, update_E: Tensor, samples: int, notify: Callable[[int, int], None]) -> bool:
        """Offer the work on the last assignment that was taken; never waits.

        Args:
            update_E: (E,) float32, CPU: what this peer contributes to the round's average. Not to
                be changed before `result` has returned. If it is not finite, it counts for nothing.
            samples: trained on.
            notify: called with round and samples, if anybody still waits for this work.

        Returns:
            Whether it is finite.

        Raises:
            SessionClosed: there is no work, or no more.
        """
        work = self._taken  # only this thread sets it
        if work is None:
            raise SessionClosed("there is no work to hand in")
        sound = finite(update_E)
        if not sound:
            logger.error("handoff.not_finite round=%d: the work counts for nothing", work.round)
            samples = 0
        with self._changed:
            self._samples = samples
            if not self._closed and work is self._assignment and not self._over(work.round):
                self._update_E = update_E
                notify(work.round, samples)
        return sound

    def result(self) -> RoundResult:
        """Wait for the end of the round of the last assignment that was taken.

        Returns:
            How it ended; how a later one did where that is all that this peer knows.

        Raises:
            SessionClosed: the session ended first.
            RoundError: the work is void, as the swarm went on from another state.
        """
        work = self._taken
        if work is None:
            raise SessionClosed("there is no work to wait for")
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or work is not self._assignment or self._over(work.round)
            )
            if self._result is not None and self._over(work.round):
                # Others may have ended a further round before this peer asked for its own.
                own = self._own
                ended = own if own is not None and own.round == work.round else self._result
                return replace(ended, samples=self._samples)
            if self._closed:
                raise SessionClosed("the session is over")
            raise RoundError(work.round, "the swarm went on from another state")

    @property
    def round(self) -> int:
        """Of the last assignment that was taken; 0 if none was."""
        work = self._taken
        return work.round if work is not None else 0

    @property
    def hurried(self) -> bool:
        """Whether the others wait for work that was not handed in yet."""
        with self._changed:
            work = self._assignment
            waiting = work is not None and work.closing.is_set() and self._update_E is None
            return self._closed or waiting

    # -- the network's loop -------------------------------------------------------------------

    def assign(self, assignment: Assignment) -> None:
        """New work; what was assigned before is void."""
        with self._changed:
            if self._assignment is not None:
                self._assignment.closing.set()
            self._assignment = assignment
            self._update_E = None
            self._changed.notify_all()

    def close_work(self, round: int) -> None:
        """The others wait for this round's work."""
        with self._changed:
            if self._assignment is not None and self._assignment.round == round:
                self._assignment.closing.set()

    def update(self, round: int) -> Tensor | None:
        """(E,) float32: what was handed in for this round, if anything was."""
        with self._changed:
            if self._assignment is None or self._assignment.round != round:
                return None
            return self._update_E

    def resolve(self, result: RoundResult) -> None:
        """A round ended; whoever still works on it may stop."""
        with self._changed:
            self._result = result
            if self._taken is not None and self._taken.round == result.round:
                self._own = result
            if self._assignment is not None and self._over(self._assignment.round):
                self._assignment.closing.set()
            self._changed.notify_all()

    def restart(self) -> None:
        """The swarm went on from another state, perhaps of an earlier round: all work is void."""
        with self._changed:
            if self._assignment is not None:
                self._assignment.closing.set()
            self._assignment = self._update_E = self._result = self._own = None
            self._changed.notify_all()

    def close(self) -> None:
        """There will be no more work and no more results."""
        with self._changed:
            self._closed = True
            if self._assignment is not None:
                self._assignment.closing.set()
            self._changed.notify_all()

    def _fresh(self) -> bool:
        work = self._assignment
        return work is not None and work is not self._taken and not self._over(work.round)

    def _over(self, round: int) -> bool:
        return self._result is not None and self._result.round >= round


def finite(vector_N: Tensor) -> bool:
    """Whether all elements are; without a vector of answers, as isfinite() makes."""
    low, high = torch.aminmax(vector_N)  # NaN if there is one
    return math.isfinite(low.item()) and math.isfinite(high.item())
