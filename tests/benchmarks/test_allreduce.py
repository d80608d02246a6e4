from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.mark.slow
def test_ours_and_gloo_are_measured_and_their_results_verified(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the benchmark reads /proc")
    path = tmp_path / "report.json"
    task = "--peers 2 --mb 1 --codec fp32 --rounds 3 --against gloo"
    done = benchmark("allreduce.py", *task.split(), "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report.keys() >= {"machine", "commit", "command", "date", "versions", "load"}
    assert [(row["system"], row["codec"]) for row in report["rows"]] == [
        ("shoal", "fp32"),
        ("gloo", "fp32"),
    ]
    for row in report["rows"]:
        assert row["right"]
        assert row["identical"]
        assert 0 <= row["max_error"] < 1e-8
        assert 0 < row["exchange_s"] <= row["whole_s"] * 1.5 + 0.1  # two clocks' readings apart
        assert row["GB/s"] > 0
        assert len(row["rounds"]) == 3
        for each in row["rounds"]:
            assert each["right"]
            assert len(each["peers"]) == 2
            assert all(peer["cpu_s"] >= 0 for peer in each["peers"])
            # Half of it to the other, half of the mean back; None where there is no `ss`.
            assert each["wire_bytes"] is None or 1e6 < each["wire_bytes"] < 1.2e6


@pytest.mark.slow  # it imports torch
@pytest.mark.parametrize(
    ("script", "arguments", "about"),
    [
        ("allreduce.py", "--peers 1", "--peers"),
        ("allreduce.py", "--codec fp32,fp64", "fp64"),
        ("allreduce.py", "--json /nowhere/report.json", "/nowhere"),
        ("wan.py", "--cases 10,56k", "56k"),
        ("wan.py", "--delay-ms 100,far", "far"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(script: str, arguments: str, about: str) -> None:
    done = benchmark(script, *arguments.split())
    assert done.returncode == 2
    assert about in done.stderr
    assert len(done.stderr.splitlines()) == 1
