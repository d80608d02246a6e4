"""Another way to a peer's tensor endpoint: through streams of the libp2p daemons.

    caller                                  perhaps a relay                    callee
    gRPC client --TCP--> portal ==stream==[ pipe ]==stream== entrance --TCP--> gRPC server

A *portal* is a listening socket on our loopback that leads to one peer: each connection to it
becomes one stream. The callee joins a stream to the one endpoint that it has offered. Two peers
that have no libp2p connection and can make none, as behind two NATs, are joined by a third that is
connected to both. The connection inside is that of `coordinator_free.transport`, TLS pinned end to
end, so that a relay sees, and can do, no more than a router on the way.

Who relays is agreed on without a word: every peer keeps a connection to a few others, the first
that it can reach in an order that depends on its own id, and whoever looks for it goes through the
same order. So there is nothing to announce, and no peer has to know whether it is behind a NAT.

On a stream `/shoal/tunnel/1` the callee says one byte, 0 for yes, and then both sides send frames:
a length of 4 bytes, big-endian, and so many bytes; length 0 ends that direction, and is answered
with 0xFFFFFFFF when all before it has been handed on. That is because the daemon cannot close half
a stream, and drops what is under way when it closes one. On a stream `/shoal/tunnel-relay/1` the
caller first says for whom it is: one byte of length and a binary peer id; the rest is as if it were
the callee's stream.

Guaranteed: only the offered endpoint can be reached from outside; every await on another machine
has a deadline, a tunnel that moves nothing is closed, buffers are bounded and hold back whoever
fills them; tunnels in all and with one peer are limited, and closing leaves no task and no socket
behind. A stream that breaks breaks the connection inside, it never ends it. Not guaranteed: that
tunnels survive the daemon's end (later ones use the next daemon), that those who relay are fair,
or, where there is no /proc, that it is this process that uses a portal: the endpoint behind it asks
for a token, which another program does not have.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import sys
import time
from collections import Counter, OrderedDict, deque
from collections.abc import (
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from dht.borrowed import PeerID
from dht.daemon import Stream
from dht.errors import Declined, Overloaded, PeerError, TimedOut, Unreachable

logger = logging.getLogger(__name__)

TUNNEL: Final = "/shoal/tunnel/1"
RELAY: Final = "/shoal/tunnel-relay/1"

_LOOPBACK = "127.0.0.1"
# 32 to 512 KiB are equally fast, as the daemons copy 32 KiB at a time and take most of the CPU.
_CHUNK_BYTES = 64 * 1024
_MAX_FRAME_BYTES = 1 << 20
_END = (0).to_bytes(4, "big")
_END_SEEN = b"\xff\xff\xff\xff"
_YES, _BUSY, _NO = b"\x00", b"\x01", b"\x02"

_ANCHORS = 4  # connections that every peer keeps, to be found through
_ASKED_RELAYS = 6  # of those we are connected to
_NAMED_FIRST = 2  # peers of the link, which everybody knows
_HEAD_START_S = 1.0  # for a direct stream before relays are asked
_SLOW_S = 30.0  # how long one that needed longer gets none
_DIAL_AGAIN_S = 30.0
_FAILED_S = 2.0
# A relay may lie, or drop what it is given: whoever looks for the same peer again so soon after it
# said yes asks it only when the others have said no, or after so long.
_AVOID_SOON_S = 30.0
_AVOIDED_WAITS_S = 0.5
_PARKED_S = 10.0
_CLOSE_S = 5.0
_REMEMBERED = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TunnelConfig:
    """Limits. Those who open tunnels to us are strangers.

    A peer of a run takes two tunnels to each that it calls: for messages and for streams.

    Attributes:
        relay: carry the tunnels of peers that cannot reach each other.
        max_portals: peers that we can have tunnels to.
        max_outbound: tunnels to one peer.
        max_inbound: tunnels of others that end here.
        max_inbound_each: of one peer, those included that it relays.
        max_relayed: tunnels of others that we relay.
        max_relayed_each: of one peer, from or to it.
        open_s: for opening a tunnel, as caller, callee and relay.
        idle_s: a tunnel that moves nothing for so long is closed.
        stall_s: longest wait for whoever does not take what was sent.
    """

    relay: bool = True
    max_portals: int = 64
    max_outbound: int = 8
    max_inbound: int = 128
    max_inbound_each: int = 32
    max_relayed: int = 64
    max_relayed_each: int = 32
    open_s: float = 5.0
    idle_s: float = 120.0
    stall_s: float = 30.0


class Streams(Protocol):
    """What tunnels need of `dht.daemon.Daemon`."""

    async def connect(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> None:
        """Make sure that there is a connection."""
        ...

    async def direct_peers(self) -> frozenset[str]:
        """Who is connected."""
        ...

    async def open_stream(self, peer_id: str, protocol: str, timeout_s: float) -> Stream:
        """Open a stream."""
        ...


@dataclass(slots=True, eq=False)
class _Portal:
    """The way in to the tunnels to one peer."""

    peer_id: str
    server: asyncio.Server
    port: int
    parked: deque[Stream] = field(default_factory=deque)  # open, and waiting for their connection
    users: int = 0


class Tunnels:
    """All tunnels of a peer, at either end and in between.

    Args:
        me: own peer id.
        streams: the daemon that runs now; raises `Unreachable` while there is none.
        known: addresses of other peers, by peer id.
        named: those of them whom a person told us about, and others too: asked first.
        config: limits.

    Attributes:
        counts: what has happened, by kind: `opened`, `opened_by_relay`, `served`, `relayed`,
            `refused`, `failed`, `broken`.
    """

    def __init__(
        self,
        me: str,
        streams: Callable[[], Streams],
        known: Callable[[], Mapping[str, tuple[str, ...]]],
        named: Sequence[str] = (),
        config: TunnelConfig | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._me = me
        self._streams = streams
        self._known = known
        self._named = named
        self._config = config = config or TunnelConfig()
        self._offered: tuple[str, int] | None = None
        self._portals: OrderedDict[str, _Portal] = OrderedDict()  # least recently used first
        self._inbound = _Places(config.max_inbound, config.max_inbound_each)
        self._relayed = _Places(config.max_relayed, config.max_relayed_each)
        self._dialled: OrderedDict[str, float] = OrderedDict()  # in vain, or too slowly; when
        self._slow: OrderedDict[str, float] = OrderedDict()
        self._failed: OrderedDict[str, float] = OrderedDict()
        self._relay_of: dict[str, tuple[str, float]] = {}
        self._avoided: dict[str, str] = {}  # for whom: which relay
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def offer(self, host: str, port: int) -> None:
        """Let others tunnel to this endpoint of ours, in place of any before.

        Args:
            host: where it listens: an address of ours, or `0.0.0.0` or `::` for all.
            port: TCP.
        """
        self._offered = ({"0.0.0.0": _LOOPBACK, "::": "::1"}.get(host, host), port)

    async def reach(self, peer_id: str) -> tuple[str, int]:
        """Open a tunnel.

        Args:
            peer_id: base58.

        Returns:
            Host and port of a socket on the loopback that leads to what the peer offers, now and
            for later connections, too.

        Raises:
            Unreachable: there is no way to it; `Declined`, `Overloaded`: or it says no.
            TimedOut: not done in time.
        """
        if _is_recent(self._failed, peer_id, _FAILED_S):
            raise Unreachable(peer_id, "a tunnel failed a moment ago")
        portal = await self._portal(peer_id)
        portal.users += 1
        relay, at = self._relay_of.pop(peer_id, ("", 0.0))
        if relay and at > time.monotonic() - _AVOID_SOON_S:
            self._avoided[peer_id] = relay
        try:
            stream = await self._open(peer_id)
        except PeerError as exc:
            self.counts["failed"] += 1
            _note(self._failed, peer_id)
            logger.debug("tunnel.failed peer=%s reason=%r", peer_id, exc.reason)
            raise
        finally:
            portal.users -= 1
        if self._closed:
            _drop(stream.writer)
            raise Unreachable(peer_id, "closing")
        if stream.peer_id != peer_id:
            self._relay_of[peer_id] = stream.peer_id, time.monotonic()
            if len(self._relay_of) > _REMEMBERED:
                self._relay_of.clear()
                self._avoided.clear()
        while len(portal.parked) >= self._config.max_outbound:
            _drop(portal.parked.popleft().writer)
        portal.parked.append(stream)
        asyncio.get_running_loop().call_later(_PARKED_S, self._unpark, portal, stream)
        return _LOOPBACK, portal.port

    async def close(self) -> None:
        """Break all tunnels. Harmless to repeat."""
        self._closed = True
        for portal in list(self._portals.values()):
            self._shut(portal)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)

    async def keep_anchors(self) -> None:
        """Connect to a few peers through which we can be found. To be called every so often.

        Raises:
            PeerError: our own daemon does not answer.
        """
        streams = self._streams()
        connected = await streams.direct_peers()
        known = self._known()
        wanted = _ANCHORS
        for peer_id in self._in_order(self._me, known):
            if wanted <= 0:
                return
            if peer_id not in connected:
                try:
                    await self._dial(streams, peer_id)
                except PeerError:
                    continue
            wanted -= 1

    # -- as caller

    async def _portal(self, peer_id: str) -> _Portal:
        portal = self._portals.get(peer_id)
        if portal is None:
            for other in list(self._portals.values()):
                if len(self._portals) < self._config.max_portals:
                    break
                if not other.users and not other.parked:
                    self._shut(other)
            if self._closed or len(self._portals) >= self._config.max_portals:
                raise Unreachable(peer_id, "as many tunnels as there may be")

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                self._start(self._pass(made, reader, writer), writer)

            server = await asyncio.start_server(accept, _LOOPBACK, 0, limit=_CHUNK_BYTES)
            made = _Portal(peer_id, server, server.sockets[0].getsockname()[1])
            portal = self._portals.setdefault(peer_id, made)
            if portal is not made:
                server.close()
        self._portals.move_to_end(peer_id)
        return portal

    def _shut(self, portal: _Portal) -> None:
        self._portals.pop(portal.peer_id, None)
        portal.server.close()
        while portal.parked:
            _drop(portal.parked.pop().writer)

    @staticmethod
    def _unpark(portal: _Portal, stream: Stream) -> None:
        if stream in portal.parked:
            portal.parked.remove(stream)
            _drop(stream.writer)

    async def _pass(
        self, portal: _Portal, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Join one connection to a portal with a stream of its own."""
        with contextlib.ExitStack() as stack:
            stack.callback(_drop, writer)
            theirs = writer.get_extra_info("peername")[1]
            if not await asyncio.to_thread(_is_own_connection, theirs, portal.port):
                logger.warning("tunnel.stranger_at_portal peer=%s", portal.peer_id)
                self.counts["refused"] += 1
                return
            if portal.users >= self._config.max_outbound:
                self.counts["refused"] += 1
                return
            portal.users += 1
            try:
                parked = portal.parked
                stream = parked.popleft() if parked else await self._open(portal.peer_id)
                stack.callback(_drop, stream.writer)
                await self._join(reader, writer, stream)
            except PeerError as exc:
                self.counts["failed"] += 1
                logger.debug("tunnel.failed peer=%s reason=%r", portal.peer_id, exc.reason)
            finally:
                portal.users -= 1

    async def _open(self, peer_id: str) -> Stream:
        """A stream that the peer itself has said yes to."""
        limit_s = self._config.open_s
        try:
            async with asyncio.timeout(limit_s):
                return await self._find_way(peer_id)
        except TimeoutError as exc:
            raise TimedOut(peer_id, f"no tunnel within {limit_s:g} s") from exc

    async def _find_way(self, peer_id: str) -> Stream:
        streams = self._streams()
        connected = await streams.direct_peers()
        direct = asyncio.create_task(self._enter_directly(streams, peer_id, connected))
        tasks, chosen = [direct], None
        try:
            # For half a minute, a connection that is dead looks like any other.
            slow = _is_recent(self._slow, peer_id, _SLOW_S)
            await asyncio.wait(tasks, timeout=0.0 if slow else _HEAD_START_S)
            refused = direct.done() and isinstance(direct.exception(), Declined)
            if not refused and not (direct.done() and direct.exception() is None):
                _note(self._slow, peer_id)
                for relay in self._relays(peer_id, connected):
                    after = tasks.copy() if relay == self._avoided.get(peer_id) else []
                    by_relay = self._enter_by(streams, relay, peer_id, connected, after)
                    tasks.append(asyncio.create_task(by_relay))
            chosen = await _first(tasks)
        finally:
            for task in tasks:
                if task is not chosen:
                    task.add_done_callback(_give_up)
                    task.cancel()
        if chosen is None:
            error = direct.exception()
            if isinstance(error, Declined):
                raise error
            raise Unreachable(peer_id, f"no way to it: {_reason(error)}") from error
        stream = chosen.result()
        if chosen is direct:
            self._slow.pop(peer_id, None)
            self.counts["opened"] += 1
        else:
            self.counts["opened_by_relay"] += 1
            logger.info("tunnel.relayed peer=%s by=%s", peer_id, stream.peer_id)
        return stream

    async def _enter_directly(
        self, streams: Streams, peer_id: str, connected: Collection[str]
    ) -> Stream:
        if peer_id not in connected:
            await self._dial(streams, peer_id)
        return await self._enter(streams, peer_id, peer_id)

    async def _enter_by(
        self,
        streams: Streams,
        relay: str,
        peer_id: str,
        connected: Collection[str],
        after: list[asyncio.Task[Stream]],
    ) -> Stream:
        if after:
            await asyncio.wait(after, timeout=_AVOIDED_WAITS_S)
        if relay not in connected:
            await self._dial(streams, relay)
        return await self._enter(streams, relay, peer_id)

    def _relays(self, peer_id: str, connected: Collection[str]) -> list[str]:
        """Whom to ask for a way to a peer: to whom it has connected for that, as far as we know."""
        asked = [
            *self._in_order(peer_id, connected)[:_ASKED_RELAYS],
            *self._in_order(peer_id, self._known())[:_ANCHORS],
        ]
        avoided = self._avoided.get(peer_id)
        return sorted(dict.fromkeys(asked), key=lambda relay: relay == avoided)  # that one last

    def _in_order(self, peer_id: str, peers: Collection[str]) -> list[str]:
        """The peers in an order that is the same for all who look for `peer_id`."""
        named = [each for each in self._named if each in peers][:_NAMED_FIRST]
        rest = sorted(
            set(peers).difference(named),
            key=lambda each: hashlib.sha256(f"{peer_id}\0{each}".encode()).digest(),
        )
        return [each for each in (*named, *rest) if each not in (peer_id, self._me)]

    async def _dial(self, streams: Streams, peer_id: str) -> None:
        """Connect, unless that failed not long ago."""
        maddrs = self._known().get(peer_id)
        if not maddrs:
            raise Unreachable(peer_id, "no libp2p address of it is known")
        if _is_recent(self._dialled, peer_id, _DIAL_AGAIN_S):
            raise Unreachable(peer_id, "could not be dialled a moment ago")
        _note(self._dialled, peer_id)  # also when we are cancelled, as a relay was faster
        await streams.connect(peer_id, maddrs, self._config.open_s)
        self._dialled.pop(peer_id, None)

    async def _enter(self, streams: Streams, via: str, peer_id: str) -> Stream:
        """Open a stream to the peer, through another one if `via` is not itself."""
        limit_s = self._config.open_s
        stream = await streams.open_stream(via, TUNNEL if via == peer_id else RELAY, limit_s)
        try:
            if stream.circuit:
                raise Unreachable(peer_id, "only a libp2p circuit, which carries too little")
            if via != peer_id:
                wanted = PeerID.from_base58(peer_id).to_bytes()
                stream.writer.write(bytes([len(wanted)]) + wanted)
            try:
                async with asyncio.timeout(limit_s):
                    said = await stream.reader.readexactly(1)
            except TimeoutError as exc:
                raise TimedOut(via, "does not answer on a new stream") from exc
            except (OSError, EOFError) as exc:
                raise Unreachable(via, "broke off a new stream") from exc
            if said == _BUSY:
                raise Overloaded(via, "has too many tunnels")
            if said != _YES:
                raise Declined(via, "has no way for this tunnel")
        except BaseException:
            _drop(stream.writer)
            raise
        return stream

    # -- as callee

    def serve(self, stream: Stream) -> None:
        """Take a stream `/shoal/tunnel/1` from a peer."""
        self._start(self._serve(stream), stream.writer)

    async def _serve(self, stream: Stream) -> None:
        with self._inbound.taken(stream.peer_id) as free:
            if not free or self._offered is None or stream.circuit:
                await self._refuse(stream, _NO if free else _BUSY)
                return
            try:
                async with asyncio.timeout(self._config.open_s):
                    reader, writer = await asyncio.open_connection(
                        *self._offered, limit=_CHUNK_BYTES
                    )
            except (OSError, TimeoutError) as exc:
                logger.warning("tunnel.own_endpoint_silent reason=%r", str(exc))
                await self._refuse(stream, _NO)
                return
            try:
                stream.writer.write(_YES)
                self.counts["served"] += 1
                await self._join(reader, writer, stream)
            finally:
                _drop(writer)

    # -- in between

    def serve_relay(self, stream: Stream) -> None:
        """Take a stream `/shoal/tunnel-relay/1` from a peer."""
        self._start(self._serve_relay(stream), stream.writer)

    async def _serve_relay(self, stream: Stream) -> None:
        try:
            async with asyncio.timeout(self._config.open_s):
                (size,) = await stream.reader.readexactly(1)
                wanted = PeerID(await stream.reader.readexactly(size)).to_base58()
        except (OSError, EOFError, TimeoutError, ValueError) as exc:
            logger.debug("tunnel.nobody_named peer=%s %r", stream.peer_id, exc)
            return
        with self._relayed.taken(stream.peer_id, wanted) as free:
            try:
                onward = await self._onward(stream, wanted) if free else None
            except PeerError as exc:
                logger.debug("tunnel.no_way_on peer=%s reason=%r", wanted, exc.reason)
                onward = None
            if onward is None:
                await self._refuse(stream, _NO if free else _BUSY)
                return
            self.counts["relayed"] += 1
            logger.info("tunnel.relays peer=%s for=%s", wanted, stream.peer_id)
            try:
                await self._splice(stream, onward)
            finally:
                _drop(onward.writer)

    async def _onward(self, stream: Stream, wanted: str) -> Stream | None:
        """The second half of a relayed tunnel, over a connection that is there already."""
        if not self._config.relay or stream.circuit or wanted in (stream.peer_id, self._me):
            return None
        streams = self._streams()
        if wanted not in await streams.direct_peers():
            return None
        onward = await streams.open_stream(wanted, TUNNEL, self._config.open_s)
        if onward.circuit:
            _drop(onward.writer)
            return None
        return onward

    async def _splice(self, one: Stream, other: Stream) -> None:
        """Hand on what each says to the other, until one of them ends."""
        flow = _Flow(self._config)
        pumps = [
            asyncio.create_task(flow.pump(here.reader, there.writer))
            for here, there in ((one, other), (other, one))
        ]
        try:
            done, _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        broken = [pump.exception() for pump in done if not pump.cancelled()]
        if any(broken):
            self._note_broken(one.peer_id, broken[0])
            return
        # Where one ended, what it had said before is still on its way to the other.
        await asyncio.gather(_finish(one.writer, _CLOSE_S), _finish(other.writer, _CLOSE_S))

    # -- at both ends

    async def _join(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: Stream
    ) -> None:
        """Carry a connection of our own machine over a stream, to the end of both directions."""
        link = _Link(reader, writer, stream, self._config)
        try:
            await link.run()
        except* _Broken as group:
            self._note_broken(stream.peer_id, group.exceptions[0])
        else:
            await asyncio.gather(_finish(writer, _CLOSE_S), _finish(stream.writer, _CLOSE_S))

    def _note_broken(self, peer_id: str, reason: BaseException | None) -> None:
        self.counts["broken"] += 1
        logger.debug("tunnel.broken peer=%s reason=%s", peer_id, reason)

    async def _refuse(self, stream: Stream, why: bytes) -> None:
        self.counts["refused"] += 1
        stream.writer.write(why)
        if why == _NO:
            # The daemon drops the byte if we end the stream before it has left. One who opens too
            # many streams is not worth the wait.
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await stream.reader.read(1)

    def _start(self, work: Coroutine[Any, Any, None], writer: asyncio.StreamWriter) -> None:
        """Run a tunnel's life; what it was given is closed at the end."""
        task = asyncio.get_running_loop().create_task(self._supervise(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Not in the task, which may be cancelled before it begins.
        task.add_done_callback(lambda _: _drop(writer))
        if self._closed:
            task.cancel()

    async def _supervise(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        # A task's outermost supervisor: whatever went wrong in one tunnel is not the others'.
        except Exception:
            self.counts["failed"] += 1
            logger.exception("tunnel.crashed")


class _Broken(Exception):
    """A tunnel ended before both of its directions had."""


class _Flow:
    """Reading and writing with deadlines that both directions of a tunnel share."""

    def __init__(self, config: TunnelConfig) -> None:
        self._idle_s = config.idle_s
        self._stall_s = config.stall_s
        self._now = asyncio.get_running_loop().time
        self._moved_at = self._now()

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        """Up to a chunk; empty at the end. A tunnel is idle when neither direction moves."""
        while True:
            try:
                async with asyncio.timeout_at(self._moved_at + self._idle_s):
                    data = await reader.read(_CHUNK_BYTES)
            except TimeoutError:
                if self._now() >= self._moved_at + self._idle_s:
                    raise _Broken("nothing moved") from None
            except OSError as exc:
                raise _Broken(f"cannot read: {exc}") from exc
            else:
                self._moved_at = self._now()
                return data

    async def write(self, writer: asyncio.StreamWriter, data: bytes | memoryview) -> None:
        """Hand on, and wait until there is room for more."""
        writer.write(data)
        try:
            async with asyncio.timeout(self._stall_s):
                await writer.drain()
        except TimeoutError:
            raise _Broken("nobody takes what was sent") from None
        except OSError as exc:
            raise _Broken(f"cannot write: {exc}") from exc

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on everything, up to the end."""
        while data := await self.read(reader):
            await self.write(writer, data)


class _Link(_Flow):
    """A TCP connection of this machine, framed over a stream."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        stream: Stream,
        config: TunnelConfig,
    ) -> None:
        super().__init__(config)
        self._reader = reader
        self._writer = writer
        self._stream = stream

    async def run(self) -> None:
        """Returns when both directions have ended, and both sides have seen it.

        Raises:
            ExceptionGroup: of `_Broken`.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._outward())
            tasks.create_task(self._inward())

    async def _outward(self) -> None:
        while data := await self.read(self._reader):
            # One write: a header of its own would travel in a packet of its own.
            await self.write(self._stream.writer, len(data).to_bytes(4, "big") + data)
        await self.write(self._stream.writer, _END)

    async def _inward(self) -> None:
        frames = _Frames()
        ended = end_seen = False
        while not (ended and end_seen):
            data = await self.read(self._stream.reader)
            if not data:
                raise _Broken("the stream ended early")
            for piece in frames.parts(data):
                if piece is None:
                    end_seen = True
                elif ended:
                    raise _Broken("something after the end")
                elif piece:
                    await self.write(self._writer, piece)
                else:
                    ended = True
                    with contextlib.suppress(OSError):  # a server that has closed needs no end
                        self._writer.write_eof()
                    self._stream.writer.write(_END_SEEN)


class _Frames:
    """What a stream's bytes mean, however they arrive."""

    def __init__(self) -> None:
        self._header = b""
        self._left = 0

    def parts(self, received: bytes) -> Iterator[memoryview | bytes | None]:
        """Pieces of payload, an empty one for its end, None when our own end was seen."""
        data = memoryview(received)
        while data:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                yield piece
                continue
            missing = 4 - len(self._header)
            self._header += data[:missing]
            data = data[missing:]
            if len(self._header) < 4:
                return
            header, self._header = self._header, b""
            if header == _END_SEEN:
                yield None
            elif header == _END:
                yield b""
            else:
                self._left = int.from_bytes(header, "big")
                if self._left > _MAX_FRAME_BYTES:
                    raise _Broken(f"a frame of {self._left} bytes")


class _Places:
    """A limited number of places, and of places for each."""

    def __init__(self, total: int, each: int) -> None:
        self._free = total
        self._each = each
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def taken(self, *names: str) -> Iterator[bool]:
        """Take a place under all these names while the block runs; False if there is none."""
        if self._free <= 0 or any(self._taken[name] >= self._each for name in names):
            yield False
            return
        self._free -= 1
        self._taken.update(names)
        try:
            yield True
        finally:
            self._free += 1
            self._taken.subtract(names)
            for name in names:
                if not self._taken[name]:
                    del self._taken[name]


async def _first(tasks: Iterable[asyncio.Task[Stream]]) -> asyncio.Task[Stream] | None:
    """The first that comes to a stream, or None."""
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not isinstance(task.exception(), PeerError):
                return task
    return None


def _reason(error: BaseException | None) -> str:
    return error.reason if isinstance(error, PeerError) else ""


def _give_up(task: asyncio.Task[Stream]) -> None:
    if not task.cancelled() and task.exception() is None:
        _drop(task.result().writer)


def _drop(writer: asyncio.StreamWriter) -> None:
    """Close at once: what was not sent yet is not waited for."""
    writer.transport.abort()


async def _finish(writer: asyncio.StreamWriter, limit_s: float) -> None:
    """Close once all has been sent, for as long as that may take."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(limit_s):
            await writer.wait_closed()


def _note(times: OrderedDict[str, float], what: str) -> None:
    times[what] = time.monotonic()
    times.move_to_end(what)
    if len(times) > _REMEMBERED:
        times.popitem(last=False)


def _is_recent(times: Mapping[str, float], what: str, within_s: float) -> bool:
    at = times.get(what)
    return at is not None and at > time.monotonic() - within_s


def _is_own_connection(their_port: int, our_port: int) -> bool:
    """Whether the other end of a loopback connection is a socket of this process, where known.

    Linux names each socket's inode in /proc/net, and our own open ones in /proc/self/fd.
    """
    loopback = int.from_bytes(socket.inet_aton(_LOOPBACK), sys.byteorder)
    ends = tuple(f"{loopback:08X}:{port:04X}" for port in (their_port, our_port))
    own = set()
    try:
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                own.add(os.readlink(f"/proc/self/fd/{number}"))
        for table in ("tcp", "tcp6"):  # gRPC speaks IPv4 through IPv6 sockets
            with open(f"/proc/self/net/{table}") as lines:
                for words in map(str.split, lines):
                    if all(word.endswith(end) for word, end in zip(words[1:3], ends, strict=False)):
                        return f"socket:[{words[9]}]" in own
    except OSError:
        # No /proc, as on macOS, where this cannot be known; or none of IPv6.
        return not os.path.isdir("/proc/self/fd")
    return False
