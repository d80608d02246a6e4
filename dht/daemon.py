"""The libp2p daemon: a child process that never outlives us and never leaves anything behind.

hivemind's own way of starting it leaves the daemon running, with its sockets in /tmp, when our
process is killed. Here a guardian stands between: a few lines of shell in a session of their own
that start the daemon, wait for the end of a pipe that only we hold, and then kill the daemon and
remove the runtime directory. The kernel closes the pipe whatever ends us, SIGKILL included.

Guaranteed: daemon and runtime directory vanish with our process, however it ends, and a Ctrl-C in
the terminal does not reach the daemon before we have said goodbye through it. The runtime directory
has mode 0700, so no other user can command the daemon. Not guaranteed: this for a guardian that is
itself killed together with us, or while a process that was forked off ours by other means than
Python's, and without exec, still lives and holds a copy of the pipe.

Every daemon of this build carries strangers' libp2p circuits of at most 128 KiB and 2 minutes, and
no option turns that off or reliably raises it: p2pd starts a relay with libp2p's default limits
besides the one that its options describe, and which of the two answers is a race inside it.
`dht.tunnel` therefore does not use libp2p's circuits.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from dht.borrowed import (
    P2P,
    P2PD,
    Multiaddr,
    P2PDaemonError,
    PeerID,
    p2pd_pb2,
    read_pbmsg_safe,
    write_pbmsg,
)
from dht.errors import ConfigError, TimedOut, Unreachable

logger = logging.getLogger(__name__)

# $1: runtime directory, the rest: the daemon's command line. Signals that a terminal or a service
# manager sends to everybody are ignored: the guardian's one job is to be the last to leave. KILL,
# not TERM: the daemon keeps no state, and what is killed cannot hang. "$watcher" only ever blocks
# in the shell's own `read`, so killing it leaves no grandchild behind. Output is closed before the
# wait because the shell reports "Killed", and doing so into a pipe whose reader is dead would end
# it before it has cleaned up.
_GUARDIAN = """
trap '' HUP INT TERM
directory=$1
shift
umask 077
mkdir "$directory" || exit 1
exec 3<&0 </dev/null
"$@" 3<&- &
daemon=$!
(read -r _ <&3; kill -KILL "$daemon") >/dev/null 2>&1 &
watcher=$!
exec 3<&- >/dev/null 2>&1
wait "$daemon"
status=$?
kill -KILL "$watcher" 2>/dev/null
rm -rf "$directory"
exit "$status"
"""

# The ends of guardians' pipes that this process holds. Processes that are forked off it, a data
# loader's for one, may outlive it: with copies they would keep the daemon. They close the objects
# and not just the numbers, which may be others' by the time the objects are collected.
_held: weakref.WeakSet[Any] = weakref.WeakSet()


def _let_go() -> None:
    for pipe in list(_held):
        pipe.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)

_PORT_ATTEMPTS = 5
_MAX_LINE_BYTES = 500
_CLOSE_TIMEOUT_S = 5.0
_CONTROL_TIMEOUT_S = 5.0
# What asyncio reads ahead of us from one stream, at most twice this and one read of the socket.
_READ_AHEAD_BYTES = 64 * 1024
# sockaddr_un holds 108 bytes including the final zero; our longest name in the directory has 27.
_MAX_DIRECTORY_BYTES = 80

_P2P, _CIRCUIT = b"\xa5\x03", b"\xa2\x02"  # the protocols' numbers, 421 and 290, as varints
_HOST_MADDR = re.compile(r"/ip[46]/(?P<host>[^/]+)/(?P<transport>tcp|udp)/(?P<port>\d{1,5})(/.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonConfig:
    """How to run the libp2p daemon.

    Attributes:
        identity_path: the file of `dht.identity.Identity`; the daemon reads it itself.
        host_maddrs: what to listen on, `/ip4/…/tcp/…`; port 0: a free one, fixed at the start.
            Empty: listen on nothing, dial only.
        announce_maddrs: what to tell others instead of what we listen on; empty: the latter.
        relay: can dial, and be dialled, through other peers' libp2p circuits.
        relay_service: asks for circuits of more than 128 KiB for others; see above about the race.
        server: answers libp2p peer-routing queries of others.
        start_timeout_s: until the daemon says that it is ready.
    """

    identity_path: Path
    host_maddrs: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    relay: bool = True
    relay_service: bool = False
    server: bool = True
    start_timeout_s: float = 15.0


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A stream of bytes to or from a peer, through the daemon. Whoever has it closes it.

    Half of it cannot be closed: when either side ends one direction, the daemon ends the other and
    may drop what is under way there.

    Attributes:
        peer_id: base58; who is at the other end, by libp2p's handshake.
        reader: reads at most a fixed number of bytes ahead.
        writer: its `drain` waits for the daemon, which waits for the peer.
        circuit: it runs through a libp2p relay, which cuts it off after 128 KiB.
    """

    peer_id: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    circuit: bool


