from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from dht.borrowed import DHTID, DictionaryDHTValue, MSGPackSerializer
from dht.errors import ConfigError, RecordError, RunNotFound, TimedOut, Unreachable
from dht.identity import Identity
from dht.kademlia import KademliaConfig, KademliaDirectory, probe
from dht.records import PeerRecord, SignedRun, peers_key, seal

MakeRecord = Callable[..., PeerRecord]
FindDaemon = Callable[[int], int]
Eventually = Callable[..., Awaitable[None]]
Open = Callable[..., Awaitable[KademliaDirectory]]


@pytest.fixture
async def open_directory(tmp_path: Path) -> AsyncIterator[Open]:
    """Open directories on loopback; all are closed at the end of the test."""
    numbers = itertools.count()
    async with AsyncExitStack() as stack:

        async def open_one(*initial_peers: str, **options: object) -> KademliaDirectory:
            config = KademliaConfig(
                identity_path=tmp_path / f"identity-{next(numbers)}",
                host="127.0.0.1",
                initial_peers=initial_peers,
                **options,  # type: ignore[arg-type]
            )
            return await stack.enter_async_context(KademliaDirectory.open(config))

        yield open_one


A_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def ids(records: list[PeerRecord]) -> set[str]:
    return {record.peer_id for record in records}


def kill_daemon(directory: KademliaDirectory, daemon_pid: FindDaemon) -> None:
    assert directory._daemon is not None
    os.kill(daemon_pid(directory._daemon.pid), signal.SIGKILL)


async def test_a_first_node_alone_stores_and_finds(
    open_directory: Open, make_record: MakeRecord, run_id: str
) -> None:
    directory = await open_directory()
    assert await directory.peers(run_id) == []
    with pytest.raises(RunNotFound):
        await directory.find_run(run_id)
    record = make_record(directory.identity, maddrs=directory.maddrs)
    await directory.announce(record)
    assert await directory.peers(run_id) == [record]
    run = SignedRun.sign(directory.identity, b"a = 1", time.time())
    await directory.publish(run)
    assert await directory.find_run(run.run_id) == run
    await directory.publish(run)  # again is no failure


async def test_three_nodes_find_each_other_through_a_bootstrap_node_without_a_run(
    open_directory: Open, make_record: MakeRecord, run_id: str
) -> None:
    bootstrap = await open_directory()
    one = await open_directory(*bootstrap.maddrs)
    other = await open_directory(*bootstrap.maddrs)
    for each in (one, other):
        await each.announce(make_record(each.identity, maddrs=each.maddrs))
    expected = {one.identity.peer_id, other.identity.peer_id}
    for each in (bootstrap, one, other):
        assert ids(await each.peers(run_id)) == expected
    run = SignedRun.sign(one.identity, b"a = 1", time.time())
    await one.publish(run)
    assert await other.find_run(run.run_id) == run
    assert await one.ping(other.maddrs[0]) < 3
    assert not bootstrap.validator.refused


async def test_the_network_outlives_its_bootstrap_node(
    open_directory: Open, make_record: MakeRecord, run_id: str, tmp_path: Path
) -> None:
    config = KademliaConfig(identity_path=tmp_path / "bootstrap", host="127.0.0.1")
    async with KademliaDirectory.open(config) as bootstrap:
        one = await open_directory(*bootstrap.maddrs, rpc_timeout_s=0.5)
        other = await open_directory(*bootstrap.maddrs, rpc_timeout_s=0.5)
        await one.announce(make_record(one.identity))
    await other.announce(make_record(other.identity))
    expected = {one.identity.peer_id, other.identity.peer_id}
    assert ids(await one.peers(run_id)) == ids(await other.peers(run_id)) == expected
    late = await open_directory(*bootstrap.maddrs, *other.maddrs)  # a dead address does no harm
    assert ids(await late.peers(run_id)) == expected


async def test_watch_shows_who_comes_and_who_leaves(
    open_directory: Open, make_record: MakeRecord, run_id: str
) -> None:
    one = await open_directory()
    other = await open_directory(*one.maddrs)
    watch = one.watch(run_id, 0.01)
    assert await anext(watch) == []
    await other.announce(make_record(other.identity))
    assert ids(await anext(watch)) == {other.identity.peer_id}
    await other.announce(make_record(other.identity, leaving=True))
    assert await anext(watch) == []


