"""The real directory: a Kademlia node inside our event loop, its libp2p daemon supervised.

`KademliaDirectory` is a full citizen of the DHT: it stores and answers for others whether or not it
announces anything itself, so one that is opened and left alone is a bootstrap node. It is also a
carrier (`dht.tunnel`): peers that no address leads to can be reached through its daemon, and it
carries for peers that cannot reach each other.

Guaranteed: what it returns has passed `dht.validator`; no call waits longer than its deadline; no
error of hivemind or the daemon leaves this module; a daemon that dies is started again on the same
port with the same identity, keeps what it stored, and finds back to the peers known so far. Not
guaranteed: that a record is found by everybody at once, or that a network which has lost all the
peers we knew of is found again; and see `dht.node` about many hostile nodes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dht.borrowed import DHTID, PeerID, ValidationError
from dht.daemon import Daemon, DaemonConfig, encode_maddr
from dht.directory import Directory, believable, poll
from dht.errors import ConfigError, RunNotFound, SwarmError, TimedOut, Unreachable
from dht.identity import Identity
from dht.node import BoundedStorage, Node
from dht.records import (
    MANIFEST_TTL_S,
    MAX_ADDRESSES,
    PeerRecord,
    SignedRun,
    is_run_id,
    manifest_key,
    open_peer_record,
    peer_id_of,
    peers_key,
    seal,
)
from dht.tunnel import RELAY, TUNNEL, TunnelConfig, Tunnels
from dht.validator import RecordValidator

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_KNOWN = 64  # peers remembered for finding back into the network
_MAX_PUBLISHED = 16
_MAX_CALLS = 16  # of ours at a time; each may fan out to hivemind's own bound
_MAX_RPCS = 64
_UPKEEP_S = 20.0
_ANCHORS_S = 5.0  # a peer behind a NAT cannot be reached until it has connected again
_GRACE_S = 1.0
_REPUBLISH_S = MANIFEST_TTL_S / 3
_STEADY_S = 60.0  # a daemon that lived this long is not in a crash loop
_MAX_BACKOFF_S = 10.0
# As hivemind words it: "local time must be within 3 seconds  of others(local: 1.5, peer: 2.5)".
_SKEW = re.compile(r"\(local: (?P<local>-?[0-9.]{1,40}), peer: (?P<peer>-?[0-9.]{1,40})\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class KademliaConfig:
    """How to take part in the DHT.

    Attributes:
        identity_path: our identity file, made where there is none. One running peer per identity:
            libp2p confuses two.
        host: IP address to listen on.
        port: TCP port to listen on; 0: a free one, kept for as long as the directory is open.
        announce_maddrs: addresses to tell others instead of our own, for a forwarded port or a
            name: `/dns4/example.org/tcp/31337`.
        initial_peers: addresses of peers to enter the network through, each with `/p2p/…`. Empty:
            we are the first.
        hints: more such addresses, from an earlier time perhaps: none of them need answer, or be
            an address at all.
        client: ask, but never store or answer for others, nor listen.
        relay: carry the streams of peers that cannot reach each other; a client never does.
        rpc_timeout_s: for one other node's answer.
        lookup_timeout_s: for a whole look-up or store.
        bootstrap_timeout_s: for entering the network.
    """

    identity_path: str | Path
    host: str = "0.0.0.0"
    port: int = 0
    announce_maddrs: tuple[str, ...] = ()
    initial_peers: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    client: bool = False
    relay: bool = True
    rpc_timeout_s: float = 3.0
    lookup_timeout_s: float = 10.0
    bootstrap_timeout_s: float = 15.0


class KademliaDirectory(Directory):
    """A directory over the DHT; obtained from `open`.

    Attributes:
        identity: who we are.
        validator: with the count of refused records.
        restarts: how often the daemon had to be started again.
        tunnels: the ways through the daemon, with counts of what was carried.
    """

    def __init__(self, config: KademliaConfig, identity: Identity) -> None:
        self.identity = identity
        self.validator = RecordValidator()
        self.restarts = 0
        self._config = config
        self._daemon_config = _daemon_config(config)
        self._daemon: Daemon | None = None
        self._node: Any = None
        self._ready = asyncio.Event()
        self._calls = asyncio.Semaphore(_MAX_CALLS)
        self._maddrs: tuple[str, ...] = ()
        # Outlive the daemon and the node: what others entrusted to us survives a restart.
        self._storage = BoundedStorage()
        self._cache = BoundedStorage()
        self._known: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        self._named: dict[str, tuple[str, ...]] = {}
        for maddr in config.initial_peers:
            peer_id = _usable(maddr)
            if peer_id is not None:
                self._named[peer_id] = (*self._named.get(peer_id, ()), maddr)
        self.tunnels = Tunnels(
            identity.peer_id,
            self._running_daemon,
            self._addresses,
            tuple(self._named),
            TunnelConfig(relay=config.relay and not config.client),
        )
        self._announced: dict[str, PeerRecord] = {}
        self._published: OrderedDict[str, SignedRun] = OrderedDict()
        self._republish_at = time.monotonic() + _REPUBLISH_S

    @classmethod
    @asynccontextmanager
    async def open(cls, config: KademliaConfig) -> AsyncIterator[KademliaDirectory]:
        """Start the daemon, enter the network, and leave both on exit.

        Raises:
            ConfigError: a wrong address, a port that is taken, an unusable identity file, or a
                clock that differs from the network's.
            Unreachable: none of the initial peers answers.
            TimedOut: our own daemon does not start in time.
        """
        # One that can be used is enough: a link, and the hints, hold what strangers wrote, too.
        if config.initial_peers and not any(map(_usable, config.initial_peers)):
            _peer_id_in(config.initial_peers[0])
        identity = await asyncio.to_thread(Identity.load_or_create, config.identity_path)
        for maddr in config.announce_maddrs:
            _peer_id_in(f"{maddr}/p2p/{identity.peer_id}")
        directory = cls(config, identity)
        tasks: list[asyncio.Task[None]] = []
        try:
            await directory._launch()
            try:
                await directory._bootstrap((*config.initial_peers, *config.hints))
            except (Unreachable, TimedOut):
                if config.initial_peers:
                    raise
            directory._ready.set()
            # Not a TaskGroup: it would wrap what the caller's block raises into a group. The tasks
            # end by cancellation only.
            for supervised in (directory._keep_daemon, directory._keep_up, directory._keep_anchors):
                tasks.append(asyncio.create_task(_supervise(supervised)))
            yield directory
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=config.rpc_timeout_s)
            await directory.tunnels.close()
            await directory._drop()

    @property
    def maddrs(self) -> tuple[str, ...]:
        """Our addresses for others, each ending in `/p2p/<our id>`; loopback ones last."""
        return self._maddrs

    @property
    def neighbours(self) -> int:
        """How many other nodes are in our routing table now."""
        return len(self._node.protocol.routing_table.uid_to_peer_id) if self._node else 0

    async def announce(self, record: PeerRecord) -> None:
        """See `Directory.announce`. The record is announced anew when the daemon was restarted."""
        raw = seal(record, self.identity)
        open_peer_record(raw, now=time.time())
        previous = self._announced.get(record.run_id)
        self._announced[record.run_id] = record
        stored = await self._call(
            "announce",
            lambda node: node.store(
                peers_key(record.run_id),
                raw,
                record.expires_at,
                subkey=record.peer_id,
                exclude_self=self._config.client,
            ),
        )
        # A node that holds an equally fresh record says no as well, which is no failure.
        if not stored and (previous is None or previous.expires_at < record.expires_at):
            raise Unreachable("", "announce: no node of the DHT took the record")

    async def peers(self, run_id: str) -> list[PeerRecord]:
        """See `Directory.peers`."""
        _check_run_id(run_id)
        found = await self._call("peers", lambda node: node.get(peers_key(run_id), latest=True))
        if found is None or not isinstance(found.value, dict):
            return []
        sealed = [entry.value for entry in found.value.values() if isinstance(entry.value, bytes)]
        records = believable(sealed, run_id, time.time())
        for record in reversed(records[:_MAX_KNOWN]):  # no more, as looking at addresses takes time
            self._remember(record.peer_id, record.maddrs)
        return records

    async def publish(self, run: SignedRun) -> None:
        """See `Directory.publish`. The run is published anew for as long as we are open."""
        raw = run.to_bytes()
        run_id = SignedRun.from_bytes(raw).run_id
        self._keep_published(run_id, run)
        await self._store_run(run_id, raw)

    async def find_run(self, run_id: str) -> SignedRun:
        """See `Directory.find_run`. A run that was found is published anew by us, too."""
        _check_run_id(run_id)
        found = await self._call("find run", lambda node: node.get(manifest_key(run_id)))
        if found is None or not isinstance(found.value, bytes):
            raise RunNotFound(run_id)
        run = SignedRun.from_bytes(found.value)
        if run.run_id != run_id:  # the validator compared already; this is what we promise
            raise RunNotFound(run_id)
        if not self._config.client:
            self._keep_published(run_id, run)
        return run

    def watch(self, run_id: str, interval_s: float) -> AsyncIterator[list[PeerRecord]]:
        """See `Directory.watch`."""
        return poll(self, run_id, interval_s)

    async def ping(self, maddr: str) -> float:
        """Ask one node of the DHT whether it is there.

        Returns:
            Seconds until its DHT node (not only its daemon) replied, connecting excluded.

        Raises:
            ConfigError: `maddr` is no libp2p address, or our own.
            Unreachable: nobody answers there.
            TimedOut: no answer in time.
        """
        peer_id = _peer_id_in(maddr)
        if peer_id == self.identity.peer_id:
            raise ConfigError(f"{maddr} is this peer's own address; ping another one")
        limit_s = self._config.lookup_timeout_s
        await self._call("ping", lambda _: self._connect(peer_id, (maddr,), limit_s), peer_id)
        began = time.monotonic()
        await self._call("ping", lambda node: _ping(node, peer_id, validate=False), peer_id)
        return time.monotonic() - began

    # -- a carrier of connections (coordinator_free.transport.Carrier)

    def offer(self, host: str, port: int) -> None:
        """Let others reach this endpoint of ours through the daemon; see `Tunnels.offer`."""
        self.tunnels.offer(host, port)

    async def reach(self, peer_id: str) -> tuple[str, int]:
        """Host and port on our loopback that lead to what a peer offers; see `Tunnels.reach`."""
        return await self.tunnels.reach(peer_id)

    # -- the daemon and the node on top of it

    async def _launch(self) -> None:
        daemon = await Daemon.start(self._daemon_config)
        try:
            node = await _contained(
                "start",
                "",
                Node.create(
                    daemon.p2p,
                    # The same after a restart, so that we stay responsible for the same keys.
                    node_id=DHTID.generate(self.identity.peer_id),
                    wait_timeout=self._config.rpc_timeout_s,
                    parallel_rpc=_MAX_RPCS,
                    cache_refresh_before_expiry=0,
                    cache_on_store=False,
                    reuse_get_requests=False,
                    client_mode=self._config.client,
                    record_validator=self.validator,
                ),
                self._config.lookup_timeout_s,
            )
            node.protocol.storage, node.protocol.cache = self._storage, self._cache
            await daemon.serve_streams(TUNNEL, self.tunnels.serve)
            await daemon.serve_streams(RELAY, self.tunnels.serve_relay)
            maddrs = await daemon.visible_maddrs()
        except BaseException:
            await daemon.close()
            raise
        self._daemon, self._node, self._maddrs = daemon, node, _best_first(maddrs)
        # From now on on this very port: addresses in records and join links stay valid.
        self._daemon_config = daemon.config

    async def _drop(self) -> None:
        node, daemon = self._node, self._daemon
        self._node = self._daemon = None
        self._ready.clear()
        if node is not None:
            node.is_alive = False
        if daemon is not None:
            await daemon.close()

    async def _keep_daemon(self) -> None:
        """Start the daemon again whenever it dies. Returns after each restart."""
        daemon = self._daemon
        backoff_s = 0.0
        if daemon is not None:
            began = time.monotonic()
            reason = await daemon.wait_dead()
            self.restarts += 1
            logger.warning("dht.daemon_died restarts=%d reason=%r", self.restarts, reason)
            await self._drop()
            if time.monotonic() - began < _STEADY_S:
                backoff_s = min(_MAX_BACKOFF_S, 0.1 * self.restarts)
        while self._daemon is None:
            await asyncio.sleep(backoff_s)
            backoff_s = min(_MAX_BACKOFF_S, 2 * backoff_s + 0.1)
            try:
                await self._launch()
            except SwarmError as exc:
                logger.warning("dht.daemon_restart_failed reason=%r", str(exc))
        try:
            await self._rejoin()
        finally:
            self._ready.set()
        logger.info("dht.daemon_restarted neighbours=%d", self.neighbours)
        now = time.time()
        for record in list(self._announced.values()):
            if record.expires_at > now:
                with suppress(SwarmError):  # the owner announces it anew soon anyway
                    await self.announce(record)

    async def _keep_up(self) -> None:
        """Every so often: learn addresses, find back when alone, keep runs published."""
        await asyncio.sleep(_UPKEEP_S)
        await self._ready.wait()
        daemon = self._daemon
        if daemon is None:
            return
        self._maddrs = _best_first(await daemon.visible_maddrs())
        for peer_id, maddrs in (await daemon.connected()).items():
            self._remember(peer_id, maddrs)
        if not self.neighbours:
            await self._rejoin()
        if time.monotonic() >= self._republish_at:
            self._republish_at = time.monotonic() + _REPUBLISH_S
            for run_id, run in list(self._published.items()):
                await self._store_run(run_id, run.to_bytes())

    async def _keep_anchors(self) -> None:
        """Every so often: see that we can be found through others."""
        await self._ready.wait()
        try:
            await self.tunnels.keep_anchors()
        except (Unreachable, TimedOut) as exc:  # the daemon is being restarted
            logger.debug("dht.anchors_unknown reason=%r", exc.reason)
        await asyncio.sleep(_ANCHORS_S)

    # -- finding into the network

    async def _bootstrap(self, maddrs: Collection[str]) -> None:
        """Meet the peers at these addresses, then our own neighbourhood.

        Addresses that cannot be used are passed over: most were taken from others' records.

        Raises:
            Unreachable: none answered.
            ConfigError: none answered, and one because its clock differs from ours.
        """
        others: dict[str, tuple[str, ...]] = {}
        for maddr in maddrs:
            peer_id = _usable(maddr)
            # All peers may be given one and the same list.
            if peer_id is not None and peer_id != self.identity.peer_id:
                others[peer_id] = (*others.get(peer_id, ()), maddr)
        if not others:
            return
        for peer_id, its_maddrs in others.items():
            self._remember(peer_id, its_maddrs)
        await self._meet_some(others)
        node = self._node
        with suppress(Unreachable, TimedOut):  # one peer is enough; the table fills as we talk
            await _contained(
                "bootstrap",
                "",
                node.find_nearest_nodes([node.node_id]),
                self._config.lookup_timeout_s,
            )

    async def _meet_some(self, others: dict[str, tuple[str, ...]]) -> None:
        """Meet these peers; once one has answered, the others have `_GRACE_S` left."""
        pending = {asyncio.create_task(self._meet(*other)) for other in others.items()}
        failures: list[SwarmError] = []
        met = False
        try:
            while pending:
                done, pending = await asyncio.wait(
                    pending,
                    timeout=_GRACE_S if met else None,
                    return_when=asyncio.ALL_COMPLETED if met else asyncio.FIRST_COMPLETED,
                )
                outcomes = [task.result() for task in done]
                failures += [outcome for outcome in outcomes if outcome is not None]
                if met:
                    return
                met = None in outcomes
        finally:
            for task in pending:
                task.cancel()
        if not met:
            # A wrong clock is ours to mend, so it is told first.
            raise min(failures, key=lambda failure: not isinstance(failure, ConfigError))

    async def _meet(self, peer_id: str, maddrs: tuple[str, ...]) -> SwarmError | None:
        """Connect to a peer and be entered in each other's routing tables, or say why not."""
        try:
            await self._connect(peer_id, maddrs, self._config.bootstrap_timeout_s)
            await _contained(
                "bootstrap",
                peer_id,
                _ping(self._node, peer_id, validate=True),
                self._config.bootstrap_timeout_s,
            )
        except TimedOut:
            return TimedOut(peer_id, f"no answer at {maddrs[0]}")
        except Unreachable as exc:
            skew_s = _clock_skew_s(exc.__cause__)
            if skew_s is not None:
                return ConfigError(
                    f"the clock of this machine is {_duration(skew_s)} "
                    f"{'ahead of' if skew_s > 0 else 'behind'} that of peer {peer_id}, and more "
                    "than 3 s is too much: set it right, for example with "
                    "'timedatectl set-ntp true' (or have that peer's set right)"
                )
            return Unreachable(peer_id, f"no DHT node answers at {maddrs[0]}: {exc.reason}")
        return None

    async def _rejoin(self) -> None:
        known = [maddr for maddrs in self._known.values() for maddr in maddrs]
        try:
            await self._bootstrap((*self._config.initial_peers, *self._config.hints, *known))
        except SwarmError as exc:
            # Nothing out of the ordinary for the last one in a network: no warning.
            logger.info("dht.rejoin_failed known=%d reason=%r", len(self._known), str(exc))

    async def _connect(self, peer_id: str, maddrs: tuple[str, ...], timeout_s: float) -> None:
        await self._running_daemon().connect(peer_id, maddrs, timeout_s)

    def _running_daemon(self) -> Daemon:
        if self._daemon is None:
            raise Unreachable(self.identity.peer_id, "our own libp2p daemon is being restarted")
        return self._daemon

    def _addresses(self) -> Mapping[str, tuple[str, ...]]:
        """Those of all peers that we know."""
        return {**self._named, **self._known}

    def _remember(self, peer_id: str, maddrs: tuple[str, ...]) -> None:
        usable = tuple(maddr for maddr in maddrs if _usable(maddr) == peer_id)
        if not usable or peer_id == self.identity.peer_id:
            return
        self._known[peer_id] = usable
        self._known.move_to_end(peer_id)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    # -- calls

    def _keep_published(self, run_id: str, run: SignedRun) -> None:
        self._published[run_id] = run
        if len(self._published) > _MAX_PUBLISHED:
            self._published.popitem(last=False)

    async def _store_run(self, run_id: str, raw: bytes) -> None:
        expires_at = time.time() + MANIFEST_TTL_S
        await self._call(
            "publish",
            lambda node: node.store(
                manifest_key(run_id), raw, expires_at, exclude_self=self._config.client
            ),
        )

    async def _call(
        self, what: str, operation: Callable[[Any], Coroutine[Any, Any, T]], peer_id: str = ""
    ) -> T:
        """Run one operation on the node, waiting for a daemon that is being restarted.

        Raises:
            TimedOut: all of it took longer than the deadline.
            Unreachable: the operation failed.
        """
        try:
            async with asyncio.timeout(self._config.lookup_timeout_s), self._calls:
                await self._ready.wait()
                return await _contained(what, peer_id, operation(self._node))
        except TimeoutError as exc:
            limit_s = self._config.lookup_timeout_s
            raise TimedOut(peer_id, f"{what}: no answer within {limit_s:g} s") from exc