class Daemon:
    """A running libp2p daemon; obtained from `start`.

    Attributes:
        config: as given, with every port 0 replaced by the port in use: starting from it again
            brings the daemon back at the same addresses.
        p2p: hivemind's handle, attached to the daemon.
        peer_id: base58.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self.config = config
        self.p2p: Any = None
        self.peer_id = ""
        self._directory = _runtime_directory()
        self._servers: list[asyncio.Server] = []
        self._transport: asyncio.SubprocessTransport | None = None
        self._child = _Child()

    @classmethod
    async def start(cls, config: DaemonConfig) -> Daemon:
        """Start a daemon and attach to it.

        Raises:
            ConfigError: an address is malformed, not ours or taken, or the daemon does not run
                here; the text names it.
            TimedOut: the daemon did not become ready in time.
        """
        for attempt in range(_PORT_ATTEMPTS):
            daemon = cls(replace(config, host_maddrs=_with_ports(config.host_maddrs)))
            try:
                await daemon._launch()
            except _PortTaken as exc:
                # Between choosing a free port and listening on it somebody else took it.
                if daemon.config == config or attempt == _PORT_ATTEMPTS - 1:
                    raise ConfigError(str(exc)) from exc
            else:
                return daemon
        raise AssertionError("the last attempt returns or raises")

    @property
    def pid(self) -> int:
        """Process id of the guardian; its process group is that of the daemon."""
        assert self._transport is not None
        return self._transport.get_pid()

    @property
    def _socket(self) -> str:
        return str(self._directory / "p2pd.sock")

    @property
    def directory(self) -> Path:
        """The runtime directory; exists while the daemon runs."""
        return self._directory

    async def visible_maddrs(self) -> tuple[str, ...]:
        """Addresses, each ending in `/p2p/<peer id>`, under which others may reach us.

        Raises:
            Unreachable: the daemon is gone.
            TimedOut: it does not answer.
        """
        answer = await self._request(
            p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY), self.peer_id, _CONTROL_TIMEOUT_S
        )
        return _dialable(answer.identify.addrs, self.peer_id)

    async def connect(self, peer_id: str, maddrs: Sequence[str], timeout_s: float) -> None:
        """Make sure that there is a connection to a peer.

        Args:
            peer_id: base58.
            maddrs: its addresses, each ending in `/p2p/<peer_id>`; all that are valid are tried.
            timeout_s: for all of it.

        Raises:
            Unreachable: it cannot be dialled, or our daemon is gone.
            TimedOut: not done in time.
        """
        suffix = f"/p2p/{peer_id}"
        encoded = (encode_maddr(maddr.removesuffix(suffix)) for maddr in maddrs)
        wanted = p2pd_pb2.ConnectRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(),
            addrs=[each for each in encoded if each is not None],
            timeout=math.ceil(timeout_s),  # or it goes on for a minute after we gave up
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=wanted)
        await self._request(request, peer_id, timeout_s)

    async def connected(self) -> dict[str, tuple[str, ...]]:
        """The peers we have a connection to, with their addresses.

        Raises:
            Unreachable: the daemon is gone.
            TimedOut: it does not answer.
        """
        answer = await self._request(
            p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS), self.peer_id, _CONTROL_TIMEOUT_S
        )
        peers: dict[str, tuple[str, ...]] = {}
        for info in answer.peers:  # one for each connection
            peer_id = PeerID(info.id).to_base58()
            peers[peer_id] = (*peers.get(peer_id, ()), *_dialable(info.addrs, peer_id))
        return peers

    async def direct_peers(self) -> frozenset[str]:
        """The peers we have a connection to that is no libp2p circuit.

        Raises:
            Unreachable: the daemon is gone.
            TimedOut: it does not answer.
        """
        answer = await self._request(
            p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS), self.peer_id, _CONTROL_TIMEOUT_S
        )
        return frozenset(
            PeerID(info.id).to_base58()
            for info in answer.peers
            if not all(_is_circuit(addr) for addr in info.addrs)
        )

    async def open_stream(self, peer_id: str, protocol: str, timeout_s: float) -> Stream:
        """Open a stream to what a peer serves under a protocol's name.

        Not hivemind's call: that one leaves the connection to the daemon open when it fails.

        Args:
            peer_id: base58; dialled first if there is no connection and its addresses are known.
            protocol: such as `/name/1`.
            timeout_s: for all of it.

        Raises:
            Unreachable: no connection, nothing is served there, or our daemon is gone.
            TimedOut: not done in time.
        """
        wanted = p2pd_pb2.StreamOpenRequest(
            peer=PeerID.from_base58(peer_id).to_bytes(),
            proto=[protocol],
            timeout=math.ceil(timeout_s),
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=wanted)
        answer, reader, writer = await self._ask(request, peer_id, timeout_s)
        return _stream(answer.streamInfo, reader, writer)

    async def serve_streams(self, protocol: str, serve: Callable[[Stream], None]) -> None:
        """Call `serve` for each stream that a peer opens under this name, from now on.

        Raises:
            Unreachable: our daemon is gone, or the name is served already.
            TimedOut: it does not answer.
        """

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened = p2pd_pb2.StreamInfo()
            try:
                async with asyncio.timeout(_CONTROL_TIMEOUT_S):
                    await read_pbmsg_safe(reader, opened)
                stream = _stream(opened, reader, writer)
            except (OSError, EOFError, ValueError, DecodeError) as exc:  # our daemon died meanwhile
                logger.debug("daemon.stream_lost %r", exc)
                writer.close()
                return
            serve(stream)

        path = self._directory / f"in{len(self._servers)}.sock"
        try:
            server = await asyncio.start_unix_server(accept, path, limit=_READ_AHEAD_BYTES)
        except OSError as exc:
            raise Unreachable(self.peer_id, f"our own libp2p daemon is gone: {exc}") from exc
        self._servers.append(server)
        wanted = p2pd_pb2.StreamHandlerRequest(
            addr=Multiaddr(f"/unix{path}").to_bytes(), proto=[protocol], balanced=False
        )
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_HANDLER, streamHandler=wanted)
        await self._request(request, self.peer_id, _CONTROL_TIMEOUT_S)

    async def wait_dead(self) -> str:
        """Return, with the reason, once the daemon or the connection to it is gone."""
        transport = self._transport
        assert transport is not None
        exited = asyncio.create_task(self._child.exited.wait())
        control = self.p2p._client.control
        # When hivemind's reader or writer of the control connection ends, it does so silently and
        # every later call would hang, which for us is as good as dead.
        try:
            await asyncio.wait(
                {exited, control._read_task, control._write_task},
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            exited.cancel()
        if not self._child.exited.is_set():
            return "the control connection broke"
        return f"exit status {transport.get_returncode()}: {self._child.last_words()}"

    async def close(self) -> None:
        """End the daemon and remove its runtime directory. Harmless to repeat."""
        while self._servers:
            self._servers.pop().close()
        transport, self._transport = self._transport, None
        if transport is None:
            return
        pid = transport.get_pid()
        pipe = transport.get_pipe_transport(0)
        if isinstance(pipe, asyncio.WriteTransport) and not pipe.is_closing():
            # A line and not only the end of the pipe: of a process forked off ours by a library in
            # C, a copy may stay open for longer than we live.
            pipe.write(b"\n")
            pipe.close()
        try:
            await self._detach()
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._child.exited.wait()
        except TimeoutError:
            logger.warning("daemon.guardian_stuck pid=%d", pid)
        finally:
            # Also when we are cancelled meanwhile, and when the guardian itself was killed. Where
            # it did its work there is nothing left to do.
            returncode = transport.get_returncode()
            if returncode is None or returncode < 0:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(self._directory, ignore_errors=True)
            transport.close()
        await asyncio.wait({asyncio.create_task(self._child.closed.wait())}, timeout=1.0)

    async def _launch(self) -> None:
        for maddr in self.config.host_maddrs:
            _check_free(maddr)
        try:
            self._transport, _ = await asyncio.get_running_loop().subprocess_exec(
                lambda: self._child,
                *("/bin/sh", "-c", _GUARDIAN, "shoal-guardian", str(self._directory)),
                *self._command_line(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
            )
        except OSError as exc:
            raise ConfigError(f"cannot start the libp2p daemon: {exc}") from exc
        stdin = self._transport.get_pipe_transport(0)
        assert stdin is not None
        _held.add(stdin.get_extra_info("pipe"))
        try:
            await self._until_ready()
            await self._attach()
        except BaseException:
            await self.close()
            raise

    def _command_line(self) -> list[str]:
        config = self.config
        options = {
            "id": str(config.identity_path),
            "listen": f"/unix{self._socket}",
            "dhtServer" if config.server else "dhtClient": "1",
            "relay": str(int(config.relay)),
            "relayService": str(int(config.relay and config.relay_service)),
            # Never open ports on somebody's router unasked, nor dial back strangers.
            "natPortMap": "0",
            "autonat": "0",
            "connManager": "1",
        }
        if config.host_maddrs:
            options["hostAddrs"] = ",".join(config.host_maddrs)
        else:
            options["noListenAddrs"] = "1"
        if config.announce_maddrs:
            options["announceAddrs"] = ",".join(config.announce_maddrs)
        return [str(P2PD), *(f"-{name}={value}" for name, value in options.items())]

    async def _until_ready(self) -> None:
        child, limit_s = self._child, self.config.start_timeout_s
        waits = {asyncio.create_task(each.wait()) for each in (child.ready, child.closed)}
        try:
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if child.ready.is_set():
            return
        if not child.closed.is_set():
            raise TimedOut("", f"the libp2p daemon was not ready within {limit_s:g} s")
        said = child.last_words()
        if "address already in use" in said:
            raise _PortTaken(_taken(", ".join(self.config.host_maddrs)))
        raise ConfigError(f"the libp2p daemon does not start: {said or 'it says nothing'}")

    async def _attach(self) -> None:
        # hivemind puts its client's socket where this class attribute says: into our directory.
        attached: Any = type(
            "AttachedP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{self._directory}/"}
        )
        try:
            async with asyncio.timeout(self.config.start_timeout_s):
                self.p2p = await attached.replicate(Multiaddr(f"/unix{self._socket}"))
        except TimeoutError as exc:
            raise TimedOut("", "the libp2p daemon does not answer") from exc
        except (OSError, EOFError, P2PDaemonError) as exc:
            raise ConfigError(f"cannot talk to the libp2p daemon: {exc}") from exc
        self.p2p._client.control._pending_calls = _PendingCalls()
        self.peer_id = self.p2p.peer_id.to_base58()

    async def _request(self, request: Any, peer_id: str, timeout_s: float) -> Any:
        """Ask the daemon, and wait for no more than its answer."""
        answer, _, writer = await self._ask(request, peer_id, timeout_s)
        writer.close()
        return answer

    async def _ask(
        self, request: Any, peer_id: str, timeout_s: float
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """Ask the daemon over a connection of its own, as hivemind does, but closed on failure."""
        answer = p2pd_pb2.Response()
        writer: asyncio.StreamWriter | None = None
        good = False
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(
                    self._socket, limit=_READ_AHEAD_BYTES
                )
                await write_pbmsg(writer, request)
                await read_pbmsg_safe(reader, answer)
            if answer.type == p2pd_pb2.Response.ERROR:
                raise Unreachable(peer_id, " ".join(answer.error.msg.split())[:300])
            good = True
        except TimeoutError as exc:
            raise TimedOut(peer_id, f"no answer within {timeout_s:g} s") from exc
        except (OSError, EOFError, ValueError, DecodeError) as exc:
            raise Unreachable(peer_id, f"our own libp2p daemon is gone: {exc}") from exc
        finally:
            if writer is not None and not good:
                writer.close()
        return answer, reader, writer

    async def _detach(self) -> None:
        if self.p2p is None:
            return
        control = self.p2p._client.control
        gone = P2PDaemonError("the libp2p daemon is gone")
        # Nobody will answer these any more. An error, not a cancellation: hivemind passes the
        # latter on to callers, who would take it for a cancellation of their own.
        for call in list(control._pending_calls.values()):
            if not call.done():
                call.set_exception(gone)
        tasks = [control._read_task, control._write_task, *control._handler_tasks.values()]
        await self.p2p.shutdown()
        for task in tasks:
            task.cancel()
        # Gathered so that the error each of them ended with is seen, by us, and not logged as lost.
        await asyncio.wait({asyncio.gather(*tasks, return_exceptions=True)}, timeout=1.0)


class _Child(asyncio.SubprocessProtocol):
    """What becomes known of the child process: its lines of output, and its end."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.exited = asyncio.Event()  # the guardian
        self.closed = asyncio.Event()  # the guardian, and all of the output was read
        self._lines: deque[str] = deque(maxlen=3)
        self._rest = b""

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-_MAX_LINE_BYTES:]
        for raw in lines:
            line = raw[:_MAX_LINE_BYTES].decode(errors="replace").strip()
            if line:
                logger.debug("daemon.says %s", line)
                self._lines.append(line)
            if line.startswith("Peer ID:"):
                self.ready.set()

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def last_words(self) -> str:
        return " | ".join(self._lines)


