"""What a peer gives to those who missed something: leaves of a state, averages, the chain.

A state that somebody downloads outlives the round: its parts are never changed in place, so keeping
it is holding on to it. Whoever asks for the current state gets a *lease* on it, renewed by every
request; while a lease runs, up to `KEPT_STATES` states that are not current any more stay as well.

Guarantees: memory is bounded by those states and `SLOTS` downloads, everything here waits without
blocking, and the bandwidth cap holds for all downloads of states together, shared evenly between
downloaders whatever number of streams each opens. Averages are not capped: a member that lacks one
holds up its round. Not guaranteed: that a state stays until its download is over. When more than
`KEPT_STATES` old ones are wanted, the one asked for least recently goes.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from coordinator_free import failpoints, wire
from coordinator_free.messages import (
    DIGESTS_A_FRAME,
    MAX_CERTIFICATES,
    FetchChain,
    FetchOutcome,
    FetchState,
    FrameHeader,
    Heads,
    Hello,
)
from coordinator_free.replica import Replica
from coordinator_free.state import State
from dht.errors import Overloaded, StateError

logger = logging.getLogger(__name__)

LEASE_S = 30.0  # a state is kept so long after somebody asked for a part of it
KEPT_STATES = 2  # that are not current any more
SLOTS = 4  # downloads of states at once
SLOT_S = 5.0  # a slot is free again so long after its downloader's last request
BURST_S = 0.1  # of the cap's bytes may be sent at once after a pause


class Throttle:
    """A cap on bytes per second that downloaders share evenly.

    Each downloader has one place in the line however many streams it opens, and whoever was served
    goes to its end. The line only ever waits on its own clock, never on a downloader.

    Args:
        bps: bytes per second; 0: no cap.
        clock: seconds.
        sleep: waits so many of them.
    """

    def __init__(
        self,
        bps: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bps = bps
        self._clock = clock
        self._sleep = sleep
        self._line = asyncio.Lock()  # first come, first served
        self._places: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._free_at = 0.0

    async def take(self, downloader: str, size: int) -> None:
        """Wait until `size` bytes may go to this downloader."""
        if not self._bps:
            return
        place = self._places.get(downloader)
        if place is None:
            place = self._places[downloader] = asyncio.Lock()
        async with place, self._line:
            now = self._clock()
            self._free_at = max(self._free_at, now - BURST_S)
            wait_s = self._free_at - now
            self._free_at += size / self._bps
            if wait_s > 0:
                await self._sleep(wait_s)


@dataclass(slots=True)
class _Lease:
    state: State
    until: float


@dataclass(slots=True)
class _Slot:
    streams: int = 0
    until: float = 0.0  # it is kept so long between two requests


class Donor:
    """Serves one replica's states, averages and chain.

    Args:
        replica: whose.
        serve_bps: cap on the bytes per second of all states being served; 0: none.
        clock: seconds.
    """

    def __init__(self, replica: Replica, serve_bps: float, clock: Callable[[], float]) -> None:
        self._replica = replica
        self._throttle = Throttle(serve_bps, clock)
        self._clock = clock
        self._leases: OrderedDict[bytes, _Lease] = OrderedDict()  # least recently asked for first
        self._slots: dict[str, _Slot] = {}  # by downloader

    def tidy(self) -> None:
        """Let go of states whose leases are over; call it now and then."""
        now = self._clock()
        for root, lease in list(self._leases.items()):
            if lease.until < now:
                del self._leases[root]
        old = [root for root in self._leases if root != self._replica.state.root]
        for root in old[: max(0, len(old) - KEPT_STATES)]:
            del self._leases[root]

    @property
    def kept(self) -> tuple[bytes, ...]:
        """Roots of the states under lease."""
        return tuple(self._leases)

    async def serve(
        self, sender: str, request: FetchState | FetchOutcome | FetchChain
    ) -> AsyncGenerator[bytes, None]:
        """The frames of what is asked for.

        Raises:
            StateError: it is not held, or no longer.
            Overloaded: too many downloads at once.
            ValueError: there is no such leaf.
        """
        match request:
            case FetchState():
                frames: AsyncGenerator[bytes, None] = self._state(sender, request)
            case FetchOutcome():
                frames = self._average(sender, request)
            case FetchChain():
                frames = self._chain()
        async with aclosing(frames):
            async for frame in frames:
                yield frame

    def answer(self, hello: Hello) -> bytes:
        """The `Heads` for a `Hello`, as many certificates as fit into one message."""
        kept = list(self._replica.certificates)
        wanted = [c for c in kept if c.outcome.height >= hello.height][:MAX_CERTIFICATES]
        if not wanted or wanted[0].outcome.height != hello.height:
            wanted = kept[-2:]
        while True:
            try:
                return wire.encode(Heads(certificates=tuple(wanted)))
            except ValueError:
                if len(wanted) == 1:
                    raise
                wanted = wanted[:-1]

    async def _state(self, sender: str, request: FetchState) -> AsyncGenerator[bytes, None]:
        lease = self._lease(request.state_root)
        leaves = len(lease.state.shape.leaves)
        if any(leaf >= leaves for leaf in request.leaves):
            raise ValueError("a request for a leaf that there is not")
        with self._slot(sender):
            self._renew(lease)
            if not request.leaves:
                digests = lease.state.digests
                for at in range(0, len(digests), DIGESTS_A_FRAME):
                    raw = b"".join(digests[at : at + DIGESTS_A_FRAME])
                    await self._throttle.take(sender, len(raw))
                    yield wire.pack_frame(FrameHeader(part=1, chunk=at), raw)
            for leaf in request.leaves:
                if leaf == leaves // 2:
                    await failpoints.reach_async("donor.half")
                payload = lease.state.leaf(leaf)
                await self._throttle.take(sender, len(payload))
                yield wire.pack_frame(FrameHeader(chunk=leaf), payload)
                self._renew(lease)

    async def _average(self, sender: str, request: FetchOutcome) -> AsyncGenerator[bytes, None]:
        average = self._replica.average(request.vector_root)
        if average is None:
            raise StateError("this average is not held")
        logger.info("donor.average peer=%s", sender)
        for frame in average.frames():
            yield frame

    async def _chain(self) -> AsyncGenerator[bytes, None]:
        for number, link in enumerate(self._replica.chain.links):
            yield wire.pack_frame(FrameHeader(chunk=number), wire.encode_certificate(link))

    def _lease(self, root: bytes) -> _Lease:
        """The state with this root, kept for a while longer."""
        self.tidy()
        lease = self._leases.get(root)
        if lease is None:
            if root != self._replica.state.root:
                raise StateError("this state is not held any more")
            lease = _Lease(self._replica.state, 0.0)
        return lease

    def _renew(self, lease: _Lease) -> None:
        lease.until = self._clock() + LEASE_S
        self._leases[lease.state.root] = lease
        self._leases.move_to_end(lease.state.root)

    @contextmanager
    def _slot(self, sender: str) -> Iterator[None]:
        """One of the few downloads that there may be at once, however many streams it has."""
        now = self._clock()
        self._slots = {p: s for p, s in self._slots.items() if s.streams or s.until > now}
        if sender not in self._slots:
            if len(self._slots) >= SLOTS:
                raise Overloaded("", f"{SLOTS} downloads are under way")
            logger.info("donor.download peer=%s", sender)
            self._slots[sender] = _Slot()
        slot = self._slots[sender]
        slot.streams += 1
        try:
            yield
        finally:
            slot.streams -= 1
            slot.until = self._clock() + SLOT_S
