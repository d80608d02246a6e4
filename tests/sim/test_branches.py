"""When so many are gone, or one is so hostile, that the rest could wait for ever."""

from __future__ import annotations

from typing import get_args

import pytest

from coordinator_free.messages import Commit, Kind, Message, Plan, Prepare, Propose, Report
from tests.sim.chaos import swarm
from tests.sim.world import Peer, World


def pass_time(world: World, seconds: float) -> None:
    end = world.now + seconds
    world.run(lambda: world.now >= end, limit_s=seconds + 30)


def goes_on(world: World, names: set[str], limit_s: float) -> float:
    """How long these take to average two more rounds."""
    began = world.now
    peers = [world.peers[name] for name in sorted(names)]
    before = max(peer.machine.head.round for peer in peers)
    world.run(lambda: all(p.machine.head.round >= before + 2 for p in peers), limit_s=limit_s)
    return world.now - began


@pytest.mark.parametrize("slow", ["p0", "p1", "p2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_survivor_goes_on_where_a_decrees_average_died_with_those_who_had_it(
    seed: int, slow: str
) -> None:
    """It may even be the leader that made the decree."""
    world = swarm(seed, 3)
    world.run(lambda: world.all_at(1), limit_s=60)
    survivor = world.peers[slow]
    survivor.link_s = 8.0

    def knows_what_it_lacks() -> bool:
        pending = survivor.machine._decided
        return pending is not None and not pending.certificate.provisional

    world.run(knows_what_it_lacks, limit_s=200)
    for name in set(world.peers) - {slow}:
        world.crash(name)
    survivor.link_s = 0.0
    assert goes_on(world, {slow}, limit_s=60) < 30
    world.check_history()


@pytest.mark.parametrize("seed", range(5))
def test_what_a_majority_decided_is_waited_for_while_one_that_has_it_lives(seed: int) -> None:
    world = swarm(seed, 3)
    world.run(lambda: world.all_at(1), limit_s=60)
    slow = world.peers["p1"]
    slow.link_s = 8.0
    world.run(lambda: slow.machine._decided is not None, limit_s=200)
    decided = slow.machine._decided
    assert decided is not None
    slow.link_s = 0.0
    for peer in world.live:
        if peer is not slow:
            world.freeze(peer.me.peer_id, 9.0)
    pass_time(world, 8.5)
    assert slow.machine._decided is not None  # the average did not come
    goes_on(world, {"p0", "p1", "p2"}, limit_s=120)
    assert decided.certificate.outcome in [c.outcome for c in slow.certificates]
    assert not world.provisional


@pytest.mark.parametrize("seed", range(5))
def test_who_was_stopped_for_a_while_takes_nobody_for_gone_because_of_that(seed: int) -> None:
    """A moment without a network before, and its clock would say that all were gone for long."""
    world = swarm(seed, 4)
    world.run(lambda: world.all_at(2), limit_s=60)
    world.partition({"p0"}, {"p1", "p2", "p3"})
    pass_time(world, 4.5)
    world.freeze("p0", 14)
    world.heal()
    pass_time(world, 14.5)
    goes_on(world, {"p0", "p1", "p2", "p3"}, limit_s=60)
    assert not world.provisional


@pytest.mark.parametrize(("pushes", "every_s"), [(20, 0.0), (20, 1.05)])
@pytest.mark.parametrize("seed", range(3))
def test_ballots_that_a_hostile_member_drove_apart_meet_again(
    seed: int, pushes: int, every_s: float
) -> None:
    """Two of three, one at ballots that the other never got near, and the third dies."""
    world = swarm(seed, 3)
    world.run(lambda: world.all_at(1), limit_s=60)
    victim = world.peers["p0"]
    at_work = lambda: {p.machine.phase for p in world.live} == {"training"}  # noqa: E731
    world.run(lambda: one_height(world) and at_work(), limit_s=30)
    hostile = next(name for name in sorted(world.peers) if name != "p0")
    height = victim.machine.head.height

    def push(times: int) -> None:
        machine = victim.machine
        assert machine.head.height == height
        later = range(machine.ballot + 1, machine.ballot + 13)
        turns = [ballot for ballot in later if machine._leader_of(ballot) == hostile]
        prepare = Prepare(height=height, ballot=turns[-1])
        world._do(victim, machine.receive(hostile, prepare, world.now))
        if times > 1:
            world.at(every_s, lambda: push(times - 1))

    if every_s:  # meanwhile it says nothing to the other one, who cannot hear the victim
        world.mute[hostile] = get_args(Message)
        world.partition({"p0"}, set(world.peers) - {"p0", hostile})
    push(pushes)
    pass_time(world, pushes * every_s)
    world.crash(hostile)
    world.heal()
    goes_on(world, set(world.peers) - {hostile}, limit_s=60)
    assert not any(len(c.outcome.roster) == 1 for c in victim.certificates[2:])


def one_height(world: World) -> bool:
    return len({peer.machine.head.height for peer in world.live}) == 1


@pytest.mark.parametrize("lost", [Plan, Propose, Commit, Report], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_a_leader_that_beats_and_gets_nowhere_is_left(seed: int, lost: type[Message]) -> None:
    """Its heartbeats arrive, and what matters does not: too large, or it is hostile."""
    world = swarm(seed, 5)
    world.run(lambda: world.all_at(1), limit_s=60)
    leader = world.peers["p0"].machine.leader
    world.mute[leader] = (lost,)
    config = world.config
    patience_s = config.exchange_s + config.provisional_s + config.grace_s
    rest = set(world.peers) - {leader}
    before = world.peers[min(rest)].machine.head.round
    began = world.now
    peers = [world.peers[name] for name in rest]
    world.run(lambda: all(p.machine.head.round > before + 1 for p in peers), limit_s=120)
    assert world.now - began < patience_s + 20
    assert not world.provisional


def test_an_average_that_leads_nowhere_costs_no_deadline() -> None:
    world = swarm(1, 4)
    world.run(lambda: world.all_at(1), limit_s=60)
    refusals = []
    refused = world._is_refused
    voids = world.voids

    def first_one(root: bytes) -> bool:
        if not refusals or root == refusals[0]:
            refusals.append(root)
            return True
        return refused(root)

    world._is_refused = first_one  # type: ignore[method-assign]
    began = world.now
    goes_on(world, set(world.peers), limit_s=60)
    assert len(refusals) == 4
    assert world.voids == voids + 4  # each applies the regroup
    assert world.now - began < 12  # a round of work more, and no deadline


def branches(world: World) -> set[bytes]:
    return {peer.machine.head.digest for peer in world.live}


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_two_sides_that_both_went_on_become_one_branch_again(seed: int, directory: bool) -> None:
    """Also where the directory is parted longer than the network: they remember each other."""
    world = swarm(seed, 5)
    world.run(lambda: world.all_at(2), limit_s=60)
    some, rest = {"p0", "p3"}, {"p1", "p2", "p4"}
    world.partition(some, rest, directory=directory)

    def alone(peer: Peer) -> bool:
        return len(peer.machine.head.roster) == 2 and peer.certificates[-1].outcome.round > 3

    world.run(lambda: all(alone(world.peers[name]) for name in some), limit_s=90)
    assert len(branches(world)) > 1
    assert world.provisional
    for certificate in world.provisional:
        assert {s.peer_id for s in certificate.signatures} <= some
        assert certificate.outcome.kind in (Kind.AVERAGE, Kind.REGROUP)
    world.heal()
    goes_on(world, set(world.peers), limit_s=120)
    world.run(world.one_branch, limit_s=60)
    world.check_history()