async def test_killed_daemon_comes_back_at_the_same_address_and_finds_the_network_again(
    open_directory: Open,
    make_record: MakeRecord,
    run_id: str,
    daemon_pid: FindDaemon,
    eventually: Eventually,
) -> None:
    one = await open_directory()
    other = await open_directory(*one.maddrs)
    # An address that nobody can even write down must not keep anybody from finding back.
    await one.announce(make_record(one.identity))
    nonsense = (f"/nonsense/1/p2p/{other.identity.peer_id}", *other.maddrs)
    await other.announce(make_record(other.identity, maddrs=nonsense))
    expected = {one.identity.peer_id, other.identity.peer_id}
    # The bootstrap node first: it has no initial peers and must know its way back by itself.
    for victim in (one, other):
        maddrs = victim.maddrs
        assert ids(await victim.peers(run_id)) == expected
        kill_daemon(victim, daemon_pid)
        await eventually(lambda victim=victim: victim.restarts == 1)
        assert ids(await victim.peers(run_id)) == expected  # waits for the restart
        assert victim.maddrs == maddrs
        for each in (one, other):
            assert ids(await each.peers(run_id)) == expected
        assert await (other if victim is one else one).ping(maddrs[0]) < 3


async def test_a_record_with_a_made_up_address_keeps_nobody_from_finding_back(
    open_directory: Open,
    make_record: MakeRecord,
    run_id: str,
    daemon_pid: FindDaemon,
    eventually: Eventually,
) -> None:
    # The first node of the network: it finds back to those alone whose records it has seen.
    first = await open_directory()
    other = await open_directory(*first.maddrs)
    liar = Identity.generate()
    made_up = make_record(liar, maddrs=(f"/foo/bar/p2p/{liar.peer_id}",))
    stored = await other._node.protocol.call_store(
        first._node.peer_id,
        [DHTID.generate(peers_key(run_id))],
        [MSGPackSerializer.dumps(seal(made_up, liar))],
        [made_up.expires_at],
        [liar.peer_id],
    )
    assert stored == [True]
    await other.announce(make_record(other.identity, maddrs=other.maddrs))
    expected = {liar.peer_id, other.identity.peer_id}
    assert ids(await first.peers(run_id)) == expected
    kill_daemon(first, daemon_pid)
    await eventually(lambda: first.restarts == 1)
    assert ids(await first.peers(run_id)) == expected  # waits for the restart
    assert first.neighbours == 1


async def test_addresses_that_strangers_made_up_keep_nobody_from_starting(
    open_directory: Open,
) -> None:
    made_up = (f"/foo/bar/p2p/{A_PEER_ID}", f"/dns4/a_b/tcp/1/p2p/{A_PEER_ID}", "nonsense")
    one = await open_directory(hints=made_up)
    assert one.neighbours == 0
    # Among the hints and in a link, which names whom its giver knows.
    assert (await open_directory(hints=(*made_up, *one.maddrs))).neighbours == 1
    assert (await open_directory(*made_up, *one.maddrs)).neighbours >= 1


async def test_first_node_keeps_what_it_stored_when_its_daemon_is_killed(
    open_directory: Open,
    daemon_pid: FindDaemon,
    eventually: Eventually,
) -> None:
    directory = await open_directory()
    run = SignedRun.sign(directory.identity, b"a = 1", time.time())
    await directory.publish(run)
    kill_daemon(directory, daemon_pid)
    await eventually(lambda: directory.restarts == 1)
    assert await directory.find_run(run.run_id) == run
    newcomer = await open_directory(*directory.maddrs)
    assert await newcomer.find_run(run.run_id) == run


