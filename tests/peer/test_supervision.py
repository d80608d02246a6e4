"""The orphan's duties, with real processes: only the kernel can tell whether they are done."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dht.identity import Identity
from peer.cli import run
from peer.supervision import LOCK_NAME, Supervision

# A child that says when it is up, obeys, and stays until told to leave.
CHILD = """
import sys, threading
from pathlib import Path
from peer.supervision import Supervision
from peer.status import Status

class Node:
    def __init__(self): self.over = threading.Event()
    def status(self): return Status(peer="p")
    def stop(self): print("stop", flush=True); self.over.set()
    def finish_after(self, round): print("finish", round, flush=True)
    def report(self, event): pass
    def abandon(self, status): print("abandon", flush=True)

supervision = Supervision(Path(sys.argv[1]))
supervision.start()
print("up", flush=True)
if sys.argv[2] == "late":
    threading.Event().wait()
node = Node()
supervision.attach(node)
node.over.wait()
supervision.clean_up()
"""


def child(folder: Path, kind: str = "ready") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    (path / LOCK_NAME).touch()
    (path / "peer-0").mkdir()
    return path


def test_orders_are_obeyed_and_the_folder_stays(folder: Path) -> None:
    with child(folder) as process:
        out, _ = process.communicate("finish 7\nnonsense\nfinish x\nstop\n")
        assert out.splitlines()[:2] == ["finish 7", "stop"]
    # "stop" came with the end of stdin, so it may have seen either first; here it had an order.
    assert process.returncode == 0


def test_a_told_child_leaves_the_folder_to_the_demo(folder: Path) -> None:
    with child(folder) as process:
        assert process.stdin is not None
        process.stdin.write("stop\n")
        process.stdin.flush()
        process.wait(10)
        assert folder.exists()


def test_the_last_orphan_removes_the_folder(folder: Path) -> None:
    with child(folder) as first, child(folder) as second:
        first.communicate()
        assert first.returncode == 0
        assert folder.exists()
        second.communicate()
        assert second.returncode == 0
        assert not folder.exists()


def test_an_orphan_that_is_still_loading_goes_as_well(folder: Path) -> None:
    with child(folder, "late") as process:
        process.communicate()
        assert process.returncode == 1
        assert not folder.exists()


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_child_that_comes_after_the_end_brings_nothing_back(tmp_path: Path, left: str) -> None:
    folder = tmp_path / "demo"
    if left != "nothing":
        folder.mkdir()
    arguments = ["join", "shoal://" + "0" * 40, "--home", str(folder / "peer-1")]
    arguments[1] += "?peer=/ip4/127.0.0.1/tcp/1/p2p/" + Identity.generate().peer_id
    assert run([*arguments, "--supervised", str(folder)]) == 1
    assert not (folder / "peer-1").exists()


def test_the_folder_goes_while_somebody_still_writes_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = shutil.rmtree, []

    def overtaken(path: Path, **how: bool) -> None:
        remove(path, **how)
        calls.append(path)
        if len(calls) < 3:  # as a file that appears between the walk and the rmdir
            path.mkdir()

    monkeypatch.setattr(shutil, "rmtree", overtaken)
    supervision = Supervision(folder)
    supervision.orphaned = True
    supervision.clean_up()
    assert len(calls) == 3
    assert not folder.exists()
