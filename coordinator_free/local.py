"""One peer's own part of the recipe: what it hands in, and from where it trains on.

The state is everybody's; here is what is a peer's own. For each fragment, with Theta its parameters
in the state and w those that are trained, all float32 on the CPU:

    hand in      D = ref - w            (ref is Theta, until something of w was kept; see below)
                 U = E + D              E: what the codec cut off of earlier contributions
    taken up     E = U - decode(encode(U))                     where the mean has it; else E stays
                 p = w - w at the hand-in                      trained on while the exchange ran
                 w = Theta + mixing * p;    ref = w - p        so p is in the next D, whole
    missed       w = Theta + KEPT * (w - ref);    ref = Theta  where the mean does not have it
    not finite   w = ref = Theta, and no E                     of all fragments

In gradient mode D is the gradient, and w is Theta whatever happened.

Guarantees that nothing here moves Theta: replicas are bit-identical whatever a peer does with w.
Not safe under concurrent use: all calls from the training thread.

Sources: DiLoCo arXiv:2311.08105; delay and mixing, Streaming DiLoCo arXiv:2501.18512; error
feedback, Seide et al. 2014 and arXiv:1901.09847; the rule for what was missed from our own runs
(25 % random misses: loss 1.644; the work dropped 1.656; put into E 1.666; w as it was 1.685).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.handoff import Assignment, RoundResult
from coordinator_free.memory import empty_vector
from coordinator_free.pace import LocalConfig, Pace
from coordinator_free.recipe import check, feeds_back
from coordinator_free.state import State
from dht.errors import RoundError

KEPT = 0.5  # of the work that missed its round
SEGMENT = 1 << 20  # elements whose encoding is worked out at once


class Parameters(Protocol):
    """The trained parameters as one flat vector, elements start .. stop of it."""

    def read(self, out: Tensor, /, *, start: int, stop: int) -> Tensor:
        """Copy them out: (stop - start,) float32 on the CPU."""
        ...

    def write(self, vector_S: Tensor, /, *, start: int, stop: int) -> None:
        """Overwrite them."""
        ...

    def gradient(self, out: Tensor, /) -> Tensor:
        """(N,) float32: mean gradient over all samples since the round began."""
        ...


class Swarm(Protocol):
    """The session as the training thread sees it (`session.Session`)."""

    def next_assignment(self) -> Assignment | None:
        """Wait for work; None when there will be none."""
        ...

    def hand_in(self, update_E: Tensor, samples: int) -> bool:
        """Offer the work on the last assignment; never waits. Whether it is finite."""
        ...

    def result(self) -> RoundResult:
        """Wait for the round's end."""
        ...

    def progress(self, samples: int) -> None:
        """Tell the swarm how far the work on the last assignment is."""
        ...

    @property
    def hurried(self) -> bool:
        """Whether the others wait for this peer."""
        ...

    @property
    def state(self) -> State:
        """The newest state."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A round ended.

    Attributes:
        result: of it; None where the work was void, as the swarm went on from another state.
        work: what comes next; None if nothing does.
        steps: that were taken for it.
        wait_s: how long training stood still for it.
        restarted: everything was overwritten, as the swarm went on from another state, or what
            this peer had trained was not finite: the inner optimizer should begin anew.
    """

    result: RoundResult | None
    work: Assignment | None
    steps: int
    wait_s: float
    restarted: bool = False


@dataclass(slots=True)
class _HandedIn:
    work: Assignment
    update_E: Tensor
    local_E: Tensor | None  # parameters then; None where nothing is trained on meanwhile
    steps: int
    finite: bool


