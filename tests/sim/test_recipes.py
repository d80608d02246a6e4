"""Runs whose rounds are of another kind: states in fragments, training that goes on, gradients."""

from __future__ import annotations

import pytest

from coordinator_free.messages import Kind, Lead, Progress
from tests.sim.chaos import calm, swarm, trouble
from tests.sim.getting import NUMEL
from tests.sim.world import World

UNEVEN = (3, 2, 1)


# -- fragments and overlapping ----------------------------------------------------------------


def overlapping(seed: int, size: int = 4, fragments: tuple[int, ...] = UNEVEN) -> World:
    """Training for a round begins when the work for the one before was handed in."""
    world = swarm(seed, size, fragments=fragments)
    world.overlap = True
    return world


def test_the_rounds_average_vectors_of_the_fragments_lengths() -> None:
    world = overlapping(1)
    world.run(lambda: world.all_at(7), limit_s=90)
    lengths: dict[int, set[int]] = {}
    for peer in world.live:
        assert peer.plans
        for plan in peer.plans:
            lengths.setdefault(plan.round % 3, set()).add(plan.numel)
    of_fragments = dict(enumerate(world.layout.lengths))
    assert lengths == {number: {length} for number, length in of_fragments.items()}
    assert len(set(world.layout.lengths)) == 3
    world.check_history()


@pytest.mark.parametrize("fragments", [UNEVEN, (1,) * NUMEL, (5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_with_fragments_all_stay_on_one_branch(seed: int, fragments: tuple[int, ...]) -> None:
    world = overlapping(seed, fragments=fragments)
    world.run(lambda: world.all_at(2 * len(fragments) + 1), limit_s=120)
    world.run(world.one_branch, limit_s=10)
    world.check_history()
    # At the same round they hold the same fragments, and not those they began with.
    furthest = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(furthest), limit_s=30)
    for begun, now in zip(world.initial.fragments, world.peers["p0"].state.fragments, strict=True):
        assert begun.digests != now.digests


@pytest.mark.parametrize("exchange_s", [0.5, 1.5, 4.0])
def test_an_exchange_hides_behind_the_training_of_the_next_round(exchange_s: float) -> None:
    """A round takes as long as the longer of the two, not as both."""
    took = {}
    for overlap in (False, True):
        world = swarm(1, 4, fragments=UNEVEN)
        world.overlap = overlap
        world.work_s, world.exchange_s = (2.0, 2.0), (exchange_s, exchange_s)
        world.run(lambda world=world: world.all_at(3), limit_s=90)
        began = world.now
        world.run(lambda world=world: world.all_at(13), limit_s=200)
        took[overlap] = (world.now - began) / 10
    messages_s = 0.6
    assert took[False] >= 2.0 + exchange_s
    assert max(2.0, exchange_s) <= took[True] <= max(2.0, exchange_s) + messages_s


def test_a_newcomer_among_overlapping_rounds_gets_all_fragments() -> None:
    world = overlapping(2)
    world.run(lambda: world.all_at(4), limit_s=60)
    world.faults.leaf_s = (0.1, 0.5)
    world.join("p4", "p0")
    world.run(lambda: not world.newcomers, limit_s=60)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 4), limit_s=60)
    world.run(world.one_branch, limit_s=10)
    world.check_history()
    assert world.downloads


@pytest.mark.parametrize("seed", range(40))
def test_nothing_that_goes_wrong_makes_replicas_of_fragments_differ(seed: int) -> None:
    fragments = [UNEVEN, (1,) * NUMEL, (5, 1)][seed % 3]
    calm(trouble(seed, fragments=fragments, overlap=seed % 2 == 0))


# -- gradients --------------------------------------------------------------------------------

TARGET = 300  # samples of a batch; four peers have them in about 1.5 s


