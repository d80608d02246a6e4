from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("module", ["identity", "records", "errors", "directory"])
def test_light_modules_stay_light(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys, dht.{module}; print([m for m in ('hivemind', 'torch') if m in sys.modules])"
    )
    result = run(code, tmp_path)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# The user's own model.py beside the script: Python puts its folder first on the path.
HOSTILE_MODEL = "raise SystemExit('the user model was imported')\n"


def test_importing_the_dht_is_silent_and_leaves_logging_and_a_users_model_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.py").write_text(HOSTILE_MODEL)
    code = """
import logging
import dht.kademlia
assert logging.getLevelName(logging.WARNING) == "WARNING"
assert not logging.getLogger().handlers
assert not logging.getLogger("hivemind").handlers
logging.getLogger("hivemind.dht").info("chatter")
"""
    result = run(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_users_own_model_py_does_not_break_coordinator_free(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HOSTILE_MODEL)
    code = """
import importlib, pkgutil, coordinator_free
for module in pkgutil.iter_modules(coordinator_free.__path__, "coordinator_free."):
    importlib.import_module(module.name)
"""
    result = run(code, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
