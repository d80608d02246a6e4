"""Real `shoal` daemons in a private world: started, watched, frozen, killed and cleaned up.

What a test learns comes from the daemons' own JSON events. Every wait has a deadline, and what the
peers said on stderr is shown when one passes.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
# Several chunks in each of five slices, and work of a fraction of a second.
RUN_FILE = """
name = "faults"
[model]
layers = {layers}
width = 256
heads = 4
context = 16
[data]
path = "text.txt"
[optimizer]
kind = "adamw"
[training]
batch_size = 1
eval_blocks = 2
[round]
codec = "fp32"
local_steps = {local_steps}
fragments = 1
delay_steps = 0
rounds = {rounds}
start_peers = {start_peers}
grace_s = {grace_s}
exchange_s = {exchange_s}
suspect_s = {suspect_s}
"""
RUN_DEFAULTS = {
    "layers": 3,
    "local_steps": 2,
    "rounds": 0,
    "start_peers": 5,
    "grace_s": 4,
    "exchange_s": 10,
    "suspect_s": 2,
}


_CLONE_NEWNET = 0x40000000  # <sched.h>

# Loading torch and hivemind takes each process seconds of CPU; one that has them loaded is forked
# for each peer. Nothing there starts a thread or a socket before the fork.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "aiohttp.web", "peer.cli", "peer.node", "peer.output", "tests.faults.harness"]
)


class Forked:
    """What a test needs of `subprocess.Popen`, for a command in a process forked with it loaded."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        namespace: str = "",
    ) -> None:
        pipes = [Path(tempfile.mktemp(dir=folder, prefix="pipe-")) for _ in range(2)]
        for pipe in pipes:
            os.mkfifo(pipe)
        self._process = _SERVER.Process(
            target=_run, args=(list(arguments), folder, environment, namespace, *pipes), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid
        self.stdout: IO[str] | None = pipes[0].open()
        self.stderr: IO[str] | None = pipes[1].open()
        for pipe in pipes:
            pipe.unlink()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive() and self.pid is not None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    namespace: str,
    out: Path,
    err: Path,
) -> None:
    if namespace:
        with open(f"/run/netns/{namespace}", "rb") as entry:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(entry.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    for number, pipe in ((1, out), (2, err)):
        descriptor = os.open(pipe, os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # was asked for with the environment of before
    from peer import cli

    cli.main(arguments)


class Peer:
    """One daemon, and what it has said."""

    def __init__(
        self, name: str, process: subprocess.Popen[str] | Forked, changed: threading.Condition
    ) -> None:
        self.name = name
        self.process = process
        self.events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._changed = changed
        self.readers = [
            threading.Thread(target=read, daemon=True)
            for read in (self._read_events, self._read_errors)
        ]
        for reader in self.readers:
            reader.start()

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError), self._changed:  # a killed writer's last line
                self.events.append({**json.loads(line), "at": time.monotonic()})
                self._changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line.rstrip())

    def said(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind, in order."""
        return [event for event in list(self.events) if event["event"] == kind]

    @property
    def rounds(self) -> dict[int, dict[str, Any]]:
        """The rounds that it reported."""
        return {event["round"]: event for event in self.said("round")}

    @property
    def last_round(self) -> int:
        """The newest of them; -1 for none."""
        return max(self.rounds, default=-1)

    @property
    def link(self) -> str:
        """The join link that it printed."""
        return str(self.said("link")[0]["link"])

    @property
    def alive(self) -> bool:
        """Whether the process runs, frozen or not."""
        return self.process.poll() is None

    @property
    def frozen(self) -> bool:
        """Whether the process is stopped by a signal."""
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            return stat.rpartition(") ")[2].startswith("T")
        return False

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)

    def libp2p_daemons(self) -> list[int]:
        """Process ids of its libp2p daemon, not of the guardian around it."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    argv = (entry / "cmdline").read_bytes().split(b"\0")
                    if Path(argv[0].decode()).name == "p2pd" and self._is_ours(int(entry.name)):
                        found.append(int(entry.name))
        return found

    def _is_ours(self, pid: int) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(") ")[2].split()[1])
        return False


