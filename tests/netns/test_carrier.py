"""Peers on machines that cannot connect to each other: their libp2p daemons carry for them."""

from __future__ import annotations

import sys

import pytest

from tests.faults.harness import Peer, Swarm
from tests.netns.net import Net

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(240)]

PORT = 4601  # of the tensor endpoints


def start(swarm: Swarm, machines: list[tuple[str, str]]) -> list[Peer]:
    """A peer on each machine; the first creates the run."""
    grpc = ("--grpc-port", str(PORT))
    namespace, address = machines[0]
    first = swarm.create("p0", *grpc, host=address, namespace=namespace)
    swarm.until(lambda: bool(first.said("link")), 40)
    peers = [first]
    for number, (namespace, address) in enumerate(machines[1:], 1):
        peers.append(swarm.join(f"p{number}", first.link, *grpc, host=address, namespace=namespace))
    return peers


def test_two_whose_endpoints_cannot_be_reached_from_each_other(swarm: Swarm, net: Net) -> None:
    machines = [net.add() for _ in range(3)]
    net.close_port(1, 2, PORT)
    net.close_port(2, 1, PORT)
    swarm.run_file(layers=1, local_steps=4, start_peers=3)
    peers = start(swarm, machines)
    swarm.go_on(peers, rounds=2, timeout_s=90)
    swarm.check(peers)
    expect(peers, carried_by=[1, 2])


def test_two_who_reach_a_third_alone(swarm: Swarm, net: Net) -> None:
    machines = [net.add() for _ in range(3)]
    net.cut([1], [2])
    swarm.run_file(layers=1, local_steps=4, start_peers=3)
    peers = start(swarm, machines)
    swarm.go_on(peers, rounds=2, timeout_s=90)
    swarm.check(peers)
    expect(peers, carried_by=[1, 2], relay=0)


def test_two_who_lose_sight_of_each_other(swarm: Swarm, net: Net) -> None:
    machines = [net.add() for _ in range(3)]
    swarm.run_file(layers=1, local_steps=4, start_peers=3)
    peers = start(swarm, machines)
    swarm.go_on(peers, rounds=1, timeout_s=90)
    net.cut([1], [2])
    # Connections of both kinds stay open and lead nowhere, and nobody is told. Until that is
    # noticed the rounds may go on without one of the two, which then catches up: one model, and all
    # together in the end, is what is promised. The one whom both see loses nothing.
    swarm.go_on(peers, rounds=2, timeout_s=90)
    swarm.check(peers[:1])
    assert all(peer.alive for peer in peers)
    # The bytes that never came make a link look slow, and who looks slow reduces nothing for some
    # rounds: nobody calls it then.
    swarm.until(lambda: all(carried(peer) for peer in peers[1:]), 60)
    swarm.go_on(peers, rounds=1, timeout_s=90)
    expect(peers, carried_by=[1, 2], relay=0)


def test_two_behind_routers_that_let_nobody_in(swarm: Swarm, net: Net) -> None:
    machines = [net.add(), net.add_behind_router(), net.add_behind_router()]
    swarm.run_file(layers=1, local_steps=4, start_peers=3)
    peers = start(swarm, machines)
    swarm.go_on(peers, rounds=2, timeout_s=90)
    swarm.check(peers)
    expect(peers, carried_by=[0, 1, 2], relay=0)


def carried(peer: Peer) -> list[str]:
    """Its words about calls through its libp2p daemon."""
    return [line for line in peer.errors if "transport.carried" in line]


def expect(peers: list[Peer], *, carried_by: list[int], relay: int | None = None) -> None:
    """These peers called another one through their libp2p daemon, and that one was the relay."""
    for number, peer in enumerate(peers):
        took = [round(event["round_s"], 1) for event in peer.rounds.values()]
        relayed = [line for line in peer.errors if "tunnel.relays" in line]
        sys.stdout.write(f"{peer.name}: carried to {len(carried(peer))}, rounds of {took} s\n")
        assert bool(carried(peer)) == (number in carried_by), "\n".join(peer.errors)
        assert relay is None or bool(relayed) == (number == relay), "\n".join(peer.errors)
