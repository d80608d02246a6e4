"""A cap on bytes per second over all streams of a peer, one for each direction.

Guarantees: over any time t, no more than `bps * (t + burst_s)` bytes pass, and of messages larger
than a burst at most one message more, so the long-run rate is the cap whatever the messages' sizes
and however late a sleeper wakes. Streams pass in the order in which they asked; one that waits for
its message before it asks again gets its turn among the others. Who gives up waiting takes nothing.
Not guaranteed: anything about headers, encryption and retransmission, which are a few percent more.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

BURST_S = 0.05  # of the cap's bytes may pass at once after a pause; more than a sleeper oversleeps
NOTED_S = 1.0  # of waiting, at most, is due to messages that did not wait themselves


class TokenBucket:
    """How long each message has to wait so that all together keep to a rate.

    A message may go when there are tokens for it, or, if it is larger than the bucket, when that is
    full; what it takes beyond is a debt that later ones wait for.

    Args:
        bps: bytes per second, above 0.
        burst_s: the bucket holds what comes in so many seconds.
    """

    def __init__(self, bps: float, burst_s: float = BURST_S) -> None:
        if not (math.isfinite(bps) and bps > 0 and burst_s >= 0):
            raise ValueError(f"a rate of {bps} bytes per second with bursts of {burst_s} s")
        self._bps = bps
        self._burst_s = burst_s
        self._empty_at = -math.inf  # when all that was taken is paid for and the bucket fills again

    def take(self, nbytes: int, now: float) -> float:
        """Take tokens for a message, and tell how many seconds it has to wait before it goes."""
        empty_at = max(self._empty_at, now - self._burst_s)
        cost_s = nbytes / self._bps
        self._empty_at = empty_at + cost_s
        return max(0.0, empty_at + min(cost_s, self._burst_s) - now)

    def charge(self, nbytes: int, now: float, most_s: float) -> None:
        """Take tokens for what has passed already: others wait for it, `most_s` at most."""
        before = self._empty_at
        self.take(nbytes, now)
        self._empty_at = min(self._empty_at, max(before, now + most_s))

    def give_back(self, nbytes: int) -> None:
        """The message that took last does not go."""
        self._empty_at -= nbytes / self._bps


class Limiter:
    """Lets messages of many streams pass at a rate.

    Args:
        bps: bytes per second; 0: no limit.
        clock: seconds.
        sleep: waits so many of them.
        burst_s: as for `TokenBucket`.
    """

    def __init__(
        self,
        bps: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        burst_s: float = BURST_S,
    ) -> None:
        self._bucket = TokenBucket(bps, burst_s) if bps else None
        self._clock = clock
        self._sleep = sleep
        self._line = asyncio.Lock()  # first come, first served

    def note(self, nbytes: int) -> None:
        """A small message that waits for nobody passes; those after it pay for it, within bounds.

        Else anybody could silence a peer for minutes, by messages that it has not asked for.
        """
        if self._bucket is not None:
            self._bucket.charge(nbytes, self._clock(), NOTED_S)

    async def acquire(self, nbytes: int) -> None:
        """Wait until a message of so many bytes may go."""
        if self._bucket is None:
            return
        # Only the head of the line has taken anything, so giving it back moves nobody else's turn.
        async with self._line:
            wait_s = self._bucket.take(nbytes, self._clock())
            if wait_s > 0:
                try:
                    await self._sleep(wait_s)
                except BaseException:  # a cancellation, above all
                    self._bucket.give_back(nbytes)
                    raise


class Limits:
    """What a peer may send and receive, over all its streams.

    Args:
        up_bps: bytes per second; 0: no limit.
        down_bps: the same, the other way.
        clock: seconds.
    """

    def __init__(
        self,
        up_bps: float = 0.0,
        down_bps: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.up = Limiter(up_bps, clock)
        self.down = Limiter(down_bps, clock)
