"""The join link: all that a newcomer must be told, in one line that can be pasted.

    shoal://<run id>?peer=<multiaddr>&peer=<multiaddr>...

The run id is the hash of the signed run file, so nobody can swap the model or the training under
it; the addresses only say whom to ask first.

Guarantees: what `parse` accepts, `str()` writes back in a form that `parse` accepts as the same
link, and what it refuses it refuses with one line that says how to mend it. A link is not a secret
and not a permission: it neither proves that the peers behind the addresses are honest nor that they
are alive.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

from dht.errors import ConfigError

MAX_PEERS = 16  # enough for any bootstrap; a longer link no longer fits a chat line
MAX_LINK_CHARS = 8192
_RUN_ID = re.compile(r"[0-9a-f]{40}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# Identity multihash (00 24) of a protobuf that says "Ed25519 public key, 32 bytes" (08 01 12 20).
_ED25519_PEER_ID = bytes.fromhex("002408011220")
_SHAPE = "it looks like /ip4/203.0.113.7/tcp/4001/p2p/12D3KooW..."


@dataclass(frozen=True, slots=True)
class Link:
    """A run and where to ask for it.

    Attributes:
        run_id: 40 lower-case hex digits.
        peers: 1 to `MAX_PEERS` multiaddrs, each ending in /p2p/<peer id>; tried in order.
    """

    run_id: str
    peers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not _RUN_ID.fullmatch(self.run_id):
            raise ConfigError(
                f"the run id {_short(self.run_id)!r} is not 40 hex digits: copy the whole link "
                "that 'shoal create' printed"
            )
        if not self.peers:
            raise ConfigError(
                "the link names no peer: copy it whole, from shoal:// to the end, and put it in "
                "quotes"
            )
        if len(self.peers) > MAX_PEERS:
            raise ConfigError(
                f"the link names {len(self.peers)} peers, at most {MAX_PEERS} are allowed: "
                "drop some of its &peer=... parts"
            )
        for peer in self.peers:
            check_multiaddr(peer)

    def __str__(self) -> str:
        """The link as a person pastes it."""
        # '/' and ':' are legal in a query and keep the addresses readable.
        query = "&".join(f"peer={quote(peer, safe='/:')}" for peer in self.peers)
        return f"shoal://{self.run_id}?{query}"

    @classmethod
    def merged(cls, links: Sequence[Link]) -> Link:
        """One link to the run of all these, with an address of each before a second of any.

        Args:
            links: at least one, all to the same run.
        """
        by_turns = itertools.zip_longest(*(link.peers for link in links))
        peers = dict.fromkeys(peer for turn in by_turns for peer in turn if peer is not None)
        return cls(links[0].run_id, tuple(peers)[:MAX_PEERS])

    @classmethod
    def parse(cls, text: str) -> Link:
        """Read a link.

        Raises:
            ConfigError: one line, what is wrong and how to mend it.
        """
        text = text.strip()
        if text.startswith("/"):
            raise ConfigError(
                f"{_short(text)!r} is the address of a peer, not a join link: the link starts with "
                "shoal:// and is printed by 'shoal create'"
            )
        if not text.startswith("shoal://"):
            raise ConfigError(
                f"{_short(text)!r} is not a join link: it must start with shoal://, "
                "as 'shoal create' prints it"
            )
        if len(text) > MAX_LINK_CHARS:
            raise ConfigError(f"the link has {len(text)} characters, at most {MAX_LINK_CHARS}")
        try:
            parts = urlsplit(text)
        except ValueError as error:  # "[" without "]", say
            raise ConfigError(f"{_short(text)!r} is not a join link: {error}") from error
        if parts.path not in ("", "/") or parts.fragment:
            raise ConfigError(
                f"{_short(parts.path + parts.fragment)!r} does not belong in a join link: "
                "after the run id comes ?peer=..."
            )
        peers = []
        for name, value in parse_qsl(parts.query, keep_blank_values=True):
            if name != "peer":
                raise ConfigError(
                    f"the link has an unknown part {_short(name)!r}: only peer=ADDRESS is allowed"
                )
            if value not in peers:
                peers.append(value)
        return cls(parts.netloc, tuple(peers))


def check_multiaddr(text: str) -> str:
    """Check the address of a peer and return it unchanged.

    Accepted: /ip4, /ip6, /dns, /dns4 or /dns6, then /tcp/PORT, then /p2p/<Ed25519 peer id>.

    Raises:
        ConfigError: one line, what is wrong and how to mend it.
    """
    shown = _short(text)
    parts = text.split("/")
    if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p":
        raise ConfigError(f"{shown!r} is not the address of a peer: {_SHAPE}")
    _, kind, host, _, port, _, peer_id = parts
    if not _host_fits(kind, host):
        raise ConfigError(
            f"the address {shown!r} has no usable /{_short(kind)}/{_short(host)}: "
            "use /ip4/ADDRESS, /ip6/ADDRESS or /dns4/NAME"
        )
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise ConfigError(f"the address {shown!r} has port {_short(port)!r}: use 1 to 65535")
    if not is_peer_id(peer_id):
        raise ConfigError(
            f"the address {shown!r} ends in {_short(peer_id)!r}, which is no Ed25519 peer id: "
            "it has 52 characters and starts with 12D3KooW; copy the address whole"
        )
    return text


def peer_address(text: str) -> str:
    """A multiaddr from either a multiaddr or a join link (its first peer).

    Raises:
        ConfigError: neither of the two.
    """
    text = text.strip()
    if text.startswith("/"):
        return check_multiaddr(text)
    return Link.parse(text).peers[0]


def is_peer_id(text: str) -> bool:
    """Whether this is the base58 libp2p id of an Ed25519 key."""
    if len(text) != 52:
        return False
    number = 0
    for character in text:
        digit = _BASE58.find(character)
        if digit < 0:
            return False
        number = number * 58 + digit
    # The leading zero byte is written as a leading '1'.
    return text[0] == "1" and number.to_bytes(64, "big")[-38:].startswith(_ED25519_PEER_ID)


def host_component(host: str) -> str:
    """`/ip4/…`, `/ip6/…` or `/dns4/…` for an address or a host name.

    Raises:
        ConfigError: neither.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A last label of digits only is a mistyped IPv4 address, never a host name (RFC 1123).
        if not _HOST_NAME.fullmatch(host) or host.rsplit(".", 1)[-1].isdigit():
            raise ConfigError(
                f"{_short(host)!r} is neither an IP address nor a host name: use for example "
                "203.0.113.7 or peer.example.org"
            ) from None
        return f"/dns4/{host}"
    return f"/ip{address.version}/{host}"


def _host_fits(kind: str, host: str) -> bool:
    if kind in ("dns", "dns4", "dns6"):
        return bool(_HOST_NAME.fullmatch(host))
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # A zone ("fe80::1%eth0") means something on one machine only.
    return kind == f"ip{address.version}" and "%" not in host


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
