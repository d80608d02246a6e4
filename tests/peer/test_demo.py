"""The demo's judgement, on what peers may have reported."""

from __future__ import annotations

from typing import Any

import pytest

from peer.demo import Child, Demo, DemoConfig, judge


def child(number: int, digests: str, exit_status: int = 0, done: str = "") -> Child:
    """A peer that reported one digest per letter, `-` for none."""
    process: Any = None
    made = Child(number, process, peer=f"peer{number}", exit_status=exit_status)
    made.digests = {n: letter for n, letter in enumerate(digests) if letter != "-"}
    if done:
        made.done = {"digest": done, "val_loss": 1.0}
    return made


@pytest.mark.parametrize(
    ("children", "rounds", "agree", "problem"),
    [
        ([child(0, "abc", done="c"), child(1, "abc", done="c")], 3, True, ""),
        # One peer's model differs in the middle.
        ([child(0, "abc"), child(1, "axc")], 3, False, "differ after round 1"),
        # A peer that missed a round came back with the same model.
        ([child(0, "abc", done="c"), child(1, "a-c", done="c")], 3, True, ""),
        ([child(0, "abc", done="c"), child(1, "a-x", done="x")], 3, False, "after round 2"),
        # A peer that lived to the end did not come to the run's.
        ([child(0, "abc", done="c"), child(1, "ab")], 3, False, "peer 1 did not come to the end"),
        # Stopped before the end, one of them a round earlier.
        ([child(0, "abc"), child(1, "ab")], 3, True, ""),
        # A peer that died is not missed afterwards, but is believed before.
        ([child(0, "abc"), child(1, "a", -9)], 3, True, ""),
        ([child(0, "abc"), child(1, "x", -9)], 3, False, "differ after round 0"),
        # A difference that only the dead could tell of.
        ([child(0, "ab"), child(1, "abx", -9), child(2, "aby", -9)], 3, False, "after round 2"),
        ([child(0, "ab", done="b"), child(1, "ab", done="x")], 2, False, "final models differ"),
        ([child(0, ""), child(1, "")], 0, False, "no round"),
        ([child(0, "ab", -9), child(1, "ab", 1)], 2, True, ""),
        ([], 0, False, "no round"),
    ],
)
def test_agreement_is_judged_honestly(
    children: list[Child], rounds: int, agree: bool, problem: str
) -> None:
    verdict = judge(children)
    assert (verdict.rounds, verdict.agree) == (rounds, agree)
    assert problem in verdict.problem
    assert bool(verdict.problem) != agree


def test_the_demos_run_file_says_what_was_asked_for(tmp_path: Any) -> None:
    from peer.config import load

    config = DemoConfig(peers=3, rounds=5, codec="int8", seed=9, local_steps=7, data="/x/y.txt")
    run = load(Demo(config, tmp_path)._run_file(), "run.toml")
    assert (run.round.start_peers, run.round.rounds, run.round.codec) == (3, 5, "int8")
    assert (run.trainer.seed, run.local_steps, run.trainer.data.path) == (9, 7, "/x/y.txt")
    timed = load(Demo(DemoConfig(minutes=1), tmp_path)._run_file(), "run.toml")
    assert timed.round.rounds == 0
