"""Machines whose links are thin: what the benchmarks over network namespaces share.

Needs root and iproute2 (`ip`, `tc`); nothing of it touches the machine's own network, and nothing
is left of it. A link has a rate each way, a short queue and, if asked for, a delay (`delay`): after
the queue of the sender's link and before that of the receiver's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.netns.net import Net

MBIT = 1e6 / 8  # bytes per second
QUEUE_S = 0.1  # what a link's queue holds
BURST_S = 0.005  # what passes a link at once
LEAST_BURST = 32_768  # bytes
DELAY = Path(__file__).with_name("delay.py")
END_S = 10.0  # for the process that delays; it only has to say what it did


@dataclass(frozen=True, slots=True)
class Link:
    """Of one peer, in Mbit/s."""

    up: float
    down: float


class Lines(Net):
    """Machines whose links are throttled in both directions, and may be long."""

    def __init__(self) -> None:
        super().__init__()
        self._delayer: subprocess.Popen[str] | None = None

    def delay(self, round_trip_s: float) -> None:
        """From now on, for all machines that were added: half of it each way.

        Raises:
            OSError: the process that holds the frames did not start.
        """
        assert self._delayer is None, "delayed twice"
        ports = [f"port{number}" for number in range(self._count)]
        for port in ports:
            self._in(self._hub, *f"ip link set {port} nomaster".split())
        command = [sys.executable, str(DELAY), "--one-way-ms", str(round_trip_s * 1e3 / 2), *ports]
        self._delayer = subprocess.Popen(
            ["ip", "netns", "exec", self._hub, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(DELAY.parents[1])},
            text=True,
        )
        assert self._delayer.stdout is not None
        if self._delayer.stdout.readline() != "ready\n":
            raise OSError("the process that delays frames did not start")

    def close(self) -> None:
        """Remove everything."""
        self.end_delay()
        super().close()

    def end_delay(self) -> dict[str, Any]:
        """No frame passes any more; what `delay` says at its end, nothing where there was none."""
        delayer, self._delayer = self._delayer, None
        if delayer is None:
            return {}
        delayer.terminate()
        try:
            said, _ = delayer.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            delayer.kill()
            said, _ = delayer.communicate()
        lines = said.splitlines()
        return json.loads(lines[-1]) if lines else {}

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
