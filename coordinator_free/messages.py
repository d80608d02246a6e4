"""What peers of one run say to each other, as values.

Every class here is immutable and bounded: construction refuses what no correct peer says with a
`ValueError`, so a message that exists is well-formed. Whether it is *true* is the machine's
business. `wire` turns them into bytes and back; the field names are those of `rounds.proto`.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator_free.contact import Contact
from dht.records import MAX_COUNT

DIGEST_BYTES = 32
MAX_MEMBERS = 4096
MAX_HOSTS = 16
MAX_HOSTS_CHARACTERS = 512
MAX_CERTIFICATES = 16
MAX_CHUNKS = 2**20
MAX_RUNS = 8192
MAX_ASSISTANTS = 64
WHOLE = 256  # parts of a contribution
MAX_LEAVES = 64  # that one request names
DIGESTS_A_FRAME = 1 << 15  # of leaves: 1 MiB
MAX_SAMPLES = MAX_COUNT  # of a run: a peer's record must be able to say it
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
    """One peer's part in an average; its weight is its share of the samples.

    Attributes:
        omitted: so many `WHOLE`ths of its vector it does not send, as its link is too slow for all
            of it (`planning.sent_by`).
    """

    peer_id: str
    samples: int
    omitted: int = 0

    def __post_init__(self) -> None:
        _peer("contribution", self.peer_id)
        if not 0 <= self.omitted < WHOLE:
            raise ValueError(f"a contribution that omits {self.omitted} parts of {WHOLE}")
        if not 1 <= self.samples <= 2**48:
            raise ValueError(f"{self.samples} samples are outside 1..2^48")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Chunks [start, stop) of the vector."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= MAX_CHUNKS:
            raise ValueError(f"chunks {self.start}..{self.stop} are none or out of range")

    @property
    def middle(self) -> int:
        """The chunk before which half of them come."""
        return (self.start + self.stop) // 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice(Run):
    """Chunks [start, stop) of the vector and the peer that averages them."""

    reducer: str

    def __post_init__(self) -> None:
        Run.__post_init__(self)
        _peer("reducer", self.reducer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept(Run):
    """Chunks [start, stop) that were averaged by the base of a plan, and who has them."""

    holders: tuple[str, ...]

    def __post_init__(self) -> None:
        Run.__post_init__(self)
        _distinct("holders", self.holders)
        if not self.holders:
            raise ValueError("chunks are kept by nobody")


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What somebody believes of a peer's links at most, in bytes per second."""

    peer_id: str
    up_bps: int
    down_bps: int

    def __post_init__(self) -> None:
        _peer("view", self.peer_id)
        _natural("up_bps", self.up_bps)
        _natural("down_bps", self.down_bps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who averages what with whom in one attempt at a round. The leader's word, sent to all.

    A plan with a `base` mends that one: chunks that somebody got from it are `kept` as they are,
    the others are averaged again by new reducers. `contributions` is in roster order, which is the
    order of summation, and stays the same in all mends; `receivers` get the result and may have
    nothing to contribute.

    Attributes:
        attempt: 0, or one more than the base's.
        assistants: peers without a seat that reduce, and how to reach them.
        links: what the leader believes of the members' links, from which it worked out the rest;
            empty where it knows too little.
        expected_s: how long the exchange should take by that; 0 where it is not known.
        chunk_elements: the vector is cut into chunks of so many elements; the last may be shorter.
        exchange_s: deadline of the exchange.
        stall_s: a contributor that is silent for so long is left out of what it did not deliver.
    """

    height: int
    round: int
    ballot: int
    attempt: int
    previous: bytes
    base: bytes
    receivers: tuple[str, ...]
    contributions: tuple[Contribution, ...]
    slices: tuple[Slice, ...]
    kept: tuple[Kept, ...]
    assistants: tuple[Member, ...] = ()
    links: tuple[View, ...] = ()
    expected_s: float = 0.0
    numel: int
    chunk_elements: int
    codec: str
    exchange_s: float
    stall_s: float

    def __post_init__(self) -> None:
        for name in ("height", "round", "ballot", "attempt"):
            _natural(name, getattr(self, name))
        for name in ("previous", "base"):
            _digest(name, getattr(self, name))
        _distinct("receivers", self.receivers)
        _distinct("contributions", tuple(c.peer_id for c in self.contributions))
        if not self.contributions or not self.receivers:
            raise ValueError("a plan needs contributions and receivers")
        mends = self.base != NO_DIGEST
        if mends != (self.attempt > 0) or (self.kept and not mends):
            raise ValueError("only a mend keeps chunks, and it names its base")
        if not mends and not {c.peer_id for c in self.contributions} <= set(self.receivers):
            raise ValueError("a plan contributes for peers that are not among its receivers")
        assistants = tuple(member.peer_id for member in self.assistants)
        _distinct("assistants", assistants)
        if len(assistants) > MAX_ASSISTANTS or not {*assistants}.isdisjoint(self.receivers):
            raise ValueError("a plan with too many assistants, or one that receives")
        if not {piece.reducer for piece in self.slices} <= {*self.receivers, *assistants}:
            raise ValueError("a plan names a reducer that it does not know")
        if not 1 <= self.chunk_elements <= 2**26 or not 1 <= self.numel <= 2**48:
            raise ValueError(f"{self.numel} elements in chunks of {self.chunk_elements}")
        if len(self.slices) + len(self.kept) > MAX_RUNS:
            raise ValueError("a plan in too many pieces")
        at = 0
        for run in sorted((*self.slices, *self.kept), key=lambda run: run.start):
            if run.start != at:
                raise ValueError("the slices of a plan leave a gap or overlap")
            at = run.stop
        if at != self.chunks:
            raise ValueError(f"a plan covers {at} of {self.chunks} chunks")
        if not 1 <= len(self.codec) <= 32:
            raise ValueError("a plan needs a codec")
        _distinct("links", tuple(link.peer_id for link in self.links))
        if not (math.isfinite(self.expected_s) and 0 <= self.expected_s <= 1e9):
            raise ValueError(f"expected_s {self.expected_s} is out of range")
        for name in ("exchange_s", "stall_s"):
            seconds = getattr(self, name)
            if not (math.isfinite(seconds) and 0 < seconds <= 86400):
                raise ValueError(f"{name} {seconds} is out of range")

    @property
    def chunks(self) -> int:
        """How many chunks the vector has."""
        return -(-self.numel // self.chunk_elements)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The value that a majority of the previous roster agrees on at one height.

    `vector_root` names the encoded bytes of the average, `state_root` the parameters and momentum
    that result from applying them: who signs it has computed both. `samples` is what
    `samples_after` says, at most `MAX_SAMPLES`.
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
        if self.samples > MAX_SAMPLES:
            raise ValueError(f"{self.samples} samples are more than a run can have")
        for name in ("previous", "plan", "vector_root", "state_root"):
            _digest(name, getattr(self, name))
        _distinct("contributions", tuple(c.peer_id for c in self.contributions))
        peers = tuple(member.peer_id for member in self.roster)
        _distinct("roster", peers)
        if not peers or list(peers) != sorted(peers):
            raise ValueError("a roster is a sorted list of at least one member")


def samples_after(samples: int, contributions: Iterable[Contribution]) -> int:
    """What a run has been trained on after this average; nobody's claim takes it past the bound."""
    return min(MAX_SAMPLES, samples + sum(c.samples for c in contributions))


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
    """The leader's heartbeat.

    Attributes:
        closing: hand in what there is, without further steps.
        lost: members that the exchange under way goes on without.
        ended: members whose own part in it came to an early end, as they say themselves: they send
            no more contributions. What they reduce, they still reduce.
    """

    closing: bool
    lost: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        _distinct("lost", self.lost)
        _distinct("ended", self.ended)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready(AtBallot):
    """To the leader: my work of this round is done.

    Attributes:
        up_bps: what this member's uplink does, bytes per second; 0 if that is not known yet.
        down_bps: the same of its downlink.
        views: of members that were slower than they claimed (`bandwidth.Trust`).
    """

    head: bytes
    samples: int
    up_bps: int = 0
    down_bps: int = 0
    views: tuple[View, ...] = ()

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        _digest("head", self.head)
        _natural("up_bps", self.up_bps)
        _natural("down_bps", self.down_bps)
        _distinct("views", tuple(view.peer_id for view in self.views))
        if not 0 <= self.samples <= 2**48:
            raise ValueError(f"{self.samples} samples are outside 0..2^48")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(AtBallot):
    """To the leader, in gradient mode: so far my work of this round has so many samples."""

    samples: int

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        if not 0 <= self.samples <= 2**48:
            raise ValueError(f"{self.samples} samples are outside 0..2^48")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare(AtBallot):
    """A new leader asks what may have been accepted before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report(AtBallot):
    """To the leader: the exchange of `plan` ended for me, and with what.

    Attributes:
        lost: peers that broke off or fell silent.
        held: without a complete average: the chunks that are here, in ascending order.
        absent: with one: contributors of the plan that are in none of its chunks.
    """

    plan: bytes
    complete: bool
    vector_root: bytes
    state_root: bytes
    lost: tuple[str, ...]
    held: tuple[Run, ...] = ()
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        AtBallot.__post_init__(self)
        for name in ("plan", "vector_root", "state_root"):
            _digest(name, getattr(self, name))
        _distinct("lost", self.lost)
        _distinct("absent", self.absent)
        if len(self.held) > MAX_RUNS:
            raise ValueError(f"{len(self.held)} runs of chunks are too many")
        if any(a.stop > b.start for a, b in itertools.pairwise(self.held)):
            raise ValueError("runs of chunks that overlap or go back")


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise(AtBallot):
    """Nothing under a lower ballot from me any more; this is what I accepted and hold so far.

    `plan` is the one that I last took part in, `report` how that ended; none if it goes on still.
    """

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
class Assist:
    """I can reduce for you, without a seat: I have no model and no vote.

    Attributes:
        up_bps: what this peer's uplink does, bytes per second; 0 if that is not known yet.
        down_bps: the same of its downlink.
    """

    member: Member
    up_bps: int = 0
    down_bps: int = 0

    def __post_init__(self) -> None:
        _natural("up_bps", self.up_bps)
        _natural("down_bps", self.down_bps)


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
    | Progress
    | Prepare
    | Promise
    | Plan
    | Report
    | Propose
    | Accepted
    | Refused
    | Commit
    | Join
    | Assist
    | Leave
    | Hello
    | Heads
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchState:
    """Send me these leaves of the state with this root; without any, the digests of all leaves."""

    state_root: bytes
    leaves: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _digest("state_root", self.state_root)
        if len(self.leaves) > MAX_LEAVES or any(not 0 <= leaf < 2**32 for leaf in self.leaves):
            raise ValueError(f"a request names 0 to {MAX_LEAVES} leaves")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchOutcome:
    """Send me the encoded average with this root."""

    vector_root: bytes

    def __post_init__(self) -> None:
        _digest("vector_root", self.vector_root)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchChunks(Run):
    """Send me these chunks of what was averaged by this plan, as far as you have them."""

    plan: bytes

    def __post_init__(self) -> None:
        Run.__post_init__(self)
        _digest("plan", self.plan)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchChain:
    """Send me the certificates that prove your newest one from the run's first one on."""


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