class Swarm:
    """Starts daemons, and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tmp").mkdir()
        text = "".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(8000))
        (folder / "text.txt").write_text(text)
        self.peers: dict[str, Peer] = {}
        self._changed = threading.Condition()

    def run_file(self, **values: float) -> Path:
        """A run small enough for a test, with these values in place of the defaults."""
        path = self.folder / "run.toml"
        path.write_text(RUN_FILE.format(**(RUN_DEFAULTS | values)))
        return path

    def shoal(
        self,
        name: str,
        *arguments: str,
        failpoints: str = "",
        namespace: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Peer:
        """Start one `shoal` command that prints events.

        Args:
            name: of the peer; its home is a folder of that name unless the arguments say otherwise.
            arguments: of the command.
            failpoints: armed in it.
            namespace: network namespace to live in; empty for this one.
            environment: more variables, which take a start from scratch.
        """
        home = () if "--home" in arguments else ("--home", str(self.folder / name))
        command = [*arguments, *home, "--json", "-v"]
        variables = {
            "TMPDIR": str(self.folder / "tmp"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "SHOAL_FAILPOINTS": failpoints,
            **(environment or {}),
        }
        process: subprocess.Popen[str] | Forked
        if environment:
            assert not namespace
            process = subprocess.Popen(
                [sys.executable, "-m", "peer.cli", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=self.folder,
                env={**os.environ, **variables},
            )
        else:
            process = Forked(command, self.folder, variables, namespace)
        self.peers[name] = peer = Peer(name, process, self._changed)
        return peer

    def create(self, name: str = "p0", *more: str, host: str = "127.0.0.1", **options: Any) -> Peer:
        """The first peer, of the run file that was written."""
        arguments = ("create", "run.toml", "--host", host, "--threads", "1")
        return self.shoal(name, *arguments, *more, **options)

    def join(
        self, name: str, link: str, *more: str, host: str = "127.0.0.1", **options: Any
    ) -> Peer:
        """Another peer."""
        data = ("--data", str(self.folder / "text.txt"))
        arguments = ("join", link, "--host", host, "--threads", "1", *data)
        return self.shoal(name, *arguments, *more, **options)

    def start(self, count: int, failpoints: Mapping[int, str] | None = None) -> list[Peer]:
        """`count` peers, p0 the creator; returns when all have committed the first round.

        All but those whose fault came as early as that: whoever leads it is drawn by lot.
        """
        faults = failpoints or {}
        first = self.create(failpoints=faults.get(0, ""))
        self.until(lambda: bool(first.said("link")), 40)
        others = [
            self.join(f"p{n}", first.link, failpoints=faults.get(n, "")) for n in range(1, count)
        ]
        peers = [first, *others]
        self.until(
            lambda: all(0 in peer.rounds or peer.frozen or not peer.alive for peer in peers), 90
        )
        assert first.rounds, self.report()
        return peers

    def until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something that events or the world tell."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition():
                left = deadline - time.monotonic()
                assert left > 0, f"not within {timeout_s:g} s:\n{self.report()}"
                self._changed.wait(min(left, 0.1))  # a death or a freeze is no event

    def go_on(self, peers: Sequence[Peer], *, rounds: int, timeout_s: float) -> None:
        """Wait until these peers have committed some more rounds together.

        Together: with nobody else in the average, and no one of them missing.
        """
        start = max(peer.last_round for peer in peers)

        def enough() -> bool:
            common = set.intersection(*(set(peer.rounds) for peer in peers))
            full = [
                number
                for number in common
                if number > start
                and all(peer.rounds[number]["members"] == len(peers) for peer in peers)
            ]
            return len(full) >= rounds

        self.until(enough, timeout_s)

    def check(self, survivors: Sequence[Peer]) -> None:
        """One digest a round over all peers, dead ones too, and no round lost by a survivor."""
        for number in sorted({n for peer in self.peers.values() for n in peer.rounds}):
            digests = {
                peer.rounds[number]["digest"]
                for peer in self.peers.values()
                if number in peer.rounds
            }
            assert len(digests) == 1, f"round {number} has {digests}\n{self.report()}"
        for peer in survivors:
            numbers = [event["round"] for event in peer.said("round")]
            assert numbers == list(range(numbers[0], numbers[-1] + 1)), (
                f"{peer.name} lost a round:\n{self.report()}"
            )
            assert peer.alive, self.report()
            for number, line in enumerate(peer.errors):
                said = "\n".join(peer.errors[max(0, number - 10) : number + 60])
                assert "Traceback" not in line, f"{peer.name} failed:\n{said}"

    def longest_round_s(self, peer: Peer) -> float:
        """The longest time between two of its rounds; printed, never judged."""
        at = [event["at"] for event in peer.said("round")]
        return max((after - before for before, after in itertools.pairwise(at)), default=0.0)

    def report(self) -> str:
        """What each peer reported, and its last words."""
        lines = []
        for peer in self.peers.values():
            state = "frozen" if peer.frozen else "alive" if peer.alive else peer.process.returncode
            lines.append(f"{peer.name}: {state}")
            lines += [
                f"  round {number} members {event['members']} {event['digest'][:12]}"
                for number, event in peer.rounds.items()
            ]
            lines += [f"  {line}" for line in peer.errors[-25:]]
        return "\n".join(lines)

    def close(self) -> None:
        """End every process and wait until it is gone."""
        for peer in self.peers.values():
            if peer.alive:
                peer.process.kill()  # ends a frozen one as well
            peer.process.wait()
            for reader in peer.readers:
                reader.join(10)
            for stream in (peer.process.stdout, peer.process.stderr):
                if stream is not None:
                    stream.close()
