"""The network side of a program that trains: one asyncio loop in one thread of its own.

    training thread                         network thread
    ---------------                         --------------
    start()  ---------------------------->  open the directory, publish or find the run
    found()  <--------------------------    the signed run
    begin(config, initial)  ------------->  Session(...).run(initial)
    session.next_assignment(), hand_in()    rounds, for as long as the session runs
    stop()   ---------------------------->  leave politely
    join()   <--------------------------    everything closed

Peers that cannot connect to each other directly are carried by the directory's libp2p daemon, or by
that of a third peer; a session uses the directory for that by itself.

Guarantees: no call here waits for ever once `stop` was called or the network has failed; whatever
ends the loop ends up in `failure` as one `SwarmError`, and the training thread is woken. Not
guaranteed: that `stop` gets through to a partner that does not answer; the caller has a watchdog.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from coordinator_free.contact import Contact
from coordinator_free.transport import Client
from dht.directory import Directory
from dht.errors import (
    ConfigError,
    PeerError,
    RunNotFound,
    SwarmError,
    TimedOut,
    Unreachable,
    innermost,
)
from dht.identity import Identity
from dht.kademlia import KademliaConfig, KademliaDirectory
from dht.link import MAX_PEERS, Link, check_multiaddr, host_component
from dht.records import PeerRecord, SignedRun

if TYPE_CHECKING:
    from torch import Tensor

    from coordinator_free.handoff import Assignment, RoundResult
    from coordinator_free.session import SessionConfig, SessionStatus
    from coordinator_free.state import State

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_FIND_ATTEMPTS = 5
_FIND_PAUSE_S = 1.0
_REMEMBER_S = 15.0  # between two looks for others, beside those of the session
_TWIN_S = 3.0  # for another process with our identity to answer
_OWN_IN_LINK = 8


class ReachableDirectory(Directory, Protocol):
    """A directory that knows under which addresses its own peer can be dialled."""

    @property
    def maddrs(self) -> tuple[str, ...]:
        """Each ends in `/p2p/<own peer id>`; loopback ones last."""
        ...


class Running(Protocol):
    """What takes part in a run, in the network's loop."""

    async def run(
        self,
        initial_N: Tensor | None,
        maddrs: Callable[[], tuple[str, ...]],
        /,
        *,
        rejoin_s: float,
    ) -> None:
        """Found the swarm with `initial_N`, or join it; return when stopped or finished."""
        ...

    def stop(self) -> None:
        """Leave politely."""
        ...


class SwarmSession(Running, Protocol):
    """What a daemon that trains needs of `coordinator_free.session.Session`."""

    def next_assignment(self) -> Assignment | None:
        """The next round's work, or None when finished or stopped."""
        ...

    def hand_in(self, update_E: Tensor, samples: int, /) -> bool:
        """Offer the work on the last assignment; never waits. Whether it is finite."""
        ...

    def result(self) -> RoundResult:
        """Wait until the round of the last assignment is committed."""
        ...

    def progress(self, samples: int, /) -> None:
        """Say how far the work on the last assignment is."""
        ...

    @property
    def hurried(self) -> bool:
        """Whether the others wait for this peer's work."""
        ...

    def finish_after(self, round: int, /) -> None:
        """Stop when that round is committed."""
        ...

    def status(self) -> SessionStatus:
        """A snapshot."""
        ...

    @property
    def state(self) -> State:
        """The last committed state."""
        ...


class Service(Protocol):
    """Something else that lives as long as the thread does, in its loop."""

    async def start(self) -> None:
        """Begin; what this raises ends the thread."""
        ...

    async def close(self) -> None:
        """End."""
        ...


OpenDirectory = Callable[[KademliaConfig], AbstractAsyncContextManager[ReachableDirectory]]
_S = TypeVar("_S", bound=Running)
MakeSession = Callable[["SessionConfig", Identity, Directory], _S]


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """How this machine takes part.

    Attributes:
        identity_path: the peer's key.
        host: IP address to listen on.
        port: of libp2p; 0 = a free one.
        announce_hosts: what others dial instead of the own addresses; needs `port`.
        link: the run to join; None to create one.
        known_peers: addresses of an earlier time, to be tried as well.
        may_be_first: take part also if no address of the link answers: the first to come back.
        relay: carry the connections of others who cannot reach each other; no limit holds for them.
    """

    identity_path: Path
    host: str = "0.0.0.0"
    port: int = 0
    announce_hosts: tuple[str, ...] = ()
    link: Link | None = None
    known_peers: tuple[str, ...] = ()
    may_be_first: bool = False
    relay: bool = True

    def __post_init__(self) -> None:
        if self.announce_hosts and not self.port:
            raise ConfigError(
                "--announce-host needs --port: the port under which others reach this machine"
            )

    def directory(self) -> KademliaConfig:
        """The same for the DHT."""
        named = self.link.peers if self.link else ()
        return KademliaConfig(
            identity_path=self.identity_path,
            host=self.host,
            port=self.port,
            announce_maddrs=tuple(
                f"{host_component(host)}/tcp/{self.port}" for host in self.announce_hosts
            ),
            initial_peers=() if self.may_be_first else named,
            hints=(*named, *self.known_peers) if self.may_be_first else self.known_peers,
            relay=self.relay,
        )


