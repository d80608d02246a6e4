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

from coordinator_free.memory import empty_vector
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
        theta_N: (N,) float32 parameters to train from. Never to be changed.
        closing: set when the others wait: submit what there is.
    """

    round: int
    seat: int
    seats: int
    theta_N: Tensor
    closing: threading.Event


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundResult:
    """How a round ended.

    Attributes:
        round: its index.
        included: whether this peer's work is in the average.
        members: how many peers contributed.
        digest: root of the state after it, hex; equal on all peers.
        samples: this peer's.
        total_samples: of all contributors.
        bytes_sent: by this peer since the round before, of any kind.
        bytes_received: the same, the other way.
        allreduce_s: seconds from the plan to the complete average; 0 if it was fetched instead.
        round_s: seconds since the round before.
    """

    round: int
    included: bool
    members: int
    digest: str
    samples: int
    total_samples: int
    bytes_sent: int
    bytes_received: int
    allreduce_s: float
    round_s: float


class Handoff:
    """One assignment at a time, its pseudo-gradient, and the newest result."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._assignment: Assignment | None = None
        self._taken: Assignment | None = None  # what the training thread works on
        self._pseudo_gradient_N: Tensor | None = None
        self._result: RoundResult | None = None
        self._late: tuple[int, Tensor, int] | None = None  # round missed, (N,) float32, samples
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

    def submit(
        self, local_N: Tensor, samples: int, notify: Callable[[int, int], None]
    ) -> RoundResult:
        """Hand in the parameters trained from the last assignment; wait for the round's end.

        Work that came too late for its round is not lost: it is averaged into that of the next one,
        each weighted by its samples. Only the round before counts: older work was done for a model
        that is gone.

        Args:
            local_N: (N,) float32, CPU. Given away: its memory becomes that of the pseudo-gradient.
            samples: trained on.
            notify: called with round and samples once the pseudo-gradient can be taken.

        Raises:
            SessionClosed: the session ended first.
            RoundError: the work is void, as the swarm went on from another state.
        """
        work = self._taken  # only this thread sets it
        if work is None:
            raise SessionClosed("there is no work to submit")
        if local_N.data_ptr() == work.theta_N.data_ptr():  # which is everybody's
            local_N = empty_vector(len(local_N))
            local_N.copy_(work.theta_N)
        pseudo_gradient_N = torch.sub(work.theta_N, local_N, out=local_N)
        if not _finite(pseudo_gradient_N):
            logger.error("handoff.not_finite round=%d: the work counts for nothing", work.round)
            samples = 0
        with self._changed:
            late, self._late = self._late, None
        if late is not None and late[0] == work.round - 1 and samples:
            _, late_N, late_samples = late
            total = samples + late_samples
            pseudo_gradient_N.mul_(samples / total).add_(late_N.mul_(late_samples / total))
            samples = total
        with self._changed:
            if not self._closed and work is self._assignment and not self._over(work.round):
                self._pseudo_gradient_N = pseudo_gradient_N
                notify(work.round, samples)
            self._changed.wait_for(
                lambda: self._closed or work is not self._assignment or self._over(work.round)
            )
            if self._result is not None and self._over(work.round):
                result = replace(self._result, samples=samples)
                if result.round == work.round and not result.included and samples:
                    self._late = (work.round, pseudo_gradient_N, samples)
                return result
            if self._closed:
                raise SessionClosed("the session is over")
            raise RoundError(work.round, "the swarm went on from another state")

    # -- the network's loop -------------------------------------------------------------------

    def assign(self, assignment: Assignment) -> None:
        """New work; what was assigned before is void."""
        with self._changed:
            if self._assignment is not None:
                self._assignment.closing.set()
            self._assignment = assignment
            self._pseudo_gradient_N = None
            self._changed.notify_all()

    def close_work(self, round: int) -> None:
        """The others wait for this round's work."""
        with self._changed:
            if self._assignment is not None and self._assignment.round == round:
                self._assignment.closing.set()

    def pseudo_gradient(self, round: int) -> Tensor | None:
        """(N,) float32: parameters before less after training, if handed in for this round."""
        with self._changed:
            if self._assignment is None or self._assignment.round != round:
                return None
            return self._pseudo_gradient_N

    def resolve(self, result: RoundResult) -> None:
        """A round ended; whoever still works on it may stop."""
        with self._changed:
            self._result = result
            if self._assignment is not None and self._over(self._assignment.round):
                self._assignment.closing.set()
            self._changed.notify_all()

    def restart(self) -> None:
        """The swarm went on from another state, perhaps of an earlier round: all work is void."""
        with self._changed:
            if self._assignment is not None:
                self._assignment.closing.set()
            self._assignment = self._pseudo_gradient_N = self._result = self._late = None
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


def _finite(vector_N: Tensor) -> bool:
    """Whether all elements are; without a vector of answers, as isfinite() makes."""
    low, high = torch.aminmax(vector_N)  # NaN if there is one
    return math.isfinite(low.item()) and math.isfinite(high.item())
