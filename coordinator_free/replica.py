"""The state that all peers share, and what it becomes.

Parameters and the outer optimizer's momentum, two flat float32 vectors. They are never changed in
place: what is being served to a newcomer, trained from or compared stays valid while the next state
is computed beside it. Guarantees that the state named by `root` is the state that is held.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from coordinator_free.average import Average
from coordinator_free.messages import MAX_CERTIFICATES, Certificate, FrameHeader, Kind
from coordinator_free.outer import NesterovOuter
from coordinator_free.wire import pack_frame, tree_root, unpack_frame
from dht.errors import StateError

LEAF_ELEMENTS = 1 << 18  # 1 MiB of float32: one leaf of the hash tree, one frame of a download
KEPT_AVERAGES = 4  # encoded averages kept for peers that missed a round
KEPT_CANDIDATES = 4  # states computed and not yet decided


def _bytes_of(vector_N: Tensor) -> memoryview:
    """The memory of a float32 vector, shared."""
    return vector_N.numpy().view(np.uint8).data


def state_root(layout: str, theta_N: Tensor, momentum_N: Tensor) -> bytes:
    """(32,) bytes that name a state.

    Args:
        layout: names and shapes of the parameters, so that peers whose models differ in anything
            but their length never agree by mistake.
        theta_N: (N,) float32 parameters.
        momentum_N: (N,) float32 outer momentum.
    """
    leaves = [blake3(b"shoal layout v1\0" + layout.encode()).digest()]
    for vector_N in (theta_N, momentum_N):
        raw = _bytes_of(vector_N)
        for start in range(0, len(raw), 4 * LEAF_ELEMENTS):
            leaves.append(blake3(raw[start : start + 4 * LEAF_ELEMENTS]).digest())
    return tree_root(leaves)


@dataclass(frozen=True, slots=True)
class State:
    """Parameters and momentum, (N,) float32 each, and the root that names them."""

    theta_N: Tensor
    momentum_N: Tensor
    root: bytes

    def frames(self) -> Iterator[bytes]:
        """For a newcomer: every leaf of the parameters, then of the momentum."""
        for part, vector_N in enumerate((self.theta_N, self.momentum_N)):
            raw = _bytes_of(vector_N)
            for leaf, start in enumerate(range(0, len(raw), 4 * LEAF_ELEMENTS)):
                header = FrameHeader(part=part, chunk=leaf)
                yield pack_frame(header, raw[start : start + 4 * LEAF_ELEMENTS])


class StateReader:
    """Collects the leaves of a fetched state, in order, bounded by the length of the vector."""

    def __init__(self, layout: str, numel: int) -> None:
        self._layout = layout
        self._vectors = (torch.empty(numel), torch.empty(numel))
        self._raw = [_bytes_of(vector) for vector in self._vectors]
        self._next = (0, 0)

    def add(self, frame: bytes) -> None:
        """Take one frame.

        Raises:
            ValueError: not the leaf that comes next.
        """
        header, payload = unpack_frame(frame)
        part, leaf = self._next
        if (header.part, header.chunk) != (part, leaf) or part > 1:
            raise ValueError("a leaf of the state came out of order")
        start = 4 * LEAF_ELEMENTS * leaf
        stop = min(start + 4 * LEAF_ELEMENTS, len(self._raw[part]))
        if len(payload) != stop - start:
            raise ValueError("a leaf of the state has another length; does the model differ?")
        self._raw[part][start:stop] = payload
        self._next = (part + 1, 0) if stop == len(self._raw[part]) else (part, leaf + 1)

    def finish(self, root: bytes) -> State:
        """The state, which has this root.

        Raises:
            ValueError: it is another one, or incomplete.
        """
        if self._next != (2, 0):
            raise ValueError("a state is incomplete")
        theta_N, momentum_N = self._vectors
        if state_root(self._layout, theta_N, momentum_N) != root:
            raise ValueError("a state has another root than asked for")
        return State(theta_N, momentum_N, root)


class Replica:
    """The current state, the states it may become, and how it came about.

    Args:
        layout: see `state_root`.
        outer: the outer optimizer.
        state: to begin with.
        certificate: that names this state.
    """

    def __init__(
        self, layout: str, outer: NesterovOuter, state: State, certificate: Certificate
    ) -> None:
        self._layout = layout
        self._outer = outer
        self._candidates: OrderedDict[tuple[bytes, bytes], State] = OrderedDict()
        self._averages: OrderedDict[bytes, Average] = OrderedDict()
        self._lock = threading.Lock()  # `consider` runs in worker threads
        self.install(state, certificate)

    def install(self, state: State, certificate: Certificate) -> None:
        """Begin from another state, as a newcomer or after losing against another branch."""
        if certificate.outcome.state_root != state.root:
            raise StateError("a state and the certificate that should name it differ")
        self.state = state
        self.certificates: deque[Certificate] = deque([certificate], maxlen=MAX_CERTIFICATES)
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
        base = self.state
        theta_N, momentum_N = self._outer.preview(base.theta_N, base.momentum_N, average.values())
        if not (torch.isfinite(theta_N).all() and torch.isfinite(momentum_N).all()):
            raise ValueError("an average leads to a state that is not finite")
        state = State(theta_N, momentum_N, state_root(self._layout, theta_N, momentum_N))
        with self._lock:
            self._candidates[(average.root, state.root)] = state
            self._averages[average.root] = average
            while len(self._candidates) > KEPT_CANDIDATES:
                self._candidates.popitem(last=False)
            while len(self._averages) > KEPT_AVERAGES:
                self._averages.popitem(last=False)
        return state.root

    def average(self, root: bytes) -> Average | None:
        """A recent average, for peers that missed it."""
        return self._averages.get(root)

    def apply(self, certificate: Certificate) -> None:
        """The outcome is decided: what was considered becomes the state.

        Raises:
            StateError: its average was never considered here, or leads elsewhere.
        """
        outcome = certificate.outcome
        if outcome.kind == Kind.AVERAGE:
            state = self._candidates.get((outcome.vector_root, outcome.state_root))
            if state is None:
                raise StateError("a decided average is not held")
            self.state = state
            with self._lock:
                self._candidates.clear()
        self.certificates.append(certificate)
