"""Links that outlive who gave them, and peers that no address leads to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator_free import tls
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.handoff import RoundResult, SessionClosed
from coordinator_free.network import NetworkConfig, link_to
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.session import Session, SessionConfig
from coordinator_free.tls import ServerCertificate
from coordinator_free.transport import CARRIER_AFTER_S, Client, Server
from dht.errors import RoundError, Unauthenticated, Unreachable
from dht.identity import Identity
from dht.kademlia import KademliaDirectory
from dht.link import MAX_PEERS, Link
from dht.records import PeerRecord

RUN = "ab" * 20


def record(*maddrs: str) -> PeerRecord:
    return PeerRecord(
        peer_id=Identity.generate().peer_id,
        run_id=RUN,
        maddrs=maddrs,
        hosts=(),
        port=0,
        certificate_sha256=bytes(32),
        can_reduce=True,
        upload_bps=0.0,
        download_bps=0.0,
        round=0,
        samples=0,
        head=bytes(32),
        leaving=False,
        expires_at=0.0,
    )


def address(host: str) -> str:
    return f"/ip4/{host}/tcp/4001/p2p/{Identity.generate().peer_id}"


def test_a_link_names_its_giver_first_and_one_address_of_each_other() -> None:
    own, near, far = address("192.0.2.1"), address("192.0.2.2"), address("192.0.2.3")
    loopback = address("127.0.0.1")
    link = link_to(RUN, (own, loopback), [record(loopback, near), record(far, address("10.0.0.1"))])
    assert link == Link(RUN, (own, near, far))


def test_what_strangers_write_into_their_records_cannot_break_a_link() -> None:
    own = address("192.0.2.1")
    nonsense = ["/ip4/999.1.1.1/tcp/1/p2p/x", "/ip4/192.0.2.2/tcp/0/p2p/x", "/dns4/../tcp/1/p2p/x"]
    assert link_to(RUN, (own,), [record(text) for text in nonsense]) == Link(RUN, (own,))


def test_a_link_of_a_large_swarm_is_no_longer_than_allowed() -> None:
    others = [record(address(f"192.0.2.{n}")) for n in range(100)]
    link = link_to(RUN, (address("198.51.100.1"),), others)
    assert len(link.peers) == MAX_PEERS
    assert Link.parse(str(link)) == link


# -- the carrier


class Way:
    """A carrier that leads to an endpoint of this machine, or nowhere."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.asked = 0

    def offer(self, host: str, port: int) -> None:
        raise AssertionError("nothing is offered here")

    async def reach(self, peer_id: str) -> tuple[str, int]:
        self.asked += 1
        if not self.port:
            raise Unreachable(peer_id, "there is no way")
        return "127.0.0.1", self.port


class Answering:
    """A service that says who asked."""

    async def deliver(self, sender: str, message: bytes) -> bytes:
        return sender.encode() + message

    async def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for frame in frames:
            yield frame

    async def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        yield request


@dataclass
class Callee:
    """A server, and contacts of it at addresses that lead there or do not."""

    peer_id: str
    port: int
    certificate: ServerCertificate

    def at(self, *hosts: str, port: int = 0) -> Contact:
        return Contact(self.peer_id, hosts, port or self.port, self.certificate.sha256)


@asynccontextmanager
async def calling(carrier: Way | None) -> AsyncIterator[tuple[Client, Callee]]:
    identity, caller = Identity.generate(), Identity.generate()
    certificate = ServerCertificate.generate()
    server = Server(identity, RUN, Answering(), "127.0.0.1", 0, certificate)
    port = await server.start()
    if carrier is not None:
        carrier.port = port
    try:
        async with Client(caller, RUN, carrier=carrier) as client:
            yield client, Callee(identity.peer_id, port, certificate)
    finally:
        await server.close()


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


async def test_a_peer_that_refuses_connections_is_reached_through_the_carrier() -> None:
    carrier = Way()
    async with calling(carrier) as (client, callee):
        contact = callee.at("127.0.0.1", port=closed_port())
        for _ in range(2):
            assert (await client.deliver(contact, b"hello", 10)).endswith(b"hello")
        async with client.exchange(contact) as stream:
            await stream.send(b"x" * 3_000_000, 10)
            assert await stream.receive(10) == b"x" * 3_000_000
        assert (carrier.asked, client.carried) == (1, 1)


async def test_a_peer_that_does_not_answer_is_reached_within_one_call() -> None:
    carrier = Way()
    # Connections are taken by the kernel and never looked at, as those to a stopped peer.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with calling(carrier) as (client, callee):
            contact = callee.at("127.0.0.1", port=silent.getsockname()[1])
            assert (await client.deliver(contact, b"hello", 3)).endswith(b"hello")
            # It is remembered: the next connection does not wait again.
            await client._retire(client._lines[callee.peer_id])
            async with asyncio.timeout(CARRIER_AFTER_S):
                await client.knock(contact, 3)
            assert carrier.asked == 2


async def test_the_carrier_is_not_asked_where_an_address_leads_to_the_peer() -> None:
    carrier = Way()
    async with calling(carrier) as (client, callee):
        assert (await client.deliver(callee.at("127.0.0.1"), b"hello", 10)).endswith(b"hello")
        assert carrier.asked == 0


async def test_somebody_else_at_the_address_is_not_evaded() -> None:
    carrier = Way()
    async with calling(carrier) as (client, callee), calling(None) as (_, other):
        with pytest.raises(Unauthenticated):
            await client.deliver(callee.at("127.0.0.1", port=other.port), b"hello", 10)
        assert carrier.asked == 0
        # But what our own loopback shows says nothing about a peer that is elsewhere.
        contact = callee.at("127.0.0.1", "192.0.2.1", port=other.port)
        assert (await client.deliver(contact, b"hello", 3)).endswith(b"hello")


