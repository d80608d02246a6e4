"""The wire between peers: three gRPC calls over pinned TLS. The only module that imports gRPC.

    deliver    one small message, one small reply
    exchange   frames both ways at once: the butterfly
    fetch      one request, a stream of frames: state, stored outcomes

The methods of service `shoal.coordinator_free.v1.Swarm` carry raw bytes; `proto/token.proto`
documents them. What bytes mean is the business of whoever uses this module.

Guarantees.
- Both ends are who they claim: the server by the certificate whose fingerprint its signed record
  holds, the caller by a token (`tokens`) that is checked before its body is read.
- No await on a partner is without a deadline, whether reading or writing: one that was killed,
  stopped or hangs costs a bounded time. After any error an exchange or fetch is dead.
- A small message waits for no frames: streams have a connection of their own. What a socket has
  taken of a stream before leaves first, and on a long way TCP's start makes seconds of that: the
  leader's messages missed their deadline, and who was well was taken for gone.
- Memory is bounded. One message of a stream is in flight in each direction; a writer waits until
  flow control has taken its message, so a slow reader holds back the writer. Messages, calls in
  all and calls of one caller are limited.
- An exchange that broke off is told from one that ended. gRPC shows a server the same end of
  stream for a caller that finished and one that died; hence the last message of the sending side
  is an empty one, and frames are never empty.
- No error of gRPC, TLS or the operating system leaves: it becomes one of `dht.errors`. A service
  that raises ends that one call, never the server.

Not guaranteed: that a caller belongs to the run (the service knows the roster), that a delivered
message was acted on once only if the reply was lost, or fairness between callers. A `Client` and
a `Server` belong to the event loop that first used them.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
import weakref
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

# gRPC's core prints to stderr whatever a hostile or dying partner makes it complain about; what
# matters reaches us as a status. It reads this once, when it starts.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio

from coordinator_free import tokens
from coordinator_free.contact import Contact
from coordinator_free.limits import Limits
from coordinator_free.tls import SERVER_NAME, ServerCertificate, fetch_pinned
from dht.errors import (
    ConfigError,
    Declined,
    Overloaded,
    PeerError,
    ProtocolViolation,
    SwarmError,
    TimedOut,
    Unauthenticated,
    Unreachable,
)
from dht.identity import Identity

_LOG = logging.getLogger(__name__)

SERVICE_NAME: Final = "shoal.coordinator_free.v1.Swarm"
TOKEN_KEY: Final = "shoal-token-bin"
ACCEPTED_KEY: Final = "shoal-accepted"
"""Initial metadata of an exchange whose token was good. A refusal has initial metadata too, an
empty one, and its status may arrive a moment later."""
MAX_MESSAGE_BYTES: Final = 1 << 20
"""Largest request or reply of `deliver`, and request of `fetch`."""
MAX_FRAME_BYTES: Final = 8 << 20
"""Largest message of a stream."""

CONNECT_S: Final = 5.0
"""For one address of several: a filtered one must not eat the time of those after it."""
CARRIER_AFTER_S: Final = 1.0
"""How long the likelier way to a peer is tried alone, or a third of the time if that is less."""
DIRECT_AGAIN_S: Final = 60.0
"""How long the addresses of a peer that only the carrier reaches are not tried again."""
MAX_ADDRESSES: Final = 16
MAX_LINES: Final = 64
"""Idle connections that a client keeps."""

SERVER_IDLE_S: Final = 120.0
"""A last resort for a stream that moves nothing while the service waits on it; services have
shorter deadlines of their own."""
DELIVER_S: Final = 60.0
DRAIN_S: Final = 10.0
"""How long a caller may go on writing to a service that has said all."""
DRAIN_FAILED_S: Final = 0.5
"""The same for a service that failed: long enough for what is under way, not for a whole slice."""
MAX_CALLS: Final = 1024
MAX_CALLS_PER_SENDER: Final = 32
MAX_REASON: Final = 200

_COMMON_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    # A partner whose machine lost power is noticed in half a minute even where no deadline runs.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS: Final = (
    *_COMMON_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 128),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a second peer on this port must fail, not share its callers
)
_CLIENT_OPTIONS: Final = (
    *_COMMON_OPTIONS,
    ("grpc.ssl_target_name_override", SERVER_NAME),
    ("grpc.default_authority", SERVER_NAME),
    ("grpc.enable_http_proxy", 0),  # the pinned endpoint and nothing between
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # Without it, a new channel to a restarted peer inherits the old one's reconnection back-off,
    # and the two channels of a line would share one connection.
    ("grpc.use_local_subchannel_pool", 1),
)

_Context = grpc.aio.ServicerContext[bytes, bytes]


class Service(Protocol):
    """What a server offers. Senders are authenticated, but may be anybody: check the roster.

    A `SwarmError` or `ValueError` that is raised ends the call with a status that names it.
    """

    async def deliver(self, sender: str, message: bytes) -> bytes:
        """Handle a message of at most `MAX_MESSAGE_BYTES`; return a reply no longer than that."""
        ...

    def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Take the sender's frames and yield ours; best written as an async generator.

        `frames` ends where the sender said that it was done, and raises `Unreachable` or
        `TimedOut` where it broke off or fell silent. When the sender goes away meanwhile, or the
        server closes, the generator is cancelled and closed: clean up in `finally`. Frames that
        are unread when the generator returns are read and dropped.
        """
        ...

    def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        """Yield what a request of at most `MAX_MESSAGE_BYTES` asks for."""
        ...


