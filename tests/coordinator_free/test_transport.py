from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from coordinator_free import tokens
from coordinator_free.contact import Contact
from coordinator_free.limits import Limiter, Limits
from coordinator_free.tls import ServerCertificate
from coordinator_free.transport import (
    MAX_CALLS_PER_SENDER,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    SERVICE_NAME,
    TOKEN_KEY,
    Client,
    ExchangeStream,
    Server,
)
from dht.errors import (
    ConfigError,
    Declined,
    Overloaded,
    PeerError,
    ProtocolViolation,
    RoundError,
    StateError,
    SwarmError,
    TimedOut,
    Unauthenticated,
    Unreachable,
)
from dht.identity import Identity

RUN = "0123456789abcdef0123456789abcdef01234567"
MIB = 1 << 20
PLENTY_S = 20.0
ROOT = Path(__file__).parents[2]


class Echo:
    """Answers whatever comes, and writes down who was here and how each exchange ended."""

    def __init__(self) -> None:
        self.senders: list[str] = []
        self.endings: asyncio.Queue[str] = asyncio.Queue()
        self.never = asyncio.Event()
        self.arrived = asyncio.Event()
        self.fails_with: BaseException | None = None

    async def deliver(self, sender: str, message: bytes) -> bytes:
        self.senders.append(sender)
        if self.fails_with is not None:
            raise self.fails_with
        if message == b"hang":
            self.arrived.set()
            await self.never.wait()
        if message == b"big":
            return bytes(MAX_MESSAGE_BYTES + 1)
        return b"echo " + message

    async def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.senders.append(sender)
        ending = "cancelled"
        try:
            if self.fails_with is not None:
                raise self.fails_with
            async for frame in frames:
                match frame:
                    case b"flood":
                        while True:
                            yield bytes(MIB)
                    case b"deaf":
                        self.arrived.set()
                        await self.never.wait()
                    case b"early":
                        for number in range(3):
                            yield b"result %d" % number
                        ending = "early"
                        return
                    case b"fail":
                        raise ProtocolViolation(sender, "a frame\nthat I dislike")
                yield frame
            ending = "complete"
        except SwarmError as exc:
            ending = type(exc).__name__
            raise
        finally:
            self.endings.put_nowait(ending)

    async def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        self.senders.append(sender)
        if self.fails_with is not None:
            raise self.fails_with
        try:
            for number in range(int(request)):
                yield b"chunk %d" % number
            if request == b"1":
                self.arrived.set()
                await self.never.wait()
        finally:
            self.endings.put_nowait("fetch over")


@dataclass
class Peer:
    identity: Identity
    service: Echo
    server: Server
    contact: Contact


@asynccontextmanager
async def serving(port: int = 0, **options: Any) -> AsyncIterator[Peer]:
    identity, certificate, service = Identity.generate(), ServerCertificate.generate(), Echo()
    server = Server(identity, RUN, service, "127.0.0.1", port, certificate, **options)
    port = await server.start()
    try:
        yield Peer(
            identity,
            service,
            server,
            Contact(identity.peer_id, ("127.0.0.1",), port, certificate.sha256),
        )
    finally:
        await server.close()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with serving() as it:
        yield it


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client(Identity.generate(), RUN) as it:
        yield it


Call = Callable[[Client, Contact], Awaitable[object]]


async def by_deliver(client: Client, contact: Contact) -> object:
    return await client.deliver(contact, b"x", PLENTY_S)


async def by_exchange(client: Client, contact: Contact) -> object:
    async with client.exchange(contact) as stream:
        await stream.send(b"x", PLENTY_S)
        return await stream.receive(PLENTY_S)


async def by_fetch(client: Client, contact: Contact) -> object:
    async with aclosing(client.fetch(contact, b"2", PLENTY_S)) as frames:
        return [frame async for frame in frames]


every_call = pytest.mark.parametrize("call", [by_deliver, by_exchange, by_fetch])


# ------------------------------------------------------------------------------ what works


