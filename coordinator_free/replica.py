"""The state that all peers share, and what it becomes.

A state that an average leads to is computed and named before anybody votes on it. Guarantees that
the state named by a decided outcome is the state that is held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque

from torch import Tensor

from coordinator_free.average import Average
from coordinator_free.chain import Chain
from coordinator_free.config import KEPT_CANDIDATES
from coordinator_free.memory import empty_vector
from coordinator_free.messages import Certificate, Kind
from coordinator_free.optimizer import Position, StateOptimizer
from coordinator_free.state import Fragment, State
from dht.errors import StateError

# Encoded averages are kept for peers that missed rounds, as many as fit into the bytes of one
# state: to replay more than that would cost more than to fetch the state. Those of the last rounds
# always, for members that have to catch up before they can accept the next one.
MIN_KEPT_AVERAGES = 2
MAX_KEPT_AVERAGES = 64
KEPT_CERTIFICATES = 2 * MAX_KEPT_AVERAGES  # some heights average nothing


class Replica:
    """The current state, the states it may become, and how it came about.

    Args:
        optimizer: turns an average into the next state.
        state: to begin with.
        chain: proves the certificate that names this state.
    """

    def __init__(self, optimizer: StateOptimizer, state: State, chain: Chain) -> None:
        self._optimizer = optimizer
        self._candidates: OrderedDict[tuple[bytes, bytes], State] = OrderedDict()
        self._averages: OrderedDict[bytes, Average] = OrderedDict()
        self._lock = threading.Lock()  # `consider` runs in worker threads
        self.install(state, chain)

    def install(self, state: State, chain: Chain) -> None:
        """Begin from another state, as a newcomer or after losing against another branch."""
        if chain.newest.outcome.state_root != state.root:
            raise StateError("a state and the certificate that should name it differ")
        self.state = state
        self.chain = chain
        # Two at least, where there are two: the newest is shown with the one that proves it.
        self.certificates: deque[Certificate] = deque(chain.links[-2:], maxlen=KEPT_CERTIFICATES)
        with self._lock:
            self._candidates.clear()

    def consider(self, average: Average) -> bytes:
        """Compute the state that applying this average leads to, and keep both for `apply`.

        Takes milliseconds per million parameters: call it in a worker thread.

        Returns:
            That state's root.

        Raises:
            ValueError: it is not finite, so nobody should go there.
        """
        state = self._after(average)
        with self._lock:
            self._candidates[(average.root, state.root)] = state
            self._candidates.move_to_end((average.root, state.root))  # as the machine counts
            self._averages[average.root] = average
            self._averages.move_to_end(average.root)
            while len(self._candidates) > KEPT_CANDIDATES:
                self._candidates.popitem(last=False)
            self._forget_averages()
        return state.root

    def _after(self, average: Average) -> State:
        """The state that an average of this round's fragment leads to.

        Raises:
            ValueError: it is not finite, or the average is not of this length.
        """
        base, now = self.state, self.chain.newest.outcome
        number = base.shape.fragment(now.round)
        before = base.fragments[number].vectors
        if average.numel != len(before[0]):
            raise ValueError(f"an average of {average.numel} elements, not {len(before[0])}")
        out = tuple(empty_vector(len(vector)) for vector in before)
        at = Position(round=now.round, samples=now.samples)
        if not self._optimizer.elementwise:
            finite = self._optimizer.advance(before, average.values(), out, at)
        else:
            finite = self._advance_by_chunks(before, average, out, at)
        if not finite:
            raise ValueError("an average leads to a state that is not finite")
        return base.then(number, Fragment.of(out))

    def _advance_by_chunks(
        self, before: tuple[Tensor, ...], average: Average, out: tuple[Tensor, ...], at: Position
    ) -> bool:
        """Decoded and stepped in the cache; whether all of it is finite."""
        scratch_E = empty_vector(max(chunk.elements for chunk in average.chunks))
        start = 0
        for chunk in average.chunks:
            span = slice(start, start + chunk.elements)
            delta_E = scratch_E[: chunk.elements]
            average.decode(chunk, delta_E)
            parts = [vector[span] for vector in before], [vector[span] for vector in out]
            if not self._optimizer.advance(parts[0], delta_E, parts[1], at):
                return False
            start = span.stop
        return True

    def average(self, root: bytes) -> Average | None:
        """A recent average, for peers that missed it."""
        return self._averages.get(root)

    def apply(self, certificate: Certificate) -> None:
        """The outcome is decided: what was considered becomes the state.

        Raises:
            StateError: its average was never considered here, or leads elsewhere.
        """
        outcome = certificate.outcome
        try:
            chain = self.chain.then(certificate)
        except ValueError as error:
            raise StateError(str(error)) from error
        if outcome.kind == Kind.AVERAGE:
            key = (outcome.vector_root, outcome.state_root)
            average = self._averages.get(outcome.vector_root)
            if key not in self._candidates and average is not None:
                self.consider(average)  # had to give way to others; rare, hence here
            state = self._candidates.get(key)
            if state is None:
                raise StateError("a decided average is not held")
            self.state = state
            with self._lock:
                for root, _ in self._candidates.keys() - {key}:
                    if root != outcome.vector_root:
                        self._averages.pop(root, None)  # nobody will ask for it
                self._candidates.clear()
        self.chain = chain
        self.certificates.append(certificate)

    def revive(self, certificate: Certificate) -> None:
        """Go on from a decree of those who came back (`revival`), perhaps in place of the newest.

        Raises:
            ValueError: it does not follow, or changes the state.
        """
        if certificate.outcome.state_root != self.state.root:
            raise ValueError("a revival that changes the state")
        self.chain = self.chain.revived(certificate)
        if certificate.outcome.height == self.certificates[-1].outcome.height:
            self.certificates.pop()
        self.certificates.append(certificate)

    def _forget_averages(self) -> None:
        kept = sum(average.nbytes for average in self._averages.values())
        while len(self._averages) > MIN_KEPT_AVERAGES and (
            kept > 4 * self.state.shape.elements or len(self._averages) > MAX_KEPT_AVERAGES
        ):
            _, oldest = self._averages.popitem(last=False)
            kept -= oldest.nbytes
