"""One seed's worth of everything that can go wrong with a swarm."""

from __future__ import annotations

from coordinator_free.config import RoundConfig
from tests.sim.world import Faults, World

PEERS = 5
TROUBLE_S = 60.0


def swarm(seed: int, size: int, *, faults: Faults | None = None, rounds: int = 0) -> World:
    """`size` peers that have gathered and begun their first round."""
    config = RoundConfig(grace_s=5.0, exchange_s=10.0, start_peers=size, rounds=rounds)
    world = World(seed, config=config, faults=faults)
    world.found("p0")
    for index in range(1, size):
        world.join(f"p{index}", "p0")
    world.run(lambda: all(len(p.machine.head.roster) == size for p in world.live), limit_s=30)
    return world


def trouble(seed: int) -> World:
    """A minute of crashes, freezes, partitions and restarts over a lossy network.

    Raises:
        Diverged: the checker found two truths.
    """
    faults = Faults(loss=0.02, duplicate=0.05, delay_s=(0.001, 0.3))
    world = swarm(seed, PEERS, faults=faults)
    chance = world.random
    everybody = {f"p{index}" for index in range(PEERS)}
    for _ in range(8):
        name = f"p{chance.randrange(PEERS)}"
        when = chance.uniform(0, 40)
        match chance.choice(["crash", "freeze", "cut", "restart"]):
            case "crash":
                world.at(when, lambda name=name: world.crash(name))
            case "freeze":
                world.at(when, lambda name=name: world.freeze(name, chance.uniform(1, 15)))
            case "cut":
                rest = everybody - {name}
                world.at(when, lambda name=name, rest=rest: world.partition({name}, rest))
                world.at(when + chance.uniform(1, 25), world.heal)
            case "restart":
                world.at(when, lambda name=name: world.crash(name))
                world.at(when + chance.uniform(0, 5), lambda name=name: revive(world, name))
    world.run(lambda: world.now > TROUBLE_S, limit_s=TROUBLE_S + 20)
    return world


def calm(world: World) -> None:
    """With the faults over, all who are left must commit again soon, and on one branch.

    Raises:
        AssertionError: they do not.
    """
    world.heal()
    world.faults = Faults()
    if not any(peer.machine.is_member for peer in world.live):
        return  # the whole roster died: only a copy on disk could go on
    best = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(best + 2), limit_s=180)
    world.run(world.one_branch, limit_s=60)


def revive(world: World, name: str) -> None:
    donors = [peer.me.peer_id for peer in world.live if peer.me.peer_id != name]
    if donors:
        world.crash(name)
        world.join(name, world.random.choice(donors))
