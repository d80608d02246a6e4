"""What others are told to dial."""

from __future__ import annotations

import pytest

from dht.addresses import announced_hosts

PEER = "/p2p/12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def maddrs(*hosts: str) -> tuple[str, ...]:
    return tuple(f"/ip{6 if ':' in host else 4}/{host}/tcp/4001{PEER}" for host in hosts)


@pytest.mark.parametrize(
    ("bind", "found", "announced"),
    [
        ("0.0.0.0", maddrs("127.0.0.1", "10.0.0.7"), ("10.0.0.7", "127.0.0.1")),
        ("0.0.0.0", maddrs("10.0.0.7", "8.8.8.8"), ("8.8.8.8", "10.0.0.7", "127.0.0.1")),
        ("0.0.0.0", (), ("127.0.0.1",)),
        ("::", maddrs("::1", "fe80::1", "fd00::2"), ("fd00::2", "::1")),
        ("::", maddrs("fd00::2", "2600::1"), ("2600::1", "fd00::2", "::1")),
        ("::", (), ("::1",)),
        # Whatever libp2p lists, of either kind.
        ("::", (*maddrs("10.0.0.7", "fd00::2"), "/dns4/x/tcp/1"), ("10.0.0.7", "fd00::2", "::1")),
        ("10.0.0.7", maddrs("10.0.0.8"), ("10.0.0.7",)),
        ("fd00::2", (), ("fd00::2",)),
    ],
)
def test_the_most_widely_reachable_come_first_and_loopback_last(
    bind: str, found: tuple[str, ...], announced: tuple[str, ...]
) -> None:
    assert announced_hosts(bind, (), found) == announced


def test_what_a_person_says_wins() -> None:
    assert announced_hosts("::", ("peer.example.org",), maddrs("fd00::2")) == ("peer.example.org",)
