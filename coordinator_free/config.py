"""What all peers of a run agree on about its rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KEPT_CANDIDATES = 4
"""States that a peer keeps beside its own until one of them is decided, the latest ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundConfig:
    """How the swarm runs its rounds; the same for all of its peers.

    Attributes:
        mode: what is averaged: "diloco", the change of the parameters over some local steps, or
            "gradient", the gradient of one common batch.
        fragments: with "diloco", the parameters are averaged in so many parts, one a round, in
            turn.
        target_batch: in gradient mode, samples of all peers together that make a round.
        weight_cap: with "diloco", nobody's samples count for more than so many times the median; 0
            for no cap.
        start_peers: the first round begins when so many are there.
        rounds: the run ends after so many; 0 for no end.
        codec: what tensors are encoded as (`codecs`).
        quorum: share of the roster that must be ready before the others are stragglers.
        grace_s: how long stragglers may hold the others then, at most; in short rounds it is a
            quarter of what the quorum took.
        close_s: how long a straggler may take to hand in what it has when asked to.
        exchange_s: longest deadline of one averaging; once one is done, the next has a few times
            as long as that took.
        suspect_s: silence after which a leader is replaced or a lost peer loses its seat.
        provisional_s: how long more than half must be gone before the rest goes on without.
    """

    mode: Literal["diloco", "gradient"] = "diloco"
    fragments: int = 1
    target_batch: int = 0
    weight_cap: float = 4.0
    start_peers: int = 1
    rounds: int = 0
    codec: str = "int4"
    quorum: float = 0.5
    grace_s: float = 10.0
    close_s: float = 3.0
    exchange_s: float = 60.0
    suspect_s: float = 5.0
    provisional_s: float = 10.0

    @property
    def parts(self) -> int:
        """Into how many fragments the state is cut: a step needs the gradient of all of it."""
        return self.fragments if self.mode == "diloco" else 1

    @property
    def effective_weight_cap(self) -> float:
        """The cap as it applies: a gradient is the mean over samples, without one."""
        return self.weight_cap if self.mode == "diloco" else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a plan needs to know about the vectors that the rounds average.

    Attributes:
        lengths: of the fragments; the rounds take them in turn.
        largest_chunk: how many elements can be one chunk.
    """

    lengths: tuple[int, ...]
    largest_chunk: int

    def numel(self, round: int) -> int:
        """Length of the vector that a round averages."""
        return self.lengths[round % len(self.lengths)]
