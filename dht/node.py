"""hivemind's Kademlia node, with bounds on what strangers make it keep and believe.

Guaranteed: storage has a fixed maximum; a replayed older record never shortens the life of a newer
one; an answer cannot cut a search short by lying about when it expires, nor flood it with
neighbours. Not guaranteed, for hivemind has no such thing: resistance against somebody who runs
many nodes and surrounds a key with them.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import Any

from dht.borrowed import DHTLocalStorage, DHTNode, DictionaryDHTValue, ValueWithExpiration

MAX_KEYS = 4096
MAX_PEERS_PER_RUN = 1024
_MAX_NEIGHBOURS = 20  # Kademlia's k: no honest node answers with more


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]
    """Records of other peers, at most `MAX_KEYS` keys with `MAX_PEERS_PER_RUN` sub-keys each."""

    def __init__(self) -> None:
        super().__init__(maxsize=MAX_KEYS)

    def store_subkey(self, key: Any, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Keep one sub-key's value; False when it is older than what is held, or there is no room.

        A full dictionary refuses newcomers rather than evicting: who floods a run's key with
        made-up peers does not push out those who were there before.
        """
        held = self.get(key)
        if held is None:
            peers = DictionaryDHTValue(MAX_PEERS_PER_RUN)
            return bool(
                peers.store(subkey, value, expiration_time)
                and self.store(key, peers, peers.latest_expiration_time)
            )
        peers = held.value
        if not isinstance(peers, DictionaryDHTValue):
            return False
        known = peers.get(subkey)
        # hivemind notes an entry's new expiry before it compares: without this check, replaying an
        # older record makes the newer one be dropped early.
        if known is not None and known.expiration_time >= expiration_time:
            return False
        if known is None and len(peers) >= MAX_PEERS_PER_RUN:
            return False
        if expiration_time > held.expiration_time:
            self.store(key, peers, expiration_time)
        return bool(peers.store(subkey, value, expiration_time))


class Node(DHTNode):  # type: ignore[misc]
    """A DHT node that believes of other nodes' answers no more than is plausible."""

    async def _call_find_with_blacklist(self, peer_id: Any, keys: Collection[Any]) -> Any:
        answer = await super()._call_find_with_blacklist(peer_id, keys)
        if not answer:
            return answer
        return {
            key: (_plausible(found), dict(islice(nearest.items(), _MAX_NEIGHBOURS)))
            for key, (found, nearest) in answer.items()
        }


def _plausible(found: Any) -> Any:
    """A found value under an expiry that follows from its (already validated) entries.

    The expiry of a dictionary is not signed by anybody. Taken as claimed, an empty dictionary that
    never expires would end every search at the first liar.
    """
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return found
    peers = DictionaryDHTValue(MAX_PEERS_PER_RUN)
    # .data, because .items() computes with a size limit that came with the answer.
    for subkey, entry in islice(found.value.data.items(), MAX_PEERS_PER_RUN):
        peers.store(subkey, entry.value, entry.expiration_time)
    if not peers:
        return None
    return ValueWithExpiration(peers, peers.latest_expiration_time)