class Network(Generic[_S]):
    """The network thread. One `start`, then `found`, `begin`, and `join` at the end.

    Args:
        config: how to take part.
        identity: who we are; the same key as in `config.identity_path`.
        open_directory: the DHT; a fake one in tests.
        make_session: the swarm; a fake one in tests.
        control: served for as long as the thread runs; None for none.
        on_control: called when `control` listens, from the network thread.
        on_run: called when the run is published or found, with the link to it, from the network
            thread.
        on_port: called with the TCP port of the DHT once it is known, from the network thread.
        on_peers: called every so often with the run id and the addresses of others in the run, from
            the network thread.

    Attributes:
        failure: what ended the thread, when it was neither asked to stop nor finished.
    """

    def __init__(
        self,
        config: NetworkConfig,
        identity: Identity,
        *,
        open_directory: OpenDirectory = KademliaDirectory.open,
        make_session: MakeSession[_S],
        control: Service | None = None,
        on_control: Callable[[], None] = lambda: None,
        on_run: Callable[[SignedRun, Link], None] = lambda run, link: None,
        on_port: Callable[[int], None] = lambda port: None,
        on_peers: Callable[[str, tuple[str, ...]], None] = lambda run_id, addresses: None,
    ) -> None:
        self._config = config
        self._identity = identity
        self._open_directory = open_directory
        self._make_session = make_session
        self._control = control
        self._on_control = on_control
        self._on_run = on_run
        self._on_port = on_port
        self._on_peers = on_peers
        self._thread = threading.Thread(target=self._live, name="network", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._running: Running | None = None
        self._stopping = threading.Event()
        self._found: concurrent.futures.Future[SignedRun | None] = concurrent.futures.Future()
        self._order: concurrent.futures.Future[tuple[SessionConfig, Tensor | None, float]]
        self._order = concurrent.futures.Future()
        self._session: concurrent.futures.Future[_S | None] = concurrent.futures.Future()
        self._publish: SignedRun | None = None
        self._maddrs: tuple[str, ...] = ()
        self._link: Link | None = None
        self.failure: SwarmError | None = None

    @property
    def maddrs(self) -> tuple[str, ...]:
        """Own addresses, once the run is found."""
        return self._maddrs

    @property
    def link(self) -> Link | None:
        """The join link as it is now, with this peer's addresses and those of others in the run."""
        return self._link

    def start(self, publish: SignedRun | None = None) -> None:
        """Start the thread; `publish` is the run to create, None to find that of the link."""
        self._publish = publish
        self._thread.start()

    def found(self) -> SignedRun | None:
        """Wait for the run; None when stopped meanwhile.

        Raises:
            SwarmError: the network failed.
        """
        return self._answer(self._found)

    def begin(
        self, config: SessionConfig, initial_N: Tensor | None, rejoin_s: float = 0.0
    ) -> _S | None:
        """Let the session run; None when stopped meanwhile.

        Args:
            config: of the session.
            initial_N: (N,) float32 to found the swarm with, None to join it.
            rejoin_s: how long to look for the swarm before founding it anew.

        Raises:
            SwarmError: the network failed.
        """
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self._order.set_result((config, initial_N, rejoin_s))
        return self._answer(self._session)

    def stop(self) -> None:
        """Leave politely. Takes no lock, so that a signal handler may call it at any point."""
        self._stopping.set()
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._on_stop)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; whether it has ended."""
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _answer(self, future: concurrent.futures.Future[_T]) -> _T:
        answer = future.result()
        if answer is None and self.failure is not None:
            raise self.failure
        return answer

    # -- the network thread

    def _live(self) -> None:
        try:
            asyncio.run(self._work())
        except asyncio.CancelledError:
            logger.info("network.stopped")
        except SwarmError as error:
            self.failure = error
        except Exception as error:  # the thread's outermost supervisor
            first = innermost(error)
            logger.debug("network.failed", exc_info=error)
            self.failure = first if isinstance(first, SwarmError) else _surprise(first)
        finally:
            # Only now, when `failure` is known, may whoever waits wake up.
            for future in (self._found, self._session):
                if not future.done():
                    future.set_result(None)

    async def _work(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        if self._stopping.is_set():
            return
        try:
            if self._control is not None:
                await self._control.start()
                self._on_control()
            await self._take_part()
        finally:
            if self._control is not None:
                await self._control.close()

    async def _take_part(self) -> None:
        link = self._config.link
        try:
            async with self._open_directory(self._config.directory()) as directory:
                self._maddrs = directory.maddrs
                for port in tcp_ports(directory.maddrs)[:1]:
                    self._on_port(port)
                self._check_way_in()
                run = await self._run_from(directory)
                others = await self._others(directory, run.run_id)
                self._link = link_to(run.run_id, directory.maddrs, others)
                self._on_run(run, self._link)
                self._found.set_result(run)
                config, initial_N, rejoin_s = await asyncio.wrap_future(self._order)
                session = self._make_session(config, self._identity, directory)
                self._running = session
                self._session.set_result(session)
                remembering = asyncio.create_task(self._remember(directory, run.run_id))
                try:
                    await session.run(initial_N, lambda: directory.maddrs, rejoin_s=rejoin_s)
                finally:
                    remembering.cancel()
        except (Unreachable, TimedOut, RunNotFound) as error:
            if self._found.done() or link is None:
                raise
            raise ConfigError(
                f"no run behind this link: {error}; check that its peers still run and can be "
                "reached from here, or ask for a new link"
            ) from error

    def _check_way_in(self) -> None:
        """A link that names nobody but ourselves leads nowhere.

        Raises:
            ConfigError: it does, and nobody else is known from an earlier time.
        """
        link, me = self._config.link, self._identity.peer_id
        if link is None or self._config.known_peers or self._config.may_be_first:
            return
        if all(maddr.endswith(f"/p2p/{me}") for maddr in link.peers):
            raise ConfigError(
                "the link names only this peer itself, which is how it looks when a home folder "
                "was copied: start this one with a home of its own (--home), or use the link of "
                "another peer"
            )

    async def _others(self, directory: Directory, run_id: str) -> list[PeerRecord]:
        """The records of others in the run, as far as they are known.

        Raises:
            ConfigError: another living process has our identity.
        """
        try:
            records = await directory.peers(run_id)
        except PeerError as error:
            logger.info("network.peers_unknown %s", error)
            return []
        for record in records:
            if record.peer_id == self._identity.peer_id and record.port and record.hosts:
                await self._refuse_twin(record)
        return [record for record in records if record.peer_id != self._identity.peer_id]

    async def _refuse_twin(self, record: PeerRecord) -> None:
        """A record of ours is an earlier process's; only a living one can show its certificate."""
        contact = Contact(record.peer_id, record.hosts, record.port, record.certificate_sha256)
        try:
            async with Client(self._identity, record.run_id) as client:
                await client.knock(contact, _TWIN_S)
        except PeerError as error:
            logger.info("network.own_record_is_old %s", error)
            return
        raise ConfigError(
            f"another peer with this identity is running at {record.hosts[0]} port {record.port}: "
            "two cannot share a key; stop that one, or start this one with a home of its own "
            "(--home), not a copy"
        )

    async def _remember(self, directory: ReachableDirectory, run_id: str) -> None:
        """Keep the addresses of others for the next start, and for those who are given a link."""
        async for records in directory.watch(run_id, _REMEMBER_S):
            others = [record for record in records if record.peer_id != self._identity.peer_id]
            self._link = link_to(run_id, directory.maddrs, others)
            # One address of each before the second of any: the list is cut somewhere.
            by_turns = itertools.zip_longest(*(record.maddrs for record in others))
            addresses = [maddr for turn in by_turns for maddr in turn if maddr is not None]
            if addresses:
                await asyncio.to_thread(self._on_peers, run_id, tuple(addresses))

    async def _run_from(self, directory: Directory) -> SignedRun:
        if self._publish is not None:
            await directory.publish(self._publish)
            return self._publish
        assert self._config.link is not None
        for attempt in range(_FIND_ATTEMPTS):
            try:
                return await directory.find_run(self._config.link.run_id)
            except RunNotFound:
                # A young DHT: whoever holds the record may not be in anybody's table yet.
                if attempt == _FIND_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(_FIND_PAUSE_S)
        raise AssertionError("unreachable")

    def _on_stop(self) -> None:
        if self._running is not None:
            self._running.stop()
        elif self._main is not None:
            self._main.cancel()


