"""What peers say about themselves and about runs: signed, bounded, expiring.

A `PeerRecord` is one peer's view of itself within one run. A `SignedRun` is a run file with its
creator's signature; its hash is the run id, so nobody can swap the configuration under a run.

Guaranteed for whatever `open_peer_record` and `SignedRun.from_bytes` return: the owner signed it
for this purpose, its schema is ours, every field is in bounds, and a peer record is neither expired
nor expires later than a record may. Not guaranteed: that what a peer says about itself is true (its
addresses, its bandwidth, its round), that its addresses can be dialled at all, or that a creator is
anybody in particular.
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, fields

from blake3 import blake3
from google.protobuf.message import DecodeError

from dht.errors import ConfigError, RecordError
from dht.identity import SIGNATURE_BYTES, Identity, public_key, verify
from dht.proto import records_pb2

SCHEMA = 1

PEER_TTL_S = 60.0
"""Lifetime of a peer record: three missed refreshes and the peer is gone."""
PEER_REFRESH_S = 20.0
MANIFEST_TTL_S = 3600.0
CLOCK_SLACK_S = 10.0
"""How far the clocks of two honest peers may be apart. The DHT itself wants 3 s between neighbours;
two neighbours of one bootstrap peer may be twice that apart, the rest is for the network."""

MAX_SEALED_PEER_BYTES = 3072
"""With `dht.node.MAX_PEERS_PER_RUN` records a reply stays below the DHT's 4 MiB message."""
MAX_RUN_FILE_BYTES = 32 * 1024
MAX_SEALED_RUN_BYTES = MAX_RUN_FILE_BYTES + 512

_PEER_DOMAIN = b"dht/peer/1"
_RUN_DOMAIN = b"dht/run/1"
_RUN_ID_DOMAIN = b"shoal run 1\x00"

MAX_ADDRESSES = 16
MAX_COUNT = 2**53
"""Of rounds and samples: exact in a double, so that JSON and dashboards show the same number."""
_MAX_MADDR_CHARACTERS = 256
_RUN_ID = re.compile(r"[0-9a-f]{40}")
_MADDR = re.compile(r"(/[A-Za-z0-9.:_-]{1,128}){2,24}")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRecord:
    """One peer of one run, as it describes itself.

    Attributes:
        peer_id: base58 libp2p id, the owner and signer.
        run_id: 40 lower-case hex digits.
        maddrs: libp2p addresses, each ending in `/p2p/<peer_id>`.
        hosts: names or IP addresses of the tensor endpoint, best first.
        port: of the tensor endpoint; 0: this peer accepts no connections.
        certificate_sha256: 32 bytes, SHA-256 of that endpoint's DER certificate.
        can_reduce: offers to be leader, reducer and donor.
        upload_bps: bytes per second, measured; 0: unknown.
        download_bps: the same, the other way.
        round: how many rounds it has committed.
        samples: how many samples it has trained on in this run.
        head: 32 bytes, its head digest after `round`.
        leaving: it goes on purpose; do not wait for it.
        expires_at: Unix seconds, at most `PEER_TTL_S` ahead. To be accepted in place of an earlier
            record it must be later than that one's, also when leaving.
    """

    peer_id: str
    run_id: str
    maddrs: tuple[str, ...]
    hosts: tuple[str, ...]
    port: int
    certificate_sha256: bytes
    can_reduce: bool
    upload_bps: float
    download_bps: float
    round: int
    samples: int
    head: bytes
    leaving: bool
    expires_at: float


def peers_key(run_id: str) -> str:
    """DHT key of a run's peer records; the sub-key is the peer id."""
    return f"run/{run_id}/peers"


def manifest_key(run_id: str) -> str:
    """DHT key of a run's signed run file."""
    return f"run/{run_id}/manifest"


def is_run_id(text: str) -> bool:
    """Whether `text` has the form of a run id: 40 lower-case hex digits."""
    return _RUN_ID.fullmatch(text) is not None


def peer_id_of(maddr: str) -> str | None:
    """The peer id that a libp2p address such as `/ip4/…/tcp/…/p2p/12D3KooW…` ends with.

    Only the form is looked at: who dials it must expect that nobody can, as its protocols may be
    made up, or newer than this program.

    Returns:
        base58 id, or None where this is no such address (hostile text is fine).
    """
    if len(maddr) > _MAX_MADDR_CHARACTERS or _MADDR.fullmatch(maddr) is None:
        return None
    head, _, peer_id = maddr.rpartition("/p2p/")
    return peer_id if head and public_key(peer_id) is not None else None


