"""Processes that begin every round of a benchmark together: both ends of their pipes.

    peer                              the benchmark
    {"say": "at", "rendezvous": ...}            of the first peer, where the others need it
    {"say": "ready"}                  go        its vector is there; all of them are
    {"say": "done", ...stamps}        look      it has its result; all of them have
    {"say": "looked", ...}                      how far from the exact mean that is, and its digest

So no peer prepares or checks anything while another still averages, and memory and CPU can be read
from outside between `ready` and `go` and between `done` and `look`. Stamps are of
`time.monotonic()`, which is one clock for all processes of a machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from benchmarks import vectors
from benchmarks.arguments import Parser
from dht.errors import innermost

ROOT = Path(__file__).parents[1]
MEAN = "mean.f64"
STEP_S = 600.0  # nothing a peer does takes so long


class Failed(Exception):
    """A peer broke off, or took too long. The text is for a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all peers average.

    Attributes:
        peers: how many.
        numel: length of each vector.
        rounds: how many times; the first is for warming up.
        codec: what travels.
        seed: of the vectors.
    """

    peers: int
    numel: int
    rounds: int
    codec: str
    seed: int = 0

    def arguments(self) -> list[str]:
        """As `peer_arguments` reads them."""
        return [
            *("--peers", str(self.peers), "--numel", str(self.numel), "--rounds", str(self.rounds)),
            *("--codec", self.codec, "--seed", str(self.seed)),
        ]


# -- the peer's end -------------------------------------------------------------------------------


class Averaging(Protocol):
    """One system, as one of its peers sees it."""

    def prepare(self) -> None:
        """Have this peer's vector at hand; not measured."""
        ...

    def exchange(self) -> dict[str, Any]:
        """Average it with the others'; returns what the system measured by itself."""
        ...

    def result(self) -> tuple[Any, dict[str, Any]]:
        """The average, (N,) float32 as a numpy array, and more about it; not measured.

        `means` in it are the blocks of the mean that it should be, if not everything was sent.
        """
        ...


class Pipe:
    """To the benchmark. Made before anything else, as libraries may print."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, what: str, **fields: Any) -> None:
        """One line."""
        print(json.dumps({"say": what, **fields}), file=self._out, flush=True)

    def hear(self, what: str) -> None:
        """Wait for this word; ends the process if the benchmark is gone."""
        if sys.stdin.readline().strip() != what:
            raise SystemExit(1)


def peer_arguments() -> argparse.Namespace:
    """What every peer is told."""
    parser = Parser()
    for name in ("number", "peers", "numel", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--codec", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--rendezvous", default="")
    return parser.parse_args()


def take_part(pipe: Pipe, arguments: argparse.Namespace, averaging: Averaging) -> None:
    """All rounds of one peer."""
    from blake3 import blake3

    for _ in range(arguments.rounds):
        averaging.prepare()
        pipe.say("ready")
        pipe.hear("go")
        began = time.monotonic()
        measured = averaging.exchange()
        ended = time.monotonic()
        pipe.say("done", began=began, ended=ended, **measured)
        pipe.hear("look")
        result_N, more = averaging.result()
        means = more.pop("means", None)
        if means is None:
            means = vectors.read_mean(arguments.folder / MEAN, arguments.numel)
        max_error, rms_error = vectors.errors(result_N, means)
        pipe.say(
            "looked",
            digest=blake3(result_N.view("uint8").data).hexdigest(),
            max_error=max_error,
            rms_error=rms_error,
            **more,
        )


# -- the benchmark's end --------------------------------------------------------------------------


class Shared(Protocol):
    """What all peers of a system are to do."""

    @property
    def peers(self) -> int:
        """How many there are."""
        ...

    def arguments(self) -> list[str]:
        """For the command line of each."""
        ...


class Processes:
    """One system's processes that say a line of JSON at a time, and their logs.

    Args:
        folder: for whatever they need to write.
        hosts: an address for each peer to listen on.
        prefixes: for each peer, what its command is preceded by.
    """

    kind: str  # the field that tells what a line is about
    log_name = "peer"
    leave_s = 5.0  # how long one may take to end by itself

    def __init__(
        self, folder: Path, hosts: Sequence[str], prefixes: Sequence[Sequence[str]]
    ) -> None:
        self._folder = folder
        self._hosts = hosts
        self._prefixes = prefixes
        self._processes: list[asyncio.subprocess.Process] = []

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started, one for each peer."""
        return [process.pid for process in self._processes]

    async def _start_all(self) -> None:
        """Start one for each peer, into `_processes`, each in a session of its own."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all of them; at the end, none is left.

        Raises:
            Failed: one did not start.
        """
        try:
            await self._start_all()
            yield
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.leave_s):
                    for process in self._processes:
                        await process.wait()
        finally:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with those that it started
            for process in self._processes:
                await process.wait()

    async def follow(self, number: int, last: str) -> AsyncIterator[dict[str, Any]]:
        """Whatever a peer says, each with the moment `at` which it came, up to its `last` word.

        Raises:
            Failed: it ended before, or said nothing for too long.
        """
        fields: dict[str, Any] = {self.kind: ""}
        while fields[self.kind] != last:
            try:
                async with asyncio.timeout(STEP_S):
                    fields = await self._next(number)
            except TimeoutError as error:
                raise Failed(f"peer {number} said nothing for {STEP_S:g} s") from error
            yield {**fields, "at": time.monotonic()}

    async def _next(self, number: int) -> dict[str, Any]:
        process = self._processes[number]
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            status = await process.wait()
            said = self._log(number).read_text(errors="replace").strip().splitlines()
            last = said[-1][:300] if said else "without a word"
            raise Failed(f"peer {number} ended with status {status}: {last}")
        fields: dict[str, Any] = json.loads(line)
        return fields

    def logs(self) -> list[str]:
        """What each has said on stderr so far."""
        return [self._log(number).read_text(errors="replace") for number in range(len(self._hosts))]

    def _log(self, number: int) -> Path:
        return self._folder / f"{self.log_name}-{number}.log"