async def test_what_the_carrier_leads_to_must_show_the_certificate() -> None:
    carrier = Way()
    async with calling(None) as (_, other), calling(carrier) as (client, callee):
        carrier.port = other.port
        with pytest.raises(Unreachable):
            await client.deliver(callee.at("127.0.0.1", port=closed_port()), b"hello", 3)
        assert (carrier.asked, client.carried) == (1, 0)


async def test_where_neither_way_leads_there_the_addresses_say_why() -> None:
    carrier = Way()
    async with calling(carrier) as (client, callee):
        carrier.port = 0
        port = closed_port()
        with pytest.raises(Unreachable, match=f"port {port}"):
            await client.deliver(callee.at("127.0.0.1", port=port), b"hello", 3)
        assert carrier.asked == 1


async def test_a_detour_ends_when_the_addresses_work_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coordinator_free.transport.DIRECT_AGAIN_S", 0.1)
    carrier, blocked = Way(), True
    fetch = tls.fetch_pinned

    async def fetch_unless_blocked(host: str, port: int, *rest: Any, **more: Any) -> bytes:
        if blocked and port == direct:
            raise Unreachable("", "blocked")
        return await fetch(host, port, *rest, **more)

    monkeypatch.setattr("coordinator_free.transport.fetch_pinned", fetch_unless_blocked)
    async with calling(carrier) as (client, callee), forwarding(callee.port) as direct:
        contact = callee.at("127.0.0.1", port=direct)
        await client.deliver(contact, b"hello", 10)
        line = client._lines[callee.peer_id]
        await asyncio.sleep(0.3)  # looked, in vain
        assert client._lines[callee.peer_id] is line
        blocked = False
        async with asyncio.timeout(10):
            while client._detours:  # noqa: ASYNC110 - the client sets no event
                await asyncio.sleep(0.01)
        await client.deliver(contact, b"hello", 10)
        assert client._lines[callee.peer_id] is not line
        assert client.carried == 1


async def test_a_carried_connection_that_was_closed_when_idle_is_made_anew() -> None:
    carrier = Way()
    connections: set[asyncio.Task[None]] = set()
    async with (
        calling(carrier) as (client, callee),
        forwarding(callee.port, connections) as carrier.port,
    ):
        contact = callee.at("127.0.0.1", port=closed_port())
        await client.deliver(contact, b"hello", 10)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0.05)  # for gRPC to see it
        assert (await client.deliver(contact, b"hello", 10)).endswith(b"hello")
        assert carrier.asked == 1


@asynccontextmanager
async def forwarding(
    port: int, connections: set[asyncio.Task[None]] | None = None
) -> AsyncIterator[int]:
    """Another port that leads to the same."""
    tasks = connections if connections is not None else set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(pump(reader, back))
                pumps.create_task(pump(there, writer))
        finally:
            writer.transport.abort()
            back.transport.abort()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(
        lambda *ends: tasks.add(asyncio.create_task(forward(*ends))), "127.0.0.1", 0
    )
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_member_whose_address_leads_nowhere_takes_part_in_rounds(tmp_path: Path) -> None:
    """What daemons consist of: sessions, directories, libp2p; only the training is played."""
    numel, rounds = 50_000, 2
    trainers: list[threading.Thread] = []
    results: list[list[RoundResult]] = [[], [], []]

    def train(session: Session, number: int) -> None:
        while session.next_assignment() is not None:
            try:
                session.hand_in(torch.full((numel,), float(number + 1)), 10)
                results[number].append(session.result())
            except (RoundError, SessionClosed):
                return

    async with AsyncExitStack() as stack:
        sessions: list[Session] = []
        directories: list[KademliaDirectory] = []
        async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
            for number in range(3):
                config = NetworkConfig(
                    identity_path=tmp_path / f"identity-{number}",
                    host="127.0.0.1",
                    link=Link(RUN, directories[0].maddrs) if directories else None,
                ).directory()
                directory = await stack.enter_async_context(KademliaDirectory.open(config))
                directories.append(directory)
                session = Session(
                    SessionConfig(
                        run_id=RUN,
                        creator=directories[0].identity.peer_id,
                        layout="00",
                        numel=numel,
                        round=RoundConfig(start_peers=3, rounds=rounds, codec="fp32"),
                        optimizer=OuterOptimizer(OuterConfig()),
                        # Nobody listens there: the servers listen on 127.0.0.1.
                        announce_hosts=("127.0.0.1",) if number < 2 else ("127.0.0.2",),
                    ),
                    identity=directory.identity,
                    directory=directory,
                )
                sessions.append(session)
                initial = torch.zeros(numel) if number == 0 else None
                tasks.create_task(session.run(initial, partial(getattr, directory, "maddrs")))
                trainers.append(threading.Thread(target=train, args=(session, number), daemon=True))
                trainers[-1].start()
        for trainer in trainers:
            await asyncio.to_thread(trainer.join, 10)
        assert all(len(each) == rounds for each in results)
        assert all(result.members == 3 for each in results for result in each)
        assert len({each[-1].digest for each in results}) == 1
        # Both others reached the third through its daemon, and it reached them directly.
        assert directories[2].tunnels.counts["served"] >= 2
        assert [session._client.carried > 0 for session in sessions] == [True, True, False]


def test_who_does_not_want_to_relay_need_not() -> None:
    config = NetworkConfig(identity_path=Path("identity"))
    assert config.directory().relay
    assert not replace(config, relay=False).directory().relay
