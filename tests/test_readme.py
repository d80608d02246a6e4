"""The loops in README.md run as they are written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOOPS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written_with", "says"),
    [("SwarmOptimizer", r"round \d+: 1 peers, [0-9a-f]{12}"), ("SwarmCallback", r"here: [1-9]")],
)
def test_a_loop_runs_as_written(written_with: str, says: str, tmp_path: Path) -> None:
    (loop,) = [text for text in LOOPS if f"import {written_with}" in text]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", loop],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert re.search(says, ran.stdout), ran.stdout
