from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dht.errors import ConfigError, RecordError
from dht.identity import Identity
from dht.proto import records_pb2
from dht.records import (
    MAX_RUN_FILE_BYTES,
    MAX_SEALED_PEER_BYTES,
    MAX_SEALED_RUN_BYTES,
    PeerRecord,
    SignedRun,
    is_run_id,
    manifest_key,
    open_peer_record,
    peer_id_of,
    peers_key,
    seal,
)

NOW = 1_800_000_000.0
MakeRecord = Callable[..., PeerRecord]


def reseal(raw: bytes, identity: Identity, **body_fields: Any) -> bytes:
    """Change fields of a sealed record and sign it properly, as a hostile owner can."""
    sealed = records_pb2.Sealed.FromString(raw)
    body = records_pb2.Peer.FromString(sealed.body)
    for name, value in body_fields.items():
        if isinstance(value, list):
            del getattr(body, name)[:]
            getattr(body, name).extend(value)
        else:
            setattr(body, name, value)
    sealed.body = body.SerializeToString()
    sealed.signature = identity.sign(b"dht/peer/1", sealed.body)
    return sealed.SerializeToString()


def refused(raw: bytes, *, now: float = NOW, run_id: str | None = None) -> str:
    with pytest.raises(RecordError) as caught:
        open_peer_record(raw, now=now, run_id=run_id)
    return caught.value.reason


def test_what_is_sealed_is_what_is_opened(identity: Identity, make_record: MakeRecord) -> None:
    record = make_record(identity, now=NOW)
    raw = seal(record, identity)
    assert open_peer_record(raw, now=NOW, run_id=record.run_id) == record
    assert len(raw) <= MAX_SEALED_PEER_BYTES


def test_a_client_without_addresses_is_a_valid_peer(
    identity: Identity, make_record: MakeRecord
) -> None:
    record = make_record(identity, now=NOW, maddrs=(), hosts=(), port=0, can_reduce=False)
    assert open_peer_record(seal(record, identity), now=NOW) == record


def test_bad_signature_is_refused(identity: Identity, make_record: MakeRecord) -> None:
    sealed = records_pb2.Sealed.FromString(seal(make_record(identity, now=NOW), identity))
    body = records_pb2.Peer.FromString(sealed.body)
    body.samples += 1
    sealed.body = body.SerializeToString()
    assert refused(sealed.SerializeToString()) == "bad signature"
    sealed.signature = b"short"
    assert refused(sealed.SerializeToString()) == "bad signature"


def test_signature_made_for_another_purpose_is_refused(
    identity: Identity, make_record: MakeRecord
) -> None:
    sealed = records_pb2.Sealed.FromString(seal(make_record(identity, now=NOW), identity))
    sealed.signature = identity.sign(b"token", sealed.body)
    assert refused(sealed.SerializeToString()) == "bad signature"


def test_wrong_owner_is_refused(identity: Identity, make_record: MakeRecord) -> None:
    sealed = records_pb2.Sealed.FromString(seal(make_record(identity, now=NOW), identity))
    sealed.owner = Identity.generate().peer_id
    assert refused(sealed.SerializeToString()) == "bad signature"
    sealed.owner = "not a peer id"
    assert refused(sealed.SerializeToString()) == "wrong owner"
    with pytest.raises(RecordError, match="wrong owner"):
        seal(make_record(identity), Identity.generate())


def test_unknown_schema_and_kind_are_refused(identity: Identity, make_record: MakeRecord) -> None:
    sealed = records_pb2.Sealed.FromString(seal(make_record(identity, now=NOW), identity))
    sealed.schema = 2
    assert refused(sealed.SerializeToString()) == "unknown schema"
    sealed.schema = 1
    sealed.kind = records_pb2.KIND_RUN
    assert refused(sealed.SerializeToString()) == "wrong kind"


def test_too_long_is_refused_before_anything_else(
    identity: Identity, make_record: MakeRecord
) -> None:
    raw = seal(make_record(identity, now=NOW), identity)
    hosts = ["h" * 253] * 16
    assert refused(reseal(raw, identity, hosts=hosts)) == "too long"
    with pytest.raises(RecordError, match="too long"):
        seal(make_record(identity, hosts=tuple(hosts)), identity)


def test_expired_is_refused_and_slack_forgives(identity: Identity, make_record: MakeRecord) -> None:
    raw = seal(make_record(identity, now=NOW), identity)
    assert refused(raw, now=NOW + 60) == "expired"
    assert open_peer_record(raw, now=NOW + 60, slack_s=1).expires_at == NOW + 60


def test_expiry_too_far_ahead_is_refused(identity: Identity, make_record: MakeRecord) -> None:
    record = make_record(identity, expires_at=NOW + 3600)
    assert refused(seal(record, identity)) == "expires too far ahead"