def tcp_ports(maddrs: tuple[str, ...]) -> list[int]:
    """The TCP ports among these addresses."""
    parts = (maddr.split("/") for maddr in maddrs)
    return [int(part[4]) for part in parts if part[3:4] == ["tcp"] and part[4:5]]


def shown_addresses(maddrs: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses that belong in a link: TCP, and loopback only when there is nothing else."""
    tcp = [maddr for maddr in maddrs if maddr.split("/")[3:4] == ["tcp"] and maddr.count("/") == 6]
    outside = [maddr for maddr in tcp if not maddr.startswith(("/ip4/127.", "/ip6/::1/"))]
    return tuple((outside or tcp)[:_OWN_IN_LINK])


def link_to(run_id: str, own: tuple[str, ...], others: Iterable[PeerRecord]) -> Link:
    """A link that still leads to the run when the peer that gave it has gone.

    Args:
        run_id: of the run.
        own: addresses of the peer that gives it; they come first.
        others: records of others, whose addresses strangers have written.
    """
    addresses = list(shown_addresses(own))
    for record in others:
        for maddr in shown_addresses(record.maddrs)[:1]:
            with contextlib.suppress(ConfigError):
                addresses.append(check_multiaddr(maddr))
    return Link(run_id, tuple(dict.fromkeys(addresses))[:MAX_PEERS])


def _surprise(error: BaseException) -> SwarmError:
    surprise = SwarmError(f"the network thread failed: {type(error).__name__}: {error}")
    surprise.__cause__ = error
    return surprise
