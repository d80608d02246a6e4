"""Tunnels through real libp2p daemons on the loopback, to endpoints that are played."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dht import tunnel
from dht.borrowed import PeerID
from dht.daemon import Daemon, DaemonConfig, Stream
from dht.errors import Overloaded, PeerError, TimedOut, Unreachable
from dht.identity import Identity
from dht.kademlia import KademliaConfig, KademliaDirectory
from dht.tunnel import RELAY, TUNNEL, TunnelConfig, Tunnels

FindDaemon = Callable[[int], int]
Eventually = Callable[..., Awaitable[None]]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

WAIT_S = 20.0
DESCRIPTORS = Path("/proc/self/fd")  # Linux
LISTEN = ("/ip4/127.0.0.1/tcp/0",)


@dataclass
class Peer:
    """A daemon and its tunnels."""

    daemon: Daemon
    tunnels: Tunnels
    maddrs: tuple[str, ...]
    known: dict[str, tuple[str, ...]]
    endpoint: int = 0

    @property
    def id(self) -> str:
        return self.daemon.peer_id

    def knows(self, *others: Peer) -> None:
        for other in others:
            self.known[other.id] = other.maddrs

    async def connect(self, other: Peer) -> None:
        await self.daemon.connect(other.id, other.maddrs, WAIT_S)


@dataclass
class World:
    folder: Path
    stack: AsyncExitStack
    peers: list[Peer] = field(default_factory=list)

    async def peer(
        self, handler: Handler | None = None, *, listens: bool = True, **limits: Any
    ) -> Peer:
        """One more peer; with a handler, it offers an endpoint."""
        path = self.folder / f"identity-{len(self.peers)}"
        Identity.load_or_create(path)
        maddrs = LISTEN if listens else ()
        daemon = await Daemon.start(DaemonConfig(identity_path=path, host_maddrs=maddrs))
        self.stack.push_async_callback(daemon.close)
        known: dict[str, tuple[str, ...]] = {}
        tunnels = Tunnels(
            daemon.peer_id, lambda: daemon, lambda: known, config=TunnelConfig(**limits)
        )
        self.stack.push_async_callback(tunnels.close)
        await daemon.serve_streams(TUNNEL, tunnels.serve)
        await daemon.serve_streams(RELAY, tunnels.serve_relay)
        peer = Peer(daemon, tunnels, await daemon.visible_maddrs() if listens else (), known)
        self.peers.append(peer)
        if handler is not None:
            peer.endpoint = await self.stack.enter_async_context(endpoint(handler))
            tunnels.offer("127.0.0.1", peer.endpoint)
        return peer


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = World(tmp_path, stack)
        yield world
        descriptors = count_descriptors()
        for peer in world.peers:
            await peer.tunnels.close()
            assert not peer.tunnels._tasks
            await peer.daemon.close()
    assert count_descriptors() <= descriptors


def count_descriptors() -> int:
    return len(list(DESCRIPTORS.iterdir())) if DESCRIPTORS.is_dir() else 0


@asynccontextmanager
async def endpoint(handler: Handler) -> AsyncIterator[int]:
    """What a peer's gRPC server is elsewhere."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                await handler(reader, writer)
        finally:
            writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    await asyncio.sleep(0.5)  # the other side closes first


