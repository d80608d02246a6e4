"""What all peers of a run agree on about its rounds."""

from __future__ import annotations

from dataclasses import dataclass

KEPT_CANDIDATES = 4
"""States that a peer keeps beside its own until one of them is decided, the latest ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundConfig:
    """How the swarm runs its rounds; the same for all of its peers.

    Attributes:
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

    start_peers: int = 1
    rounds: int = 0
    codec: str = "int4"
    quorum: float = 0.5
    grace_s: float = 10.0
    close_s: float = 3.0
    exchange_s: float = 60.0
    suspect_s: float = 5.0
    provisional_s: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a plan needs to know about the vector: its length and how much can be one chunk."""

    numel: int
    largest_chunk: int
