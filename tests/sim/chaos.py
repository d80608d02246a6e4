"""One seed's worth of everything that can go wrong with a swarm."""

from __future__ import annotations

from functools import partial

from coordinator_free.certificates import Head
from coordinator_free.config import RoundConfig
from tests.sim.getting import NUMEL
from tests.sim.world import Faults, World

PEERS = 5
TROUBLE_S = 50.0
ALONE_S = 30.0  # in which somebody who can lead finds the others, if there is anybody


def swarm(
    seed: int,
    size: int,
    *,
    faults: Faults | None = None,
    rounds: int = 0,
    save_every: int = 0,
    clients: int = 0,
    target_batch: int = 0,
    fragments: tuple[int, ...] = (NUMEL,),
) -> World:
    """`size` peers that have gathered and begun their first round.

    With a `target_batch` they average gradients.
    """
    config = RoundConfig(
        mode="gradient" if target_batch else "diloco",
        target_batch=target_batch,
        grace_s=5.0,
        exchange_s=10.0,
        start_peers=size,
        rounds=rounds,
    )
    world = World(seed, config=config, faults=faults, save_every=save_every, fragments=fragments)
    world.clients = frozenset(f"p{index}" for index in range(size - clients, size))
    world.found("p0")
    for index in range(1, size):
        world.join(f"p{index}", "p0")
    world.run(lambda: all(len(p.machine.head.roster) == size for p in world.live), limit_s=90)
    return world


def trouble(
    seed: int,
    *,
    target_batch: int = 0,
    fragments: tuple[int, ...] = (NUMEL,),
    overlap: bool = False,
) -> World:
    """Fifty seconds of crashes, freezes, partitions and restarts over a lossy network.

    In every fourth swarm exchanges take seconds, in every eighth some averages lead nowhere.

    Raises:
        Diverged: the checker found two truths.
    """
    faults = Faults(
        loss=0.02,
        duplicate=0.05,
        delay_s=(0.001, 0.3),
        leaf_s=(0.02, 1.5),
        wrong_leaf=0.02,
        refused=0.2 if seed % 8 == 5 else 0.0,
    )
    world = swarm(
        seed,
        PEERS,
        faults=faults,
        save_every=1,
        clients=max(0, seed % 5 - 2),
        target_batch=target_batch,
        fragments=fragments,
    )
    world.overlap = overlap
    chance = world.random
    if seed % 4 == 3:
        world.exchange_s = (1.0, 6.0)
    everybody = {f"p{index}" for index in range(PEERS)}
    for _ in range(8):
        name = f"p{chance.randrange(PEERS)}"
        when = chance.uniform(0, 40)
        match chance.choice(["crash", "freeze", "cut", "split", "restart", "reboot"]):
            case "crash":
                world.at(when, lambda name=name: world.crash(name))
            case "freeze":
                world.at(when, lambda name=name: world.freeze(name, chance.uniform(1, 15)))
            case "cut":
                rest = everybody - {name}
                world.at(when, lambda name=name, rest=rest: world.partition({name}, rest))
                world.at(when + chance.uniform(1, 25), world.heal)
            case "split":
                some = set(chance.sample(sorted(everybody), chance.randint(2, 3)))
                rest = everybody - some
                parted = chance.random() < 0.5  # the directory
                split = partial(world.partition, some, rest, directory=parted)
                world.at(when, split)
                whole = when + chance.uniform(1, 25)
                world.at(whole, world.heal)
                world.at(whole + chance.uniform(0, 15), world.hidden.clear)
            case "restart":
                world.at(when, lambda name=name: world.crash(name))
                world.at(when + chance.uniform(0, 5), lambda name=name: revive(world, name))
            case "reboot":
                world.at(when, lambda name=name: world.crash(name))
                world.at(when + chance.uniform(0, 5), lambda name=name: world.restart(name))
    end = world.now + TROUBLE_S
    world.at(TROUBLE_S, lambda: None)  # time passes also where everybody is dead
    world.run(lambda: world.now >= end, limit_s=TROUBLE_S + 20)
    return world


def calm(world: World) -> None:
    """With the faults over, all who are left must commit again soon, and on one branch.

    Raises:
        AssertionError: they do not.
        Diverged: what they hold is not what was decided.
    """
    world.heal()
    world.hidden.clear()
    world.faults = Faults()
    if not _is_led(world):
        end = world.now + ALONE_S
        world.at(ALONE_S, lambda: None)
        world.run(lambda: world.now >= end, limit_s=ALONE_S + 20)
    if not _is_led(world):
        for name, peer in list(world.peers.items()):
            if not peer.alive:
                world.restart(name)  # all who could lead died: their disks go on
    if not any(peer.me.can_reduce for peer in world.live):
        return  # not even a disk: nobody had averaged a round
    best = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(best + 2), limit_s=180)
    world.run(world.one_branch, limit_s=60)
    world.check_history()


def _is_led(world: World) -> bool:
    """Whether somebody who can lead has a seat in the furthest roster."""
    heads = [peer.machine.head for peer in world.live]
    furthest = max(heads, key=lambda head: head.rank, default=None)
    return furthest is not None and any(
        peer.me.can_reduce and peer.me in furthest.roster for peer in world.live
    )


def revive(world: World, name: str) -> None:
    donors = [peer.me.peer_id for peer in world.live if peer.me.peer_id != name]
    if donors:
        world.crash(name)
        world.join(name, world.random.choice(donors))


def total_stop(seed: int) -> tuple[World, bytes]:
    """Everybody is killed at once, and some of them come back from their disks.

    Returns:
        The world some seconds later, and the state root of the newest save among those.
    """
    chance = World(seed, config=RoundConfig()).random
    world = swarm(seed, chance.randint(1, 5), save_every=chance.randint(1, 3))
    world.run(lambda: world.all_at(4), limit_s=90)
    if len(world.peers) > 2 and chance.random() < 0.5:  # one of them is behind
        name = chance.choice(sorted(world.peers))
        world.crash(name)
        world.run(lambda: world.all_at(8), limit_s=120)
    else:
        end = world.now + chance.uniform(0, 3)
        world.run(lambda: world.now >= end, limit_s=10)
    names = sorted(world.peers)
    for name in names:
        world.crash(name)
    back = chance.sample(names, chance.randint(1, len(names)))
    for name in back:
        world.at(chance.uniform(0, 3), lambda name=name: world.restart(name))
    saves = [saved for name in back for saved in world.disks.get(name, ())]
    newest = max((saved.chain_end[-1] for saved in saves), key=lambda c: Head.after(c).rank)
    world.run(lambda: len(world.live) == len(back), limit_s=5)
    return world, newest.outcome.state_root