def seal(record: PeerRecord, identity: Identity) -> bytes:
    """Sign a record for storing it in the DHT.

    Raises:
        RecordError: a field is out of bounds, or `identity` is not the record's owner.
    """
    if record.peer_id != identity.peer_id:
        raise RecordError("wrong owner")
    _check_peer(record)
    body = records_pb2.Peer(
        **{
            each.name: getattr(record, each.name)
            for each in fields(record)
            if each.name != "peer_id"
        }
    ).SerializeToString(deterministic=True)
    raw = records_pb2.Sealed(
        schema=SCHEMA,
        kind=records_pb2.KIND_PEER,
        owner=record.peer_id,
        body=body,
        signature=identity.sign(_PEER_DOMAIN, body),
    ).SerializeToString(deterministic=True)
    if len(raw) > MAX_SEALED_PEER_BYTES:
        raise RecordError("too long")
    return raw


def open_peer_record(
    raw: bytes, *, now: float, run_id: str | None = None, slack_s: float = 0.0
) -> PeerRecord:
    """Check a sealed peer record, whoever handed it over, and return what it says.

    Args:
        raw: hostile bytes.
        now: Unix seconds.
        run_id: the run it must belong to; None: any.
        slack_s: accept records that expired up to this long ago, for clocks that disagree.

    Raises:
        RecordError: with `.reason`, one of a fixed set: "too long", "malformed", "unknown schema",
            "wrong kind", "wrong owner", "bad signature", "malformed field: ...", "wrong run",
            "expired", "expires too far ahead".
    """
    sealed = _parse_sealed(raw, records_pb2.KIND_PEER, MAX_SEALED_PEER_BYTES)
    if not verify(sealed.owner, _PEER_DOMAIN, sealed.body, sealed.signature):
        raise RecordError("bad signature")
    body = records_pb2.Peer()
    try:
        body.ParseFromString(sealed.body)
    except DecodeError as exc:
        raise RecordError("malformed") from exc
    record = PeerRecord(
        peer_id=sealed.owner,
        run_id=body.run_id,
        maddrs=tuple(body.maddrs),
        hosts=tuple(body.hosts),
        port=body.port,
        certificate_sha256=body.certificate_sha256,
        can_reduce=body.can_reduce,
        upload_bps=body.upload_bps,
        download_bps=body.download_bps,
        round=body.round,
        samples=body.samples,
        head=body.head,
        leaving=body.leaving,
        expires_at=body.expires_at,
    )
    _check_peer(record)
    if run_id is not None and record.run_id != run_id:
        raise RecordError("wrong run")
    if record.expires_at <= now - slack_s:
        raise RecordError("expired")
    if record.expires_at > now + PEER_TTL_S + CLOCK_SLACK_S:
        raise RecordError("expires too far ahead")
    return record