# --------------------------------------------------------------------------------- the server


class Server:
    """Listens for the other peers of one run.

    Attributes:
        bytes_sent: payload bytes of replies and frames, also of those whose writing has begun.
        bytes_received: payload bytes of messages and frames.
        refused: calls turned away before the service saw them, by reason.
        failures: calls that the service ended by raising, by the error's class name.
    """

    def __init__(
        self,
        identity: Identity,
        run_id: str,
        service: Service,
        host: str,
        port: int,
        certificate: ServerCertificate,
        *,
        idle_s: float = SERVER_IDLE_S,
        limits: Limits | None = None,
    ) -> None:
        """Remember what to serve; nothing is opened before `start`.

        Args:
            identity: who serves; tokens must name it as the callee.
            run_id: the run that callers must ask for.
            service: does the work.
            host: address to listen on, such as "0.0.0.0" or "::".
            port: TCP port, 0 for any free one.
            certificate: shown to callers.
            idle_s: longest that a stream may make its handler wait for one frame, either way.
            limits: on all that passes here; share them with the peer's client.
        """
        self.bytes_sent = 0
        self.bytes_received = 0
        self.refused: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._identity = identity
        self._run_id = run_id
        self._service = service
        self._host = host
        self._port = port
        self._certificate = certificate
        self._idle_s = idle_s
        self._limits = limits or Limits()
        self._calls: Counter[str] = Counter()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Open the port.

        Returns:
            The port number.

        Raises:
            ConfigError: the port is taken, forbidden, or the host is not ours; one line.
        """
        assert self._server is None, "started twice"
        probe_bind(self._host, self._port)
        server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers((_Router(self),))
        host = f"[{self._host}]" if ":" in self._host else self._host
        credentials = grpc.ssl_server_credentials(
            [(self._certificate.pem_key, self._certificate.pem_cert)]
        )
        try:
            port = server.add_secure_port(f"{host}:{self._port}", credentials)
        except RuntimeError as exc:
            raise ConfigError(_cannot_listen(self._host, self._port, "already in use?")) from exc
        await server.start()
        self._server = server
        return port

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more calls, let running ones finish for `grace_s` seconds, cancel the rest."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s or None)

    def _admit(self, token: bytes) -> str:
        """Peer id of the caller.

        Raises:
            Unauthenticated: counted and logged.
        """
        try:
            return tokens.check(
                token, self._identity.peer_id, self._run_id, self._certificate.sha256
            )
        except Unauthenticated as exc:
            self.refused["unauthenticated"] += 1
            _LOG.warning("transport.refused peer=%s reason=%r", exc.peer_id or "?", exc.reason)
            raise

    async def _supervise(
        self, method: str, sender: str, context: _Context, work: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """Run one call; whatever it raises ends that call alone."""
        if self._calls[sender] >= MAX_CALLS_PER_SENDER:
            self.refused["too many calls"] += 1
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
        self._calls[sender] += 1
        try:
            return await work()
        except grpc.aio.BaseError as exc:  # a write that failed: the caller is gone
            code, reason = grpc.StatusCode.UNAVAILABLE, f"the stream broke: {exc}"
        except (SwarmError, ValueError, TimeoutError) as exc:
            self.failures[type(exc).__name__] += 1
            code, reason = _status_of(exc), _one_line(str(exc))
            _LOG.info(
                "transport.call_failed method=%s peer=%s error=%s reason=%r",
                method,
                sender,
                type(exc).__name__,
                reason,
            )
        except Exception as exc:  # the outermost supervisor of this call's task
            self.failures[type(exc).__name__] += 1
            code, reason = grpc.StatusCode.INTERNAL, "internal error"
            _LOG.exception("transport.call_crashed method=%s peer=%s", method, sender)
        finally:
            self._calls[sender] -= 1
            if not self._calls[sender]:
                del self._calls[sender]
        try:
            await context.abort(code, reason)
        except grpc.aio.AbortError:
            raise
        except grpc.aio.BaseError as exc:
            # The caller broke off in the middle of a write: there is nobody to tell. Left to gRPC,
            # that would be a traceback in the log.
            raise asyncio.CancelledError from exc
        raise AssertionError("abort always raises")

    async def _deliver(self, sender: str, message: bytes) -> bytes:
        self._count_message(message)
        async with asyncio.timeout(DELIVER_S):
            reply = await self._service.deliver(sender, message)
        if len(reply) > MAX_MESSAGE_BYTES:
            raise RuntimeError(f"the service's reply has {len(reply)} bytes")
        self._limits.up.note(len(reply))
        self.bytes_sent += len(reply)
        return reply

    async def _exchange(self, sender: str, context: _Context) -> bytes:
        # Tells the caller that its token was accepted before it sends megabytes.
        async with asyncio.timeout(self._idle_s):
            await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
        frames = _Frames(self, sender, context)
        try:
            await self._respond(context, self._service.exchange(sender, frames))
        except (SwarmError, ValueError, TimeoutError):
            await frames.drain(DRAIN_FAILED_S)
            raise
        await frames.drain(DRAIN_S)
        return b""

    async def _fetch(self, sender: str, request: bytes, context: _Context) -> bytes:
        self._count_message(request)
        await self._respond(context, self._service.fetch(sender, request))
        return b""

    def _count_message(self, message: bytes) -> None:
        if len(message) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(message)} bytes, more than {MAX_MESSAGE_BYTES}")
        self._limits.down.note(len(message))
        self.bytes_received += len(message)

    async def _respond(self, context: _Context, frames: AsyncIterator[bytes]) -> None:
        try:
            async for frame in frames:
                if not 1 <= len(frame) <= MAX_FRAME_BYTES:
                    raise RuntimeError(f"the service yielded a frame of {len(frame)} bytes")
                await self._limits.up.acquire(len(frame))
                self.bytes_sent += len(frame)
                async with asyncio.timeout(self._idle_s):
                    await context.write(frame)
        finally:
            # Now, and not when the garbage collector comes by: it may hold a reducer's slot.
            if isinstance(frames, AsyncGenerator):
                await frames.aclose()


class _Frames(AsyncIterator[bytes]):
    """What a caller sends on an exchange, up to the empty message that ends it."""

    def __init__(self, server: Server, sender: str, context: _Context) -> None:
        self._server = server
        self._sender = sender
        self._context = context
        self._over = False

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        # Until the frame is here: a read that was cancelled cannot be repeated.
        self._over = True
        try:
            async with asyncio.timeout(self._server._idle_s):
                frame = await self._context.read()
        except TimeoutError as exc:
            raise TimedOut(self._sender, "sent nothing on an open exchange") from exc
        except grpc.aio.BaseError as exc:
            raise Unreachable(self._sender, "broke off an exchange") from exc
        if not isinstance(frame, bytes):  # gRPC's end of stream
            raise Unreachable(self._sender, "broke off an exchange")
        if not frame:
            raise StopAsyncIteration
        # Before the next read, not before this one: what is here has passed already.
        await self._server._limits.down.acquire(len(frame))
        self._over = False
        self._server.bytes_received += len(frame)
        return frame

    async def drain(self, timeout_s: float) -> None:
        """Read the rest, for a short while.

        To end the stream under a caller that is still writing would fail its write, and in grpc.aio
        a failed write overwrites the status and drops what the caller has not read yet.
        """
        try:
            async with asyncio.timeout(timeout_s):
                async for _ in self:
                    pass
        except (TimeoutError, PeerError):
            _LOG.debug("transport.undrained peer=%s", self._sender)


class _Router(grpc.GenericRpcHandler):
    """Finds the handler of a call, and checks its token before gRPC reads its body."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        prefix, _, method = handler_call_details.method.rpartition("/")
        if prefix != f"/{SERVICE_NAME}" or method not in ("Deliver", "Exchange", "Fetch"):
            return None
        metadata: Any = handler_call_details.invocation_metadata
        shown = [value for key, value in metadata or () if key == TOKEN_KEY]
        try:
            sender = self._server._admit(shown[0] if len(shown) == 1 else b"")
        except Unauthenticated as exc:
            return _refusal(exc.reason)
        server = self._server

        async def deliver(message: bytes, context: _Context) -> bytes:
            return await server._supervise(
                method, sender, context, lambda: server._deliver(sender, message)
            )

        async def exchange(_: AsyncIterator[bytes], context: _Context) -> None:
            await server._supervise(
                method, sender, context, lambda: server._exchange(sender, context)
            )

        async def fetch(request: bytes, context: _Context) -> None:
            await server._supervise(
                method, sender, context, lambda: server._fetch(sender, request, context)
            )

        if method == "Deliver":
            return grpc.unary_unary_rpc_method_handler(deliver)
        if method == "Exchange":
            return grpc.stream_stream_rpc_method_handler(exchange)
        return grpc.unary_stream_rpc_method_handler(fetch)