async def probe(maddr: str, *, timeout_s: float = 10.0) -> float:
    """Ping a DHT node as a passer-by, with a throw-away identity; for health checks.

    Returns:
        Seconds until the node replied.

    Raises:
        ConfigError: `maddr` is no libp2p address.
        Unreachable: nobody answers there.
        TimedOut: no answer in time.
    """
    _peer_id_in(maddr)
    with tempfile.TemporaryDirectory(prefix="shoal-probe-") as folder:
        config = KademliaConfig(identity_path=Path(folder) / "identity", client=True)
        try:
            async with asyncio.timeout(timeout_s), KademliaDirectory.open(config) as directory:
                return await directory.ping(maddr)
        except TimeoutError as exc:
            raise TimedOut("", f"no answer from {maddr} within {timeout_s:g} s") from exc


async def _supervise(keep: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Call `keep` over and over, until cancelled."""
    while True:
        try:
            await keep()
        except SwarmError as exc:
            logger.warning("dht.upkeep_failed task=%s reason=%r", keep.__name__, str(exc))
            await asyncio.sleep(1.0)
        # A task's outermost supervisor: the directory must go on, whatever went wrong here.
        except Exception:
            logger.exception("dht.upkeep_failed task=%s", keep.__name__)
            await asyncio.sleep(1.0)


async def _contained(
    what: str, peer_id: str, operation: Coroutine[Any, Any, T], timeout_s: float | None = None
) -> T:
    """Await a coroutine of hivemind's without letting its errors through.

    It runs as a task of its own, because inside hivemind the end of a connection can surface as a
    cancellation; awaited directly, our caller would believe that it was cancelled itself.

    Raises:
        TimedOut: it took longer than `timeout_s`.
        Unreachable: it raised anything, which is the cause.
    """
    task = asyncio.create_task(operation)
    # Whatever it ends with after we stopped waiting has been dealt with.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise TimedOut(peer_id, f"{what}: not done within {timeout_s:g} s")
    finally:
        task.cancel()
    if task.cancelled():
        raise Unreachable(peer_id, f"{what}: the connection to the libp2p daemon is gone")
    error = task.exception()
    if isinstance(error, SwarmError):
        raise error
    if error is not None:
        raise Unreachable(peer_id, f"{what}: {_one_line(error)}") from error
    return task.result()


async def _ping(node: Any, peer_id: str, *, validate: bool) -> None:
    if await node.protocol.call_ping(PeerID.from_base58(peer_id), validate=validate) is None:
        raise Unreachable(peer_id, "no DHT node answers")


def _daemon_config(config: KademliaConfig) -> DaemonConfig:
    if not 0 <= config.port <= 65535:
        raise ConfigError(f"port {config.port} is not possible; 0 to 65535 are")
    try:
        host = ipaddress.ip_address(config.host)
    except ValueError as exc:
        raise ConfigError(f"{config.host!r} is not an IP address to listen on") from exc
    return DaemonConfig(
        # Absolute: a restart must find it even after the program has changed its folder.
        identity_path=Path(config.identity_path).absolute(),
        host_maddrs=() if config.client else (f"/ip{host.version}/{host}/tcp/{config.port}",),
        announce_maddrs=config.announce_maddrs,
        server=not config.client,
    )


def _usable(maddr: str) -> str | None:
    """The peer id in an address that our daemon can dial, or None."""
    peer_id = peer_id_of(maddr)
    return peer_id if peer_id is not None and encode_maddr(maddr) is not None else None


def _peer_id_in(maddr: str) -> str:
    peer_id = _usable(maddr)
    if peer_id is None:
        raise ConfigError(
            f"{maddr[:200]!r} is not the address of a peer;"
            " it looks like /ip4/192.0.2.7/tcp/31337/p2p/12D3KooW…"
        )
    return peer_id


def _check_run_id(run_id: str) -> None:
    if not is_run_id(run_id):
        raise ConfigError(f"{run_id[:80]!r} is not a run id, which has 40 digits 0-9a-f")


def _clock_skew_s(error: BaseException | None) -> float | None:
    """By how much our clock is ahead, if that is what hivemind complains of."""
    found = _SKEW.search(str(error)) if isinstance(error, ValidationError) else None
    return float(found["local"]) - float(found["peer"]) if found else None


def _duration(seconds: float) -> str:
    """`3.4 s`, `5 min` or `2.0 h`, without a sign."""
    size = abs(seconds)
    if size < 100:
        return f"{size:.1f} s"
    return f"{size / 60:.0f} min" if size < 6000 else f"{size / 3600:.1f} h"


def _best_first(maddrs: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses, at most as many as a record holds, those only we can dial last."""
    local = ("/ip4/127.", "/ip6/::1/")
    return tuple(sorted(maddrs, key=lambda maddr: maddr.startswith(local)))[:MAX_ADDRESSES]


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
