from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.errors import ConfigError
from dht.identity import Identity
from dht.link import (
    MAX_PEERS,
    Link,
    check_multiaddr,
    host_component,
    is_peer_id,
    peer_address,
)

RUN = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def peer_id() -> str:
    return Identity.generate().peer_id


@pytest.fixture
def maddr(peer_id: str) -> str:
    return f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id}"


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Link.parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_link_survives_being_written_and_read(peer_id: str) -> None:
    peers = (
        f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id}",
        f"/dns4/peer.example.org/tcp/1/p2p/{peer_id}",
        f"/ip6/2001:db8::1/tcp/65535/p2p/{peer_id}",
    )
    link = Link(RUN, peers)
    assert Link.parse(str(link)) == link
    assert Link.parse(f"  {link}\n") == link


def test_links_of_one_run_become_one_that_names_a_peer_of_each_first(peer_id: str) -> None:
    def at(port: int) -> str:
        return f"/ip4/203.0.113.7/tcp/{port}/p2p/{peer_id}"

    merged = Link.merged([Link(RUN, (at(1), at(2))), Link(RUN, (at(3), at(1)))])
    assert merged.peers == (at(1), at(3), at(2))
    many = [Link(RUN, tuple(at(100 * n + m) for m in range(1, 9))) for n in range(4)]
    assert len(Link.merged(many).peers) == MAX_PEERS
    assert {peer for link in many for peer in link.peers[:4]} == set(Link.merged(many).peers)


def test_a_link_is_readable(maddr: str) -> None:
    assert str(Link(RUN, (maddr,))) == f"shoal://{RUN}?peer={maddr}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://example.org", "must start with shoal://"),
        ("", "must start with shoal://"),
        ("/ip4/1.2.3.4/tcp/1", "address of a peer, not a join link"),
        ("shoal://abc?peer=/ip4/1.2.3.4", "not 40 hex digits"),
        (f"shoal://{RUN.upper()}", "not 40 hex digits"),
        (f"shoal://{RUN}", "names no peer"),
        (f"shoal://{RUN}?pear=x", "unknown part 'pear'"),
        (f"shoal://{RUN}/more?peer=x", "does not belong"),
        (f"shoal://{RUN}?peer=x#y", "does not belong"),
        (f"shoal://{RUN}?peer=", "not the address of a peer"),
        (f"shoal://{RUN}?peer=/ip4/1.2.3.4/tcp/1/p2p/12D3KooWshort", "no Ed25519 peer id"),
        ("shoal://[", "not a join link"),
        ("shoal://" + "x" * 10_000, "characters"),
    ],
)
def test_a_wrong_link_is_told_what_is_wrong(text: str, says: str) -> None:
    assert says in refused(text)


@pytest.mark.parametrize(
    ("kind", "host", "port"),
    [
        ("ip4", "300.1.1.1", "1"),
        ("ip4", "::1", "1"),
        ("ip6", "1.2.3.4", "1"),
        ("ip6", "fe80::1%eth0", "1"),
        ("dns4", "-bad-", "1"),
        ("dns4", "", "1"),
        ("udp", "1.2.3.4", "1"),
        ("ip4", "1.2.3.4", "0"),
        ("ip4", "1.2.3.4", "65536"),
        ("ip4", "1.2.3.4", "1e3"),
        ("ip4", "1.2.3.4", "٣"),
        ("ip4", "1.2.3.4", "9" * 5000),
    ],
)
def test_a_wrong_address_is_refused(kind: str, host: str, port: str, peer_id: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        check_multiaddr(f"/{kind}/{host}/tcp/{port}/p2p/{peer_id}")


def test_too_many_peers_are_refused(maddr: str) -> None:
    many = tuple(maddr.replace("4001", str(4001 + n)) for n in range(MAX_PEERS + 1))
    assert "at most" in refused(f"shoal://{RUN}?" + "&".join(f"peer={one}" for one in many))


@given(st.text(max_size=200))
def test_no_text_does_worse_than_a_config_error(text: str) -> None:
    for candidate in (
        text,
        f"shoal://{text}",
        f"shoal://{RUN}?{text}",
        f"shoal://{RUN}?peer={text}",
    ):
        with contextlib.suppress(ConfigError):
            link = Link.parse(candidate)
            assert Link.parse(str(link)) == link


def test_peer_ids(peer_id: str) -> None:
    assert is_peer_id(peer_id)
    assert not is_peer_id(peer_id[:-1])
    assert not is_peer_id(peer_id.replace("12D3", "12D4"))
    assert not is_peer_id("Qm" + peer_id[2:])
    assert not is_peer_id(peer_id[:-1] + "0")  # not in the alphabet


def test_ping_takes_a_link_or_an_address(maddr: str) -> None:
    assert peer_address(maddr) == maddr
    assert peer_address(f"shoal://{RUN}?peer={maddr}") == maddr


@pytest.mark.parametrize(
    ("host", "component"),
    [
        ("203.0.113.7", "/ip4/203.0.113.7"),
        ("2001:db8::1", "/ip6/2001:db8::1"),
        ("bootstrap", "/dns4/bootstrap"),
        ("peer_1.example.org", "/dns4/peer_1.example.org"),
    ],
)
def test_announced_hosts_become_multiaddrs(host: str, component: str) -> None:
    assert host_component(host) == component


@pytest.mark.parametrize("host", ["", "a b", "http://x", "256.1.1.1", "x/y"])
def test_a_wrong_announced_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="neither an IP address nor a host name"):
        host_component(host)
