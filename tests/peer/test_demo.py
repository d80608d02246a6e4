"""The demo's judgement, on what peers may have reported."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import Any

import pytest

from dht.errors import ConfigError, SwarmError
from peer.demo import Child, Demo, DemoConfig, judge, memory_use, run_demo


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
    assert (run.trainer.seed, run.local.local_steps, run.trainer.data.path) == (9, 7, "/x/y.txt")
    timed = load(Demo(DemoConfig(minutes=1), tmp_path)._run_file(), "run.toml")
    assert timed.round.rounds == 0


def test_the_killed_did_not_die_and_who_contradicts_itself_is_seen() -> None:
    killed = child(0, "ab", -9)
    killed.trouble = "killed"
    assert not killed.died
    assert child(1, "ab", -9).died
    revived = child(2, "abc", done="c")
    revived.contradicted = 1
    assert "differ after round 1" in judge([revived, child(3, "abc", done="c")]).problem


def test_memory_is_compared_between_the_first_and_the_last_quarter() -> None:
    grown = child(0, "a")
    grown.memory = [(float(second), 100_000_000 + second * 1_000_000) for second in range(101)]
    use = memory_use(grown)
    assert (use.first_quarter_mb, use.last_quarter_mb) == (112.5, 187.5)
    unknown = memory_use(child(1, "a"))
    assert (unknown.first_quarter_mb, unknown.last_quarter_mb) == (None, None)


def test_chaos_needs_a_majority_to_be_left(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="--peers 3 or more"):
        Demo(DemoConfig(peers=2, chaos=True), tmp_path)


# A peer that completes a round every tenth of a second until it is told to leave, or ends before.
PEER = """
import json, sys, threading, time
number, ends = sys.argv[1:]
told = threading.Event()
def listen():
    sys.stdin.readline()
    told.set()
threading.Thread(target=listen, daemon=True).start()
if ends != "never":
    time.sleep(0.5)
    print("shoal join: boom", file=sys.stderr)
    sys.exit(int(ends))
for round in range(1000):
    event = {"event": "round", "peer": number, "round": round, "digest": "d"}
    print(json.dumps({**event, "val_loss": 1 / (round + 1)}), flush=True)
    if told.wait(0.1):
        break
"""


def start_played(ends: str) -> Any:
    """Peers of which the second ends by itself before its first round, with this exit status."""

    async def start(self: Demo, number: int, *command: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PEER, str(number), ends if number == 1 else "never"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    return start


@pytest.mark.parametrize(
    ("ends", "says"),
    [("1", r"died that was not killed.*exit status 1.*boom"), ("0", "did not come to its end")],
)
def test_with_chaos_a_peer_that_ends_by_itself_is_the_end_and_the_failure_that_it_is(
    monkeypatch: pytest.MonkeyPatch, ends: str, says: str
) -> None:
    monkeypatch.setattr(Demo, "_start", start_played(ends))
    began = time.monotonic()
    with pytest.raises(SwarmError, match=says):
        run_demo(DemoConfig(peers=3, minutes=60, chaos=True, seed=1, json=True))
    assert time.monotonic() - began < 20


def test_a_demo_under_nohup_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[int] = []
    monkeypatch.setattr(Demo, "_start", start_played("1"))
    monkeypatch.setattr(
        asyncio.SelectorEventLoop,
        "add_signal_handler",
        lambda loop, number, *_: handled.append(number),
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(SwarmError):
            run_demo(DemoConfig(peers=3, chaos=True, seed=1, json=True))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP not in handled
    assert signal.SIGTERM in handled


def test_chaos_ends_by_order_and_not_by_the_run_file(tmp_path: Any) -> None:
    from peer.config import load

    demo = Demo(DemoConfig(peers=3, rounds=5, chaos=True, seed=4), tmp_path)
    run = load(demo._run_file(), "run.toml")
    assert (run.round.rounds, run.trainer.seed) == (0, 4)
