from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dht.identity import Identity
from dht.records import PeerRecord

RUN_ID = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def run_id() -> str:
    return RUN_ID


@pytest.fixture
def identity() -> Identity:
    return Identity.generate()


@pytest.fixture
def make_record() -> Callable[..., PeerRecord]:
    """A valid record of `identity`, fields replaced at will; expires a minute from `now`."""

    def make(identity: Identity, *, now: float | None = None, **fields: Any) -> PeerRecord:
        defaults: dict[str, Any] = {
            "peer_id": identity.peer_id,
            "run_id": RUN_ID,
            "maddrs": (f"/ip4/192.0.2.7/tcp/31337/p2p/{identity.peer_id}",),
            "hosts": ("192.0.2.7", "peer.example.org"),
            "port": 31338,
            "certificate_sha256": b"c" * 32,
            "can_reduce": True,
            "upload_bps": 1e6,
            "download_bps": 2.5e6,
            "round": 7,
            "samples": 1234,
            "head": b"h" * 32,
            "leaving": False,
            "expires_at": (time.time() if now is None else now) + 60,
        }
        return PeerRecord(**{**defaults, **fields})

    return make


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Whether a process exists and is more than a zombie."""

    def check(pid: int) -> bool:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except FileNotFoundError:
            return False
        return status.rpartition(")")[2].split()[0] != "Z"

    return check


@pytest.fixture
def daemon_pid() -> Callable[[int], int]:
    """Process id of the p2pd that a guardian started."""

    def find(guardian: int) -> int:
        for task in Path("/proc").glob("[0-9]*"):
            try:
                status = (task / "stat").read_text()
                command = (task / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = int(status.rpartition(")")[2].split()[1])
            if parent == guardian and command.split(b"\0")[0].endswith(b"p2pd"):
                return int(task.name)
        raise AssertionError(f"no p2pd below {guardian}")

    return find


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """Wait for a condition, looking often; fail when it does not come about in time."""

    async def wait(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - other processes set no events
                await asyncio.sleep(0.01)

    return wait