def test_record_of_another_run_is_refused(identity: Identity, make_record: MakeRecord) -> None:
    raw = seal(make_record(identity, now=NOW), identity)
    assert refused(raw, run_id="f" * 40) == "wrong run"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "0" * 39),
        ("run_id", "G" * 40),
        ("run_id", "A" * 40),
        ("run_id", "0" * 40 + "\n"),
        ("maddrs", ["/ip4/192.0.2.7/tcp/1"]),
        ("maddrs", ["not an address"]),
        (
            "maddrs",
            ["/ip4/192.0.2.7/tcp/1/p2p/12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"],
        ),
        ("maddrs", ["/ip4/192.0.2.7,/tcp/1"]),
        ("hosts", ["h"] * 17),
        ("hosts", [""]),
        ("hosts", ["a b"]),
        ("hosts", ["h\n"]),
        ("hosts", ["h" * 254]),
        ("port", 65536),
        ("certificate_sha256", b"c" * 31),
        ("upload_bps", math.nan),
        ("upload_bps", math.inf),
        ("download_bps", -1.0),
        ("round", 2**63),
        ("samples", 2**63),
        ("head", b""),
        ("expires_at", math.nan),
        ("expires_at", math.inf),
        ("expires_at", -1.0),
    ],
)
def test_malformed_field_is_refused_even_when_properly_signed(
    identity: Identity, make_record: MakeRecord, field: str, value: Any
) -> None:
    raw = reseal(seal(make_record(identity, now=NOW), identity), identity, **{field: value})
    assert refused(raw) == f"malformed field: {field}"


def test_seal_refuses_what_open_would(identity: Identity, make_record: MakeRecord) -> None:
    with pytest.raises(RecordError, match="port"):
        seal(make_record(identity, port=-1), identity)


@given(st.binary(max_size=4000))
def test_random_bytes_are_a_record_error(raw: bytes) -> None:
    refused(raw)
    with pytest.raises(RecordError):
        SignedRun.from_bytes(raw)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_mangled_record_never_opens_as_something_else(
    identity: Identity, make_record: MakeRecord, position: int, value: int, cut: bool
) -> None:
    record = make_record(identity, now=NOW)
    raw = bytearray(seal(record, identity))
    position %= len(raw)
    if cut:
        del raw[position:]
    else:
        raw[position] = value
    with suppress(RecordError):
        assert open_peer_record(bytes(raw), now=NOW) == record


def test_run_travels_and_keeps_its_id(identity: Identity) -> None:
    run = SignedRun.sign(identity, b"[run]\nname = 'x'\n", NOW)
    again = SignedRun.from_bytes(run.to_bytes())
    assert again == run
    assert again.run_id == run.run_id
    assert is_run_id(run.run_id)
    assert run.creator == identity.peer_id


def test_run_id_commits_to_everything(identity: Identity) -> None:
    run = SignedRun.sign(identity, b"a = 1", NOW)
    others = [
        SignedRun.sign(identity, b"a = 2", NOW),
        SignedRun.sign(identity, b"a = 1", NOW + 1),
        SignedRun.sign(Identity.generate(), b"a = 1", NOW),
        replace(run, signature=bytes(64)),
    ]
    assert len({run.run_id, *(other.run_id for other in others)}) == 5


def test_run_id_is_stable_across_versions() -> None:
    # Join links outlive a release: this id must never change.
    peer_id = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    run = SignedRun(b"a = 1", peer_id, 1_800_000_000.0, bytes(range(64)))
    assert run.run_id == "772e5f2b940dbf8b7c0236154cffab21dcf8c73a"


def test_swapped_run_file_is_refused(identity: Identity) -> None:
    run = SignedRun.sign(identity, b"a = 1", NOW)
    for forged in (
        replace(run, run_file=b"a = 2"),
        replace(run, created_at=NOW + 1),
        replace(run, creator=Identity.generate().peer_id),
    ):
        with pytest.raises(RecordError, match="bad signature"):
            SignedRun.from_bytes(forged.to_bytes())


def test_run_file_bounds(identity: Identity) -> None:
    largest = SignedRun.sign(identity, b"#" * MAX_RUN_FILE_BYTES, NOW)
    assert len(largest.to_bytes()) <= MAX_SEALED_RUN_BYTES
    for bad in (b"", b"#" * (MAX_RUN_FILE_BYTES + 1), b"\xff\xfe"):
        with pytest.raises(ConfigError):
            SignedRun.sign(identity, bad, NOW)
    with pytest.raises(RecordError, match="too long"):
        SignedRun.from_bytes(replace(largest, run_file=b"#" * 40_000).to_bytes())
    with pytest.raises(RecordError, match="run_file"):
        SignedRun.from_bytes(replace(largest, run_file=b"\xff").to_bytes())


def test_addresses_name_their_peer(identity: Identity) -> None:
    peer_id = identity.peer_id
    assert peer_id_of(f"/ip4/192.0.2.7/tcp/1/p2p/{peer_id}") == peer_id
    assert peer_id_of(f"/dns4/host.example/tcp/1/p2p/{peer_id}") == peer_id
    assert peer_id_of(f"/ip6/fe80::1/tcp/1/p2p/{peer_id}") == peer_id
    relayed = f"/ip4/192.0.2.7/tcp/1/p2p/{Identity.generate().peer_id}/p2p-circuit/p2p/{peer_id}"
    assert peer_id_of(relayed) == peer_id
    for bad in ("", "/p2p/" + peer_id, peer_id, f"/ip4/1/p2p/{peer_id[:-1]}", "/x" * 1000):
        assert peer_id_of(bad) is None


def test_keys_differ_by_run_and_kind(run_id: str) -> None:
    keys = {peers_key(run_id), manifest_key(run_id), peers_key("f" * 40), manifest_key("f" * 40)}
    assert len(keys) == 4