@asynccontextmanager
async def through(
    peer: Peer, other: Peer
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the other's endpoint."""
    host, port = await peer.tunnels.reach(other.id)
    assert host == "127.0.0.1"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def said_back(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes
) -> bytes:
    """What comes back for it, when our direction has ended behind it."""

    async def send() -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        return await tasks.create_task(reader.read(-1))
    raise AssertionError("unreachable")


async def test_bytes_arrive_both_ways_and_half_of_a_connection_can_end(world: World) -> None:
    one, other = await world.peer(), await world.peer(echo)
    one.knows(other)
    data = os.urandom(3_000_017)
    for _ in range(2):
        async with through(one, other) as (reader, writer):
            assert await said_back(reader, writer, data) == data
    assert one.tunnels.counts == {"opened": 2}
    assert other.tunnels.counts == {"served": 2}


async def test_every_connection_to_a_portal_is_a_tunnel(
    world: World, eventually: Eventually
) -> None:
    one, other = await world.peer(), await world.peer(echo)
    one.knows(other)
    host, port = await one.tunnels.reach(other.id)
    for _ in range(3):
        reader, writer = await asyncio.open_connection(host, port)
        assert await said_back(reader, writer, b"again") == b"again"
        writer.close()
    # The first one used what `reach` had opened.
    await eventually(lambda: one.tunnels.counts["opened"] == 3)
    assert (await one.tunnels.reach(other.id))[1] == port


async def test_who_cannot_be_dialled_is_reached_over_its_own_connection(world: World) -> None:
    one, other = await world.peer(), await world.peer(echo, listens=False)
    await other.connect(one)
    async with through(one, other) as (reader, writer):
        assert await said_back(reader, writer, b"hello") == b"hello"


async def test_two_who_cannot_be_dialled_are_joined_by_a_third(world: World) -> None:
    public = await world.peer()
    one, other = await world.peer(listens=False), await world.peer(echo, listens=False)
    for each in (one, other):
        each.knows(public)
        await each.tunnels.keep_anchors()
    data = os.urandom(2_000_003)
    async with through(one, other) as (reader, writer):
        assert await said_back(reader, writer, data) == data
    assert one.tunnels.counts["opened_by_relay"] == 1
    assert public.tunnels.counts["relayed"] == 1
    assert other.tunnels.counts["served"] == 1


async def test_a_connection_that_is_dead_is_gone_around(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "_HEAD_START_S", 0.3)
    public, one, other = await world.peer(), await world.peer(), await world.peer(echo)
    path = world.folder / "identity-lossy"
    Identity.load_or_create(path)
    lossy = await Daemon.start(DaemonConfig(identity_path=path, host_maddrs=LISTEN))
    world.stack.push_async_callback(lossy.close)
    tunnels = Tunnels(lossy.peer_id, lambda: lossy, dict)
    world.stack.push_async_callback(tunnels.close)
    tunnels.offer("127.0.0.1", other.endpoint)
    lost: list[Stream] = []

    def serve(stream: Stream) -> None:
        (lost.append if stream.peer_id == one.id else tunnels.serve)(stream)

    await lossy.serve_streams(TUNNEL, serve)
    for each in (one, public):
        await each.daemon.connect(lossy.peer_id, await lossy.visible_maddrs(), WAIT_S)
    await one.connect(public)
    began = asyncio.get_running_loop().time()
    await one.tunnels.reach(lossy.peer_id)
    assert one.tunnels.counts == {"opened_by_relay": 1}
    assert asyncio.get_running_loop().time() - began >= 0.3
    monkeypatch.setattr(tunnel, "_HEAD_START_S", WAIT_S)  # has none the next time
    async with asyncio.timeout(WAIT_S / 2):
        await one.tunnels.reach(lossy.peer_id)
    for stream in lost:
        stream.writer.close()


async def test_a_relay_that_lies_is_passed_over_the_next_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = await world.peer()
    one, other = await world.peer(listens=False), await world.peer(echo, listens=False)
    await one.connect(public)
    await other.connect(public)

    def lie(stream: Stream) -> None:
        stream.writer.write(b"\x00" + bytes(100))
        lies.append(stream)

    lies: list[Stream] = []
    path = world.folder / "identity-liar"
    Identity.load_or_create(path)
    daemon = await Daemon.start(DaemonConfig(identity_path=path, host_maddrs=LISTEN))
    world.stack.push_async_callback(daemon.close)
    await daemon.serve_streams(RELAY, lie)
    await one.daemon.connect(daemon.peer_id, await daemon.visible_maddrs(), WAIT_S)
    # Both say yes; the lie is told first.
    slow = public.daemon.open_stream

    async def open_slowly(*arguments: Any) -> Stream:
        await asyncio.sleep(0.2)
        return await slow(*arguments)

    monkeypatch.setattr(public.daemon, "open_stream", open_slowly)
    async with through(one, other) as (reader, writer):
        with contextlib.suppress(OSError):
            assert await said_back(reader, writer, b"hello") != b"hello"
    host, port = await one.tunnels.reach(other.id)
    for _ in range(2):  # what `reach` has opened, and what is opened for who uses the portal again
        reader, writer = await asyncio.open_connection(host, port)
        assert await said_back(reader, writer, b"hello") == b"hello"
        writer.close()
    for stream in lies:
        stream.writer.close()


async def test_who_does_not_relay_says_so(world: World) -> None:
    public = await world.peer(relay=False)
    one, other = await world.peer(listens=False), await world.peer(echo, listens=False)
    await one.connect(public)
    await other.connect(public)
    with pytest.raises(Unreachable):
        await one.tunnels.reach(other.id)
    assert public.tunnels.counts == {"refused": 1}


async def test_nobody_to_be_reached_is_an_error_and_soon_remembered(world: World) -> None:
    one = await world.peer()
    nobody = Identity.generate().peer_id
    with pytest.raises(Unreachable):
        await one.tunnels.reach(nobody)
    with pytest.raises(Unreachable, match="a moment ago"):
        await one.tunnels.reach(nobody)


async def test_who_offers_nothing_is_not_reached(world: World) -> None:
    one, other = await world.peer(), await world.peer()
    one.knows(other)
    with pytest.raises(PeerError):
        await one.tunnels.reach(other.id)
    assert other.tunnels.counts == {"refused": 1}


async def test_who_offers_what_does_not_answer_is_not_reached(world: World) -> None:
    one, other = await world.peer(), await world.peer()
    one.knows(other)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    other.tunnels.offer("0.0.0.0", closed)
    with pytest.raises(PeerError):
        await one.tunnels.reach(other.id)


async def test_who_does_not_read_holds_back_who_writes(
    world: World, eventually: Eventually
) -> None:
    go_on = asyncio.Event()

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await echo(reader, writer)

    one, other = await world.peer(), await world.peer(slow)
    one.knows(other)
    data = bytes(64 << 20)
    async with through(one, other) as (reader, writer):
        sent = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                while sent < len(data):
                    writer.write(data[: 1 << 20])
                    await writer.drain()
                    sent += 1 << 20
        # What the daemons' windows (16 MB each) and the sockets take, and no more.
        assert sent < 48 << 20
        go_on.set()
        writer.write_eof()
        received = 0
        async with asyncio.timeout(WAIT_S):
            while piece := await reader.read(1 << 20):
                received += len(piece)
        assert received == sent + (1 << 20)  # the write that was cut short was taken all the same


async def test_a_server_may_end_first(world: World) -> None:
    ended = asyncio.Event()

    async def speak_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"goodbye")
        writer.write_eof()
        assert await reader.read(-1) == b"still here"
        ended.set()

    one, other = await world.peer(), await world.peer(speak_first)
    one.knows(other)
    async with through(one, other) as (reader, writer):
        async with asyncio.timeout(WAIT_S):
            assert await reader.read(-1) == b"goodbye"
            writer.write(b"still here")
            writer.write_eof()
            await ended.wait()