async def test_deliver_authenticates_the_sender_and_counts_bytes(peer: Peer) -> None:
    identity = Identity.generate()
    async with Client(identity, RUN) as client:
        assert await client.deliver(peer.contact, b"hello", PLENTY_S) == b"echo hello"
        assert await client.deliver(peer.contact, b"", PLENTY_S) == b"echo "
        assert (client.bytes_sent, client.bytes_received) == (5, 15)
    assert peer.service.senders == [identity.peer_id] * 2
    assert (peer.server.bytes_sent, peer.server.bytes_received) == (15, 5)


async def test_exchange_carries_large_frames_both_ways_and_ends_politely(
    peer: Peer, client: Client
) -> None:
    frames = [bytes([number]) * (MIB + number) for number in range(12)]
    frames.append(bytes(MAX_FRAME_BYTES))

    async def send(stream: ExchangeStream) -> None:
        for frame in frames:
            await stream.send(frame, PLENTY_S)
        await stream.done_sending(PLENTY_S)

    async with client.exchange(peer.contact) as stream, asyncio.TaskGroup() as tasks:
        tasks.create_task(send(stream))
        for frame in frames:
            assert await stream.receive(PLENTY_S) == frame
        assert await stream.receive(PLENTY_S) is None
        assert await stream.receive(PLENTY_S) is None
    assert await peer.service.endings.get() == "complete"
    total = sum(map(len, frames))
    assert (client.bytes_sent, client.bytes_received) == (total, total)
    assert (peer.server.bytes_sent, peer.server.bytes_received) == (total, total)


class Counting(Limiter):
    """Lets everything pass, and knows what asked."""

    def __init__(self) -> None:
        super().__init__(0.0, lambda: 0.0)
        self.passed = 0

    def note(self, nbytes: int) -> None:
        self.passed += nbytes

    async def acquire(self, nbytes: int) -> None:
        self.passed += nbytes


def counting() -> Limits:
    limits = Limits()
    limits.up, limits.down = Counting(), Counting()
    return limits


async def test_limits_see_every_byte_that_passes() -> None:
    of_server, of_client = counting(), counting()
    async with (
        serving(limits=of_server) as peer,
        Client(Identity.generate(), RUN, limits=of_client) as client,
    ):
        await by_deliver(client, peer.contact)
        await by_fetch(client, peer.contact)
        async with client.exchange(peer.contact) as stream:
            await stream.send(bytes(MIB), PLENTY_S)
            assert await stream.receive(PLENTY_S) == bytes(MIB)
            await stream.done_sending(PLENTY_S)
            assert await stream.receive(PLENTY_S) is None
        for limits, end in ((of_server, peer.server), (of_client, client)):
            assert isinstance(limits.up, Counting)
            assert isinstance(limits.down, Counting)
            assert limits.up.passed == end.bytes_sent > MIB
            assert limits.down.passed == end.bytes_received > MIB


async def test_a_stream_waits_for_its_limit(peer: Peer) -> None:
    limits, slept = Limits(), []
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    limits.up = Limiter(1e6, lambda: now, sleep)
    async with (
        Client(Identity.generate(), RUN, limits=limits) as client,
        client.exchange(peer.contact) as stream,
    ):
        for _ in range(10):
            await stream.send(bytes(MIB), PLENTY_S)
            assert await stream.receive(PLENTY_S) is not None
    assert sum(slept) == pytest.approx(9 * MIB / 1e6, rel=0.02)


async def test_several_tasks_may_send_on_one_exchange(peer: Peer, client: Client) -> None:
    async with client.exchange(peer.contact) as stream, asyncio.TaskGroup() as tasks:
        for number in range(20):
            tasks.create_task(stream.send(b"%d" % number, PLENTY_S))
        got = [await stream.receive(PLENTY_S) for _ in range(20)]
        await stream.done_sending(PLENTY_S)
    assert sorted(got) == sorted(b"%d" % number for number in range(20))


async def test_fetch_yields_all_frames(peer: Peer, client: Client) -> None:
    frames = [f async for f in client.fetch(peer.contact, b"300", PLENTY_S)]
    assert frames == [b"chunk %d" % number for number in range(300)]


