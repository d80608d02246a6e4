"""The round's state machines under a virtual clock: what must hold whatever goes wrong."""

from __future__ import annotations

import os

import pytest

from tests.sim.chaos import calm, swarm, trouble

SEEDS = int(os.environ.get("SEEDS", "150"))


def test_four_peers_end_a_run_together_with_one_head() -> None:
    world = swarm(1, 4, rounds=6)
    world.run(lambda: all(peer.finished for peer in world.live), limit_s=60)
    heads = {peer.machine.head.digest for peer in world.live}
    assert len(heads) == 1
    assert {peer.machine.head.round for peer in world.live} == {6}
    assert all(
        len(certificate.signatures) >= 3
        for certificate in world.peers["p0"].certificates
        if certificate.outcome.round > 0
    )


def test_leaders_take_turns() -> None:
    world = swarm(2, 4)
    leaders = set()

    def until() -> bool:
        leaders.add(world.peers["p0"].machine.leader)
        return world.all_at(12)

    world.run(until, limit_s=120)
    assert leaders == set(world.peers)


def test_a_round_starts_at_once_when_all_are_ready() -> None:
    world = swarm(3, 4)
    world.run(lambda: world.all_at(10), limit_s=200)
    # At most 2 s of work, 0.6 s of exchange and a few message delays; never the grace time.
    assert world.now < 10 * (2.0 + 0.6 + 0.6)


@pytest.mark.parametrize("seed", range(30))
def test_any_crash_costs_at_most_a_few_seconds(seed: int) -> None:
    world = swarm(seed, 4)
    victim = world.random.choice(sorted(world.peers))
    world.at(world.random.uniform(0, 6), lambda: world.crash(victim))
    world.run(lambda: not world.peers[victim].alive, limit_s=10)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 2), limit_s=40)
    assert len({peer.machine.head.digest for peer in world.live}) <= 2
    assert all(len(peer.machine.head.roster) == 3 for peer in world.live)


@pytest.mark.parametrize("seed", range(10))
def test_the_last_of_two_goes_on_alone_and_takes_the_other_back(seed: int) -> None:
    world = swarm(seed, 2)
    world.crash("p1")
    world.run(lambda: world.peers["p0"].machine.head.round >= 2, limit_s=60)
    assert len(world.peers["p0"].machine.head.roster) == 1
    world.join("p1", "p0")
    world.run(lambda: len(world.peers["p0"].machine.head.roster) == 2, limit_s=20)
    before = world.peers["p0"].machine.head.round
    world.run(lambda: world.all_at(before + 2), limit_s=30)
    assert len({peer.machine.head.digest for peer in world.live}) <= 2


@pytest.mark.parametrize("seed", range(10))
def test_half_of_eight_die_at_once(seed: int) -> None:
    world = swarm(seed, 8)
    for name in world.random.sample(sorted(world.peers), 4):
        world.crash(name)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 2), limit_s=60)


@pytest.mark.parametrize("seed", range(10))
def test_a_polite_leave_disturbs_nobody(seed: int) -> None:
    world = swarm(seed, 3)
    world.run(lambda: world.all_at(1), limit_s=30)
    leaver = world.peers[world.random.choice(sorted(world.peers))]
    world.at(world.random.uniform(0, 3), lambda: world._do(leaver, leaver.machine.leave(world.now)))
    world.run(lambda: leaver.left, limit_s=15)
    world.crash(leaver.me.peer_id)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 2), limit_s=30)
    assert all(not c.provisional for peer in world.live for c in peer.certificates)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_that_goes_wrong_makes_replicas_differ(seed: int) -> None:
    """The world checks every commit; a seed that fails fails again the same way."""
    calm(trouble(seed))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_when_all_leave_at_once_each_is_let_go(size: int) -> None:
    world = swarm(size, size)
    world.run(lambda: world.all_at(1), limit_s=30)
    for peer in world.live:
        world._do(peer, peer.machine.leave(world.now))
    world.run(lambda: not world.live, limit_s=5)


def test_a_lone_peer_that_is_ready_can_leave() -> None:
    world = swarm(7, 1)
    lone = world.peers["p0"]
    world.run(lambda: lone.machine.phase == "averaging", limit_s=10)
    world._do(lone, lone.machine.leave(world.now))
    assert lone.left
