"""The gate in front of the DHT's storage: nothing gets in that is not a valid Shoal record.

The DHT knows a key only by its hash. A record therefore says itself which run it is about, and is
accepted under no other key, under no other owner's sub-key and with no other expiry than the signed
one. The same gate stands in front of what other nodes answer.

Guaranteed: `validate` never raises, whatever the bytes are, and counts every refusal by reason. Not
guaranteed: that the answer of the DHT is complete, or that anybody stores what they should.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from dht.borrowed import DHTID, DHTProtocol, DHTRecord, MSGPackSerializer, RecordValidatorBase
from dht.errors import RecordError
from dht.records import (
    CLOCK_SLACK_S,
    MANIFEST_TTL_S,
    MAX_SEALED_PEER_BYTES,
    MAX_SEALED_RUN_BYTES,
    PEER_TTL_S,
    PeerRecord,
    SignedRun,
    manifest_key,
    open_peer_record,
    peers_key,
)

_MAX_REMEMBERED = 4096
_REGULAR: bytes = DHTProtocol.IS_REGULAR_VALUE  # the sub-key of a value that has none


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Refuses every record that is not a valid Shoal record under its own key.

    Attributes:
        refused: how many records were refused, by reason. The reasons are a fixed set.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.refused: Counter[str] = Counter()
        self._clock = clock
        # Each node on the way answers with the same records again and again; an Ed25519 check
        # takes 0.1 ms in the event loop, remembering that these very bytes passed takes 0.1 us.
        self._verified: OrderedDict[bytes, PeerRecord] = OrderedDict()

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be stored, or believed when somebody answers with it."""
        try:
            if record.subkey == _REGULAR:
                self._check_run(record)
            else:
                self._check_peer(record)
        except RecordError as exc:
            self.refused[exc.reason] += 1
            return False
        # Peers are hostile, and the parsers below are not ours: whatever a crafted value makes
        # them raise is a refusal, because an exception here would answer for the whole request.
        except Exception:
            self.refused["unparsable"] += 1
            return False
        return True

    def _check_peer(self, record: DHTRecord) -> None:
        raw = _unpacked(record.value, MAX_SEALED_PEER_BYTES)
        now = self._clock()
        peer = self._verified.get(raw)
        if peer is None:
            # What expired a moment ago is forgiven here (the storage drops it anyway): a node
            # whose clock is ahead must not refuse an answer of twenty records because of one.
            peer = open_peer_record(raw, now=now, slack_s=CLOCK_SLACK_S)
            self._verified[raw] = peer
            if len(self._verified) > _MAX_REMEMBERED:
                self._verified.popitem(last=False)
        elif not now - CLOCK_SLACK_S < peer.expires_at <= now + PEER_TTL_S + CLOCK_SLACK_S:
            raise RecordError("expired")
        if record.key != _hashed(peers_key(peer.run_id)):
            raise RecordError("wrong key")
        if record.subkey != MSGPackSerializer.dumps(peer.peer_id):
            raise RecordError("wrong owner")
        if record.expiration_time != peer.expires_at:
            raise RecordError("wrong expiry")

    def _check_run(self, record: DHTRecord) -> None:
        run = SignedRun.from_bytes(_unpacked(record.value, MAX_SEALED_RUN_BYTES))
        if record.key != _hashed(manifest_key(run.run_id)):
            raise RecordError("wrong key")
        now = self._clock()
        # Written so that NaN fails it.
        if not now - CLOCK_SLACK_S < record.expiration_time <= now + MANIFEST_TTL_S + CLOCK_SLACK_S:
            raise RecordError("wrong expiry")


def _hashed(key: str) -> bytes:
    hashed: bytes = DHTID.generate(key).to_bytes()
    return hashed


def _unpacked(value: bytes, max_bytes: int) -> bytes:
    # hivemind wraps every value in MessagePack. Only a plain byte string is let into the decoder:
    # extension types would run hivemind's constructors on hostile input.
    if len(value) > max_bytes + 5:
        raise RecordError("too long")
    if value[:1] not in (b"\xc4", b"\xc5", b"\xc6"):
        raise RecordError("malformed")
    raw = MSGPackSerializer.loads(value)
    if not isinstance(raw, bytes):
        raise RecordError("malformed")
    return raw