async def test_closing_a_fetch_early_closes_the_services_generator(
    peer: Peer, client: Client
) -> None:
    async with aclosing(client.fetch(peer.contact, b"1", PLENTY_S)) as frames:
        assert await anext(frames) == b"chunk 0"
    async with asyncio.timeout(PLENTY_S):
        assert await peer.service.endings.get() == "fetch over"


async def test_many_streams_of_many_callers_at_once(peer: Peer) -> None:
    async def conversation(client: Client) -> None:
        async with client.exchange(peer.contact) as stream:
            for number in range(5):
                await stream.send(bytes([number]) * 100_000, PLENTY_S)
                assert await stream.receive(PLENTY_S) == bytes([number]) * 100_000
            await stream.done_sending(PLENTY_S)
            assert await stream.receive(PLENTY_S) is None

    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        for _ in range(6):
            client = await stack.enter_async_context(Client(Identity.generate(), RUN))
            for _ in range(12):
                tasks.create_task(conversation(client))
        # The clients outlive the conversations: the group is the inner block.
    assert peer.server.failures == {}
    assert peer.server.refused == {}


async def test_the_first_calls_to_a_peer_share_one_connection(peer: Peer, client: Client) -> None:
    replies = await asyncio.gather(
        *(client.deliver(peer.contact, b"%d" % number, PLENTY_S) for number in range(20))
    )
    assert replies == [b"echo %d" % number for number in range(20)]
    assert len(client._open) == 1