def _refusal(reason: str) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def refuse(_: AsyncIterator[bytes], context: _Context) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, _one_line(reason))

    # As a stream whatever was called, since a stream's handler runs before any message is read.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _status_of(exc: Exception) -> grpc.StatusCode:
    match exc:
        case Unauthenticated():
            return grpc.StatusCode.UNAUTHENTICATED
        case ProtocolViolation() | ValueError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case TimedOut() | TimeoutError():
            return grpc.StatusCode.DEADLINE_EXCEEDED
        case Overloaded():
            return grpc.StatusCode.RESOURCE_EXHAUSTED
        case _:
            return grpc.StatusCode.ABORTED


def probe_bind(host: str, port: int) -> None:
    """Find out by an ordinary bind what is wrong with an address: gRPC only says that it failed."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except (OSError, OverflowError, ValueError) as exc:
        number = exc.errno if isinstance(exc, OSError) else None
        hints = {
            errno.EADDRINUSE: "another program listens there; choose another port, or 0 for any",
            errno.EACCES: "not permitted; choose a port above 1023",
            errno.EADDRNOTAVAIL: "not an address of this machine; use 0.0.0.0 for all of them",
        }
        hint = hints.get(number, str(exc)) if number is not None else str(exc)
        raise ConfigError(_cannot_listen(host, port, hint)) from exc


def _cannot_listen(host: str, port: int, hint: str) -> str:
    return f"cannot listen on {host} port {port}: {hint}"


# --------------------------------------------------------------------------------- the client


@dataclass(slots=True, eq=False)
class _Line:
    """Two pinned channels to one peer, and who uses them. Each connects when it is first used.

    Attributes:
        channels: for small messages, and for streams.
    """

    contact: Contact
    channels: tuple[grpc.aio.Channel, grpc.aio.Channel]
    deliver: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    exchange: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
    fetch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
    users: int = 0
    retired: bool = False

    async def close(self) -> None:
        """Break what still runs."""
        for channel in self.channels:
            await channel.close()


@runtime_checkable
class Carrier(Protocol):
    """Another way to a peer than its addresses; not trusted, as what it carries is pinned TLS."""

    def offer(self, host: str, port: int) -> None:
        """Let others reach this endpoint of ours, and nothing else, through the carrier."""
        ...

    async def reach(self, peer_id: str) -> tuple[str, int]:
        """A way to what the peer offers.

        Returns:
            IPv4 address and port, on this machine, to connect to as often as is needed.

        Raises:
            PeerError: there is none, or not within the carrier's own deadline.
        """
        ...


class Client:
    """Calls other peers of one run.

    Two connections to each, for messages and for streams; the first call that needs one opens it.

    Use as an async context manager, or call `close`.

    Attributes:
        bytes_sent: payload bytes of messages and frames, also of those whose writing has begun.
        bytes_received: payload bytes of replies and frames.
        carried: how many connections were made through the carrier.
    """

    def __init__(
        self,
        identity: Identity,
        run_id: str,
        *,
        max_lines: int = MAX_LINES,
        carrier: Carrier | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Remember who calls; nothing is opened yet.

        Args:
            identity: signs the tokens.
            run_id: the run that all calls are about.
            max_lines: connections kept open while nobody uses them.
            carrier: for peers to which none of their addresses leads.
            limits: on all that passes here; share them with the peer's server.
        """
        self.carried = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._identity = identity
        self._run_id = run_id
        self._max_lines = max_lines
        self._lines: OrderedDict[str, _Line] = OrderedDict()  # by peer id, least recent first
        self._open: set[_Line] = set()  # those, and retired ones that are still in use
        self._dialling: weakref.WeakValueDictionary[str, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._carrier = carrier
        self._limits = limits or Limits()
        # To whom only the carrier leads; each task waits for that to change.
        self._detours: dict[Contact, asyncio.Task[None]] = {}
        self._closed = False

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Break all connections; calls that still run raise `Unreachable`."""
        self._closed = True
        for detour in self._detours.values():
            detour.cancel()
        self._lines.clear()
        while self._open:
            await self._open.pop().close()

    async def deliver(self, contact: Contact, message: bytes, timeout_s: float) -> bytes:
        """Send one message and wait for the reply.

        Args:
            contact: whom to call.
            message: at most `MAX_MESSAGE_BYTES`.
            timeout_s: for everything: connecting, sending, the partner's work, the reply.

        Returns:
            The reply, at most `MAX_MESSAGE_BYTES`.

        Raises:
            Unreachable: no connection, or it broke.
            Declined: the partner will not, for a reason of its own; `Overloaded`: not now.
            TimedOut: no reply within the time.
            Unauthenticated: another certificate than `contact` promises, or our token is refused.
            ProtocolViolation: the partner calls our message malformed, or its reply is over-long.
            ValueError: our own message is over-long.
        """
        _check_size(message, MAX_MESSAGE_BYTES)
        async with self._calling(contact, timeout_s) as line:
            with self._mapped(line):
                async with asyncio.timeout(timeout_s):
                    reply = await line.deliver(
                        message, metadata=self._metadata(contact), timeout=timeout_s
                    )
        self._count(len(message), len(reply))
        if len(reply) > MAX_MESSAGE_BYTES:
            raise ProtocolViolation(contact.peer_id, f"a reply of {len(reply)} bytes")
        return reply

    @asynccontextmanager
    async def exchange(
        self, contact: Contact, open_timeout_s: float = 2 * CONNECT_S
    ) -> AsyncGenerator[ExchangeStream, None]:
        """Open frames both ways; leaving the block ends the call, politely or not.

        Args:
            contact: whom to call.
            open_timeout_s: until the partner has accepted our token.

        Yields:
            The stream. The partner learns of an early exit as of a broken connection.

        Raises:
            PeerError: as `deliver`, on opening.
        """
        async with self._calling(contact, open_timeout_s) as line:
            call = line.exchange(metadata=self._metadata(contact))
            try:
                with self._mapped(line):
                    async with asyncio.timeout(open_timeout_s):
                        if (await call.initial_metadata()).get(ACCEPTED_KEY) is None:
                            raise await _error_of(contact.peer_id, call)
                yield ExchangeStream(self, line, call)
            finally:
                call.cancel()  # of no effect on a call that is over

    async def knock(self, contact: Contact, timeout_s: float) -> None:
        """Connect, and ask for nothing.

        Raises:
            PeerError: nobody who holds the key of this very certificate answers there.
        """
        async with self._calling(contact, timeout_s):
            pass

    async def fetch(
        self, contact: Contact, request: bytes, idle_timeout_s: float
    ) -> AsyncGenerator[bytes, None]:
        """Ask for a stream of frames.

        An early `break` leaves the call open until the generator is closed: use
        `contextlib.aclosing`.

        Args:
            contact: whom to call.
            request: at most `MAX_MESSAGE_BYTES`.
            idle_timeout_s: for connecting, and then for each frame.

        Yields:
            Frames of 1 to `MAX_FRAME_BYTES` bytes; the end means that the partner sent all.

        Raises:
            PeerError: as `deliver`.
            ValueError: our own request is over-long.
        """
        _check_size(request, MAX_MESSAGE_BYTES)
        async with self._calling(contact, idle_timeout_s) as line:
            call = line.fetch(request, metadata=self._metadata(contact))
            self._count(len(request), 0)
            try:
                while True:
                    with self._mapped(line):
                        async with asyncio.timeout(idle_timeout_s):
                            frame = await call.read()
                    if not isinstance(frame, bytes):  # gRPC's end of stream, with status OK
                        return
                    if not frame:
                        raise ProtocolViolation(contact.peer_id, "an empty frame")
                    await self._limits.down.acquire(len(frame))
                    self.bytes_received += len(frame)
                    yield frame
            finally:
                call.cancel()

    def _count(self, sent: int, received: int) -> None:
        """Small messages: they wait for nobody."""
        self._limits.up.note(sent)
        self._limits.down.note(received)
        self.bytes_sent += sent
        self.bytes_received += received

    def _metadata(self, contact: Contact) -> grpc.aio.Metadata:
        token = tokens.mint(
            self._identity, contact.peer_id, self._run_id, contact.certificate_sha256
        )
        return grpc.aio.Metadata((TOKEN_KEY, token))

    @asynccontextmanager
    async def _calling(self, contact: Contact, timeout_s: float) -> AsyncIterator[_Line]:
        """A connection that is not closed while the block runs."""
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._line(contact, timeout_s)
        except TimeoutError as exc:
            raise TimedOut(contact.peer_id, f"no connection within {timeout_s:g} s") from exc
        try:
            yield line
        finally:
            line.users -= 1
            if line.retired:
                await self._retire(line)

    async def _line(self, contact: Contact, timeout_s: float) -> _Line:
        lock = self._dialling.get(contact.peer_id)
        if lock is None:
            lock = self._dialling[contact.peer_id] = asyncio.Lock()
        async with lock:
            line = self._lines.get(contact.peer_id)
            if line is None or line.contact != contact:
                pem, address = await self._dial(contact, timeout_s)
                if self._closed:
                    raise Unreachable(contact.peer_id, "this client is closed")
                if line is not None:
                    await self._retire(line)
                line = _open_line(contact, pem, address)
                self._lines[contact.peer_id] = line
                self._open.add(line)
            line.users += 1
            self._lines.move_to_end(contact.peer_id)
        idle = [old for old in self._lines.values() if not old.users]
        for old in idle[: max(0, len(self._lines) - self._max_lines)]:
            await self._retire(old)
        return line

    async def _retire(self, line: _Line) -> None:
        """Give the connection to no more calls, and close it behind the last one."""
        self._forget(line)
        if not line.users:
            self._open.discard(line)
            await line.close()

    async def _dial(self, contact: Contact, timeout_s: float) -> tuple[bytes, str]:
        """Find a way that ends at the pinned certificate.

        The peer's addresses come first, and the carrier when none of them leads there or they take
        long; the other way round while it is known that only the carrier does.

        Returns:
            The certificate (PEM), and the address as a gRPC target.
        """
        if self._closed:
            raise Unreachable(contact.peer_id, "this client is closed")
        if self._carrier is None:
            return await self._dial_addresses(contact, timeout_s)
        ways = [self._dial_addresses, self._dial_carrier]
        if contact in self._detours:
            ways.reverse()
        tasks = {ways[0]: asyncio.create_task(ways[0](contact, timeout_s))}
        try:
            await asyncio.wait(tasks.values(), timeout=min(CARRIER_AFTER_S, timeout_s / 3))
            first = tasks[ways[0]]
            # Where somebody else answers, the peer has a new certificate: no other way helps.
            if not first.done() or isinstance(first.exception(), Unreachable | TimedOut):
                tasks[ways[1]] = asyncio.create_task(ways[1](contact, timeout_s))
            for finished in asyncio.as_completed(tasks.values()):
                with suppress(PeerError):
                    found = await finished
                    if contact in self._detours and not _has_result(tasks.get(self._dial_carrier)):
                        self._detours.pop(contact).cancel()
                    return found
            return await tasks.get(self._dial_addresses, first)  # the carrier can tell less
        finally:
            for task in tasks.values():
                task.add_done_callback(_has_result)  # or an error is logged as not seen
                task.cancel()

    async def _dial_carrier(self, contact: Contact, timeout_s: float) -> tuple[bytes, str]:
        assert self._carrier is not None
        host, port = await self._carrier.reach(contact.peer_id)
        pem = await fetch_pinned(
            host,
            port,
            contact.certificate_sha256,
            min(CONNECT_S, timeout_s),
            peer_id=contact.peer_id,
        )
        self.carried += 1
        if contact not in self._detours and not self._closed:
            _LOG.info("transport.carried peer=%s", contact.peer_id)
            self._detours[contact] = asyncio.create_task(self._end_detour(contact))
        return pem, f"ipv4:{host}:{port}"

    async def _end_detour(self, contact: Contact) -> None:
        """Have a peer dialled directly again once that works, or nobody has called it for long."""
        try:
            while True:
                await asyncio.sleep(DIRECT_AGAIN_S)
                line = self._lines.get(contact.peer_id)
                if line is None or line.contact != contact:
                    return
                with suppress(PeerError):
                    await self._dial_addresses(contact, CONNECT_S)
                    if self._lines.get(contact.peer_id) is line:
                        await self._retire(line)
                    _LOG.info("transport.direct_again peer=%s", contact.peer_id)
                    return
        finally:
            if self._detours.get(contact) is asyncio.current_task():
                del self._detours[contact]

    async def _dial_addresses(self, contact: Contact, timeout_s: float) -> tuple[bytes, str]:
        """Find the first address that answers with the pinned certificate."""
        addresses = await _addresses(contact)
        if not addresses:
            raise Unreachable(contact.peer_id, "none of its addresses can be resolved")
        share_s = min(CONNECT_S, timeout_s / len(addresses))
        failures: list[PeerError] = []
        for address in addresses:
            try:
                pem = await fetch_pinned(
                    address,
                    contact.port,
                    contact.certificate_sha256,
                    share_s,
                    peer_id=contact.peer_id,
                )
            except PeerError as exc:
                failures.append(exc)
                continue
            scheme, host = ("ipv6", f"[{address}]") if ":" in address else ("ipv4", address)
            return pem, f"{scheme}:{host}:{contact.port}"
        # The most telling one: an impostor before silence before a refused connection. On this
        # machine's loopback somebody else is no impostor, if the peer may well be elsewhere.
        elsewhere = [
            failure
            for failure, address in zip(failures, addresses, strict=True)
            if not ipaddress.ip_address(address).is_loopback
        ]
        failures = elsewhere or failures
        for kind in (Unauthenticated, TimedOut):
            for failure in failures:
                if isinstance(failure, kind):
                    raise failure
        raise failures[0]

    @contextmanager
    def _mapped(self, line: _Line) -> Iterator[None]:
        """Turn what grpc.aio raises into `PeerError`s."""
        peer_id = line.contact.peer_id
        try:
            yield
        except Declined:
            raise  # the connection is as good as before
        except PeerError:
            self._forget(line)
            raise
        except TimeoutError as exc:
            self._forget(line)
            raise TimedOut(peer_id, "the deadline passed") from exc
        except grpc.aio.AioRpcError as exc:
            error = _error_from(peer_id, exc.code(), exc.details())
            if isinstance(error, Unreachable | TimedOut) and not isinstance(error, Declined):
                self._forget(line)
            raise error from exc
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as exc:
            raise Unreachable(peer_id, "the stream is over") from exc
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled us: this is grpc.aio's way to say that the call was, as by `close`.
            raise Unreachable(peer_id, "the call was cancelled on our side") from exc

    def _forget(self, line: _Line) -> None:
        """Have the next call dial anew, from the first address; running ones go on."""
        if self._lines.get(line.contact.peer_id) is line:
            del self._lines[line.contact.peer_id]
        line.retired = True


class ExchangeStream:
    """Frames to and from one partner. One task may send while another receives.

    After any error the stream is dead; leave the `exchange` block.
    """

    def __init__(
        self, client: Client, line: _Line, call: grpc.aio.StreamStreamCall[bytes, bytes]
    ) -> None:
        self._client = client
        self._line = line
        self._call = call
        self._sending = asyncio.Lock()  # gRPC allows one write at a time
        self._receiving = asyncio.Lock()
        self._ended = False

    async def send(self, frame: bytes, timeout_s: float) -> None:
        """Send one frame; returns when flow control has let all of it go.

        Args:
            frame: 1 to `MAX_FRAME_BYTES` bytes.
            timeout_s: a partner that reads slower than this frame is dropped.

        Raises:
            TimedOut: the partner does not read.
            Unreachable: the stream broke or is over. A partner that ends it for a reason waits
                half a second for us to notice; when that ends in the middle of a write, gRPC loses
                the reason, and this is raised instead of the proper error.
            PeerError: the partner's reason, where it is known.
            ValueError: the frame is empty or over-long.
        """
        _check_size(frame, MAX_FRAME_BYTES)
        if not frame:
            raise ValueError("an empty frame")
        await self._client._limits.up.acquire(len(frame))
        self._client.bytes_sent += len(frame)
        await self._write(frame, timeout_s)

    async def done_sending(self, timeout_s: float) -> None:
        """Tell the partner that nothing more comes. Receiving goes on.

        Raises:
            PeerError: as `send`.
        """
        await self._write(b"", timeout_s)

    async def receive(self, timeout_s: float) -> bytes | None:
        """Wait for one frame.

        Returns:
            1 to `MAX_FRAME_BYTES` bytes, or None when the partner has sent all, for good.

        Raises:
            TimedOut: no frame within the time.
            PeerError: the stream broke, or the partner gave a reason to end it.
        """
        with self._client._mapped(self._line):
            async with asyncio.timeout(timeout_s), self._receiving:
                if self._ended:
                    return None
                frame = await self._call.read()
        if not isinstance(frame, bytes):  # gRPC's end of stream, with status OK
            self._ended = True
            return None
        if not frame:
            raise ProtocolViolation(self._line.contact.peer_id, "an empty frame")
        await self._client._limits.down.acquire(len(frame))
        self._client.bytes_received += len(frame)
        return frame

    async def _write(self, frame: bytes, timeout_s: float) -> None:
        with self._client._mapped(self._line):
            async with asyncio.timeout(timeout_s), self._sending:
                if self._call.done():
                    raise await _error_of(self._line.contact.peer_id, self._call)
                await self._call.write(frame)
                if not frame:
                    await self._call.done_writing()


def _open_line(contact: Contact, pem: bytes, target: str) -> _Line:
    credentials = grpc.ssl_channel_credentials(root_certificates=pem)
    small = grpc.aio.secure_channel(target, credentials, options=_CLIENT_OPTIONS)
    bulk = grpc.aio.secure_channel(target, credentials, options=_CLIENT_OPTIONS)
    return _Line(
        contact=contact,
        channels=(small, bulk),
        deliver=small.unary_unary(f"/{SERVICE_NAME}/Deliver"),
        exchange=bulk.stream_stream(f"/{SERVICE_NAME}/Exchange"),
        fetch=bulk.unary_stream(f"/{SERVICE_NAME}/Fetch"),
    )


async def _addresses(contact: Contact) -> list[str]:
    """IP addresses to try, best first; those of this machine go through the loopback.

    A machine's own outside address often does not lead back to it: routers that translate addresses
    and firewalls drop such packets.
    """
    found: dict[str, None] = {}
    for host in contact.hosts[:MAX_ADDRESSES]:
        for address in await _resolve(host, contact.port):
            if _is_own(address):
                found["::1" if ":" in address else "127.0.0.1"] = None
            found[address] = None
    return list(found)[:MAX_ADDRESSES]


def _has_result(task: asyncio.Task[tuple[bytes, str]] | None) -> bool:
    if task is None or not task.done() or task.cancelled():
        return False
    return task.exception() is None


async def _resolve(host: str, port: int) -> list[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    if not host:
        return []
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # ValueError: no resolver takes such a name
        return []
    return [str(info[4][0]) for info in infos]


def _is_own(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback or parsed.is_unspecified:
        return False
    try:
        family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


async def _error_of(peer_id: str, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> PeerError:
    """Why a call is over, which we had wanted to go on."""
    return _error_from(peer_id, await call.code(), await call.details())


def _error_from(peer_id: str, code: grpc.StatusCode, details: str | None) -> PeerError:
    reason = _one_line(details or "")
    match code:
        case grpc.StatusCode.OK:
            return Unreachable(peer_id, "ended the stream")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return TimedOut(peer_id, reason)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return Unauthenticated(peer_id, f"refused us: {reason}")
        case grpc.StatusCode.INVALID_ARGUMENT | grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolViolation(peer_id, f"does not accept our message: {reason}")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in reason:
            return ProtocolViolation(peer_id, reason)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(peer_id, f"has too much to do: {reason}")
        case grpc.StatusCode.ABORTED:
            return Declined(peer_id, f"declined: {reason}")
        case _:
            return Unreachable(peer_id, f"{code.name.lower()}: {reason}")


def _check_size(message: bytes, limit: int) -> None:
    if len(message) > limit:
        raise ValueError(f"a message of {len(message)} bytes, more than {limit}")


def _one_line(text: str) -> str:
    """A partner's words in a log: short, printable, one line."""
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in text[:MAX_REASON])
