from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from model import box
from model.trainer import Trainer

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("box_worker.py")
LAUNCHER = ("torch.distributed.run", "--master-addr", "127.0.0.1", "--nproc-per-node")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def task(tmp_path, corpus):
    """Writes a task; returns its file, and the one where the answer will be."""

    def make(**fields: Any) -> tuple[Path, Path]:
        name = f"task{len(list(tmp_path.glob('task*')))}"
        out = tmp_path / f"{name}.out"
        defaults = {"kind": "adamw", "batch_size": 4, "micro_batch": 2, "corpus": str(corpus)}
        file = tmp_path / name
        file.write_text(json.dumps({**defaults, **fields, "out": str(out)}))
        return file, out

    return make


def run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=140,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("processes", "kind", "batch_size"),
    [(2, "muon", 4), (3, "schedulefree", 2), (2, "adamw", 5)],
)  # 3 for 2: one of them has nothing to do in a step
def test_a_box_does_what_one_process_does(task, processes, kind, batch_size):
    alone, single = task(do="everything", kind=kind, batch_size=batch_size, micro_batch=2)
    run(str(WORKER), str(alone))
    shared, several = task(do="everything", kind=kind, batch_size=batch_size, micro_batch=2)
    port = ("--master-port", str(free_port()))
    run("-m", *LAUNCHER, str(processes), *port, str(WORKER), str(shared))
    wanted, given = torch.load(single), torch.load(several)
    assert wanted.keys() == given.keys()
    assert {"diverged in step", "diverged in accumulate", "refused"} <= wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert (given[name] - value).norm() < 1e-6 * value.norm(), name
        elif isinstance(value, str | bool):
            assert given[name] == value, name
        else:
            assert given[name] == pytest.approx(value, rel=1e-6), name


@contextmanager
def by_hand(file: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes without a launcher, which would end one when the other does."""
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(file)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(out: Path, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 200
    while not out.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("do", ["idle", "train"])
def test_when_rank_0_dies_the_others_end(task, do):
    file, out = task(do=do, idle_s=0.0)
    with by_hand(file) as (first, second):
        wait_for(out, [first, second])
        first.kill()
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "BoxError: a process of this box is gone" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rank_0_may_be_silent_for_long_but_not_hang(task):
    # Silent for twice the patience, during which its heart beats.
    file, out = task(do="idle", idle_s=4.0, beat_s=0.2, patience_s=2.0)
    with by_hand(file) as (first, second):
        wait_for(out, [first, second])
        first.send_signal(signal.SIGSTOP)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "BoxError: a process of this box is gone" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_dies_is_an_error_in_rank_0(task):
    file, out = task(do="train", idle_s=0.0)
    with by_hand(file) as (first, second):
        wait_for(out, [first, second])
        second.kill()
        _, said = first.communicate(timeout=60)
        assert first.returncode == 1
        assert "BoxError: a process of this box is gone" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rank_0_may_have_nothing_to_do(task):
    file, _ = task(do="nothing")
    run("-m", *LAUNCHER, "2", "--master-port", str(free_port()), str(WORKER), str(file))


def test_a_process_of_its_own_is_a_plain_trainer(tiny):
    crew = box.Crew()
    alone = crew.trainer(tiny, "", lambda: False)
    assert type(alone) is Trainer
    crew.close()
    box.Crew().close()


class Launcher(dict[str, str]):
    """The launcher's store, as far as rank 0 uses it before there are connections."""

    def add(self, key: str, amount: int) -> int:
        assert amount == 0
        return 0

    def set(self, key: str, value: str) -> None:
        self[key] = value


def test_rank_0_waits_for_the_others_and_can_be_told_to_stop(tiny, monkeypatch):
    launcher = Launcher()
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("model.box._meet", lambda limit_s: launcher)
    monkeypatch.setattr("model.box.MUSTER_S", 0.0)
    monkeypatch.setattr("model.box._LOOK_S", 0.0)
    crew = box.Crew()
    assert crew.trainer(tiny, "text", lambda: True) is None
    with pytest.raises(box.BoxError, match=r"2 processes of this box have not come"):
        crew.trainer(tiny, "text", lambda: False)
    assert launcher == {}
    crew.close()
    assert launcher == {"run_file": ""}


def test_torchrun_gives_each_process_its_device(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert box._device("auto", 1) == "cuda:1"
    assert box._device("cpu", 1) == "cpu"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"4 processes need as many GPUs, and this machine has 2"):
        box._device("auto", 0)
    with pytest.raises(ValueError, match=r"'cuda:0' is for one process"):
        box._device("cuda:0", 1)
