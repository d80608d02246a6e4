"""What all peers of a run agree on about its rounds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundConfig:
    """How the swarm runs its rounds; the same for all of its peers.

    Attributes:
        start_peers: the first round begins when so many are there.
        rounds: the run ends after so many; 0 for no end.
        codec: what tensors are encoded as (`codecs`).
        grace_s: how long stragglers may hold the others once a majority is ready.
        close_s: how long a straggler may take to hand in what it has when asked to.
        exchange_s: deadline of one averaging.
        suspect_s: silence after which a leader is replaced or a lost peer loses its seat.
        provisional_s: how long more than half must be gone before the rest goes on without.
    """

    start_peers: int = 1
    rounds: int = 0
    codec: str = "int4"
    grace_s: float = 10.0
    close_s: float = 3.0
    exchange_s: float = 60.0
    suspect_s: float = 5.0
    provisional_s: float = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a plan needs to know about the vector: its length and how much of it is one chunk."""

    numel: int
    chunk_elements: int