class _PendingCalls(dict[Any, "asyncio.Future[Any]"]):
    """Calls that await an answer, by id; one that was given up on counts as not there.

    hivemind looks a call up with `in` and then sets its result, which raises if the call was
    cancelled a moment before, and ends the task that reads all answers.
    """

    def __contains__(self, call_id: object) -> bool:
        call = self.get(call_id)
        return call is not None and not call.done()


class _PortTaken(Exception):
    """Somebody else listens on a port that the daemon was told to use."""


def encode_maddr(maddr: str) -> bytes | None:
    """The binary form of a libp2p address, or None where it is not a valid one.

    A peer id inside it, as in `/…/p2p/<relay>/p2p-circuit`, is written by us: hivemind writes it as
    a content id, for which the daemon refuses the address and all others of the same request.
    """
    head, *others = maddr.split("/p2p/")
    try:
        encoded: bytes = Multiaddr(head).to_bytes() if head else b""
        for other in others:
            peer_id, slash, rest = other.partition("/")
            multihash = PeerID.from_base58(peer_id).to_bytes()
            if len(multihash) not in range(2, 128) or multihash[1] != len(multihash) - 2:
                return None
            encoded += _P2P + bytes([len(multihash)]) + multihash
            encoded += Multiaddr(slash + rest).to_bytes() if rest else b""
    except (ValueError, LookupError):
        return None
    return encoded or None