class Peers(Processes):
    """The processes of one system.

    Args:
        script: of one peer; below this folder.
        task: see there.
        folder: with the mean in it; for whatever the peers need to write.
        hosts: an address for each peer to listen on.
        prefixes: for each peer, what its command is preceded by.
        introduced: whether the first peer has to say where it is before the others can start.
    """

    kind = "say"

    def __init__(
        self,
        script: str,
        task: Shared,
        folder: Path,
        *,
        hosts: Sequence[str],
        prefixes: Sequence[Sequence[str]],
        introduced: bool,
    ) -> None:
        super().__init__(folder, hosts, prefixes)
        self.log_name = Path(script).stem
        self._script = script
        self._task = task
        self._introduced = introduced

    async def _start_all(self) -> None:
        rendezvous = ""
        for number in range(self._task.peers):
            await self._start(number, rendezvous)
            if self._introduced and number == 0:
                rendezvous = (await self.hear("at"))[0]["rendezvous"]

    async def _start(self, number: int, rendezvous: str) -> None:
        task = self._task
        with self._log(number).open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(*self._prefixes[number], sys.executable, str(ROOT / "benchmarks" / self._script)),
                *("--number", str(number), *task.arguments()),
                *("--folder", str(self._folder), "--host", self._hosts[number]),
                *("--rendezvous", rendezvous),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )
        self._processes.append(process)

    async def hear(self, what: str) -> list[dict[str, Any]]:
        """Wait until all have said this.

        Raises:
            Failed: one ended, or said something else, or nothing for too long.
        """
        try:
            async with asyncio.timeout(STEP_S), asyncio.TaskGroup() as tasks:
                lines = [
                    tasks.create_task(self._line(number, what))
                    for number in range(len(self._processes))
                ]
        except TimeoutError as error:
            raise Failed(f"not all peers were {what} within {STEP_S:g} s") from error
        except BaseExceptionGroup as group:
            raise innermost(group) from group
        return [line.result() for line in lines]

    async def _line(self, number: int, what: str) -> dict[str, Any]:
        fields = await self._next(number)
        if fields["say"] != what:
            raise Failed(f"peer {number} said {fields['say']!r} instead of {what!r}")
        return fields

    def tell(self, what: str) -> None:
        """All of them."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{what}\n".encode())


def environment() -> dict[str, str]:
    """Of a peer: one thread of torch, whichever system, as they share the machine's cores."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one comparison, gone afterwards."""
    # What a peer has started may outlive it by a moment, and write.
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def run(main: Callable[[], Coroutine[Any, Any, int]]) -> NoReturn:
    """Run it and exit with what it returns; SIGINT and SIGTERM let it clean up first."""

    async def watched() -> int:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def end() -> None:
            # Once: a second cancellation would break off the cleaning up.
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, lambda: None)
            task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        return await main()

    try:
        sys.exit(asyncio.run(watched()))
    except asyncio.CancelledError:
        sys.exit("interrupted")