class LocalLoop:
    """Takes one peer's local steps through the swarm's rounds.

        work = loop.begin()
        while work is not None:
            ... one optimizer step (in gradient mode: one micro-batch) ...
            turn = loop.stepped(samples)
            if turn is not None:
                work = turn.work

    Args:
        swarm: the session.
        parameters: what is trained.
        round: how rounds are run.
        local: what a peer does in them.
    """

    def __init__(
        self, swarm: Swarm, parameters: Parameters, round: RoundConfig, local: LocalConfig
    ) -> None:
        check(round, local)
        self._swarm = swarm
        self._parameters = parameters
        self._round = round
        self._local = local
        self._codec = codec(round.codec)
        self._feedback = feeds_back(local, round.codec)
        self._work: Assignment | None = None
        self._state: State | None = None
        self._references: list[Tensor] = []  # by fragment
        self._residuals: list[Tensor | None] = []
        self._handed_in: _HandedIn | None = None
        self._pace = Pace(local, round.parts)
        self._steps = self._samples = 0
        self._round_samples = 0  # of the last round that ended, by everybody
        self._began = self._stepped_at = 0.0

    def begin(self) -> Assignment | None:
        """Wait for the state and the first round's work; None if there will be none."""
        work = self._swarm.next_assignment()
        if work is not None:
            # A small model has fewer fragments than the run asks for.
            self._pace = Pace(self._local, len(work.state.shape.bounds))
            self._restart(work)
        return work

    @property
    def round(self) -> int:
        """Which round is being worked for: the next one, while an exchange runs."""
        assert self._work is not None
        return self._work.round + (self._handed_in is not None)

    @property
    def steps(self) -> int:
        """Taken for this round."""
        return self._steps

    def swarm_samples(self, step: int = 0) -> int:
        """What the swarm is trained on, if everybody is as far in this round as this peer.

        Where the round before is still being averaged, it counts as much as the one before that.

        Args:
            step: samples of a step that this peer is about to take, and every other one with it.
        """
        work = self._work
        assert work is not None
        ahead = self.round - work.round
        return work.samples + ahead * self._round_samples + (self._samples + step) * work.seats

    @property
    def due_steps(self) -> int:
        """How many this round has; in gradient mode it ends by samples."""
        return self._pace.steps(self.round)

    @property
    def pace(self) -> str:
        """Why so many: one line for people."""
        return self._pace.reason

    @property
    def paced(self) -> bool:
        """Whether that rests on measurements, or was configured."""
        return self._pace.measured

    def stepped(self, samples: int) -> Turn | None:
        """After every step: hand in what is due, take up what is there.

        Args:
            samples: of this step.

        Returns:
            How a round ended, if one did.

        Raises:
            SessionClosed: the session is over.
        """
        assert self._work is not None, "begin comes before stepped"
        self._steps += 1
        self._samples += samples
        now = time.monotonic()
        self._pace.stepped(now - self._stepped_at)
        self._stepped_at = now
        if self._round.mode == "gradient":
            self._swarm.progress(self._samples)
        due = self._due()
        turn = None
        if self._handed_in is not None and (due or self._steps >= self._delay):
            turn = self._take_up()
            if turn.work is None or turn.restarted:
                return turn
        if due:
            self._hand_in()
            if not self._delay:
                return self._take_up()
        return turn

    @property
    def _delay(self) -> int:
        """Steps into the round that is worked for, after which the one before is taken up."""
        return self._pace.delay(self.round) if self._round.mode == "diloco" else 0

    # -- inside -------------------------------------------------------------------------------

    def _due(self) -> bool:
        if self._swarm.hurried:
            return True
        if self._round.mode == "gradient":
            return self._samples >= self._round.target_batch
        late = 0 < self._local.work_s <= time.monotonic() - self._began
        return late or self._steps >= self.due_steps

    def _hand_in(self) -> None:
        work = self._work
        assert work is not None
        number = work.fragment
        start, stop = work.state.shape.bounds[number]
        local_E: Tensor | None = None
        if self._round.mode == "gradient":
            update_E = self._parameters.gradient(empty_vector(stop - start))
        else:
            read_E = self._parameters.read(empty_vector(stop - start), start=start, stop=stop)
            local_E = read_E if self._local.delay_steps else None
            update_E = empty_vector(stop - start) if local_E is not None else read_E
            torch.sub(self._references[number], read_E, out=update_E)
        residual_E = self._residuals[number]
        if residual_E is not None:
            update_E.add_(residual_E)
        finite = self._swarm.hand_in(update_E, self._samples)
        self._handed_in = _HandedIn(work, update_E, local_E, self._steps, finite)
        self._steps = self._samples = 0
        self._began = time.monotonic()

    def _take_up(self) -> Turn:
        """Wait for the end of the round that was handed in for, and go on from there."""
        handed_in, self._handed_in = self._handed_in, None
        assert handed_in is not None
        began = time.monotonic()
        try:
            result = self._swarm.result()
        except RoundError:
            work = self._swarm.next_assignment()
            if work is not None:
                self._restart(work)
            wait_s = time.monotonic() - began
            return Turn(
                result=None, work=work, steps=handed_in.steps, wait_s=wait_s, restarted=True
            )
        work = self._swarm.next_assignment()
        self._stepped_at = time.monotonic()
        wait_s = self._stepped_at - began
        self._pace.exchanged(result.commit_s)
        self._round_samples = result.total_samples
        if not handed_in.finite and work is not None:
            # A NaN would stay in the parameters and in all that is handed in from here on.
            self._restart(work)
            return Turn(
                result=result, work=work, steps=handed_in.steps, wait_s=wait_s, restarted=True
            )
        state = work.state if work is not None else self._swarm.state
        self._settle(handed_in, result, state)
        self._work = work
        if handed_in.local_E is None:
            self._began = time.monotonic()
        return Turn(result=result, work=work, steps=handed_in.steps, wait_s=wait_s)

    def _restart(self, work: Assignment) -> None:
        """Forget all that is this peer's own."""
        self._work, self._state, self._handed_in = work, work.state, None
        self._references = [fragment.theta_E for fragment in work.state.fragments]
        self._residuals = [None] * len(self._references)
        self._parameters.write(work.state.theta_N, start=0, stop=work.state.shape.numel)
        self._steps = self._samples = 0
        self._began = self._stepped_at = time.monotonic()

    def _settle(self, handed_in: _HandedIn, result: RoundResult, state: State) -> None:
        before, self._state = self._state, state
        assert before is not None
        number = handed_in.work.fragment
        spans = result.spans if result.round == handed_in.work.round else ()
        if self._feedback and spans:
            self._feed_back(number, handed_in.update_E, spans)
        for other, fragment in enumerate(state.fragments):
            if other == number:
                self._mix(number, fragment.theta_E, handed_in.local_E, spans)
            elif fragment is not before.fragments[other]:
                self._mix(other, fragment.theta_E, None, ())

    def _feed_back(self, number: int, update_E: Tensor, spans: tuple[tuple[int, int], ...]) -> None:
        """Keep what the codec cut off; encoded once more, which gives the bytes that were sent."""
        residual_E = self._residuals[number]
        if residual_E is None:
            residual_E = self._residuals[number] = torch.zeros(len(update_E))
        for start, stop in spans:
            for at in range(start, stop, SEGMENT):
                part_E = update_E[at : min(at + SEGMENT, stop)]
                payload = self._codec.encode(part_E)
                into_E = residual_E[at : min(at + SEGMENT, stop)]
                into_E.copy_(part_E)
                self._codec.decode_add(payload, len(part_E), -1.0, into_E)

    def _mix(
        self,
        number: int,
        theta_E: Tensor,
        local_E: Tensor | None,
        spans: tuple[tuple[int, int], ...],
    ) -> None:
        """Where to train on from in a fragment, and what the next change is counted from."""
        assert self._state is not None
        start, stop = self._state.shape.bounds[number]
        whole = spans == ((0, stop - start),)
        if self._round.mode == "gradient" or (whole and local_E is None):
            self._references[number] = theta_E
            self._parameters.write(theta_E, start=start, stop=stop)
            return
        now_E = self._parameters.read(empty_vector(stop - start), start=start, stop=stop)
        reference_E = empty_vector(stop - start)
        missed = torch.sub(now_E, self._references[number]).mul_(KEPT)
        local_after_E = torch.add(theta_E, missed)
        reference_E.copy_(theta_E)
        for low, high in spans:
            span = slice(low, high)
            if local_E is None:
                local_after_E[span].copy_(theta_E[span])
                continue
            progress = torch.sub(now_E[span], local_E[span])
            torch.add(theta_E[span], progress, alpha=self._local.mixing, out=local_after_E[span])
            torch.sub(local_after_E[span], progress, out=reference_E[span])
        self._references[number] = reference_E
        self._parameters.write(local_after_E, start=start, stop=stop)