def _dialable(encoded: Iterable[bytes], peer_id: str) -> tuple[str, ...]:
    """A peer's addresses as text, without those of protocols that hivemind cannot write down."""
    maddrs = []
    for each in encoded:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            maddrs.append(f"{Multiaddr(each)}/p2p/{peer_id}")
    return tuple(maddrs)


def _stream(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Stream:
    peer_id = PeerID(info.peer).to_base58()
    return Stream(peer_id, reader, writer, _is_circuit(info.addr))


def _is_circuit(maddr: bytes) -> bool:
    """Whether this, where a connection leads, is a circuit: `/…/p2p/<relay>/p2p-circuit`."""
    return maddr.endswith(_CIRCUIT) and _P2P in maddr


def _runtime_directory() -> Path:
    # A name only: the guardian makes the directory, so that none can be left behind without one.
    name = f"shoal-{secrets.token_hex(8)}"
    directory = Path(tempfile.gettempdir()).absolute() / name
    if len(os.fsencode(directory)) > _MAX_DIRECTORY_BYTES or not _SOCKET_PATH.fullmatch(
        str(directory)
    ):
        directory = Path("/tmp") / name
    return directory


# What both a multiaddr and the daemon's comma-separated options can carry unescaped.
_SOCKET_PATH = re.compile(r"[A-Za-z0-9/._+-]+")


def _with_ports(maddrs: tuple[str, ...]) -> tuple[str, ...]:
    """Replace each port 0 by one that is free now."""
    return tuple(_with_port(maddr) for maddr in maddrs)


def _with_port(maddr: str) -> str:
    match = _parsed(maddr)
    if int(match["port"]) != 0:
        return maddr
    with _bound(maddr) as probe:
        port = probe.getsockname()[1]
    return f"{maddr[: match.start('port')]}{port}{maddr[match.end('port') :]}"


def _check_free(maddr: str) -> None:
    """Raise unless we could listen on the address.

    The daemon cannot tell: libp2p sets SO_REUSEPORT, so two daemons of one user would share a port
    without an error and each get half of the connections.
    """
    with _bound(maddr) as probe:
        if probe.type == socket.SOCK_STREAM:
            try:
                probe.listen(1)
            except OSError as exc:
                raise _PortTaken(_taken(maddr)) from exc


def _bound(maddr: str) -> socket.socket:
    match = _parsed(maddr)
    family = socket.AF_INET6 if maddr.startswith("/ip6/") else socket.AF_INET
    kind = socket.SOCK_STREAM if match["transport"] == "tcp" else socket.SOCK_DGRAM
    try:
        probe = socket.socket(family, kind)
    except OSError as exc:
        raise ConfigError(f"cannot listen on {maddr}: {exc.strerror}") from exc
    try:
        if kind == socket.SOCK_STREAM:  # connections of a predecessor may linger in TIME_WAIT
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((match["host"], int(match["port"])))
    except OSError as exc:
        probe.close()
        if exc.errno == errno.EADDRINUSE:
            raise _PortTaken(_taken(maddr)) from exc
        raise ConfigError(f"cannot listen on {maddr}: {exc.strerror}") from exc
    return probe


def _parsed(maddr: str) -> re.Match[str]:
    match = _HOST_MADDR.fullmatch(maddr)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(f"{maddr!r} is not an address to listen on; like /ip4/0.0.0.0/tcp/31337")
    return match


def _taken(maddrs: str) -> str:
    port = _HOST_MADDR.fullmatch(maddrs)
    number = f"port {port['port']}" if port else "a port"
    return f"{number} ({maddrs}) is in use by another program: stop it or choose another port"
