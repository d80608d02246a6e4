"""Faults at named points of a round, one after the other, between real peers on loopback.

What is asserted is the outcome: survivors lose no round, everybody who reports a round reports one
digest, and who was only frozen comes back by itself. How long it took is printed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import pytest

from tests.faults.harness import Peer, Swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RECOVERS_S = 60.0


def gone(swarm: Swarm, peer: Peer) -> None:
    """Wait until a peer's failpoint has killed or stopped it."""
    swarm.until(lambda: peer.frozen or not peer.alive, RECOVERS_S)
    assert peer.frozen or peer.process.returncode == -signal.SIGKILL


def see_through(swarm: Swarm, peers: Sequence[Peer], victims: Sequence[Peer]) -> None:
    """All victims fail; the others go on; the frozen come back; everything agrees."""
    untouched = [peer for peer in peers if peer not in victims]
    for victim in victims:
        gone(swarm, victim)
    swarm.go_on(untouched, rounds=2, timeout_s=RECOVERS_S)
    frozen = [peer for peer in victims if peer.alive]
    for peer in frozen:
        peer.thaw()
    swarm.go_on([*untouched, *frozen], rounds=2, timeout_s=RECOVERS_S)
    swarm.check(untouched)
    longest = max(swarm.longest_round_s(peer) for peer in untouched)
    sys.stdout.write(f"longest wait for a round among the survivors: {longest:.1f} s\n")


# Peers' own passes: a peer of five opens four streams and serves four readers a round, reduces
# once, and leads about every fifth round. The three faults of a swarm fall into different rounds,
# and no two of its victims are needed for a majority.
SWARMS = [
    ("send.half@6=kill", "leader.commit.before@1=stop", "reduce.half@5=stop"),
    ("ready.before@3=stop", "leader.commit.after@1=kill", "results.half@18=kill"),
]
if os.environ.get("FAULTS") == "all":  # each of them the other way round: a minute more each
    SWARMS += [
        ("send.half@6=stop", "leader.commit.before@1=kill", "reduce.half@5=kill"),
        ("ready.before@3=kill", "leader.commit.after@1=stop", "results.half@18=stop"),
    ]


@pytest.mark.parametrize(("early", "leading", "late"), SWARMS)
def test_rounds_go_on_whoever_fails_where(
    swarm: Swarm, early: str, leading: str, late: str
) -> None:
    swarm.run_file()
    peers = swarm.start(5, {1: early, 2: leading, 3: late})
    see_through(swarm, peers, peers[1:4])


def test_a_leader_and_a_reducer_fail_together_among_broken_and_slow_streams(swarm: Swarm) -> None:
    swarm.run_file()
    broken = "send.half@6=disconnect,results.half@11=disconnect"
    slow = "send.begin@7=sleep:1.5,reduce.begin@3=sleep:1.5"
    peers = swarm.start(5, {1: "leader.plan.after@1=kill", 3: broken, 4: slow})
    # Every peer reduces: the leader is one reducer that fails in this exchange, and two another.
    gone(swarm, peers[1])
    peers[2].kill()
    survivors = [peers[0], *peers[3:]]
    swarm.go_on(survivors, rounds=4, timeout_s=RECOVERS_S)
    swarm.check(survivors)


def test_half_of_eight_are_killed_within_a_second(swarm: Swarm) -> None:
    swarm.run_file(start_peers=8, layers=1)
    peers = swarm.start(8, {})
    swarm.go_on(peers, rounds=1, timeout_s=RECOVERS_S)
    for peer in peers[4:]:
        peer.kill()
    swarm.go_on(peers[:4], rounds=2, timeout_s=RECOVERS_S)
    swarm.check(peers[:4])
    longest = max(swarm.longest_round_s(peer) for peer in peers[:4])
    sys.stdout.write(f"training again after {longest:.1f} s at most\n")


def test_a_donor_that_breaks_off_in_mid_transfer_is_asked_again(swarm: Swarm) -> None:
    swarm.run_file(start_peers=1)
    first = swarm.create(failpoints="donor.half@1=disconnect")
    swarm.until(lambda: bool(first.said("link")), RECOVERS_S)
    second = swarm.join("p1", first.link)
    swarm.go_on([first, second], rounds=2, timeout_s=RECOVERS_S)
    assert any("donor.half" in line for peer in (first, second) for line in peer.errors)
    swarm.check([first])
