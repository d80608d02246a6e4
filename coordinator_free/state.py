"""What all peers share: parameters and the optimizer's moments, and the root that names them.

A state is cut into *fragments*, equal spans of the parameters with the moments that belong to them.
A round averages one fragment, the rounds in turn, so that a fragment's exchange can hide behind the
training between two rounds (Streaming DiLoCo, arXiv:2501.18512); with one fragment it averages all.

Nothing here is ever changed in place: what is being served to a newcomer, trained from or compared
stays valid while the next state is computed beside it. Two states share the fragments in which they
do not differ, so a round costs the memory and the hashing of one fragment. Guarantees that `root`
names exactly what is held.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from coordinator_free.memory import bytes_of, empty_vector
from coordinator_free.optimizer import StateOptimizer
from coordinator_free.partition import fragment_bounds
from coordinator_free.wire import tree_root

LEAF_ELEMENTS = 1 << 18  # 1 MiB of float32: one leaf of the hash tree, one frame of a download


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a state's hash tree: bytes start .. stop of a vector of a fragment."""

    fragment: int
    vector: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shape:
    """How a run's states are laid out; equal in all of its peers.

    Args:
        layout: digest of names and shapes of the parameters, so that peers whose models differ in
            anything but their length never agree by mistake.
        bounds: of the fragments, (start, stop) in elements of the parameters.
        lengths: by fragment, of its vectors: parameters first, then moments.
    """

    layout: str
    bounds: tuple[tuple[int, int], ...]
    lengths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, layout: str, numel: int, fragments: int, optimizer: StateOptimizer) -> Shape:
        """The states of a run.

        Args:
            layout: see above.
            numel: parameters.
            fragments: into how many they are cut, at most (`partition.fragment_bounds`).
            optimizer: has the moments.
        """
        bounds = fragment_bounds(numel, fragments)
        lengths = tuple(optimizer.lengths(stop - start) for start, stop in bounds)
        return cls(layout, bounds, lengths)

    @property
    def numel(self) -> int:
        """How many parameters there are."""
        return self.bounds[-1][1]

    @functools.cached_property
    def elements(self) -> int:
        """Of all vectors together."""
        return sum(map(sum, self.lengths))

    def fragment(self, round: int) -> int:
        """Which fragment a round averages."""
        return round % len(self.bounds)

    def averaged(self, round: int) -> int:
        """How many elements a round averages."""
        return self.lengths[self.fragment(round)][0]

    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Fragment by fragment, vector by vector."""
        step = 4 * LEAF_ELEMENTS
        return tuple(
            Leaf(fragment, vector, start, min(start + step, 4 * length))
            for fragment, lengths in enumerate(self.lengths)
            for vector, length in enumerate(lengths)
            for start in range(0, 4 * length, step)
        )

    @functools.cached_property
    def layout_leaf(self) -> bytes:
        """(32,) bytes: the first entry of a state's tree, which no donor needs to send."""
        return blake3(b"shoal layout v1\0" + self.layout.encode()).digest()

    def root(self, digests: Sequence[bytes]) -> bytes:
        """(32,) bytes that name the state whose leaves have these digests."""
        return tree_root([self.layout_leaf, *digests])

    def empty(self) -> tuple[tuple[Tensor, ...], ...]:
        """Memory for a state, of any values: by fragment, its vectors."""
        return tuple(tuple(map(empty_vector, lengths)) for lengths in self.lengths)


@dataclass(frozen=True, slots=True, eq=False)
class Fragment:
    """A span of the parameters and the moments that belong to it.

    Attributes:
        vectors: float32 on the CPU, parameters first; never to be changed.
        digests: (32,) bytes for each leaf.
    """

    vectors: tuple[Tensor, ...]
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, vectors: Sequence[Tensor]) -> Fragment:
        """With the digests computed: a gigabyte takes about a second."""
        return cls(tuple(vectors), tuple(_digests(vectors)))

    @property
    def theta_E(self) -> Tensor:
        """(E,) float32 parameters."""
        return self.vectors[0]


@dataclass(frozen=True, eq=False)
class State:
    """All fragments, and the root that names them."""

    shape: Shape
    fragments: tuple[Fragment, ...]

    @classmethod
    def begin(cls, shape: Shape, theta_N: Tensor) -> State:
        """The state that a run is founded with: all moments are zero.

        Args:
            shape: of the run.
            theta_N: (N,) float32 parameters. Given away.
        """
        return cls.of(
            shape,
            [
                (theta_N[start:stop], *(torch.zeros(length) for length in lengths[1:]))
                for (start, stop), lengths in zip(shape.bounds, shape.lengths, strict=True)
            ],
        )

    @classmethod
    def of(cls, shape: Shape, vectors: Sequence[Sequence[Tensor]]) -> State:
        """A state of these vectors, by fragment; hashes all of them."""
        return cls(shape, tuple(map(Fragment.of, vectors)))

    def then(self, number: int, fragment: Fragment) -> State:
        """The state in which one fragment is another."""
        before, after = self.fragments[:number], self.fragments[number + 1 :]
        return State(self.shape, (*before, fragment, *after))

    @functools.cached_property
    def root(self) -> bytes:
        """(32,) bytes that name it."""
        return self.shape.root(self.digests)

    @property
    def digests(self) -> list[bytes]:
        """(32,) bytes for every leaf, in the order of `Shape.leaves`."""
        return list(itertools.chain(*(fragment.digests for fragment in self.fragments)))

    @property
    def theta_N(self) -> Tensor:
        """(N,) float32 parameters, never to be changed: a copy if there are several fragments."""
        if len(self.fragments) == 1:
            return self.fragments[0].theta_E
        out_N = empty_vector(self.shape.numel)
        for (start, stop), fragment in zip(self.shape.bounds, self.fragments, strict=True):
            out_N[start:stop].copy_(fragment.theta_E)
        return out_N

    def leaf(self, number: int) -> memoryview:
        """The bytes of one leaf, shared.

        Raises:
            IndexError: there is no such leaf.
        """
        if not 0 <= number < len(self.shape.leaves):
            raise IndexError(f"a state of {len(self.shape.leaves)} leaves has no leaf {number}")
        leaf = self.shape.leaves[number]
        return bytes_of(self.fragments[leaf.fragment].vectors[leaf.vector])[leaf.start : leaf.stop]

    def vectors(self) -> Iterator[Tensor]:
        """All vectors, in the order of the leaves."""
        return itertools.chain(*(fragment.vectors for fragment in self.fragments))


def _digests(vectors: Sequence[Tensor]) -> Iterator[bytes]:
    step = 4 * LEAF_ELEMENTS
    for vector in vectors:
        raw = bytes_of(vector)
        for start in range(0, len(raw), step):
            yield blake3(raw[start : start + step]).digest()
