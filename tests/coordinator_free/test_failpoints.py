from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from coordinator_free import failpoints
from dht.errors import ConfigError, Unreachable


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process would have sent to itself."""
    signals: list[int] = []

    def kill(pid: int, number: int) -> None:
        assert pid == os.getpid()
        signals.append(number)

    monkeypatch.setattr(os, "kill", kill)
    return signals


async def test_unarmed_points_do_nothing(sent: list[int]) -> None:
    for name in failpoints.MARKS:
        failpoints.reach(name)
    for name in failpoints.STREAMS | failpoints.WAITS:
        await failpoints.reach_async(name)
    assert sent == []


async def test_the_pass_that_is_named_is_the_one_that_fails(sent: list[int]) -> None:
    failpoints.arm("leader.commit.before@2=kill, send.half@3=stop")
    failpoints.reach("leader.commit.before")
    assert sent == []
    failpoints.reach("leader.commit.before")
    failpoints.reach("leader.commit.before")
    assert sent == [signal.SIGKILL]
    for _ in range(4):
        await failpoints.reach_async("send.half")
    assert sent == [signal.SIGKILL, signal.SIGSTOP]


async def test_a_stream_is_slowed_or_broken_on_every_pass() -> None:
    failpoints.arm("send.begin=sleep:0.02,results.half=disconnect")
    for _ in range(2):
        began = time.monotonic()
        await failpoints.reach_async("send.begin")
        assert time.monotonic() - began >= 0.02
        with pytest.raises(Unreachable):
            await failpoints.reach_async("results.half")


def test_arming_again_forgets_what_was_armed_and_counted(sent: list[int]) -> None:
    failpoints.arm("ready.before@2=kill")
    failpoints.reach("ready.before")
    failpoints.arm("ready.before@2=kill")
    failpoints.reach("ready.before")
    assert sent == []
    assert failpoints.armed("ready.before")
    failpoints.arm("")
    assert not failpoints.armed("ready.before")


def test_an_unknown_point_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        failpoints.arm("leader.comit=kill")
    for name in failpoints.POINTS:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        *("send.half", "send.half=", "send.half=explode", "send.half@0=kill", "send.half@x=kill"),
        *("send.half@-1=kill", "send.half=sleep", "send.half=sleep:nan", "send.half=sleep:-1"),
        *("send.half=sleep:x", "send.half=kill:9", "=kill"),
        # There is no stream to break, and the loop must not be blocked.
        *("ready.before=disconnect", "accept.after=sleep:1", "reduce.half=disconnect"),
    ],
)
def test_what_makes_no_sense_is_refused_and_arms_nothing(spec: str) -> None:
    with pytest.raises(ConfigError):
        failpoints.arm(f"leader.plan.after=kill,{spec}")
    assert not failpoints.armed("leader.plan.after")