async def test_a_connection_that_breaks_is_broken_at_the_other_end(world: World) -> None:
    broken = asyncio.Event()

    async def expect_break(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        with contextlib.suppress(OSError):
            await reader.read(-1)
        broken.set()

    one, other = await world.peer(), await world.peer(expect_break)
    one.knows(other)
    async with through(one, other) as (reader, writer):
        writer.write(b"x")
        async with asyncio.timeout(WAIT_S):
            await reader.readexactly(1)
    async with asyncio.timeout(WAIT_S):
        await broken.wait()


async def test_tunnels_that_move_nothing_are_closed(world: World, eventually: Eventually) -> None:
    one, other = await world.peer(), await world.peer(echo, idle_s=0.3)
    one.knows(other)
    async with through(one, other) as (reader, writer):
        for _ in range(4):  # as long as something moves, it stays
            await asyncio.sleep(0.15)
            writer.write(b"x")
            async with asyncio.timeout(WAIT_S):
                assert await reader.readexactly(1) == b"x"
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(OSError):
                assert await reader.read(-1) == b""
    await eventually(lambda: other.tunnels.counts["broken"] == 1)


async def test_who_stops_reading_is_dropped(world: World, eventually: Eventually) -> None:
    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()

    one, other = await world.peer(), await world.peer(pour, stall_s=0.5)
    one.knows(other)
    async with through(one, other):
        # Nobody reads here: portal, streams and windows fill up, and then the callee has enough.
        await eventually(lambda: other.tunnels.counts["broken"] == 1, WAIT_S)


async def test_tunnels_are_limited_for_each_peer_and_in_all(
    world: World, eventually: Eventually
) -> None:
    other = await world.peer(echo, max_inbound=3, max_inbound_each=2)
    one, two = await world.peer(), await world.peer()
    for each in (one, two):
        each.knows(other)
    async with through(one, other), through(one, other):
        with pytest.raises(PeerError):
            await one.tunnels.reach(other.id)
        async with through(two, other) as (reader, writer):
            with pytest.raises(PeerError):
                await two.tunnels.reach(other.id)
            assert await said_back(reader, writer, b"still") == b"still"
        assert other.tunnels.counts == {"served": 3, "refused": 2}
    # Places are given back.
    await eventually(lambda: not other.tunnels._inbound._taken)
    one.tunnels._failed.clear()
    async with through(one, other) as (reader, writer):
        assert await said_back(reader, writer, b"again") == b"again"


async def test_portals_and_their_users_are_limited(world: World, eventually: Eventually) -> None:
    one = await world.peer(max_portals=1, max_outbound=1)
    other, third = await world.peer(echo), await world.peer(echo)
    one.knows(other, third)
    async with through(one, other) as (reader, writer):
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        with pytest.raises(Unreachable, match="as many"):
            await one.tunnels.reach(third.id)
        async with through(one, other) as (refused, _):
            with contextlib.suppress(OSError):
                assert await refused.read(1) == b""
        one.tunnels._unpark(one.tunnels._portals[other.id], *one.tunnels._portals[other.id].parked)
    await eventually(lambda: not one.tunnels._portals[other.id].users)
    async with through(one, third) as (reader, writer):  # the unused portal made room
        assert await said_back(reader, writer, b"third") == b"third"


async def test_a_relay_carries_a_limited_number(world: World, eventually: Eventually) -> None:
    public = await world.peer(max_relayed_each=1)
    one, other = await world.peer(listens=False), await world.peer(echo, listens=False)
    await one.connect(public)
    await other.connect(public)
    async with through(one, other) as (reader, writer):
        with pytest.raises(PeerError):
            await one.tunnels.reach(other.id)
        assert await said_back(reader, writer, b"first") == b"first"
    await eventually(lambda: not public.tunnels._relayed._taken)


async def test_a_stream_is_handed_on_to_peers_alone_that_are_connected(world: World) -> None:
    public, one = await world.peer(), await world.peer()
    await one.connect(public)
    others = [Identity.generate().peer_id, public.id, one.id]
    for name in (PeerID.from_base58(other).to_bytes() for other in others):
        stream = await one.daemon.open_stream(public.id, RELAY, WAIT_S)
        stream.writer.write(bytes([len(name)]) + name)
        async with asyncio.timeout(WAIT_S):
            assert await stream.reader.read(1) in (b"\x02", b"")
        stream.writer.close()
    assert not public.tunnels.counts["relayed"]


@pytest.mark.parametrize(
    "said",
    [
        (1 << 31).to_bytes(4, "big"),  # a frame that is too long
        bytes(4) + b"\x00\x00\x00\x01x",  # something after the end
        bytes(8),  # two ends
        b"\x00\x00",  # and no more
    ],
)
async def test_what_no_correct_peer_says_ends_that_tunnel_alone(
    world: World, eventually: Eventually, said: bytes
) -> None:
    one, other = await world.peer(), await world.peer(echo)
    one.knows(other)
    async with through(one, other) as (reader, writer):
        stream = await one.daemon.open_stream(other.id, TUNNEL, WAIT_S)
        async with asyncio.timeout(WAIT_S):
            assert await stream.reader.readexactly(1) == b"\x00"
            stream.writer.write(said)
            if len(said) < 4:
                stream.writer.close()
            with contextlib.suppress(OSError):
                await stream.reader.read(-1)
        stream.writer.close()
        await eventually(lambda: other.tunnels.counts["broken"] == 1)
        assert await said_back(reader, writer, b"the other") == b"the other"


async def test_a_hostile_peer_costs_only_its_own_streams(
    world: World, eventually: Eventually
) -> None:
    other = await world.peer(echo, max_inbound_each=4)
    hostile, honest = await world.peer(), await world.peer()
    for each in (hostile, honest):
        each.knows(other)
    await hostile.connect(other)
    opened = await asyncio.gather(
        *(hostile.daemon.open_stream(other.id, TUNNEL, WAIT_S) for _ in range(100)),
        *(hostile.daemon.open_stream(other.id, RELAY, WAIT_S) for _ in range(100)),
        return_exceptions=True,
    )
    async with through(honest, other) as (reader, writer):
        data = os.urandom(1_000_000)
        assert await said_back(reader, writer, data) == data
    assert other.tunnels.counts["served"] <= 5
    for stream in opened:
        if isinstance(stream, Stream):
            stream.writer.transport.abort()
    await eventually(lambda: not other.tunnels._inbound._taken)
    await eventually(lambda: not other.tunnels._tasks)


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="only /proc tells whose a connection is")
async def test_a_program_that_is_not_us_is_turned_away(world: World) -> None:
    one, other = await world.peer(), await world.peer(echo)
    one.knows(other)
    _, port = await one.tunnels.reach(other.id)
    script = (
        "import socket, sys\n"
        f"s = socket.create_connection(('127.0.0.1', {port}))\n"
        "s.settimeout(10)\n"
        "try:\n"
        "    s.sendall(b'hello')\n"
        "    sys.stdout.write(repr(s.recv(5)))\n"
        "except OSError as error:\n"
        "    sys.stdout.write(repr(b''))\n"
    )
    said = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-S", "-c", script], capture_output=True, text=True
    )
    assert said.stdout == "b''", said
    assert one.tunnels.counts["refused"] == 1
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await said_back(reader, writer, b"hello") == b"hello"
    writer.close()


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="only /proc tells whose a connection is")
async def test_our_own_connections_are_known_over_both_kinds_of_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        families = [(socket.AF_INET, "127.0.0.1")]
        if socket.has_ipv6:
            families.append((socket.AF_INET6, "::ffff:127.0.0.1"))  # as gRPC does
        for family, host in families:
            with socket.socket(family) as client:
                try:
                    client.connect((host, port))
                except OSError:
                    continue
                assert tunnel._is_own_connection(client.getsockname()[1], port)
        assert not tunnel._is_own_connection(1, port)


