"""Machines whose links are thin: what the benchmarks over network namespaces share.

Needs root and iproute2 (`ip`, `tc`); nothing of it touches the machine's own network, and nothing
is left of it. A link has a rate each way and a short queue, and no delay of its own.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.netns.net import Net

MBIT = 1e6 / 8  # bytes per second
QUEUE_S = 0.1  # what a link's queue holds
BURST_S = 0.005  # what passes a link at once
LEAST_BURST = 32_768  # bytes


@dataclass(frozen=True, slots=True)
class Link:
    """Of one peer, in Mbit/s."""

    up: float
    down: float


class Lines(Net):
    """Machines whose links are throttled in both directions."""

    def shape(self, number: int, link: Link) -> None:
        """From now on."""
        self._limit(f"{self._prefix}{number}", "eth0", link.up)
        self._limit(self._hub, f"port{number}", link.down)

    def _limit(self, namespace: str, device: str, mbits: float) -> None:
        burst = max(LEAST_BURST, int(mbits * MBIT * BURST_S))
        rule = f"rate {mbits:.3f}mbit burst {burst} latency {QUEUE_S * 1e3:.0f}ms"
        self._in(namespace, *f"tc qdisc add dev {device} root tbf {rule}".split())


def transmitted(pid: int) -> int:
    """Bytes that left the machine of this process, with all headers."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    fields = next(line.split() for line in lines if line.strip().startswith("eth0:"))
    return int(fields[9])


def complaint() -> str:
    """Why there can be no such machines here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} missing: install iproute2" if missing else ""
