"""Caps on bytes per second under a virtual clock, and once under the real one."""

from __future__ import annotations

import asyncio
import itertools
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator_free.limits import BURST_S, NOTED_S, Limiter, TokenBucket

MB = 1_000_000


class Line:
    """A virtual clock. Only the head of a line sleeps, so whoever does moves it on."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now = 50.0
        self.sleeps = 0
        self._oversleep_s = oversleep_s

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        await asyncio.sleep(0)
        self.now += seconds + self._oversleep_s


sizes = st.sampled_from([1, 100, 65_536, 8 * MB]) | st.integers(1, 8 * MB)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.0, 0.001, 0.3, 40.0]), sizes), max_size=50),
    st.sampled_from([1_000.0, 1e6, 3e7, 1e9]),
    st.sampled_from([0.0, 0.1, 2.0]),
)
def test_no_window_holds_more_than_the_rate_and_one_burst(
    messages: list[tuple[float, int]], bps: float, burst_s: float
) -> None:
    bucket = TokenBucket(bps, burst_s)
    now, passed = 10.0, []
    for pause_s, size in messages:
        now += pause_s
        now += bucket.take(size, now)
        passed.append((now, size))
    for first, last in itertools.combinations_with_replacement(range(len(passed)), 2):
        window_s = passed[last][0] - passed[first][0]
        total = sum(size for _, size in passed[first : last + 1])
        # A message larger than the bucket goes into debt for what it is larger.
        excess = max(0.0, passed[last][1] - burst_s * bps)
        assert total <= (window_s + burst_s) * bps * (1 + 1e-9) + excess + 1


@pytest.mark.parametrize("size", [1, 1_000, 65_536, MB, 8 * MB])
@pytest.mark.parametrize("oversleep_s", [0.0, 0.002, 0.02])
async def test_the_rate_holds_in_the_long_run(size: int, oversleep_s: float) -> None:
    line = Line(oversleep_s)
    bps = max(2e3, 100.0 * size / 60)
    limiter = Limiter(bps, line, line.sleep)
    began, count = line.now, 0
    while line.now < began + 60:
        await limiter.acquire(size)
        count += 1
    assert count * size / (line.now - began) == pytest.approx(bps, rel=0.015)


async def test_the_rate_holds_for_mixed_messages_of_many_streams() -> None:
    line = Line(0.001)
    limiter = Limiter(5e6, line, line.sleep)
    rng = random.Random(1)
    total = 0

    async def stream() -> None:
        nonlocal total
        while line.now < 350:
            size = rng.choice([1, 500, 65_536, MB, 8 * MB])
            await limiter.acquire(size)
            total += size

    await asyncio.gather(*(stream() for _ in range(6)))
    assert total / (line.now - 50) == pytest.approx(5e6, rel=0.02)


def test_a_pause_earns_no_more_than_one_burst() -> None:
    bucket = TokenBucket(1000.0, 0.5)
    for size in (300, 200):
        assert bucket.take(size, 1000.0) == 0
    assert bucket.take(100, 1000.0) == pytest.approx(0.1)
    for size in (300, 200):
        assert bucket.take(size, 5000.0) == 0
    assert bucket.take(1, 5000.0) > 0


def test_a_large_message_goes_at_once_and_the_next_pays() -> None:
    bucket = TokenBucket(1000.0, 0.5)
    assert bucket.take(8000, 0.0) == 0
    assert bucket.take(100, 1.0) == pytest.approx(6.6)  # 0.5 s were in the bucket: 7.5 + 0.1 - 1


async def test_what_nobody_asked_for_delays_others_by_no_more_than_a_second() -> None:
    clock = Never()
    limiter = Limiter(1000.0, clock, clock.sleep)
    for _ in range(60):
        limiter.note(10**6)
    waiting = asyncio.create_task(limiter.acquire(1))
    await asyncio.sleep(0)
    clock.wake.set()
    await waiting
    assert clock.waits == [pytest.approx(NOTED_S, abs=0.01)]
    # Nor is what somebody else took forgiven by it.
    bucket = TokenBucket(1000.0, 0.0)
    bucket.take(8000, 0.0)
    bucket.charge(100, 0.0, NOTED_S)
    assert bucket.take(1, 0.0) == pytest.approx(8.0)


async def test_without_a_limit_nobody_waits() -> None:
    line = Line()
    limiter = Limiter(0.0, line, line.sleep)
    await asyncio.gather(*(limiter.acquire(10**12) for _ in range(100)))
    assert line.sleeps == 0


async def test_streams_take_turns_in_the_order_of_asking() -> None:
    line = Line()
    limiter = Limiter(1000.0, line, line.sleep)
    turns: list[str] = []

    async def stream(name: str) -> None:
        for _ in range(20):
            await limiter.acquire(100)
            turns.append(name)

    await asyncio.gather(*(stream(name) for name in "abc"))
    steady = turns[6:]  # what a full bucket lets through at once is in nobody's way
    gaps = [steady[at : at + 3] for at in range(0, len(steady) - 8, 3)]
    assert all(set(three) == set("abc") for three in gaps)


class Never:
    """A clock that stands still; sleepers wait until they are woken or cancelled."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.wake = asyncio.Event()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await self.wake.wait()


async def test_who_gives_up_waiting_takes_nothing() -> None:
    clock = Never()
    limiter = Limiter(1000.0, clock, clock.sleep)
    await limiter.acquire(10_000)  # at once, on credit
    waiting = [asyncio.create_task(limiter.acquire(500)) for _ in range(4)]
    await asyncio.sleep(0.001)
    for number in (1, 2, 0):  # two that stand in line, then the one that sleeps
        waiting[number].cancel()
        await asyncio.sleep(0.001)
    assert clock.waits == [pytest.approx(10.0)] * 2  # the first and the last
    clock.wake.set()
    await waiting[3]
    clock.now = 10.5  # 10 s for the first, half a second for the last, a burst of them on credit
    clock.waits.clear()
    await limiter.acquire(100)
    assert clock.waits == []
    assert [task.cancelled() for task in waiting] == [True, True, True, False]


async def test_cancelling_at_random_costs_no_bytes() -> None:
    line = Line()
    limiter = Limiter(1e6, line, line.sleep)
    rng = random.Random(3)
    total = 0

    async def stream() -> None:
        nonlocal total
        while line.now < 150:
            size = rng.choice([1000, 300_000])
            task = asyncio.create_task(limiter.acquire(size))
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            if rng.random() < 0.5:
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                continue
            total += size

    await asyncio.gather(*(stream() for _ in range(5)))
    assert total / (line.now - 50) == pytest.approx(1e6, rel=0.02)


@pytest.mark.parametrize(
    ("bps", "burst_s"), [(0.0, 0.1), (-1.0, 0.1), (float("nan"), 0.1), (1, -1)]
)
def test_a_bucket_without_a_rate_is_refused(bps: float, burst_s: float) -> None:
    with pytest.raises(ValueError, match="bytes per second"):
        TokenBucket(bps, burst_s)


async def test_the_rate_holds_by_the_real_clock() -> None:
    limiter = Limiter(4e6, time.monotonic)
    began, total = time.monotonic(), 0
    while total < 2 * MB:
        await limiter.acquire(10_000)
        total += 10_000
    # Half a second, less what was in the bucket; a busy machine may be late, never early.
    assert time.monotonic() - began >= 0.99 * (0.5 - BURST_S)