async def test_a_silent_peer_costs_a_bounded_time(world: World) -> None:
    one, other = await world.peer(open_s=0.5), await world.peer(listens=False)
    accepted: list[Stream] = []
    await other.daemon.close()
    path = world.folder / "identity-silent"
    Identity.load_or_create(path)
    silent = await Daemon.start(DaemonConfig(identity_path=path, host_maddrs=LISTEN))
    world.stack.push_async_callback(silent.close)
    await silent.serve_streams(TUNNEL, accepted.append)
    one.known[silent.peer_id] = await silent.visible_maddrs()
    async with asyncio.timeout(5):
        with pytest.raises((TimedOut, Unreachable)):
            await one.tunnels.reach(silent.peer_id)
    for stream in accepted:
        stream.writer.close()


async def test_closing_breaks_what_is_open(world: World) -> None:
    one, other = await world.peer(), await world.peer(echo)
    one.knows(other)
    async with through(one, other) as (reader, writer):
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        await one.tunnels.close()
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(OSError):
                assert await reader.read(-1) == b""
    with pytest.raises(Unreachable):
        await one.tunnels.reach(other.id)


async def test_an_overload_is_told_from_a_refusal() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"\x01")

    class Transport(asyncio.Transport):
        def abort(self) -> None:
            pass

        def is_closing(self) -> bool:
            return True

        def write(self, data: Any) -> None:
            pass

    loop = asyncio.get_running_loop()
    writer = asyncio.StreamWriter(Transport(), asyncio.Protocol(), None, loop)  # type: ignore[arg-type]

    class Busy:
        async def connect(self, *_: object) -> None: ...

        async def direct_peers(self) -> frozenset[str]:
            return frozenset({"them"})

        async def open_stream(self, *_: object) -> Stream:
            return Stream("them", reader, writer, False)

    tunnels = Tunnels("me", Busy, dict)  # type: ignore[arg-type]
    with pytest.raises(Overloaded):
        await tunnels.reach("them")
    await tunnels.close()


