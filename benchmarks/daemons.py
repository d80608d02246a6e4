"""Shoal's own daemons for a benchmark: started from a run file, heard through their events."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lockstep import ROOT, Processes, environment

LINE_LIMIT = 1 << 20


class Daemons(Processes):
    """`shoal create` and, for all but the first, `shoal join`.

    Args:
        run_file: TOML.
        folder: for their homes and logs.
        hosts: an address for each peer to listen on.
        prefixes: for each peer, what its command is preceded by.
        failpoints: for each peer, what `coordinator_free.failpoints` reads.
        device: of the model.
    """

    kind = "event"
    leave_s = 15.0  # once one has ended, the others still serve each other for a while

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
        super().__init__(folder, hosts, prefixes)
        self._failpoints = failpoints
        self._device = device
        (folder / "run.toml").write_text(run_file)

    async def _start_all(self) -> None:
        for number in range(len(self._hosts)):
            await self._start(number)

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
