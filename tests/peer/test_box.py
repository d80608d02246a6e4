"""A peer in two processes, as torchrun starts it: real processes, a real DHT, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peer import cli
from tests.model.test_box import free_port
from tests.peer.test_swarm import SMALL, Shoal, events, until

TAKING_PART = ("--json", "--host", "127.0.0.1", "--device", "cpu")


class Boxes(Shoal):
    """Starts the same commands by torchrun, too."""

    def torchrun(self, *arguments: str) -> subprocess.Popen[str]:
        launcher = ("torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", *launcher, str(free_port()), "--nproc-per-node", "2"),
                *("--no-python", sys.executable, "-m", "peer.cli", *arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )
        self.processes.append(process)
        return process

    def run_file(self, rounds: int, start_peers: int) -> str:
        path = self.folder / "run.toml"
        path.write_text(SMALL.format(rounds=rounds, start_peers=start_peers, local_steps=5))
        return str(path)

    def ranks(self) -> dict[str, int]:
        """The processes of the box, without those that rank 0 started itself."""
        found = {}
        for pid, command in self._world().items():
            with contextlib.suppress(OSError):
                if " peer.cli " not in command:
                    continue
                for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    name, _, value = part.decode().partition("=")
                    if name == "RANK":
                        found[value] = pid
        return found

    def home(self, name: str) -> tuple[str, str]:
        """In the folder by which processes are known to belong here."""
        return "--home", str(self.temporary / name)

    def nobody_within(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.world() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.world() == []

    def close(self) -> None:
        for pid in self.ranks().values():  # killing the launcher would leave them
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        super().close()


@pytest.fixture
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boxes]:
    made = Boxes(tmp_path_factory.mktemp("b"))
    yield made
    made.close()


def own_lines(text: str) -> list[str]:
    """What is not from the launcher."""
    return [line for line in text.splitlines() if line.startswith("shoal")]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_box_joins_a_run_and_commits_its_rounds(boxes: Boxes) -> None:
    link = ("--link-file", str(boxes.folder / "link"))
    alone = boxes.start(
        *("create", boxes.run_file(rounds=2, start_peers=2), *TAKING_PART, *link),
        *boxes.home("alone"),
    )
    box = boxes.torchrun("join", *TAKING_PART, *link, *boxes.home("box"))
    said = {}
    for name, process in {"alone": alone, "box": box}.items():
        out, err = process.communicate(timeout=200)
        assert (process.returncode, err) == (0, "")
        said[name] = [json.loads(line) for line in out.splitlines()]
        assert len({event["peer"] for event in said[name]}) == 1

    def rounds(of: str) -> list[dict[str, Any]]:
        return [event for event in said[of] if event["event"] == "round"]

    assert [event["members"] for event in rounds("box")] == [2, 2]
    assert [event["digest"] for event in rounds("box")] == [
        event["digest"] for event in rounds("alone")
    ]
    assert [event["samples"] for event in rounds("box")] == [20, 20]
    (chosen,) = [event for event in said["box"] if event["event"] == "chosen"]
    assert chosen["processes"].startswith("2: ")
    assert said["box"][-1]["event"] == said["alone"][-1]["event"] == "done"
    assert said["box"][-1]["digest"] == said["alone"][-1]["digest"]
    boxes.nobody_within(5)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_launcher_that_is_told_to_end_ends_a_box_politely(
    boxes: Boxes, ending: signal.Signals
) -> None:
    run_file = boxes.run_file(rounds=100_000, start_peers=1)
    box = boxes.torchrun("create", run_file, *TAKING_PART, *boxes.home("box"))
    until(events(box.stdout), lambda event: event["event"] == "round")
    box.send_signal(ending)
    out, err = box.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["event"] == "left"
    assert own_lines(err) == []
    boxes.nobody_within(5)


def kill_rank_1(boxes: Boxes) -> None:
    os.kill(boxes.ranks()["1"], signal.SIGKILL)


def kill_rank_0(boxes: Boxes) -> None:
    os.kill(boxes.ranks()["0"], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kill", "who"), [(kill_rank_1, "shoal create: "), (kill_rank_0, "shoal create: process 1: ")]
)
def test_who_loses_another_process_says_so_in_a_line(
    boxes: Boxes, kill: Callable[[Boxes], None], who: str
) -> None:
    run_file = boxes.run_file(rounds=100_000, start_peers=1)
    box = boxes.torchrun("create", run_file, *TAKING_PART, *boxes.home("box"))
    until(events(box.stdout), lambda event: event["event"] == "round")
    kill(boxes)
    out, err = box.communicate(timeout=60)
    assert box.returncode == 1
    (line,) = own_lines(err)
    assert line.startswith(f"{who}a process of this box is gone: ")
    assert "exitcode  : 1 " in err  # in the launcher's report: of the one that says it
    assert '"left"' not in out
    boxes.nobody_within(10)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nobody_waits_for_a_rank_0_that_cannot_begin(boxes: Boxes) -> None:
    began = time.monotonic()
    box = boxes.torchrun("create", str(boxes.folder / "nothing.toml"), *boxes.home("box"))
    _, err = box.communicate(timeout=100)
    (line,) = own_lines(err)
    assert "there is no run file" in line
    assert "exitcode  : 2 " in err
    assert time.monotonic() - began < 60
    boxes.nobody_within(0)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def be(rank: int) -> None:
        for name, value in {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))

    return be


@pytest.mark.parametrize("command", [["demo"], ["assist", "shoal://"]])
def test_what_is_not_for_torchrun(
    rank: Callable[[int], None], capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    rank(0)
    assert cli.run(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "not for torchrun" in err
    rank(1)
    assert cli.run(command) == 2
    assert capsys.readouterr() == ("", "")
