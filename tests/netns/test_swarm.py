"""Real peers on machines of their own: cut off from each other, losing packets, on a thin line."""

from __future__ import annotations

import sys
import time

import pytest

from tests.faults.harness import Peer, Swarm
from tests.netns.net import Net

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(240)]

PARTITION_S = 15.0


def start(swarm: Swarm, net: Net, count: int) -> list[Peer]:
    """`count` peers, each on a machine of its own, that have committed a round together."""
    namespace, address = net.add()
    first = swarm.create(host=address, namespace=namespace)
    swarm.until(lambda: bool(first.said("link")), 40)
    peers = [first]
    for number in range(1, count):
        namespace, address = net.add()
        peers.append(swarm.join(f"p{number}", first.link, host=address, namespace=namespace))
    swarm.go_on(peers, rounds=1, timeout_s=60)
    return peers


def test_a_partition_leaves_the_majority_at_work_and_heals(swarm: Swarm, net: Net) -> None:
    swarm.run_file(layers=1, local_steps=4, start_peers=5)
    peers = start(swarm, net, 5)
    minority, majority = peers[:2], peers[2:]
    net.cut([0, 1], [2, 3, 4])
    cut_at = time.monotonic()
    swarm.go_on(majority, rounds=2, timeout_s=60)
    swarm.until(lambda: time.monotonic() - cut_at > PARTITION_S, PARTITION_S + 5)
    healed_at = time.monotonic()
    net.heal()
    swarm.go_on(peers, rounds=2, timeout_s=90)
    # The few may have gone on alone, provisionally; what they have now is what the many decided.
    for number in {n for peer in majority for n in peer.rounds}:
        reported = {p.rounds[number]["digest"] for p in majority if number in p.rounds}
        assert len(reported) == 1, swarm.report()
    together = [n for n, event in majority[0].rounds.items() if event["members"] == 5]
    after = [n for n in together if majority[0].rounds[n]["at"] > healed_at]
    for number in range(min(after), max(after) + 1):
        reported = {peer.rounds[number]["digest"] for peer in peers if number in peer.rounds}
        assert len(reported) == 1, swarm.report()
    assert all(peer.alive for peer in minority)
    apart_s = majority[0].rounds[min(after)]["at"] - healed_at
    sys.stdout.write(f"all five averaged together {apart_s:.1f} s after the link was mended\n")


def test_rounds_commit_while_packets_are_lost(swarm: Swarm, net: Net) -> None:
    swarm.run_file(layers=1, local_steps=4, start_peers=3)
    peers = start(swarm, net, 3)
    for number, share in ((0, 0.05), (1, 0.05), (2, 0.1)):
        net.lose(number, share)
    start_round = max(peer.last_round for peer in peers)
    swarm.until(lambda: min(peer.last_round for peer in peers) >= start_round + 3, 90)
    net.heal()
    swarm.go_on(peers, rounds=1, timeout_s=60)
    swarm.check([])


def test_a_thin_uplink_delays_nobody_beyond_the_exchange(swarm: Swarm, net: Net) -> None:
    exchange_s, grace_s = 6, 3
    swarm.run_file(layers=1, local_steps=4, start_peers=4, exchange_s=exchange_s, grace_s=grace_s)
    peers = start(swarm, net, 4)
    # A contribution of 3.7 MB would take this uplink a minute, and its slice for the others more.
    net.throttle(3, 500)
    others = peers[:3]
    before = max(peer.last_round for peer in others)
    swarm.until(lambda: min(peer.last_round for peer in others) >= before + 3, 120)
    swarm.check(others)
    for peer in others:
        waits = [peer.rounds[n]["round_s"] for n in peer.rounds if n > before + 1]
        # One round may fail for the slow reducer before the others know; then they do.
        assert sorted(waits)[len(waits) // 2] < exchange_s + grace_s + 5, swarm.report()
