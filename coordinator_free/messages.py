"""What peers of one run say to each other, as values.

Every class here is immutable and bounded: construction refuses what no correct peer says with a
`ValueError`, so a message that exists is well-formed. Whether it is *true* is the machine's
business. `wire` turns them into bytes and back; the field names are those of `rounds.proto`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from coordinator_free.contact import Contact

DIGEST_BYTES = 32
MAX_MEMBERS = 4096
MAX_HOSTS = 16
MAX_HOSTS_CHARACTERS = 512
MAX_CERTIFICATES = 16
U64_MAX = 2**64 - 1
NO_DIGEST = bytes(DIGEST_BYTES)


class Kind(enum.IntEnum):
    """What a decree did."""

    FOUND = 0  # the creator fixed the initial state
    AVERAGE = 1  # a round was averaged and applied
    REGROUP = 2  # only the roster changed
    GATHER = 3  # the same, while the run still waits for enough peers to begin


def _natural(name: str, value: int) -> None:
    if not 0 <= value <= U64_MAX:
        raise ValueError(f"{name} is not an unsigned 64-bit number: {value}")


def _digest(name: str, value: bytes) -> None:
    if len(value) != DIGEST_BYTES:
        raise ValueError(f"{name} has {len(value)} bytes instead of {DIGEST_BYTES}")


def _peer(name: str, value: str) -> None:
    if not 1 <= len(value) <= 128 or not value.isascii():
        raise ValueError(f"{name} is no peer id")


def _distinct(name: str, peers: tuple[str, ...]) -> None:
    if len(peers) > MAX_MEMBERS:
        raise ValueError(f"{name} holds {len(peers)} peers, at most {MAX_MEMBERS} are allowed")
    for peer in peers:
        _peer(name, peer)
    if len(set(peers)) != len(peers):
        raise ValueError(f"{name} names a peer twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One seat of a roster: who it is and where to reach it.

    `session` is drawn at random at every start of a peer, so one that restarts without its memory
    is a new member and can never vote twice in a round.
    """

    peer_id: str
    session: int
    hosts: tuple[str, ...]
    port: int
    certificate_sha256: bytes
    can_reduce: bool

    def __post_init__(self) -> None:
        _peer("member", self.peer_id)
        _natural("session", self.session)
        _digest("certificate_sha256", self.certificate_sha256)
        if not 1 <= len(self.hosts) <= MAX_HOSTS or any(
            not 1 <= len(host) <= 255 for host in self.hosts
        ):
            raise ValueError(f"a member needs 1 to {MAX_HOSTS} host names")
        if sum(map(len, self.hosts)) > MAX_HOSTS_CHARACTERS:
            raise ValueError("a member's host names are over-long")  # they are in every outcome
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is outside 1..65535")

    @property
    def contact(self) -> Contact:
        """How the transport reaches it."""
        return Contact(
            peer_id=self.peer_id,
            hosts=self.hosts,
            port=self.port,
            certificate_sha256=self.certificate_sha256,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Contribution:
    """One peer's part in an average; its weight is its share of the samples."""

    peer_id: str
    samples: int

    def __post_init__(self) -> None:
        _peer("contribution", self.peer_id)
        if not 1 <= self.samples <= 2**48:
            raise ValueError(f"{self.samples} samples are outside 1..2^48")


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Elements [start, stop) of the vector and the peer that averages them."""

    reducer: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        _peer("reducer", self.reducer)
        if not 0 <= self.start < self.stop <= 2**48:
            raise ValueError(f"slice {self.start}..{self.stop} is empty or out of range")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who averages what with whom in one attempt at a round. The leader's word, sent to all.

    `contributions` is in roster order, which is the order of summation; `receivers` get the result
    and may have nothing to contribute.
    """

    height: int
    round: int
    ballot: int
    previous: bytes
    receivers: tuple[str, ...]
    contributions: tuple[Contribution, ...]
    slices: tuple[Slice, ...]
    chunk_elements: int
    codec: str
    exchange_s: float

    def __post_init__(self) -> None:
        for name in ("height", "round", "ballot"):
            _natural(name, getattr(self, name))
        _digest("previous", self.previous)
        _distinct("receivers", self.receivers)
        _distinct("contributions", tuple(c.peer_id for c in self.contributions))
        _distinct("reducers", tuple(s.reducer for s in self.slices))
        if not self.contributions or not self.slices:
            raise ValueError("a plan needs contributions and slices")
        if not set(c.peer_id for c in self.contributions) <= set(self.receivers):
            raise ValueError("a plan contributes for peers that are not among its receivers")
        if not set(s.reducer for s in self.slices) <= set(self.receivers):
            raise ValueError("a plan names a reducer that is not among its receivers")
        if self.slices[0].start != 0 or any(
            left.stop != right.start
            for left, right in zip(self.slices, self.slices[1:], strict=False)
        ):
            raise ValueError("the slices of a plan leave a gap or overlap")
        if not 1 <= self.chunk_elements <= 2**26:
            raise ValueError(f"{self.chunk_elements} elements a chunk are out of range")
        if not 1 <= len(self.codec) <= 32:
            raise ValueError("a plan needs a codec")
        if not (math.isfinite(self.exchange_s) and 0 < self.exchange_s <= 86400):
            raise ValueError(f"exchange_s {self.exchange_s} is out of range")

    @property
    def numel(self) -> int:
        """Length of the averaged vector."""
        return self.slices[-1].stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The value that a majority of the previous roster agrees on at one height.

    `vector_root` names the encoded bytes of the average, `state_root` the parameters and momentum
    that result from applying them: who signs it has computed both.
    """

    height: int
    round: int
    kind: Kind
    previous: bytes
    plan: bytes
    vector_root: bytes
    state_root: bytes
    samples: int
    contributions: tuple[Contribution, ...]
    roster: tuple[Member, ...]

    def __post_init__(self) -> None:
        for name in ("height", "round", "samples"):
            _natural(name, getattr(self, name))
        for name in ("previous", "plan", "vector_root", "state_root"):
            _digest(name, getattr(self, name))
        _distinct("contributions", tuple(c.peer_id for c in self.contributions))
        peers = tuple(member.peer_id for member in self.roster)
        _distinct("roster", peers)
        if not peers or list(peers) != sorted(peers):
            raise ValueError("a roster is a sorted list of at least one member")


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """One peer's signature under an outcome."""

    peer_id: str
    signature: bytes

    def __post_init__(self) -> None:
        _peer("signature", self.peer_id)
        if len(self.signature) != 64:
            raise ValueError("an Ed25519 signature has 64 bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """An outcome with the signatures of those who accepted it under one ballot."""

    outcome: Outcome
    ballot: int
    provisional: bool
    signatures: tuple[Signature, ...]

    def __post_init__(self) -> None:
        _natural("ballot", self.ballot)
        _distinct("signatures", tuple(s.peer_id for s in self.signatures))


@dataclass(frozen=True, kw_only=True, slots=True)
class AtBallot:
    """What every message inside a height begins with."""

    height: int
    ballot: int

    def __post_init__(self) -> None:
        _natural("height", self.height)
        _natural("ballot", self.ballot)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lead(AtBallot):
    """The leader's heartbeat; `closing` asks for what there is, without further steps."""

    closing: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready(AtBallot):
    """To the leader: my work of this round is done."""

    head: bytes
    samples: int

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        _digest("head", self.head)
        if not 0 <= self.samples <= 2**48:
            raise ValueError(f"{self.samples} samples are outside 0..2^48")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare(AtBallot):
    """A new leader asks what may have been accepted before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report(AtBallot):
    """To the leader: the exchange of `plan` ended for me, and with what."""

    plan: bytes
    complete: bool
    vector_root: bytes
    state_root: bytes
    lost: tuple[str, ...]

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        for name in ("plan", "vector_root", "state_root"):
            _digest(name, getattr(self, name))
        _distinct("lost", self.lost)


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise(AtBallot):
    """Nothing under a lower ballot from me any more; this is what I accepted and hold so far."""

    accepted_ballot: int | None
    accepted: Outcome | None
    plan: Plan | None
    report: Report | None

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        if (self.accepted_ballot is None) != (self.accepted is None):
            raise ValueError("an accepted outcome and its ballot come together")
        if self.report is not None and self.plan is None:
            raise ValueError("a report comes with its plan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Propose(AtBallot):
    """The leader asks for acceptance; `holders` have the bytes of the average."""

    outcome: Outcome
    holders: tuple[str, ...]

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        _distinct("holders", self.holders)


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted(AtBallot):
    """My signature under the outcome with this digest."""

    outcome: bytes
    signature: bytes

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        _digest("outcome", self.outcome)
        if len(self.signature) != 64:
            raise ValueError("an Ed25519 signature has 64 bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused(AtBallot):
    """I promised a higher ballot."""

    promised: int

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        _natural("promised", self.promised)


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """The certificate that ends a height."""

    certificate: Certificate
    holders: tuple[str, ...]

    def __post_init__(self) -> None:
        _distinct("holders", self.holders)


@dataclass(frozen=True, kw_only=True, slots=True)
class Join:
    """I hold the state before `height` and want to be in the next roster."""

    member: Member
    height: int

    def __post_init__(self) -> None:
        _natural("height", self.height)


@dataclass(frozen=True, kw_only=True, slots=True)
class Leave:
    """Please go on without me; I answer until you have."""

    height: int

    def __post_init__(self) -> None:
        _natural("height", self.height)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """What was decided from `height` on? Answered with `Heads`; see there."""

    height: int

    def __post_init__(self) -> None:
        _natural("height", self.height)


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Consecutive certificates: from the asked height on, or else the newest two.

    The second kind answers for a height that is no longer kept, or not decided yet.
    """

    certificates: tuple[Certificate, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.certificates) <= MAX_CERTIFICATES:
            raise ValueError(f"{len(self.certificates)} certificates are out of range")
        heights = [certificate.outcome.height for certificate in self.certificates]
        if heights != list(range(heights[0], heights[0] + len(heights))):
            raise ValueError("certificates that do not follow on each other")


Message = (
    Lead
    | Ready
    | Prepare
    | Promise
    | Plan
    | Report
    | Propose
    | Accepted
    | Refused
    | Commit
    | Join
    | Leave
    | Hello
    | Heads
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchState:
    """Send me parameters and momentum with this root."""

    state_root: bytes

    def __post_init__(self) -> None:
        _digest("state_root", self.state_root)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchOutcome:
    """Send me the encoded average with this root."""

    vector_root: bytes

    def __post_init__(self) -> None:
        _digest("vector_root", self.vector_root)


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameHeader:
    """Precedes the payload of every frame; the fields that a stream does not use are empty."""

    plan: bytes = b""
    slice: int = 0
    chunk: int = 0
    contributors: bytes = b""
    codec: str = ""
    elements: int = 0
    part: int = 0

    def __post_init__(self) -> None:
        if len(self.plan) not in (0, DIGEST_BYTES):
            raise ValueError("a frame names a plan by its digest")
        if len(self.contributors) > MAX_MEMBERS // 8 or len(self.codec) > 32:
            raise ValueError("a frame header is over-long")
        if self.elements > 2**26:
            raise ValueError(f"a frame of {self.elements} elements is out of range")
