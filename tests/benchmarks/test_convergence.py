from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import convergence
from benchmarks.convergence import Case, broken_streams, run_file, summaries, verdicts
from benchmarks.learning import Task
from benchmarks.lockstep import Failed

ROOT = Path(__file__).parents[2]
TASK: dict[str, Any] = {
    "peers": 4,
    "seed": 1,
    "model": {"layers": 1, "width": 16, "heads": 1, "context": 16},
    "batch": 2,
    "steps": 60,
    "every": 30,
    "eval_blocks": 2,
    "warmup_steps": 10,
    "device": "cpu",
    "optimizer": {"kind": "muon", "lr": 0.01},
}


def row(setting: str, loss: float, mb: float, seconds: float, **more: Any) -> dict[str, Any]:
    points = [
        {"step": 0, "val_loss": 5.0, "bytes": 0.0, "wall_s": 0.0},
        {"step": 30, "val_loss": 2.5, "bytes": mb / 2, "wall_s": seconds / 2},
        {"step": 60, "val_loss": loss, "bytes": mb, "wall_s": seconds},
    ]
    case = {"setting": setting, "mbit": 100.0, "seed": 1, "lost": 0.0}
    figures = {"loss": loss, "MB": mb, "seconds": seconds, "waiting": 0.02, "points": points}
    return {**case, **figures, **more}


def test_a_run_file_has_as_many_rounds_as_the_steps_need() -> None:
    _, config = run_file("shoal-wait-int4", Task(**TASK))
    assert config.round.rounds == 2
    assert config.round.start_peers == 4
    assert config.trainer.seed == 1
    with pytest.raises(Failed, match="multiple"):
        run_file("shoal-wait-int4", Task(**{**TASK, "steps": 70}))
    _, config = run_file("shoal-gradient", Task(**TASK))
    assert (config.round.rounds, config.round.target_batch) == (60, 8)


@pytest.mark.parametrize(
    ("setting", "found"), [("shoal-adamw", 0.002), ("shoal", 0.015), ("ddp-adamw", 0.002)]
)
def test_a_learning_rate_for_adamw_reaches_whoever_uses_it(setting: str, found: float) -> None:
    arguments = Namespace(
        size="cpu",
        lr=0.002,
        local_steps=30,
        hivemind_target=None,
        **{name: TASK[name] for name in ("peers", "model", "batch", "steps", "eval_blocks")},
        device="cpu",
    )
    task = convergence.task_of(Case(setting=setting, mbit=0, seed=1, lost=0), arguments)
    assert task.optimizer["lr"] == found
    if setting in convergence.OURS:
        _, config = run_file(setting, task)
        assert config.trainer.optimizer.lr == found


def test_a_short_trial_has_a_schedule_too() -> None:
    task = Task(**{**TASK, "steps": 2})
    assert task.schedule() == {"warmup_samples": 8, "total_samples": 16}


def test_each_round_the_same_number_of_peers_loses_all_its_streams() -> None:
    case = Case(setting="shoal", mbit=0, seed=3, lost=0.25)
    faults = broken_streams(case, 4, 10)
    broken = [fault for each in faults for fault in each.split(",") if fault]
    passes = sorted(int(fault.partition("@")[2].partition("=")[0]) for fault in broken)
    assert passes == list(range(1, 31))
    assert faults == broken_streams(case, 4, 10)
    assert broken_streams(Case(setting="shoal", mbit=0, seed=3, lost=0.0), 4, 10) == [""] * 4


def test_means_are_over_seeds_and_failures_count_for_nothing() -> None:
    rows = [
        row("shoal", 1.4, 10, 30),
        row("shoal", 1.6, 10, 50, seed=2),
        {**row("shoal", 9.9, 1, 1), "failed": "a peer broke off"},
    ]
    (mean,) = summaries(rows)
    assert mean["loss"] == pytest.approx(1.5)
    assert mean["seconds"] == 40
    assert mean["seeds"] == [1, 2]


def test_verdicts_compare_with_what_was_run_on_the_same_link() -> None:
    rows = [
        row("shoal", 1.5, 10, 40),
        row("shoal", 1.515, 10, 40, lost=0.25),
        row("ddp-adamw", 1.6, 4500, 100),
        row("ddp-muon", 1.45, 4500, 100, mbit=20.0),
        row("hivemind", 2.5, 100, 200),
    ]
    said = "\n".join(verdicts(rows))
    assert "loss -6.25 % of ddp-adamw's" in said
    assert "450x fewer MB" in said
    assert "ddp-muon" not in said
    assert "at hivemind's loss in 0.100 of its time" in said
    assert "losing 0.25 of the peers, loss +1.00 %" in said


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.timeout(240)
def test_a_rival_and_ours_learn_the_same_from_the_same_text(tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("tc") is None:
        pytest.skip("network namespaces need root and iproute2")
    path = tmp_path / "report.json"
    task = "--settings ddp-adamw,shoal-wait-int4 --mbit 1000 --peers 2 --steps 30 --batch 1"
    command = [sys.executable, "benchmarks/convergence.py", *task.split(), "--json", str(path)]
    done = subprocess.run(
        [*command, "--eval-blocks", "4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    theirs, ours = json.loads(path.read_text())["rows"]
    # The same initial model on the same held-out blocks; and both have learnt something.
    assert theirs["points"][0]["val_loss"] == pytest.approx(ours["points"][0]["val_loss"])
    for each in (theirs, ours):
        assert each["loss"] < each["points"][0]["val_loss"] - 1
        assert each["seen"] == 1.0
    assert theirs["MB"] > 100 * ours["MB"]


@pytest.mark.slow  # it imports torch
def test_a_setting_that_there_is_not_is_one_line_and_exit_status_2() -> None:
    command = [sys.executable, "benchmarks/convergence.py", "--settings", "shoal,nccl"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "nccl" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_setting_has_learning_rates_at_every_size() -> None:
    for rates in convergence.LEARNING_RATES.values():
        assert {rival.rates for rival in convergence.RIVALS.values()} | {"muon"} <= rates.keys()