async def test_call_during_a_restart_is_neither_cancelled_nor_a_foreign_error(
    open_directory: Open, run_id: str, daemon_pid: FindDaemon
) -> None:
    one = await open_directory()
    other = await open_directory(*one.maddrs)

    async def look_up() -> None:
        with_errors = (Unreachable, TimedOut)
        for _ in range(50):
            try:
                await other.peers(run_id)
            except with_errors:
                continue

    look_ups = [asyncio.create_task(look_up()) for _ in range(8)]
    kill_daemon(other, daemon_pid)
    await asyncio.gather(*look_ups)
    assert not any(look_up.cancelled() for look_up in look_ups)
    assert other.restarts >= 1


async def test_forged_and_misplaced_records_are_refused_by_the_storing_node(
    open_directory: Open, make_record: MakeRecord, run_id: str
) -> None:
    honest = await open_directory()
    liar = await open_directory(*honest.maddrs)
    node, peer = liar._node, honest._node.peer_id
    record = make_record(liar.identity)
    raw = MSGPackSerializer.dumps(seal(record, liar.identity))
    key = DHTID.generate(peers_key(run_id))
    elsewhere = DHTID.generate(peers_key("f" * 40))

    async def store(key: DHTID, value: object, subkey: str | None = None) -> list[bool] | None:
        answer: list[bool] | None = await node.protocol.call_store(
            peer, [key], [value], [record.expires_at], None if subkey is None else [subkey]
        )
        return answer

    victim = Identity.generate()
    assert await store(key, raw[:-1] + b"x", liar.identity.peer_id) == [False]
    assert await store(key, raw, victim.peer_id) == [False]
    assert await store(elsewhere, raw, liar.identity.peer_id) == [False]
    assert await store(key, b"\xc0") == [False]

    # A whole dictionary is refused for one hostile entry, wherever it stands in it.
    dictionary = DictionaryDHTValue()
    dictionary.store(liar.identity.peer_id, raw, record.expires_at)
    dictionary.store(victim.peer_id, raw, record.expires_at)
    assert await store(key, dictionary) == [False]
    assert await honest.peers(run_id) == []
    reasons = {"bad signature", "wrong owner", "wrong key", "malformed"}
    assert honest.validator.refused.keys() == reasons

    assert await store(key, raw, liar.identity.peer_id) == [True]
    assert await honest.peers(run_id) == [record]


async def test_forged_answers_are_not_believed(
    open_directory: Open, make_record: MakeRecord, run_id: str
) -> None:
    liar = await open_directory()
    honest = await open_directory(*liar.maddrs)
    # The liar answers with what it never checked.
    raw = MSGPackSerializer.dumps(seal(make_record(liar.identity), liar.identity))
    forged = DictionaryDHTValue()
    forged.store(Identity.generate().peer_id, raw, time.time() + 60)
    liar._node.protocol.storage.store(
        DHTID.generate(peers_key(run_id)), forged, forged.latest_expiration_time
    )
    assert await honest.peers(run_id) == []
    assert honest.validator.refused["wrong owner"] >= 1
    # That it lies does not keep the truth from being found.
    record = make_record(honest.identity)
    await honest.announce(record)
    assert await honest.peers(run_id) == [record]


async def test_only_our_own_records_are_announced(
    open_directory: Open, make_record: MakeRecord
) -> None:
    directory = await open_directory()
    with pytest.raises(RecordError, match="wrong owner"):
        await directory.announce(make_record(Identity.generate()))
    with pytest.raises(RecordError, match="too far ahead"):
        await directory.announce(make_record(directory.identity, expires_at=time.time() + 3600))