@dataclass(frozen=True, slots=True)
class SignedRun:
    """A run file with its creator's signature; obtained from `sign` or `from_bytes`.

    Attributes:
        run_file: UTF-8 TOML, at most 32 KiB. Not parsed here: who uses it validates it.
        creator: base58 libp2p id of who signed it.
        created_at: Unix seconds, by the creator's clock.
        signature: 64 bytes.
    """

    run_file: bytes
    creator: str
    created_at: float
    signature: bytes

    @classmethod
    def sign(cls, identity: Identity, run_file: bytes, created_at: float) -> SignedRun:
        """Sign a run file.

        Raises:
            ConfigError: the run file is empty, too long or not UTF-8.
        """
        if not run_file or len(run_file) > MAX_RUN_FILE_BYTES:
            raise ConfigError(
                f"the run file has {len(run_file)} bytes; 1 to {MAX_RUN_FILE_BYTES} are possible"
            )
        try:
            run_file.decode()
        except UnicodeDecodeError as exc:
            raise ConfigError("the run file is not UTF-8 text: save it as UTF-8") from exc
        statement = _run_statement(run_file, identity.peer_id, created_at)
        run = cls(run_file, identity.peer_id, created_at, identity.sign(_RUN_DOMAIN, statement))
        run._check()
        return run

    @property
    def run_id(self) -> str:
        """40 hex digits: BLAKE3 over the canonical form (records.proto), its first 20 bytes."""
        statement = _run_statement(self.run_file, self.creator, self.created_at)
        return blake3(_RUN_ID_DOMAIN + statement + self.signature).hexdigest(length=20)

    def to_bytes(self) -> bytes:
        """The form that travels and is stored in the DHT; at most `MAX_SEALED_RUN_BYTES`."""
        body = records_pb2.Run(run_file=self.run_file, created_at=self.created_at)
        return records_pb2.Sealed(
            schema=SCHEMA,
            kind=records_pb2.KIND_RUN,
            owner=self.creator,
            body=body.SerializeToString(deterministic=True),
            signature=self.signature,
        ).SerializeToString(deterministic=True)

    @classmethod
    def from_bytes(cls, raw: bytes) -> SignedRun:
        """Check a signed run, whoever handed it over.

        Raises:
            RecordError: as for `open_peer_record`.
        """
        sealed = _parse_sealed(raw, records_pb2.KIND_RUN, MAX_SEALED_RUN_BYTES)
        body = records_pb2.Run()
        try:
            body.ParseFromString(sealed.body)
        except DecodeError as exc:
            raise RecordError("malformed") from exc
        run = cls(body.run_file, sealed.owner, body.created_at, sealed.signature)
        run._check()
        return run

    def _check(self) -> None:
        if not 0 < len(self.run_file) <= MAX_RUN_FILE_BYTES:
            raise RecordError("malformed field: run_file")
        try:
            self.run_file.decode()
        except UnicodeDecodeError as exc:
            raise RecordError("malformed field: run_file") from exc
        _require(_is_time(self.created_at), "created_at")
        statement = _run_statement(self.run_file, self.creator, self.created_at)
        if not verify(self.creator, _RUN_DOMAIN, statement, self.signature):
            raise RecordError("bad signature")


def _run_statement(run_file: bytes, creator: str, created_at: float) -> bytes:
    # Written out by hand rather than as protobuf, whose bytes are not canonical across languages.
    owner = creator.encode()
    return b"".join(
        (
            struct.pack(">I", len(run_file)),
            run_file,
            struct.pack(">H", len(owner)),
            owner,
            struct.pack(">d", created_at),
        )
    )


def _parse_sealed(raw: bytes, kind: records_pb2.Kind, max_bytes: int) -> records_pb2.Sealed:
    # The length comes first: nothing that is too long is ever parsed or hashed.
    if len(raw) > max_bytes:
        raise RecordError("too long")
    sealed = records_pb2.Sealed()
    try:
        sealed.ParseFromString(raw)
    except DecodeError as exc:
        raise RecordError("malformed") from exc
    if sealed.schema != SCHEMA:
        raise RecordError("unknown schema")
    if sealed.kind != kind:
        raise RecordError("wrong kind")
    if public_key(sealed.owner) is None:
        raise RecordError("wrong owner")
    if len(sealed.signature) != SIGNATURE_BYTES:
        raise RecordError("bad signature")
    return sealed


def _check_peer(record: PeerRecord) -> None:
    _require(is_run_id(record.run_id), "run_id")
    _require(len(record.maddrs) <= MAX_ADDRESSES, "maddrs")
    for maddr in record.maddrs:
        _require(peer_id_of(maddr) == record.peer_id, "maddrs")
    _require(len(record.hosts) <= MAX_ADDRESSES, "hosts")
    for host in record.hosts:
        _require(_HOST.fullmatch(host) is not None, "hosts")
    _require(0 <= record.port <= 65535, "port")
    _require(len(record.certificate_sha256) == 32, "certificate_sha256")
    _require(_is_amount(record.upload_bps), "upload_bps")
    _require(_is_amount(record.download_bps), "download_bps")
    _require(0 <= record.round <= MAX_COUNT, "round")
    _require(0 <= record.samples <= MAX_COUNT, "samples")
    _require(len(record.head) == 32, "head")
    _require(_is_time(record.expires_at), "expires_at")


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise RecordError(f"malformed field: {field}")


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and 0 <= value <= 1e15


def _is_time(value: float) -> bool:
    return math.isfinite(value) and 0 < value <= 1e11
