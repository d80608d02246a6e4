"""When everybody is gone: whether a former member lets the run go on, and who goes first.

A peer that starts again has a new session and no seat. While a member of the newest roster that it
knows lives, it joins as a newcomer does. When none has been reachable for `provisional_s`, it may
revive the run with its own vote (`certificates.revive`), and takes along who else has come back.
Those who see each other take turns, so that usually one branch comes of it; two that do not see
each other make two, which settle by rank when they meet.

Pure functions of a machine and a clock: the shell (`session`) and the simulator share them.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordinator_free import certificates
from coordinator_free.certificates import Signer
from coordinator_free.machine import Machine
from coordinator_free.membership import fitting
from coordinator_free.messages import Certificate

LOOK_S = 2.0  # how often a peer without a seat looks for others in its place
TURN_S = 5.0  # how much longer each waits for those who are to revive the run before it


def is_stranded(machine: Machine) -> bool:
    """Whether this peer has no seat and cannot reach anybody who could give it one."""
    return not machine.is_member and not _leaders(machine).intersection(machine.membership.live())


def _leaders(machine: Machine) -> set[str]:
    """Members other than this peer who could lead: without them the rest waits for ever."""
    roster, me = machine.head.roster, machine.me.peer_id
    able = {member.peer_id for member in roster if member.can_reduce} or set(machine.head.peers)
    return able - {me}


def revival(
    machine: Machine, chain_end: Sequence[Certificate], signer: Signer, waited_s: float, now: float
) -> Certificate | None:
    """The certificate with which this peer lets the run go on; None while it should not.

    Args:
        machine: of a peer that holds the newest state it knows of.
        chain_end: the machine's certificate, after its predecessor if that is known.
        signer: signs for this peer.
        waited_s: how long it has been stranded at this head, looking for others.
        now: the machine's time.
    """
    me, members, patience_s = machine.me, machine.membership, machine.config.provisional_s
    if not is_stranded(machine) or machine.finished or not me.can_reduce:
        return None
    if not certificates.has_vote(chain_end, me.peer_id):
        return None
    if any(members.gone_for(peer, now) < patience_s for peer in _leaders(machine)):
        return None
    roster = fitting((me, *members.joiners(now)))
    back = [member.peer_id for member in roster]
    earlier = [
        peer for peer in back if peer < me.peer_id and certificates.has_vote(chain_end, peer)
    ]
    if waited_s < patience_s + TURN_S * len(earlier):
        return None
    return certificates.revive(
        machine.run_id,
        chain_end,
        roster,
        signer,
        gathering=machine.gathering,
    )
