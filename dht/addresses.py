"""Under which hosts others on the network may reach this machine.

A guess from the addresses that libp2p listens on. It cannot see through a NAT and does not know
which interface leads where: who is dialled from elsewhere says so with --announce-host. Loopback
comes last: it serves a second daemon on this machine when there is no network at all.
"""

from __future__ import annotations

import ipaddress

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # of those hosts that mean everywhere
_MAX_HOSTS = 8  # strangers try them one after the other


def announced_hosts(
    bind_host: str, announce: tuple[str, ...], maddrs: tuple[str, ...]
) -> tuple[str, ...]:
    """What others should dial.

    Args:
        bind_host: where this peer listens; "0.0.0.0" and "::" mean everywhere, with IPv4 or IPv6.
        announce: what the person said others should dial; wins when given.
        maddrs: libp2p's own view of where this peer is, `/ip4/…/tcp/…` or `/ip6/…/tcp/…`.

    Returns:
        IP addresses and host names, the most widely reachable first; never empty.
    """
    if announce:
        return announce
    loopback = _LOOPBACK.get(bind_host)
    if loopback is None:
        return (bind_host,)
    found = set()
    for maddr in maddrs:
        parts = maddr.split("/")
        if len(parts) > 2 and parts[1] in ("ip4", "ip6"):
            found.add(ipaddress.ip_address(parts[2]))
    usable = [address for address in found if not (address.is_link_local or address.is_loopback)]
    usable.sort(key=lambda address: (not address.is_global, address.version, int(address)))
    return (*(str(address) for address in usable[: _MAX_HOSTS - 1]), loopback)
