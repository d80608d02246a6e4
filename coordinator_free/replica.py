"""The state that all peers share, and what it becomes.

Parameters and the outer optimizer's momentum, two flat float32 vectors. They are never changed in
place: what is being served to a newcomer, trained from or compared stays valid while the next state
is computed beside it. Guarantees that the state named by `root` is the state that is held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass

from blake3 import blake3
from torch import Tensor

from coordinator_free.average import Average
from coordinator_free.chain import Chain
from coordinator_free.config import KEPT_CANDIDATES
from coordinator_free.memory import bytes_of, empty_vector
from coordinator_free.messages import Certificate, Kind
from coordinator_free.optimizer import Position, StateOptimizer
from coordinator_free.wire import tree_root
from dht.errors import StateError

LEAF_ELEMENTS = 1 << 18  # 1 MiB of float32: one leaf of the hash tree, one frame of a download
# Encoded averages are kept for peers that missed rounds, as many as fit into the bytes of one
# state: to replay more than that would cost more than to fetch the state. Those of the last rounds
# always, for members that have to catch up before they can accept the next one.
MIN_KEPT_AVERAGES = 2
MAX_KEPT_AVERAGES = 64
KEPT_CERTIFICATES = 2 * MAX_KEPT_AVERAGES  # some heights average nothing


def layout_leaf(layout: str) -> bytes:
    """(32,) bytes: the first entry of a state's tree, which no donor needs to send."""
    return blake3(b"shoal layout v1\0" + layout.encode()).digest()


def leaf_bounds(numel: int) -> list[tuple[int, int, int]]:
    """(vector, start, stop) in bytes of every leaf: parameters are vector 0, the momentum is 1."""
    size, step = 4 * numel, 4 * LEAF_ELEMENTS
    return [
        (vector, start, min(start + step, size))
        for vector in (0, 1)
        for start in range(0, size, step)
    ]


def leaf_digests(theta_N: Tensor, momentum_N: Tensor) -> list[bytes]:
    """(32,) bytes for every leaf, in the order of `leaf_bounds`."""
    raw = (bytes_of(theta_N), bytes_of(momentum_N))
    return [
        blake3(raw[vector][start:stop]).digest()
        for vector, start, stop in leaf_bounds(len(theta_N))
    ]


def state_root(layout: str, theta_N: Tensor, momentum_N: Tensor) -> bytes:
    """(32,) bytes that name a state.

    Args:
        layout: names and shapes of the parameters, so that peers whose models differ in anything
            but their length never agree by mistake.
        theta_N: (N,) float32 parameters.
        momentum_N: (N,) float32 outer momentum.
    """
    return tree_root([layout_leaf(layout), *leaf_digests(theta_N, momentum_N)])


@dataclass(frozen=True, slots=True)
class State:
    """Parameters and momentum, (N,) float32 each, and the root that names them."""

    theta_N: Tensor
    momentum_N: Tensor
    root: bytes

    def leaf(self, number: int) -> memoryview:
        """The bytes of one leaf, shared; `number` counts as in `leaf_bounds`.

        Raises:
            IndexError: there is no such leaf.
        """
        if not 0 <= number < self.leaves:
            raise IndexError(f"a state of {self.leaves} leaves has no leaf {number}")
        vector, index = divmod(number, self.leaves // 2)
        step = 4 * LEAF_ELEMENTS
        raw = bytes_of((self.theta_N, self.momentum_N)[vector])
        return raw[index * step : (index + 1) * step]

    @property
    def leaves(self) -> int:
        """How many leaves it has."""
        return 2 * -(-len(self.theta_N) // LEAF_ELEMENTS)


class Replica:
    """The current state, the states it may become, and how it came about.

    Args:
        layout: see `state_root`.
        outer: the outer optimizer.
        state: to begin with.
        chain: proves the certificate that names this state.
    """

    def __init__(self, layout: str, outer: StateOptimizer, state: State, chain: Chain) -> None:
        self._layout = layout
        self._outer = outer
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

    @property
    def numel(self) -> int:
        """Length of the vectors."""
        return len(self.state.theta_N)

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
        """The state that an average leads to, decoded and stepped chunk by chunk in the cache.

        Raises:
            ValueError: it is not finite, or the average is not of this length.
        """
        base, numel, head = self.state, self.numel, self.chain.newest.outcome
        at = Position(round=head.round, samples=head.samples)
        if average.numel != numel:
            raise ValueError(f"an average of {average.numel} elements, not {numel}")
        theta_N, momentum_N = empty_vector(numel), empty_vector(numel)
        scratch_E = empty_vector(max(chunk.elements for chunk in average.chunks))
        start = 0
        for chunk in average.chunks:
            span = slice(start, start + chunk.elements)
            delta_E = scratch_E[: chunk.elements]
            average.decode(chunk, delta_E)
            before = base.theta_N[span], base.momentum_N[span]
            out = theta_N[span], momentum_N[span]
            if not self._outer.advance(before, delta_E, out, at):
                raise ValueError("an average leads to a state that is not finite")
            start = span.stop
        return State(theta_N, momentum_N, state_root(self._layout, theta_N, momentum_N))

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
            kept > 8 * self.numel or len(self._averages) > MAX_KEPT_AVERAGES
        ):
            _, oldest = self._averages.popitem(last=False)
            kept -= oldest.nbytes