# -- as part of a directory


async def test_a_restarted_daemon_breaks_tunnels_and_serves_new_ones(
    tmp_path: Path, daemon_pid: FindDaemon, eventually: Eventually
) -> None:
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(endpoint(echo))
        ends = []
        for name in ("one", "other"):
            config = KademliaConfig(
                identity_path=tmp_path / name,
                host="127.0.0.1",
                initial_peers=ends[0].maddrs if ends else (),
            )
            ends.append(await stack.enter_async_context(KademliaDirectory.open(config)))
        callee, caller = ends
        callee.offer("0.0.0.0", port)
        for number, victim in enumerate((callee, caller), 1):
            host, portal = await caller.reach(callee.identity.peer_id)
            reader, writer = await asyncio.open_connection(host, portal)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            assert victim._daemon is not None
            os.kill(daemon_pid(victim._daemon.pid), signal.SIGKILL)
            async with asyncio.timeout(WAIT_S):
                with contextlib.suppress(OSError):
                    assert await reader.read(-1) == b""
            writer.close()
            await eventually(lambda victim=victim: victim.restarts == 1 and victim._ready.is_set())
            again: tuple[str, int] | None = None
            async with asyncio.timeout(WAIT_S):
                while again is None:
                    try:
                        again = await caller.reach(callee.identity.peer_id)
                    except PeerError:
                        await asyncio.sleep(0.1)
            assert again == (host, portal)  # whoever kept it need not ask anew
            reader, writer = await asyncio.open_connection(*again)
            assert await said_back(reader, writer, b"hello") == b"hello"
            writer.close()
            assert callee.tunnels.counts["served"] >= 2 * number
