"""`shoal ping`: one question to one DHT node, for health checks.

A throw-away identity asks, as a client that stores nothing: the check leaves no trace in the DHT.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from dht.errors import TimedOut
from dht.kademlia import KademliaConfig, KademliaDirectory


def ping_once(address: str, timeout_s: float) -> float:
    """Seconds until the node at this multiaddr answered.

    Raises:
        Unreachable: nobody answers there.
        TimedOut: no answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-ping-") as folder:
        return asyncio.run(_ping(address, Path(folder) / "identity.key", timeout_s))


async def _ping(address: str, identity_path: Path, timeout_s: float) -> float:
    config = KademliaConfig(identity_path=identity_path, host="127.0.0.1", client=True)
    try:
        async with asyncio.timeout(timeout_s), KademliaDirectory.open(config) as directory:
            return await directory.ping(address)
    except TimeoutError as error:
        raise TimedOut(address.rsplit("/", 1)[-1], f"no answer in {timeout_s:g} s") from error