@asynccontextmanager
async def blocked_after(port: int, limit: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A way to a port on which every connection comes to a standstill after so many bytes."""
    blocked, tasks = asyncio.Event(), set[asyncio.Task[None]]()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        passed = 0
        while data := await reader.read(1 << 16):
            passed += len(data)
            if passed > limit:
                blocked.set()
                await asyncio.Event().wait()
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        tasks.add(asyncio.create_task(pass_on(reader, back)))
        tasks.add(asyncio.create_task(pass_on(there, writer)))
        writers.extend((writer, back))

    writers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], blocked
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.close()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_small_message_waits_for_no_frames(peer: Peer) -> None:
    # 300 ms from its partner, TCP took seconds to bring away what its socket had taken already.
    async with (
        blocked_after(peer.contact.port, MIB) as (port, blocked),
        Client(Identity.generate(), RUN) as client,
        client.exchange(replace(peer.contact, port=port)) as stream,
    ):

        async def send() -> None:
            while True:
                await stream.send(bytes(MIB), PLENTY_S)

        sending = asyncio.create_task(send())
        await blocked.wait()
        contact = replace(peer.contact, port=port)
        assert await client.deliver(contact, b"x", PLENTY_S) == b"echo x"
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending


# ---------------------------------------------------------------------------- who is who


@every_call
async def test_a_server_with_another_certificate_is_refused(
    peer: Peer, client: Client, call: Call
) -> None:
    impostor = replace(peer.contact, certificate_sha256=ServerCertificate.generate().sha256)
    with pytest.raises(Unauthenticated, match="another certificate") as refusal:
        await call(client, impostor)
    assert refusal.value.peer_id == peer.contact.peer_id
    assert peer.service.senders == []


@every_call
async def test_a_token_for_another_run_is_refused(peer: Peer, call: Call) -> None:
    async with Client(Identity.generate(), "f" * 40) as client:
        with pytest.raises(Unauthenticated, match="another run"):
            await call(client, peer.contact)
    assert peer.service.senders == []


@every_call
async def test_a_token_for_another_peer_is_refused(peer: Peer, client: Client, call: Call) -> None:
    somebody_else = replace(peer.contact, peer_id=Identity.generate().peer_id)
    with pytest.raises(Unauthenticated, match="another peer"):
        await call(client, somebody_else)
    assert peer.service.senders == []


@every_call
async def test_a_token_with_a_bad_signature_is_refused(peer: Peer, call: Call) -> None:
    victim = Identity.generate()
    impostor = replace(Identity.generate(), peer_id=victim.peer_id)
    async with Client(impostor, RUN) as client:
        with pytest.raises(Unauthenticated, match="bad signature"):
            await call(client, peer.contact)
    assert peer.service.senders == []


@asynccontextmanager
async def raw_channel(contact: Contact, pem: bytes) -> AsyncIterator[grpc.aio.Channel]:
    """A client that is not ours."""
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{contact.port}",
        grpc.ssl_channel_credentials(pem),
        options=[
            ("grpc.ssl_target_name_override", "shoal"),
            ("grpc.max_send_message_length", -1),
        ],
    )
    try:
        yield channel
    finally:
        await channel.close()


async def raw_status(
    peer: Peer, method: str, message: bytes, metadata: list[tuple[str, bytes]]
) -> tuple[grpc.StatusCode, str]:
    async with raw_channel(peer.contact, peer.server._certificate.pem_cert) as channel:
        call = channel.unary_unary(method)(message, metadata=metadata, timeout=PLENTY_S)
        code, details = await call.code(), await call.details()
        return code, details or ""


def token_for(peer: Peer) -> bytes:
    contact = peer.contact
    return tokens.mint(Identity.generate(), contact.peer_id, RUN, contact.certificate_sha256)


async def test_a_token_of_an_earlier_session_is_refused(peer: Peer) -> None:
    before = ServerCertificate.generate().sha256
    old = tokens.mint(Identity.generate(), peer.contact.peer_id, RUN, before)
    for method in ("Deliver", "Exchange", "Fetch"):
        code, details = await raw_status(
            peer, f"/{SERVICE_NAME}/{method}", b"1", [(TOKEN_KEY, old)]
        )
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "another session" in details
    assert peer.service.senders == []


async def test_missing_malformed_doubled_and_overlong_tokens_are_refused(peer: Peer) -> None:
    good = tokens.mint(
        Identity.generate(), peer.contact.peer_id, RUN, peer.contact.certificate_sha256
    )
    for metadata in (
        [],
        [(TOKEN_KEY, b"junk")],
        [(TOKEN_KEY, good), (TOKEN_KEY, good)],
        [(TOKEN_KEY, good + bytes(600))],
    ):
        for method in ("Deliver", "Exchange", "Fetch"):
            code, _ = await raw_status(peer, f"/{SERVICE_NAME}/{method}", b"1", metadata)
            assert code is grpc.StatusCode.UNAUTHENTICATED
    assert peer.service.senders == []
    assert peer.server.refused == {"unauthenticated": 12}
    code, _ = await raw_status(peer, f"/{SERVICE_NAME}/Deliver", b"1", [(TOKEN_KEY, good)])
    assert code is grpc.StatusCode.OK


async def test_unknown_methods_and_oversized_messages_never_reach_the_service(peer: Peer) -> None:
    token = tokens.mint(
        Identity.generate(), peer.contact.peer_id, RUN, peer.contact.certificate_sha256
    )
    metadata = [(TOKEN_KEY, token)]
    for method, size, expected in (
        (f"/{SERVICE_NAME}/Destroy", 1, grpc.StatusCode.UNIMPLEMENTED),
        ("/other.Service/Deliver", 1, grpc.StatusCode.UNIMPLEMENTED),
        (f"/{SERVICE_NAME}/Deliver", MAX_MESSAGE_BYTES + 1, grpc.StatusCode.INVALID_ARGUMENT),
        (f"/{SERVICE_NAME}/Fetch", MAX_MESSAGE_BYTES + 1, grpc.StatusCode.INVALID_ARGUMENT),
        (f"/{SERVICE_NAME}/Deliver", MAX_FRAME_BYTES + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ):
        code, _ = await raw_status(peer, method, bytes(size), metadata)
        assert code is expected
    assert peer.service.senders == []


# ---------------------------------------------------------------- a service that fails


@every_call
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("no such\nfield"), ProtocolViolation),
        (ProtocolViolation("x", "bad ballot"), ProtocolViolation),
        (Unauthenticated("x", "not on the roster"), Unauthenticated),
        (TimedOut("x", "too late"), TimedOut),
        (RoundError(3, "void"), Declined),
        (StateError("no state yet"), Declined),
        (Overloaded("x", "no room"), Overloaded),
        (ZeroDivisionError("a bug"), Unreachable),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
async def test_what_a_service_raises_ends_one_call_with_its_reason(
    peer: Peer,
    client: Client,
    call: Call,
    raised: Exception,
    expected: type[PeerError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer.service.fails_with = raised
    with pytest.raises(expected) as failure:
        await call(client, peer.contact)
    assert failure.value.peer_id == peer.contact.peer_id
    assert "\n" not in str(failure.value)
    if isinstance(raised, ZeroDivisionError):
        assert "a bug" not in str(failure.value), "our internals are no partner's business"
        assert "transport.call_crashed" in caplog.text
    assert peer.server.failures == {type(raised).__name__: 1}
    peer.service.fails_with = None
    assert await client.deliver(peer.contact, b"still there?", PLENTY_S) == b"echo still there?"


async def test_a_reason_given_in_mid_stream_reaches_a_caller_that_listens(
    peer: Peer, client: Client
) -> None:
    async with client.exchange(peer.contact) as stream:
        await stream.send(b"fail", PLENTY_S)
        with pytest.raises(ProtocolViolation, match=r"a frame\?that I dislike"):
            await stream.receive(PLENTY_S)
        with pytest.raises(PeerError):
            await stream.send(b"more", PLENTY_S)


async def test_an_overlong_reply_is_the_servers_bug(peer: Peer, client: Client) -> None:
    with pytest.raises(Unreachable, match="internal error"):
        await client.deliver(peer.contact, b"big", PLENTY_S)


async def test_our_own_oversized_messages_are_value_errors(peer: Peer, client: Client) -> None:
    with pytest.raises(ValueError, match="1048577 bytes"):
        await client.deliver(peer.contact, bytes(MAX_MESSAGE_BYTES + 1), PLENTY_S)
    async with client.exchange(peer.contact) as stream:
        with pytest.raises(ValueError, match="8388609 bytes"):
            await stream.send(bytes(MAX_FRAME_BYTES + 1), PLENTY_S)
        with pytest.raises(ValueError, match="empty"):
            await stream.send(b"", PLENTY_S)
        await stream.send(b"fine", PLENTY_S)
        assert await stream.receive(PLENTY_S) == b"fine"


# ------------------------------------------------------------- streams that do not end well


async def test_a_caller_that_breaks_off_is_not_mistaken_for_one_that_finished(
    peer: Peer, client: Client
) -> None:
    async with client.exchange(peer.contact) as stream:
        await stream.send(b"one", PLENTY_S)
        assert await stream.receive(PLENTY_S) == b"one"
    async with asyncio.timeout(PLENTY_S):
        assert await peer.service.endings.get() in ("Unreachable", "cancelled")
    async with raw_channel(peer.contact, peer.server._certificate.pem_cert) as channel:
        token = tokens.mint(
            Identity.generate(), peer.contact.peer_id, RUN, peer.contact.certificate_sha256
        )
        metadata = [(TOKEN_KEY, token)]
        call = channel.stream_stream(f"/{SERVICE_NAME}/Exchange")(metadata=metadata)
        await call.write(b"two")
        await call.done_writing()  # without the empty message that says so
        assert await call.read() == b"two"
        assert await call.code() is grpc.StatusCode.ABORTED
    assert await peer.service.endings.get() == "Unreachable"


async def test_a_service_that_returns_early_loses_no_frame_of_its_own(
    peer: Peer, client: Client
) -> None:
    """The caller is still writing megabytes when the service has already said all."""
    async with client.exchange(peer.contact) as stream:
        await stream.send(b"early", PLENTY_S)
        for _ in range(24):
            await stream.send(bytes(MIB), PLENTY_S)
        await stream.done_sending(PLENTY_S)
        got = [await stream.receive(PLENTY_S) for _ in range(4)]
    assert got == [b"result 0", b"result 1", b"result 2", None]


async def test_a_caller_that_does_not_read_holds_back_the_service_and_is_dropped() -> None:
    async with serving(idle_s=0.5) as peer, Client(Identity.generate(), RUN) as client:
        async with client.exchange(peer.contact) as stream:
            await stream.send(b"flood", PLENTY_S)
            async with asyncio.timeout(PLENTY_S):
                assert await peer.service.endings.get() == "cancelled"
            assert peer.server.bytes_sent < 32 * MIB

            async def read_what_is_left() -> None:
                while await stream.receive(PLENTY_S):
                    pass

            with pytest.raises(TimedOut):
                await read_what_is_left()
            assert client.bytes_received < 32 * MIB
            assert peer.server.failures == {"TimeoutError": 1}
        assert await client.deliver(peer.contact, b"x", PLENTY_S) == b"echo x"


async def test_a_service_that_does_not_read_holds_back_the_caller(
    peer: Peer, client: Client
) -> None:
    async with client.exchange(peer.contact) as stream:
        await stream.send(b"deaf", PLENTY_S)

        async def send_for_ever() -> None:
            while True:
                await stream.send(bytes(MIB), 0.5)

        with pytest.raises(TimedOut):
            await send_for_ever()
        assert client.bytes_sent < 32 * MIB
    async with asyncio.timeout(PLENTY_S):
        assert await peer.service.endings.get() == "cancelled"


async def test_a_silent_service_is_a_timeout_on_every_call(peer: Peer, client: Client) -> None:
    with pytest.raises(TimedOut):
        await client.deliver(peer.contact, b"hang", 0.3)
    async with client.exchange(peer.contact) as stream:
        await stream.send(b"deaf", PLENTY_S)
        with pytest.raises(TimedOut):
            await stream.receive(0.2)
    async with aclosing(client.fetch(peer.contact, b"1", PLENTY_S)) as frames:
        await anext(frames)
    frames = client.fetch(peer.contact, b"1", 0.5)
    await anext(frames)
    with pytest.raises(TimedOut):
        await anext(frames)


async def test_a_silent_caller_is_dropped_by_the_server() -> None:
    async with serving(idle_s=0.2) as peer, Client(Identity.generate(), RUN) as client:
        async with client.exchange(peer.contact) as stream:
            with pytest.raises(TimedOut, match="sent nothing"):
                await stream.receive(PLENTY_S)
        assert await peer.service.endings.get() == "TimedOut"


async def test_one_caller_cannot_take_all_calls(peer: Peer, client: Client) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(MAX_CALLS_PER_SENDER):
            await stack.enter_async_context(client.exchange(peer.contact))
        with pytest.raises(Overloaded, match="too many calls"):
            await client.deliver(peer.contact, b"x", PLENTY_S)
        async with Client(Identity.generate(), RUN) as other:
            assert await other.deliver(peer.contact, b"x", PLENTY_S) == b"echo x"
    assert peer.server.refused == {"too many calls": 1}


async def test_the_callers_cancellation_is_a_cancellation(peer: Peer, client: Client) -> None:
    task = asyncio.create_task(client.deliver(peer.contact, b"hang", PLENTY_S))
    await peer.service.arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.deliver(peer.contact, b"x", PLENTY_S) == b"echo x"


async def test_closing_the_client_breaks_its_calls_with_a_typed_error(peer: Peer) -> None:
    client = Client(Identity.generate(), RUN)
    task = asyncio.create_task(client.deliver(peer.contact, b"hang", PLENTY_S))
    await peer.service.arrived.wait()
    await client.close()
    with pytest.raises(Unreachable):
        await task
    with pytest.raises(Unreachable, match="closed"):
        await client.deliver(peer.contact, b"x", PLENTY_S)


async def test_closing_the_server_ends_open_streams_at_once(peer: Peer, client: Client) -> None:
    async with client.exchange(peer.contact) as stream:
        await stream.send(b"deaf", PLENTY_S)
        await peer.service.arrived.wait()
        async with asyncio.timeout(PLENTY_S):
            await peer.server.close(0.1)
            with pytest.raises(Unreachable):
                await stream.receive(PLENTY_S)
            assert await peer.service.endings.get() == "cancelled"
    await peer.server.close()


# --------------------------------------------------------------------------- finding the way


async def test_hosts_are_tried_in_order_until_one_shows_the_certificate(client: Client) -> None:
    async with serving() as wanted, serving() as other:
        hosts = ("a" * 70, "", "127.0.0.3", "127.0.0.1")
        contact = replace(wanted.contact, hosts=hosts)
        assert await client.deliver(contact, b"x", PLENTY_S) == b"echo x"
        lost = replace(wanted.contact, hosts=("127.0.0.3",))
        with pytest.raises(Unreachable):
            await client.deliver(lost, b"x", PLENTY_S)
        with pytest.raises(Unreachable, match="none of its addresses"):
            await client.deliver(replace(lost, hosts=("a" * 70, "nul\0")), b"x", PLENTY_S)
        with pytest.raises(Unreachable, match="none of its addresses"):
            await client.deliver(replace(lost, hosts=()), b"x", PLENTY_S)
        with pytest.raises(Unauthenticated):
            await client.deliver(replace(lost, hosts=hosts, port=other.contact.port), b"x", 5.0)
        assert await client.deliver(contact, b"x", PLENTY_S) == b"echo x"


async def test_an_address_of_this_machine_is_dialled_by_the_loopback(
    peer: Peer, client: Client
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, only picks our address
        except OSError:
            pytest.skip("this machine has no address but the loopback")
        own = probe.getsockname()[0]
    contact = replace(peer.contact, hosts=(own,))  # where the server does not even listen
    assert await client.deliver(contact, b"x", PLENTY_S) == b"echo x"


async def test_a_restarted_peer_is_found_under_its_new_contact(client: Client) -> None:
    async with serving() as before:
        assert await client.deliver(before.contact, b"x", PLENTY_S) == b"echo x"
    port = before.contact.port
    async with serving(port) as after:
        with pytest.raises((Unauthenticated, Unreachable)):
            await client.deliver(before.contact, b"x", PLENTY_S)
        with pytest.raises(Unauthenticated, match="another certificate"):
            await client.deliver(before.contact, b"x", PLENTY_S)
        moved = replace(after.contact, peer_id=after.identity.peer_id)
        assert await client.deliver(moved, b"x", PLENTY_S) == b"echo x"


async def test_the_same_peer_with_a_new_contact_gets_a_new_connection(client: Client) -> None:
    identity, service = Identity.generate(), Echo()
    for _ in range(2):
        certificate = ServerCertificate.generate()
        server = Server(identity, RUN, service, "127.0.0.1", 0, certificate)
        port = await server.start()
        contact = Contact(identity.peer_id, ("127.0.0.1",), port, certificate.sha256)
        assert await client.deliver(contact, b"x", PLENTY_S) == b"echo x"
        assert len(client._open) == 1
        await server.close()


async def test_idle_connections_are_bounded() -> None:
    async with (
        serving() as one,
        serving() as two,
        serving() as three,
        Client(Identity.generate(), RUN, max_lines=2) as client,
        client.exchange(one.contact) as stream,  # in use, so never closed
    ):
        for peer in (two, three, two, three):
            assert await client.deliver(peer.contact, b"x", PLENTY_S) == b"echo x"
            assert len(client._open) <= 2
        await stream.send(b"alive", PLENTY_S)
        assert await stream.receive(PLENTY_S) == b"alive"


async def test_a_port_that_is_taken_is_one_line_that_names_it(peer: Peer) -> None:
    port = peer.contact.port
    with pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port}: another program") as refusal:
        async with serving(port):
            pass
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "port"), [("192.0.2.7", 0), ("no host", 0), ("127.0.0.1", 70_000)]
)
async def test_an_address_that_is_not_ours_is_a_config_error(host: str, port: int) -> None:
    server = Server(Identity.generate(), RUN, Echo(), host, port, ServerCertificate.generate())
    with pytest.raises(ConfigError, match=f"cannot listen on {host} port {port}"):
        await server.start()


# ------------------------------------------------------------------------ killed and stopped

CHILD = textwrap.dedent(
    """
    import asyncio, json, sys
    from coordinator_free.tls import ServerCertificate
    from coordinator_free.transport import Server
    from dht.identity import Identity

    class Echo:
        async def deliver(self, sender, message):
            return message

        async def exchange(self, sender, frames):
            async for frame in frames:
                yield frame

        async def fetch(self, sender, request):
            while True:
                yield bytes(100_000)

    async def main():
        identity, certificate = Identity.generate(), ServerCertificate.generate()
        server = Server(identity, sys.argv[1], Echo(), "127.0.0.1", 0, certificate)
        port = await server.start()
        print(json.dumps([identity.peer_id, port, certificate.sha256.hex()]), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await server.close()

    asyncio.run(main())
    """
)


@dataclass
class Child:
    process: asyncio.subprocess.Process
    contact: Contact

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@pytest.fixture
async def child() -> AsyncIterator[Child]:
    """A server in a process of its own, which ends with its standard input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        RUN,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            peer_id, port, digest = json.loads(await process.stdout.readline())
        yield Child(process, Contact(peer_id, ("127.0.0.1",), port, bytes.fromhex(digest)))
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_killed_partner_breaks_every_open_stream(child: Child, client: Client) -> None:
    async with (
        client.exchange(child.contact) as stream,
        aclosing(client.fetch(child.contact, b"", PLENTY_S)) as frames,
    ):
        await stream.send(b"x", PLENTY_S)
        assert await stream.receive(PLENTY_S) == b"x"
        await anext(frames)
        child.send(signal.SIGKILL)
        with pytest.raises(Unreachable):
            await stream.receive(PLENTY_S)
        with pytest.raises(Unreachable):
            await stream.send(b"x", PLENTY_S)
        with pytest.raises(Unreachable):
            async for _ in frames:
                pass
    with pytest.raises(Unreachable):
        await client.deliver(child.contact, b"x", PLENTY_S)


async def test_a_stopped_partner_costs_a_deadline_and_no_more(child: Child, client: Client) -> None:
    assert await client.deliver(child.contact, b"x", PLENTY_S) == b"x"
    async with client.exchange(child.contact) as stream:
        child.send(signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(TimedOut):
                await client.deliver(child.contact, b"x", 0.5)
            with pytest.raises(TimedOut):  # not even a connection
                await client.deliver(child.contact, b"x", 0.5)
            with pytest.raises(TimedOut):
                async with client.exchange(child.contact, 0.5):
                    pass
            with pytest.raises(TimedOut):
                await anext(client.fetch(child.contact, b"", 0.5))

            async def send_for_ever() -> None:
                while True:
                    await stream.send(bytes(MIB), 0.5)

            with pytest.raises(TimedOut):
                await send_for_ever()
            assert time.monotonic() - started < PLENTY_S
        finally:
            child.send(signal.SIGCONT)
    assert await client.deliver(child.contact, b"back", PLENTY_S) == b"back"


@pytest.mark.parametrize("ended", [True, False])
async def test_a_call_whose_caller_has_gone_ends_without_a_word(ended: bool) -> None:
    """gRPC refuses to abort what has ended, and would log that with a traceback."""

    class Gone:
        async def abort(self, code: object, reason: str) -> None:
            raise grpc.aio.BaseError("too many operations") if ended else grpc.aio.AbortError()

    async def work() -> bytes:
        raise grpc.aio.BaseError("a write that failed")

    server = Server(Identity.generate(), RUN, Echo(), "127.0.0.1", 0, ServerCertificate.generate())
    with pytest.raises(asyncio.CancelledError if ended else grpc.aio.AbortError):
        await server._supervise("Fetch", "peer", Gone(), work)  # type: ignore[arg-type]
