"""The proof that a certificate belongs to a run: a short chain from the run's first one to it.

    FOUND --> c1 --------> c7 --------> c41 --> c42
          direct      skip         skip     direct

The first link is signed by the run's creator. A link a -> b is good if

- *direct*: b follows a (next height, naming a's head), its round, samples and state add up
  (`certificates.adds_up`), and a's roster decided it, as it decides anything
  (`certificates.verify`: a majority of it, or some of it provisionally); or
- *skip*: b is later, not provisional, and more than half of a's roster signed it.

The last link is always direct, so the newest certificate is checked as every member checks it.

Why a skip is as good as the links it stands for: whoever can forge a skip from a holds the keys of
more than half of a's roster, and with those could as well have signed a false certificate that
directly follows a. A skip trusts the same peers as a direct link, about something they only sign
having followed the run up to there.

What the chain does not protect from: keys that were good once. More than half of an old roster,
stolen, bought or in league long after that roster left, can sign another history from there on,
with or without skips; and a provisional link needs one member of a roster (the others were gone,
it says). Nothing in a chain tells such a history from the true one; peers settle on the one with
more samples. It does stop everybody who was never in a roster: without the creator's signature at
the beginning and those of members on the way, no chain is believed.

Guarantees: a `Chain` was verified when it came from bytes, and is extended only by certificates
that directly follow; pruned greedily, it has about one link for every time that half of the roster
changed. No I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from coordinator_free import certificates, wire
from coordinator_free.certificates import Verify
from coordinator_free.messages import Certificate, Kind

MAX_LINKS = 4096
MAX_CHAIN_BYTES = 32 << 20
_MAGIC = b"shoal chain v1\0"
_LENGTH = struct.Struct(">I")


class Chain:
    """Certificates, each of which proves the next one; the first is the run's, the last the newest.

    Immutable. Make one with `begin` (by the creator), `verified` or `from_bytes`, and longer ones
    with `then`.

    Attributes:
        links: at least one certificate, FOUND first.
    """

    __slots__ = ("links",)

    def __init__(self, links: tuple[Certificate, ...]) -> None:
        assert links
        assert links[0].outcome.kind == Kind.FOUND
        self.links = links

    @classmethod
    def begin(cls, first: Certificate) -> Chain:
        """The chain of a run that was just founded here."""
        return cls((first,))

    @classmethod
    def verified(
        cls, links: Iterable[Certificate], run_id: str, creator: str, check: Verify
    ) -> Chain:
        """A chain from somebody else.

        Reads no further than the first link that is wrong, so that a liar costs no more than the
        true chain, which its lie must begin with, and the signatures of one certificate.

        Args:
            links: hostile, in order.
            run_id: of the run that it must belong to.
            creator: who must have signed the first one.
            check: verifies one signature.

        Raises:
            ValueError: a link proves nothing, or there are too many of them.
        """
        good: list[Certificate] = []
        direct = True
        for certificate in links:
            if len(good) >= MAX_LINKS:
                raise ValueError(f"a chain of more than {MAX_LINKS} links")
            if not good:
                proven = certificate.outcome.kind == Kind.FOUND and certificates.verify(
                    certificate, run_id, (creator,), check
                )
            else:
                direct = follows(good[-1], certificate, run_id, check)
                proven = direct or _skips(good[-1], certificate, run_id, check)
            if not proven:
                raise ValueError(f"link {len(good)} of a chain is not proven by the one before it")
            good.append(certificate)
        if not good:
            raise ValueError("a chain without links")
        if not direct:
            raise ValueError("a chain whose last link is not a direct one")
        return cls(tuple(good))

    @property
    def newest(self) -> Certificate:
        """What this chain proves."""
        return self.links[-1]

    def then(self, certificate: Certificate) -> Chain:
        """The chain to a certificate that directly follows and was verified by the caller.

        Links that a skip makes superfluous are dropped: the one before the newest is reached from
        as far back as possible.

        Raises:
            ValueError: it does not follow on the newest one.
        """
        if not _is_next(self.newest, certificate):
            raise ValueError("a certificate that does not follow on the chain")
        last = len(self.links) - 1
        keep = next((at for at in range(last) if _may_skip(self.links[at], self.newest)), last - 1)
        return Chain((*self.links[: keep + 1], self.newest, certificate))

    def revived(self, certificate: Certificate) -> Chain:
        """The chain after a decree of those who came back: the next one, or the newest anew.

        Raises:
            ValueError: it does not follow on the newest one or on the one before that.
        """
        if certificate.outcome.height > self.newest.outcome.height:
            return self.then(certificate)
        if len(self.links) < 2 or not _is_next(self.links[-2], certificate):
            raise ValueError("a certificate that does not follow on the chain")
        return Chain((*self.links[:-1], certificate))

    def to_bytes(self) -> bytes:
        """For a file; `from_bytes` reads it back."""
        parts = [_MAGIC]
        for certificate in self.links:
            raw = wire.encode_certificate(certificate)
            parts += [_LENGTH.pack(len(raw)), raw]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, raw: bytes, run_id: str, creator: str, check: Verify) -> Chain:
        """Read and verify a chain; arguments and cost as `verified`.

        Raises:
            ValueError: not a chain of this run, or over-long.
        """
        if len(raw) > MAX_CHAIN_BYTES:
            raise ValueError(f"a chain of {len(raw)} bytes is over the limit of {MAX_CHAIN_BYTES}")
        if not raw.startswith(_MAGIC):
            raise ValueError("not a chain")
        return cls.verified(_read(raw), run_id, creator, check)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.links == other.links

    def __hash__(self) -> int:
        return hash(self.links)

    def __len__(self) -> int:
        return len(self.links)


def follows(before: Certificate, after: Certificate, run_id: str, check: Verify) -> bool:
    """Whether `after` is the very next decree and the roster before it decided it."""
    voters = tuple(member.peer_id for member in before.outcome.roster)
    return _is_next(before, after) and certificates.verify(after, run_id, voters, check)


def _skips(before: Certificate, after: Certificate, run_id: str, check: Verify) -> bool:
    """Whether more than half of the roster of `before` vouches for `after`."""
    if not _may_skip(before, after):
        return False
    roster = {member.peer_id for member in before.outcome.roster}
    text = certificates.signed_text(run_id, after.ballot, after.outcome)
    # The roster's alone: signatures of others prove nothing here, and cost time.
    return all(
        check(signature.peer_id, certificates.ACCEPT_DOMAIN, text, signature.signature)
        for signature in after.signatures
        if signature.peer_id in roster
    )


def _is_next(before: Certificate, after: Certificate) -> bool:
    return (
        after.outcome.height == before.outcome.height + 1
        and after.outcome.previous == wire.head_digest(before.outcome)
        and certificates.adds_up(before.outcome, after.outcome)
    )


def _may_skip(before: Certificate, after: Certificate) -> bool:
    """Everything about a skip but the signatures themselves."""
    roster = {member.peer_id for member in before.outcome.roster}
    signers = {signature.peer_id for signature in after.signatures}
    old, new = before.outcome, after.outcome
    return (
        new.kind != Kind.FOUND
        and new.height > old.height
        and new.round >= old.round
        and new.samples >= old.samples
        and not after.provisional
        and len(signers & roster) > len(roster) // 2
    )


def _read(raw: bytes) -> Iterable[Certificate]:
    at = len(_MAGIC)
    while at < len(raw):
        if at + _LENGTH.size > len(raw):
            raise ValueError("a chain is cut off")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if at + length > len(raw):
            raise ValueError("a chain is cut off")
        yield wire.decode_certificate(raw[at : at + length])
        at += length
