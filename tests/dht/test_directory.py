from __future__ import annotations

from collections.abc import Callable

import pytest

from dht.directory import InMemoryDirectory, InMemoryNetwork
from dht.errors import RecordError, RunNotFound, Unreachable
from dht.identity import Identity
from dht.records import PeerRecord, SignedRun

MakeRecord = Callable[..., PeerRecord]


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def network() -> InMemoryNetwork:
    return InMemoryNetwork()


async def test_peers_see_each_other_until_their_records_expire(
    clock: Clock, network: InMemoryNetwork, make_record: MakeRecord, run_id: str
) -> None:
    one, other = Identity.generate(), Identity.generate()
    here = InMemoryDirectory(one, network, clock=clock)
    there = InMemoryDirectory(other, network, clock=clock)
    await here.announce(make_record(one, now=clock()))
    clock.now += 20
    await there.announce(make_record(other, now=clock()))
    assert [each.peer_id for each in await here.peers(run_id)] == [other.peer_id, one.peer_id]
    assert await here.peers(run_id) == await there.peers(run_id)
    assert await here.peers("f" * 40) == []
    clock.now += 40
    assert [each.peer_id for each in await here.peers(run_id)] == [other.peer_id]
    clock.now += 20
    assert await here.peers(run_id) == []
    assert network.peers == {}


async def test_who_leaves_is_gone_at_once_and_older_records_do_not_bring_it_back(
    clock: Clock,
    network: InMemoryNetwork,
    identity: Identity,
    make_record: MakeRecord,
    run_id: str,
) -> None:
    directory = InMemoryDirectory(identity, network, clock=clock)
    before = make_record(identity, now=clock())
    await directory.announce(before)
    clock.now += 1
    await directory.announce(make_record(identity, now=clock(), leaving=True))
    assert await directory.peers(run_id) == []
    await directory.announce(before)
    assert await directory.peers(run_id) == []


async def test_same_checks_as_the_real_one(
    clock: Clock,
    network: InMemoryNetwork,
    identity: Identity,
    make_record: MakeRecord,
    run_id: str,
) -> None:
    directory = InMemoryDirectory(identity, network, clock=clock)
    with pytest.raises(RecordError, match="wrong owner"):
        await directory.announce(make_record(Identity.generate(), now=clock()))
    with pytest.raises(RecordError, match="too far ahead"):
        await directory.announce(make_record(identity, expires_at=clock() + 1000))
    network.peers[run_id, identity.peer_id] = b"whatever a liar stored", clock() + 60
    assert await directory.peers(run_id) == []


async def test_runs_are_found_by_their_hash(
    clock: Clock, network: InMemoryNetwork, identity: Identity
) -> None:
    run = SignedRun.sign(identity, b"a = 1", clock())
    # Somebody else publishes it: runs are content-addressed.
    await InMemoryDirectory(Identity.generate(), network, clock=clock).publish(run)
    directory = InMemoryDirectory(identity, network, clock=clock)
    assert await directory.find_run(run.run_id) == run
    with pytest.raises(RunNotFound, match="f" * 40):
        await directory.find_run("f" * 40)


async def test_watch_looks_at_once_then_at_the_interval_and_survives_failures(
    clock: Clock,
    network: InMemoryNetwork,
    identity: Identity,
    make_record: MakeRecord,
    run_id: str,
) -> None:
    failures = iter([False, True, False])

    class Flaky(InMemoryDirectory):
        async def peers(self, run_id: str) -> list[PeerRecord]:
            if next(failures):
                raise Unreachable("", "the network is down")
            return await super().peers(run_id)

    directory = Flaky(identity, network, clock=clock, sleep=clock.sleep)
    began = clock()
    watch = directory.watch(run_id, 5.0)
    assert await anext(watch) == []
    assert clock() == began
    await directory.announce(make_record(identity, now=clock()))
    assert len(await anext(watch)) == 1
    assert clock() == began + 10
