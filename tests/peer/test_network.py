"""Links that outlive who gave them."""

from __future__ import annotations

from dht.identity import Identity
from dht.records import PeerRecord
from peer.link import MAX_PEERS, Link
from peer.network import link_to

RUN = "ab" * 20


def record(*maddrs: str) -> PeerRecord:
    return PeerRecord(
        peer_id=Identity.generate().peer_id,
        run_id=RUN,
        maddrs=maddrs,
        hosts=(),
        port=0,
        certificate_sha256=bytes(32),
        can_reduce=True,
        upload_bps=0.0,
        download_bps=0.0,
        round=0,
        samples=0,
        head=bytes(32),
        leaving=False,
        expires_at=0.0,
    )


def address(host: str) -> str:
    return f"/ip4/{host}/tcp/4001/p2p/{Identity.generate().peer_id}"


def test_a_link_names_its_giver_first_and_one_address_of_each_other() -> None:
    own, near, far = address("192.0.2.1"), address("192.0.2.2"), address("192.0.2.3")
    loopback = address("127.0.0.1")
    link = link_to(RUN, (own, loopback), [record(loopback, near), record(far, address("10.0.0.1"))])
    assert link == Link(RUN, (own, near, far))


def test_what_strangers_write_into_their_records_cannot_break_a_link() -> None:
    own = address("192.0.2.1")
    nonsense = ["/ip4/999.1.1.1/tcp/1/p2p/x", "/ip4/192.0.2.2/tcp/0/p2p/x", "/dns4/../tcp/1/p2p/x"]
    assert link_to(RUN, (own,), [record(text) for text in nonsense]) == Link(RUN, (own,))


def test_a_link_of_a_large_swarm_is_no_longer_than_allowed() -> None:
    others = [record(address(f"192.0.2.{n}")) for n in range(100)]
    link = link_to(RUN, (address("198.51.100.1"),), others)
    assert len(link.peers) == MAX_PEERS
    assert Link.parse(str(link)) == link
