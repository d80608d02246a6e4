"""Who takes part in a run: the interface, and a directory in memory for simulation.

`dht.kademlia` implements the same interface over a real DHT. Guaranteed by both: whatever `peers`
and `find_run` return has passed every check of `dht.records`. Not guaranteed: completeness. A peer
may be missing for a refresh interval, and one that has died is listed until its record expires.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Protocol

from dht.errors import PeerError, RecordError, RunNotFound
from dht.identity import Identity
from dht.records import PeerRecord, SignedRun, open_peer_record, seal

logger = logging.getLogger(__name__)


class Directory(Protocol):
    """Where peers of a run find each other.

    Any method may raise `dht.errors.PeerError` (`Unreachable`, `TimedOut`) when the network fails:
    keep going with the peers already known and try again.
    """

    async def announce(self, record: PeerRecord) -> None:
        """Publish a record about ourselves; to be repeated every `PEER_REFRESH_S`.

        Raises:
            RecordError: the record breaks a bound or is about somebody else.
        """
        ...

    async def peers(self, run_id: str) -> list[PeerRecord]:
        """Verified, unexpired records of a run's peers that are not leaving, ourselves included.

        Returns:
            Freshest (latest expiry) first; empty where nobody is known.
        """
        ...

    async def publish(self, run: SignedRun) -> None:
        """Make a run known under its id; anybody may do it for any run."""
        ...

    async def find_run(self, run_id: str) -> SignedRun:
        """Look a run up by its id; what is returned hashes to that id.

        Raises:
            RunNotFound: nobody who could be reached has it.
        """
        ...

    def watch(self, run_id: str, interval_s: float) -> AsyncIterator[list[PeerRecord]]:
        """Yield `peers(run_id)` at once and then every `interval_s`, for ever.

        A failed look-up is skipped: it is logged, and the next one may succeed.
        """
        ...


class InMemoryNetwork:
    """What the in-memory directories of one simulated network share: the sealed bytes."""

    def __init__(self) -> None:
        self.peers: dict[tuple[str, str], tuple[bytes, float]] = {}  # (run, peer): sealed, expiry
        self.runs: dict[str, bytes] = {}


class InMemoryDirectory(Directory):
    """A directory for simulation: no sockets, the same records, checks and expiry as the real one.

    Args:
        identity: signs what is announced.
        network: shared by all directories that shall see each other.
        clock: Unix seconds, possibly virtual.
        sleep: waits that many seconds on the same clock; used by `watch` alone.
    """

    def __init__(
        self,
        identity: Identity,
        network: InMemoryNetwork,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._identity = identity
        self._network = network
        self._clock = clock
        self._sleep = sleep

    async def announce(self, record: PeerRecord) -> None:
        """See `Directory.announce`."""
        raw = seal(record, self._identity)
        open_peer_record(raw, now=self._clock())
        key = record.run_id, record.peer_id
        _, held_until = self._network.peers.get(key, (b"", 0.0))
        if record.expires_at > held_until:  # as in the DHT: only a later expiry replaces
            self._network.peers[key] = raw, record.expires_at

    async def peers(self, run_id: str) -> list[PeerRecord]:
        """See `Directory.peers`."""
        now = self._clock()
        for key, (_, expires_at) in list(self._network.peers.items()):
            if expires_at <= now:
                del self._network.peers[key]
        sealed = (raw for (run, _), (raw, _) in self._network.peers.items() if run == run_id)
        return believable(sealed, run_id, now)

    async def publish(self, run: SignedRun) -> None:
        """See `Directory.publish`."""
        raw = run.to_bytes()
        self._network.runs[SignedRun.from_bytes(raw).run_id] = raw

    async def find_run(self, run_id: str) -> SignedRun:
        """See `Directory.find_run`."""
        raw = self._network.runs.get(run_id)
        if raw is None:
            raise RunNotFound(run_id)
        return SignedRun.from_bytes(raw)

    def watch(self, run_id: str, interval_s: float) -> AsyncIterator[list[PeerRecord]]:
        """See `Directory.watch`."""
        return poll(self, run_id, interval_s, self._sleep)


def believable(sealed: Iterable[bytes], run_id: str, now: float) -> list[PeerRecord]:
    """Open records, leaving out those that must not be believed and those that are leaving.

    Returns:
        Freshest (latest expiry) first; ties in the order of peer ids, so all see one order.
    """
    records = []
    for raw in sealed:
        try:
            record = open_peer_record(raw, now=now, run_id=run_id)
        except RecordError as exc:
            logger.debug("directory.record_refused run=%s reason=%r", run_id, exc.reason)
            continue
        if not record.leaving:
            records.append(record)
    return sorted(records, key=lambda record: (-record.expires_at, record.peer_id))


async def poll(
    directory: Directory,
    run_id: str,
    interval_s: float,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> AsyncIterator[list[PeerRecord]]:
    """The `watch` of every directory: look, yield, wait."""
    while True:
        try:
            records = await directory.peers(run_id)
        except PeerError as exc:
            logger.warning("directory.lookup_failed run=%s reason=%r", run_id, exc.reason)
        else:
            yield records
        await sleep(interval_s)
