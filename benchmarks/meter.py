"""What processes use of the machine, read from outside of them: CPU, memory, bytes on the wire.

A peer may be several processes (hivemind's are four: a DHT, an averager, a libp2p daemon and the
one that asks for averages), so all that descend from the one that was started are added up.

Not exact: CPU time has a resolution of 10 ms; the peaks of one peer's processes need not have
coincided; memory that two of its processes share is counted in both; what a connection that was
closed in between had carried is not seen. Linux only.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Of one peer, between `Meter.start` and `Meter.stop`.

    Attributes:
        cpu_s: of all its processes.
        held_bytes: memory of all its processes at the start (what several share, they divide).
        extra_bytes: how far their resident memory rose above what it was at the start, at most.
        wire_bytes: sent through TCP; None where that cannot be told.
    """

    cpu_s: float
    held_bytes: int
    extra_bytes: int
    wire_bytes: int | None


class Meter:
    """Of several peers at once.

    Args:
        roots: the process that was started for each of them.
    """

    def __init__(self, roots: Sequence[int]) -> None:
        self._roots = roots
        self._cpu: dict[int, float] = {}
        self._resident: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._sent: dict[tuple[str, ...], tuple[set[int], int]] | None = None

    def start(self) -> None:
        """From here on."""
        self._sent = _sockets()
        self._cpu, self._resident, self._held = {}, {}, {}
        for process in set().union(*_trees(self._roots)):
            with suppress(OSError):  # it may have ended
                self._held[process] = _bytes(process, "smaps_rollup", "Pss")
                Path(f"/proc/{process}/clear_refs").write_text("5")  # the peak so far is forgotten
                self._cpu[process] = _cpu_s(process)
                self._resident[process] = _bytes(process, "status", "VmRSS")

    def stop(self) -> list[Usage]:
        """Up to here; one for each peer."""
        usages = []
        trees = _trees(self._roots)
        measured = [(self._used(tree), tree) for tree in trees]
        sent = _sockets()
        for (cpu_s, extra_bytes), tree in measured:
            wire_bytes = None
            if sent is not None and self._sent is not None:
                wire_bytes = sum(
                    count - self._sent.get(socket, (set(), 0))[1]
                    for socket, (owners, count) in sent.items()
                    if owners & tree
                )
            usages.append(
                Usage(
                    cpu_s=cpu_s,
                    held_bytes=sum(self._held.get(process, 0) for process in tree),
                    extra_bytes=extra_bytes,
                    wire_bytes=wire_bytes,
                )
            )
        return usages

    def _used(self, tree: set[int]) -> tuple[float, int]:
        cpu_s, extra_bytes = 0.0, 0
        for process in tree:
            with suppress(OSError):
                cpu_s += _cpu_s(process) - self._cpu.get(process, 0.0)
                grown = _bytes(process, "status", "VmHWM") - self._resident.get(process, 0)
                extra_bytes += max(0, grown)
        return cpu_s, extra_bytes


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    cpus = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ("torch", "grpcio", "hivemind", "numpy", "cryptography", "shoal")
    commit = _git("rev-parse", "HEAD")
    return {
        "machine": {
            "cpu": cpus[0] if cpus else platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
            "kernel": platform.release(),
        },
        "commit": commit,
        "changed_since": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "load": os.getloadavg()[0],
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _trees(roots: Sequence[int]) -> list[set[int]]:
    """Each process with all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int(_stat(int(entry.name))[1])
                children.setdefault(parent, []).append(int(entry.name))
    trees = []
    for root in roots:
        tree, found = set(), [root]
        while found:
            process = found.pop()
            tree.add(process)
            found += children.get(process, [])
        trees.append(tree)
    return trees


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold anything."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()


def _cpu_s(process: int) -> float:
    fields = _stat(process)
    return (int(fields[11]) + int(fields[12])) / TICKS


def _bytes(process: int, file: str, what: str) -> int:
    """A line of a file in /proc, in bytes."""
    text = Path(f"/proc/{process}/{file}").read_text()
    found = re.search(rf"^{what}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _sockets() -> dict[tuple[str, ...], tuple[set[int], int]] | None:
    """Of every TCP connection: the processes that hold it, and the bytes that it has sent."""
    if shutil.which("ss") is None:
        return None
    listing = subprocess.run(["ss", "-tinpHO"], capture_output=True, text=True, check=False).stdout
    sockets = {}
    for line in listing.splitlines():
        count = re.search(r"\bbytes_sent:(\d+)", line)
        owners = {int(owner) for owner in re.findall(r"\bpid=(\d+)", line)}
        if owners:
            sockets[tuple(line.split()[3:5])] = owners, int(count[1]) if count else 0
    return sockets