def test_a_batch_is_closed_when_all_together_have_its_samples() -> None:
    world = swarm(1, 4, target_batch=TARGET)
    world.run(lambda: world.all_at(10), limit_s=120)
    world.run(world.one_branch, limit_s=10)
    world.check_history()
    averages = [
        certificate.outcome
        for certificate in world.peers["p0"].certificates
        if certificate.outcome.kind == Kind.AVERAGE
    ]
    assert len(averages) >= 10
    for outcome in averages:
        total = sum(contribution.samples for contribution in outcome.contributions)
        # Nobody is waited for longer than it takes to say so.
        assert TARGET <= total < 2 * TARGET
        assert len(outcome.contributions) == 4
        assert all(contribution.samples < TARGET for contribution in outcome.contributions)


def test_a_slow_peer_delays_no_batch_and_gives_what_it_has() -> None:
    world = swarm(2, 4, target_batch=TARGET)
    world.peers["p1"].slowness = 20.0
    first = world.peers["p0"].machine.head.round + 1
    world.run(lambda: world.all_at(first), limit_s=120)
    began = world.now
    world.run(lambda: world.all_at(first + 10), limit_s=120)
    # Three peers of 50 to 100 samples in 1 to 2 s: 3.5 s at most, an exchange and some messages.
    assert (world.now - began) / 10 < 5.0
    gave: dict[str, int] = {}
    for certificate in world.peers["p0"].certificates:
        for contribution in certificate.outcome.contributions:
            gave[contribution.peer_id] = gave.get(contribution.peer_id, 0) + contribution.samples
    assert 0 < gave["p1"] < min(gave[name] for name in ("p0", "p2", "p3")) / 5


def test_a_peer_that_is_alone_fills_the_batch_by_itself() -> None:
    world = swarm(3, 1, target_batch=TARGET)
    world.run(lambda: world.all_at(3), limit_s=120)
    for certificate in world.peers["p0"].certificates:
        if certificate.outcome.kind == Kind.AVERAGE:
            (contribution,) = certificate.outcome.contributions
            assert TARGET <= contribution.samples < TARGET * 1.2


@pytest.mark.parametrize("seed", range(10))
def test_batches_go_on_when_the_leader_dies_in_the_middle_of_one(seed: int) -> None:
    """Its sum dies with it: the next leader is told anew."""
    world = swarm(seed, 4, target_batch=TARGET)
    world.run(lambda: world.all_at(2), limit_s=60)

    def half_full() -> bool:
        working = [p for p in world.live if p.machine.phase == "training"]
        return len(working) == 4 and sum(map(world._done, working)) >= TARGET // 2

    world.run(half_full, limit_s=60)
    leader = world.peers["p0"].machine.leader
    world.crash(leader)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 3), limit_s=60)
    world.run(world.one_branch, limit_s=10)
    world.check_history()
    survivor = world.live[0]
    assert all(len(peer.machine.head.roster) == 3 for peer in world.live)
    later = [
        certificate.outcome
        for certificate in survivor.certificates
        if certificate.outcome.kind == Kind.AVERAGE and certificate.outcome.round > before
    ]
    assert later
    for outcome in later:
        assert sum(contribution.samples for contribution in outcome.contributions) >= TARGET


@pytest.mark.parametrize("lost", [Progress, Lead], ids=lambda kind: kind.__name__)
def test_a_batch_whose_news_are_lost_is_closed_all_the_same(lost: type) -> None:
    """Who hears no call to hand in ends by the batch that it has filled itself."""
    world = swarm(5, 3, target_batch=TARGET)
    world.run(lambda: world.all_at(1), limit_s=60)
    for name in world.peers:
        world.mute[name] = (lost,)
    before = max(peer.machine.head.round for peer in world.live)
    world.run(lambda: world.all_at(before + 3), limit_s=120)
    world.run(world.one_branch, limit_s=10)
    world.check_history()


def test_a_state_that_only_clients_hold_is_found() -> None:
    """Everybody who can lead was restarted; they had passed over who showed the furthest state."""
    calm(trouble(1274, fragments=(5, 1), overlap=True))


@pytest.mark.parametrize("seed", range(30))
def test_nothing_that_goes_wrong_makes_replicas_differ_in_gradient_mode(seed: int) -> None:
    calm(trouble(seed, target_batch=TARGET))
