from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.borrowed import DHTID, DHTProtocol, DHTRecord, DictionaryDHTValue, MSGPackSerializer
from dht.identity import Identity
from dht.records import (
    CLOCK_SLACK_S,
    MANIFEST_TTL_S,
    PeerRecord,
    SignedRun,
    manifest_key,
    peers_key,
    seal,
)
from dht.validator import RecordValidator

NOW = 1_800_000_000.0
MakeRecord = Callable[..., PeerRecord]


def hashed(key: str) -> bytes:
    key_id: bytes = DHTID.generate(key).to_bytes()
    return key_id


def stored_peer(record: PeerRecord, identity: Identity) -> DHTRecord:
    return DHTRecord(
        hashed(peers_key(record.run_id)),
        MSGPackSerializer.dumps(record.peer_id),
        MSGPackSerializer.dumps(seal(record, identity)),
        record.expires_at,
    )


def stored_run(run: SignedRun) -> DHTRecord:
    return DHTRecord(
        hashed(manifest_key(run.run_id)),
        DHTProtocol.IS_REGULAR_VALUE,
        MSGPackSerializer.dumps(run.to_bytes()),
        NOW + MANIFEST_TTL_S,
    )


@pytest.fixture
def validator() -> RecordValidator:
    return RecordValidator(clock=lambda: NOW)


@pytest.fixture
def peer(identity: Identity, make_record: MakeRecord) -> DHTRecord:
    return stored_peer(make_record(identity, now=NOW), identity)


@pytest.fixture
def run(identity: Identity) -> DHTRecord:
    return stored_run(SignedRun.sign(identity, b"a = 1", NOW))


def test_valid_records_pass_again_and_again(
    validator: RecordValidator, peer: DHTRecord, run: DHTRecord
) -> None:
    assert all(validator.validate(each) for each in (peer, run, peer, run))
    assert not validator.refused


def refusals(validator: RecordValidator, record: DHTRecord) -> list[str]:
    assert not validator.validate(record)
    return list(validator.refused)


def test_peer_record_under_another_key_is_refused(
    validator: RecordValidator, peer: DHTRecord
) -> None:
    for key in (hashed(peers_key("f" * 40)), b"\0" * 20, b""):
        assert refusals(validator, replace(peer, key=key)) == ["wrong key"]


def test_peer_record_under_another_peers_subkey_is_refused(
    validator: RecordValidator, peer: DHTRecord
) -> None:
    other = MSGPackSerializer.dumps(Identity.generate().peer_id)
    assert refusals(validator, replace(peer, subkey=other)) == ["wrong owner"]


def test_dht_expiry_must_be_the_signed_one(validator: RecordValidator, peer: DHTRecord) -> None:
    for expiry in (peer.expiration_time + 1, math.inf, math.nan, "soon"):
        assert refusals(validator, replace(peer, expiration_time=expiry)) == ["wrong expiry"]


def test_expired_record_is_refused_also_when_it_was_believed_before(
    identity: Identity, make_record: MakeRecord
) -> None:
    now = NOW
    validator = RecordValidator(clock=lambda: now)
    peer = stored_peer(make_record(identity, now=NOW), identity)
    assert validator.validate(peer)
    now = NOW + 60 + CLOCK_SLACK_S / 2  # an honest clock may be late by this much
    assert validator.validate(peer)
    now = NOW + 60 + CLOCK_SLACK_S
    assert refusals(validator, peer) == ["expired"]
    assert not RecordValidator(clock=lambda: now).validate(peer)


def test_forged_record_is_refused(
    validator: RecordValidator, identity: Identity, make_record: MakeRecord
) -> None:
    record = make_record(identity, now=NOW)
    raw = bytearray(seal(record, identity))
    raw[-1] ^= 1
    forged = replace(stored_peer(record, identity), value=MSGPackSerializer.dumps(bytes(raw)))
    assert refusals(validator, forged) == ["bad signature"]


def test_over_long_value_is_refused_unread(validator: RecordValidator, peer: DHTRecord) -> None:
    assert refusals(validator, replace(peer, value=b"\xc6" + bytes(100_000))) == ["too long"]


def test_anything_but_a_byte_string_is_refused_undecoded(
    validator: RecordValidator, peer: DHTRecord
) -> None:
    dictionary = MSGPackSerializer.dumps(DictionaryDHTValue())
    for value in (b"", dictionary, MSGPackSerializer.dumps("text"), MSGPackSerializer.dumps([1])):
        assert refusals(validator, replace(peer, value=value)) == ["malformed"]


def test_truncated_or_trailing_bytes_are_refused(
    validator: RecordValidator, peer: DHTRecord
) -> None:
    assert not validator.validate(replace(peer, value=peer.value[:-1]))
    assert not validator.validate(replace(peer, value=peer.value + b"x"))


def test_run_must_hash_to_its_key(
    validator: RecordValidator, identity: Identity, run: DHTRecord
) -> None:
    other = stored_run(SignedRun.sign(identity, b"a = 2", NOW))
    assert refusals(validator, replace(run, key=other.key)) == ["wrong key"]


def test_run_must_not_stay_for_ever(validator: RecordValidator, run: DHTRecord) -> None:
    for expiry in (NOW + 2 * MANIFEST_TTL_S, NOW - 60, math.inf, math.nan):
        assert refusals(validator, replace(run, expiration_time=expiry)) == ["wrong expiry"]


def test_kinds_do_not_stand_in_for_each_other(
    validator: RecordValidator, peer: DHTRecord, run: DHTRecord
) -> None:
    assert not validator.validate(replace(run, subkey=peer.subkey))
    assert not validator.validate(replace(peer, subkey=run.subkey))
    assert validator.refused.keys() <= {"wrong kind", "too long"}


@given(st.binary(max_size=200), st.binary(max_size=40), st.binary(max_size=4000), st.floats())
def test_random_records_are_refused_not_errors(
    key: bytes, subkey: bytes, value: bytes, expiry: float
) -> None:
    validator = RecordValidator(clock=lambda: NOW)
    assert not validator.validate(DHTRecord(key, subkey, value, expiry))
    assert not validator.validate(
        DHTRecord(key, DHTProtocol.IS_REGULAR_VALUE, MSGPackSerializer.dumps(value), expiry)
    )
    assert validator.refused.total() == 2