async def test_nobody_at_the_initial_address_is_unreachable(open_directory: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nobody = Identity.generate().peer_id
    with pytest.raises(Unreachable) as caught:
        await open_directory(f"/ip4/127.0.0.1/tcp/{port}/p2p/{nobody}")
    assert caught.value.peer_id == nobody


async def test_initial_peer_that_accepts_but_never_speaks_times_out(open_directory: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        maddr = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
        began = time.monotonic()
        with pytest.raises((TimedOut, Unreachable)):
            await open_directory(maddr, bootstrap_timeout_s=0.5)
        assert time.monotonic() - began < 5


async def test_somebody_else_at_the_initial_address_is_unreachable(open_directory: Open) -> None:
    somebody = await open_directory()
    address = somebody.maddrs[0].rpartition("/")[0]
    with pytest.raises(Unreachable):
        await open_directory(f"{address}/{Identity.generate().peer_id}")


async def test_wrong_clock_is_told_as_such(
    open_directory: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await open_directory()
    calls = itertools.count()
    # Of the readings while they meet, the second is that of the peer that was asked.
    monkeypatch.setattr(
        "hivemind.dht.protocol.get_dht_time",
        lambda: time.time() + (100 if next(calls) == 1 else 0),
    )
    with pytest.raises(ConfigError, match="clock"):
        await open_directory(*one.maddrs)


@pytest.mark.parametrize(
    "option",
    [
        {"port": 70000},
        {"host": "localhost"},
        {"initial_peers": (f"/ip4/999.0.0.1/tcp/1/p2p/{A_PEER_ID}",)},
        {"initial_peers": (f"/nonsense/1/p2p/{A_PEER_ID}",)},
        {"announce_maddrs": ("example.org:1",)},
        {"initial_peers": ("/ip4/127.0.0.1/tcp/1",)},
        {"initial_peers": ("https://example.org",)},
    ],
)
async def test_malformed_options_are_config_errors(
    tmp_path: Path, option: dict[str, object]
) -> None:
    config = KademliaConfig(identity_path=tmp_path / "identity", **option)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        async with KademliaDirectory.open(config):
            pass
    assert "\n" not in str(caught.value)


async def test_own_address_among_the_initial_peers_is_skipped(
    tmp_path: Path, open_directory: Open
) -> None:
    bootstrap = await open_directory()
    config = KademliaConfig(
        identity_path=tmp_path / "identity-0",  # the bootstrap node's own
        host="127.0.0.1",
        initial_peers=bootstrap.maddrs,
    )
    async with KademliaDirectory.open(config) as alone:
        assert alone.neighbours == 0


async def test_announced_address_replaces_the_real_one(open_directory: Open) -> None:
    directory = await open_directory(announce_maddrs=("/dns4/peer.example.org/tcp/31337",))
    peer_id = directory.identity.peer_id
    assert directory.maddrs == (f"/dns4/peer.example.org/tcp/31337/p2p/{peer_id}",)


async def test_names_work_as_addresses(open_directory: Open) -> None:
    one = await open_directory()
    by_name = one.maddrs[0].replace("/ip4/127.0.0.1/", "/dns4/localhost/")
    other = await open_directory(by_name)
    assert other.neighbours == 1


async def test_client_asks_but_is_nobodys_neighbour(
    open_directory: Open, make_record: MakeRecord, run_id: str
) -> None:
    server = await open_directory()
    record = make_record(server.identity)
    await server.announce(record)
    client = await open_directory(*server.maddrs, client=True)
    assert client.maddrs == ()
    assert await client.peers(run_id) == [record]
    await client.announce(make_record(client.identity, maddrs=(), hosts=(), port=0))
    assert client.identity.peer_id in ids(await server.peers(run_id))
    assert server.neighbours == 0


async def test_probe_tells_a_living_dht_node_from_nothing(
    tmp_path: Path, open_directory: Open
) -> None:
    config = KademliaConfig(identity_path=tmp_path / "identity", host="127.0.0.1")
    async with KademliaDirectory.open(config) as directory:
        (maddr,) = directory.maddrs
        assert await probe(maddr) < 3
        with pytest.raises(ConfigError, match="own address"):
            await directory.ping(maddr)
    with pytest.raises(Unreachable):
        await probe(maddr)
    with pytest.raises(ConfigError):
        await probe("localhost:4000")


async def test_error_in_the_body_leaves_as_it_is_and_all_is_closed(
    tmp_path: Path, open_directory: Open
) -> None:
    config = KademliaConfig(identity_path=tmp_path / "identity", host="127.0.0.1")
    opened = []

    async def fail() -> None:
        async with KademliaDirectory.open(config) as directory:
            opened.append(directory)
            assert directory._daemon is not None
            folders.append(directory._daemon.directory)
            raise LookupError("mine")

    folders: list[Path] = []
    with pytest.raises(LookupError, match="mine"):
        await fail()
    assert not folders[0].exists()
    assert opened[0].neighbours == 0
