"""A whole state on its way while the swarm goes on and its donors fail."""

from __future__ import annotations

import pytest

from coordinator_free.donor import LEASE_S
from coordinator_free.download import PATIENCE_S
from tests.sim.chaos import swarm
from tests.sim.getting import Getting, after, contents, initial, shape
from tests.sim.world import World

SEEDS = 20


def training(seed: int, size: int = 4) -> World:
    """A swarm in its third round, whose donors take half a round for a leaf."""
    world = swarm(seed, size)
    world.run(lambda: world.all_at(2), limit_s=60)
    world.downloads.clear()
    world.faults.leaf_s = (0.2, 1.5)
    return world


def arrive(world: World, limit_s: float) -> None:
    """The newcomer gets its state, then its seat, and holds what was decided."""
    world.run(lambda: not world.newcomers, limit_s=limit_s)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 2), limit_s=40)
    world.check_history()


def test_a_state_depends_on_every_byte_of_what_it_follows_on() -> None:
    first = initial(shape())
    one, other = after(first, 0, b"a"), after(first, 0, b"b")
    assert len({first.root, one.root, other.root, after(one, 1, b"b").root}) == 4
    assert contents(after(other, 1, b"a")) != contents(after(one, 1, b"b"))


def test_newcomers_get_their_states_from_several_donors_while_rounds_are_committed() -> None:
    several = behind = 0
    for seed in range(SEEDS):
        world = training(seed)
        world.join("p4", "p0")
        began = world.peers["p0"].machine.head.round
        world.run(lambda world=world: not world.newcomers, limit_s=60)
        several += len(world.downloads[0]) > 1
        behind += world.peers["p4"].machine.head.round > began
        arrive(world, 1)
        assert sum(len(gave) > 0 for gave in world.downloads) == 1
    # A donor that is asked for its first leaf after the next commit has not got that state.
    assert several > SEEDS // 4
    assert behind > SEEDS // 4


@pytest.mark.parametrize("fault", ["crash", "freeze", "cut"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_donor_that_fails_in_mid_transfer_is_made_up_for(seed: int, fault: str) -> None:
    world = training(seed)
    world.join("p4", "p0")
    fail = {
        "crash": lambda: world.crash("p0"),
        "freeze": lambda: world.freeze("p0", 60),
        "cut": lambda: world.partition({"p4"}, {"p0"}),
    }[fault]
    world.at(world.random.uniform(0.1, 3), fail)
    # The donor's silence, nobody else with that state, and the newest one from the others.
    world.run(lambda: not world.newcomers, limit_s=3 * PATIENCE_S)
    world.heal()
    others = [peer for peer in world.live if peer.me.peer_id != "p0"]
    before = max(peer.machine.head.round for peer in others)
    world.run(lambda: all(p.machine.head.round >= before + 2 for p in others), limit_s=60)


def test_a_state_that_nobody_has_any_more_is_given_up_for_the_newest() -> None:
    world = training(1)
    world.partition({"p4"}, {"p1", "p2", "p3"})
    world.faults.leaf_s = (1.0, 1.0)
    world.join("p4", "p0")
    end = world.now + 2.5
    world.run(lambda: world.now >= end, limit_s=5)
    world.crash("p0")
    world.run(lambda: world.now >= end + 15, limit_s=20)
    assert "p4" in world.newcomers
    world.heal()
    arrive(world, 2 * PATIENCE_S)
    assert world.lost_downloads == 1
    assert world.peers["p4"].certificates[-1].outcome.round > 5


def test_donors_hold_a_state_that_is_asked_for_and_no_longer_than_its_lease() -> None:
    world = training(2)
    world.faults.leaf_s = (4.0, 4.0)  # the download outlives the round by far
    world.join("p4", "p0")
    world.run(lambda: bool(world.peers["p0"].giver.kept), limit_s=5)
    root = world.peers["p0"].giver.kept[-1]
    world.run(lambda: world.peers["p0"].state_root != root, limit_s=20)
    arrive(world, 60)
    assert world.lost_downloads == 0
    end = world.now + LEASE_S
    world.run(lambda: world.now > end, limit_s=LEASE_S + 1)
    world.peers["p0"].giver.tidy()
    assert world.peers["p0"].giver.kept == ()


def test_wrong_leaves_are_noticed_and_never_become_a_state() -> None:
    world = training(3)
    world.faults.wrong_leaf = 1.0
    world.join("p4", "p0")
    end = world.now + 2 * PATIENCE_S
    world.run(lambda: world.now >= end, limit_s=2 * PATIENCE_S + 5)
    assert "p4" in world.newcomers
    assert world.lies_noticed >= 3
    world.faults.wrong_leaf = 0.0
    arrive(world, 2 * PATIENCE_S)


def test_a_peer_on_a_branch_that_lost_gets_the_state_of_the_other() -> None:
    world = swarm(4, 5)
    world.run(lambda: world.all_at(2), limit_s=60)
    world.downloads.clear()
    world.partition({"p0"}, {"p1", "p2", "p3", "p4"})
    world.run(lambda: len(world.peers["p0"].machine.head.roster) == 1, limit_s=90)
    alone = world.peers["p0"].machine.head.round
    world.run(lambda: world.peers["p0"].machine.head.round > alone, limit_s=60)
    world.heal()
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 2), limit_s=90)
    world.run(world.one_branch, limit_s=60)
    world.check_history()
    assert world.downloads


def test_a_downloader_that_dies_leaves_nothing_behind() -> None:
    world = training(5)
    world.join("p4", "p0")
    end = world.now + 1.0
    world.run(lambda: world.now >= end, limit_s=5)
    world.newcomers.clear()
    before = world.peers["p0"].machine.head.round
    world.run(lambda: world.all_at(before + 3), limit_s=60)
    assert "p4" not in world.peers
    assert world.downloads == []


def test_a_download_ends_once() -> None:
    world = training(6)
    ends: list[str] = []
    host = world.peers["p1"]
    root = world.peers["p0"].state_root
    Getting(
        world,
        host,
        root,
        "p0",
        here=lambda state, received: ends.append("here"),
        lost=lambda: ends.append("lost"),
    )
    end = world.now + PATIENCE_S
    world.run(lambda: world.now >= end, limit_s=PATIENCE_S + 5)
    assert ends == ["here"]
