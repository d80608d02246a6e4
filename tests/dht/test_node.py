from __future__ import annotations

import time

import pytest

from dht.borrowed import DHTID, DHTNode, DictionaryDHTValue, ValueWithExpiration
from dht.node import MAX_PEERS_PER_RUN, BoundedStorage, Node

KEY = DHTID.generate("key")


@pytest.fixture
def storage() -> BoundedStorage:
    return BoundedStorage()


def test_only_a_later_record_replaces(storage: BoundedStorage) -> None:
    now = time.time()
    assert storage.store_subkey(KEY, "peer", b"old", now + 30)
    assert storage.store_subkey(KEY, "peer", b"new", now + 60)
    assert not storage.store_subkey(KEY, "peer", b"old", now + 30)
    assert not storage.store_subkey(KEY, "peer", b"again", now + 60)
    assert storage.get(KEY).value.get("peer") == ValueWithExpiration(b"new", now + 60)


def test_replayed_older_record_does_not_make_the_newer_expire_early(
    storage: BoundedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    storage.store_subkey(KEY, "peer", b"old", now + 30)
    storage.store_subkey(KEY, "peer", b"new", now + 60)
    storage.store_subkey(KEY, "peer", b"old", now + 30)
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 45)
    assert storage.get(KEY).value.get("peer").value == b"new"
    monkeypatch.setattr("hivemind.utils.timed_storage.get_dht_time", lambda: now + 61)
    assert storage.get(KEY) is None


def test_expired_record_is_not_kept(storage: BoundedStorage) -> None:
    assert not storage.store_subkey(KEY, "peer", b"late", time.time() - 1)
    assert storage.get(KEY) is None


def test_flood_of_peers_is_bounded_and_does_not_evict(storage: BoundedStorage) -> None:
    now = time.time()
    assert storage.store_subkey(KEY, "honest", b"first", now + 10)
    for number in range(2 * MAX_PEERS_PER_RUN):
        storage.store_subkey(KEY, f"liar {number}", b"x", now + 60)
    peers = storage.get(KEY).value
    assert len(peers) == MAX_PEERS_PER_RUN
    assert peers.get("honest").value == b"first"
    assert storage.store_subkey(KEY, "honest", b"second", now + 30)


def test_regular_value_is_not_turned_into_a_dictionary(storage: BoundedStorage) -> None:
    now = time.time()
    storage.store(KEY, b"manifest", now + 10)
    assert not storage.store_subkey(KEY, "peer", b"x", now + 60)
    assert storage.get(KEY).value == b"manifest"


async def answered(
    monkeypatch: pytest.MonkeyPatch, value: DictionaryDHTValue, expiry: float
) -> tuple[ValueWithExpiration | None, dict[int, str]]:
    """What our node makes of another node's answer to a find request."""
    neighbours = {number: f"peer {number}" for number in range(500)}

    async def answer(*_: object) -> object:
        return {KEY: (ValueWithExpiration(value, expiry), neighbours)}

    monkeypatch.setattr(DHTNode, "_call_find_with_blacklist", answer)
    node = Node(_initialized_with_create=True)
    found: dict[DHTID, tuple[ValueWithExpiration | None, dict[int, str]]]
    found = await node._call_find_with_blacklist("liar", [KEY])
    return found[KEY]


async def test_empty_answer_that_never_expires_does_not_end_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, neighbours = await answered(monkeypatch, DictionaryDHTValue(), float("inf"))
    assert found is None
    assert len(neighbours) == 20


async def test_expiry_of_an_answer_follows_from_its_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time()
    value = DictionaryDHTValue()
    value.store("one", b"1", now + 30)
    value.store("other", b"2", now + 50)
    value.maxsize = "hostile"  # arrives with the answer, unchecked by hivemind
    found, _ = await answered(monkeypatch, value, float("inf"))
    assert found is not None
    assert found.expiration_time == now + 50
    assert dict(found.value.items()).keys() == {"one", "other"}
