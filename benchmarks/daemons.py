"""Shoal's own daemons for a benchmark: started from a run file, heard through their events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lockstep import ROOT, STEP_S, Failed, environment

LEAVE_S = 15.0  # how long the others may take to end once one has
LINE_LIMIT = 1 << 20


class Daemons:
    """`shoal create` and, for all but the first, `shoal join`.

    Args:
        run_file: TOML.
        folder: for their homes and logs.
        hosts: an address for each peer to listen on.
        prefixes: for each peer, what its command is preceded by.
        failpoints: for each peer, what `coordinator_free.failpoints` reads.
        device: of the model.
    """

    def __init__(
        self,
        run_file: str,
        folder: Path,
        *,
        hosts: Sequence[str],
        prefixes: Sequence[Sequence[str]],
        failpoints: Sequence[str],
        device: str,
    ) -> None:
        self._folder = folder
        self._hosts = hosts
        self._prefixes = prefixes
        self._failpoints = failpoints
        self._device = device
        self._processes: list[asyncio.subprocess.Process] = []
        (folder / "run.toml").write_text(run_file)

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started, one for each peer."""
        return [process.pid for process in self._processes]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all of them; at the end, none is left."""
        try:
            for number in range(len(self._hosts)):
                await self._start(number)
            yield
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    for process in self._processes:
                        await process.wait()
        finally:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with libp2p's daemon
            for process in self._processes:
                await process.wait()

    async def _start(self, number: int) -> None:
        command = ["create", str(self._folder / "run.toml"), "--new"] if number == 0 else ["join"]
        with self._log(number).open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(*self._prefixes[number], sys.executable, "-m", "peer.cli", *command),
                *("--link-file", str(self._folder / "link"), "--json", "-v"),
                *("--home", str(self._folder / f"peer-{number}"), "--host", self._hosts[number]),
                *("--threads", "1", "--checkpoint-every", "0", "--device", self._device),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=LINE_LIMIT,
                env={
                    **environment(),
                    "TMPDIR": str(self._folder),
                    "SHOAL_FAILPOINTS": self._failpoints[number],
                },
                cwd=ROOT,
                start_new_session=True,
            )
        self._processes.append(process)

    async def follow(self, number: int) -> AsyncIterator[dict[str, Any]]:
        """A peer's events, each with the moment `at` which it came, up to and with "done".

        Raises:
            Failed: it ended before, or said nothing for too long.
        """
        event: dict[str, Any] = {"event": ""}
        while event["event"] != "done":
            try:
                async with asyncio.timeout(STEP_S):
                    event = await self._next(number)
            except TimeoutError as error:
                raise Failed(f"peer {number} said nothing for {STEP_S:g} s") from error
            yield {**event, "at": time.monotonic()}

    async def _next(self, number: int) -> dict[str, Any]:
        process = self._processes[number]
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            status = await process.wait()
            said = self._log(number).read_text(errors="replace").strip().splitlines()
            last = said[-1][:300] if said else "without a word"
            raise Failed(f"peer {number} ended with status {status}: {last}")
        event: dict[str, Any] = json.loads(line)
        return event

    def logs(self) -> list[str]:
        """What each has said on stderr so far."""
        return [self._log(number).read_text(errors="replace") for number in range(len(self._hosts))]

    def _log(self, number: int) -> Path:
        return self._folder / f"peer-{number}.log"
