"""What a swarm has decided, and how a stranger checks it.

A certificate holds an outcome and the signatures of those members of the *previous* roster who
accepted it. `Head` is what follows from the newest certificate. `verify` guarantees that more than
half of the given roster signed; for a provisional certificate (more than half was gone) it only
guarantees that members of that roster did, so two provisional branches can both be valid: the one
with more samples wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from coordinator_free import wire
from coordinator_free.messages import (
    NO_DIGEST,
    Certificate,
    Kind,
    Member,
    Outcome,
    Signature,
    samples_after,
)

ACCEPT_DOMAIN = b"shoal accept v1"

Verify = Callable[[str, bytes, bytes, bytes], bool]
"""(peer id, domain, message, signature) -> whether that peer signed that message."""


class Signer(Protocol):
    """The part of an identity that the machine needs."""

    @property
    def peer_id(self) -> str:
        """Who signs."""
        ...

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """64 bytes of Ed25519 over a domain-separated message."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Where a replica stands: what the next height builds on.

    Attributes:
        height: decrees so far.
        round: averaged rounds so far, which is the index of the round under way.
        digest: the hash chain over all outcomes.
        state_root: of parameters and momentum.
        samples: trained on by the swarm so far.
        roster: who votes on the next decree, sorted by peer id.
        kind: what the newest decree did.
    """

    height: int
    round: int
    digest: bytes
    state_root: bytes
    samples: int
    roster: tuple[Member, ...]
    kind: Kind

    @classmethod
    def after(cls, certificate: Certificate) -> Head:
        """The head that this certificate leads to."""
        outcome = certificate.outcome
        return cls(
            height=outcome.height + 1,
            round=outcome.round,
            digest=wire.head_digest(outcome),
            state_root=outcome.state_root,
            samples=outcome.samples,
            roster=outcome.roster,
            kind=outcome.kind,
        )

    @property
    def peers(self) -> tuple[str, ...]:
        """Peer ids of the roster, in its order."""
        return tuple(member.peer_id for member in self.roster)

    @property
    def majority(self) -> int:
        """How many of the roster must accept."""
        return len(self.roster) // 2 + 1

    @property
    def rank(self) -> tuple[int, int, bytes]:
        """Of two branches the one with the higher rank wins."""
        return (self.samples, self.height, self.digest)


def signed_text(run_id: str, ballot: int, outcome: Outcome) -> bytes:
    """What an acceptance signs: the run, the ballot, and the outcome with its height."""
    return b"\0".join((run_id.encode(), str(ballot).encode(), wire.outcome_digest(outcome)))


def found(run_id: str, founder: Member, signer: Signer, state_root: bytes) -> Certificate:
    """The first certificate of a run: its creator fixes the initial state and is the roster."""
    outcome = Outcome(
        height=0,
        round=0,
        kind=Kind.FOUND,
        previous=NO_DIGEST,
        plan=NO_DIGEST,
        vector_root=NO_DIGEST,
        state_root=state_root,
        samples=0,
        contributions=(),
        roster=(founder,),
    )
    signature = signer.sign(ACCEPT_DOMAIN, signed_text(run_id, 0, outcome))
    return Certificate(
        outcome=outcome,
        ballot=0,
        provisional=False,
        signatures=(Signature(peer_id=founder.peer_id, signature=signature),),
    )


def has_vote(chain_end: Sequence[Certificate], peer_id: str) -> bool:
    """Whether this peer, as any of its sessions, may revive the run after these decrees.

    Args:
        chain_end: the newest certificate, after its predecessor if that is known.
        peer_id: of the peer.
    """
    return any(
        member.peer_id == peer_id
        for certificate in chain_end[-2:]
        for member in certificate.outcome.roster
    )


def revive(
    run_id: str,
    chain_end: Sequence[Certificate],
    roster: tuple[Member, ...],
    signer: Signer,
    *,
    gathering: bool,
) -> Certificate:
    """Let a run go on whose whole roster is gone: one former member decides a new one.

    Who is in the newest roster decides a further height. Who was let go by the newest decree, and
    has its state all the same, decides that very decree anew, with another roster. Provisional:
    others may do so as well, and of two branches the one with the higher rank wins.

    Args:
        run_id: of the run.
        chain_end: the newest certificate, after its predecessor if that is known.
        roster: who goes on, sorted by peer id.
        signer: the former member.
        gathering: whether the run still waits for its `start_peers`.

    Raises:
        ValueError: the signer was in neither roster.
    """
    newest = chain_end[-1].outcome
    if has_vote(chain_end[-1:], signer.peer_id):
        head = Head.after(chain_end[-1])
        outcome = Outcome(
            height=head.height,
            round=head.round,
            kind=Kind.GATHER if gathering else Kind.REGROUP,
            previous=head.digest,
            plan=NO_DIGEST,
            vector_root=NO_DIGEST,
            state_root=head.state_root,
            samples=head.samples,
            contributions=(),
            roster=roster,
        )
    elif has_vote(chain_end, signer.peer_id):
        outcome = replace(newest, roster=roster)
    else:
        raise ValueError(f"{signer.peer_id} has no vote in this run")
    signature = signer.sign(ACCEPT_DOMAIN, signed_text(run_id, 0, outcome))
    return Certificate(
        outcome=outcome,
        ballot=0,
        provisional=True,
        signatures=(Signature(peer_id=signer.peer_id, signature=signature),),
    )


def adds_up(before: Head | Outcome, after: Outcome) -> bool:
    """Whether round, samples and state of an outcome go on from those of the decree before it.

    What everybody can check who never saw the tensors. Samples decide between branches, and a
    provisional certificate needs one signer: it can claim no more than its whole roster could do.

    Args:
        before: the decree that `after` directly follows, or where it led to.
        after: checked for nothing else.
    """
    if after.kind == Kind.AVERAGE:
        seats = {member.peer_id for member in before.roster}
        return (
            after.round == before.round + 1
            and after.samples == samples_after(before.samples, after.contributions)
            and seats.issuperset(contribution.peer_id for contribution in after.contributions)
        )
    same = (before.round, before.samples, before.state_root)
    return after.kind != Kind.FOUND and (after.round, after.samples, after.state_root) == same


def verify(certificate: Certificate, run_id: str, voters: tuple[str, ...], check: Verify) -> bool:
    """Whether these voters decided this.

    Args:
        certificate: from anywhere.
        run_id: of the run it must belong to.
        voters: peer ids of the roster before it; for the first certificate the run's creator.
        check: verifies one signature.

    Returns:
        True if all signatures are valid and by voters, and there are enough of them.
    """
    signers = {signature.peer_id for signature in certificate.signatures}
    if not signers or not signers <= set(voters):
        return False
    if len(signers) <= len(voters) // 2 and not certificate.provisional:
        return False
    text = signed_text(run_id, certificate.ballot, certificate.outcome)
    return all(
        check(signature.peer_id, ACCEPT_DOMAIN, text, signature.signature)
        for signature in certificate.signatures
    )
