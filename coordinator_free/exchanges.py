"""The exchanges that a peer takes part in, by the digests of their plans, for those who call it.

A member's stream may be a little ahead of the plan it belongs to: it waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable

from coordinator_free import wire
from coordinator_free.butterfly import Butterfly
from dht.errors import ProtocolViolation

PLAN_S = 5.0  # how long a stream may be ahead of its plan
KEPT = 4  # exchanges of one height whose chunks a later one may take up


class Exchanges:
    """The latest few."""

    def __init__(self) -> None:
        self._butterflies: dict[bytes, Butterfly] = {}
        self._arrived = asyncio.Event()  # another one for every plan

    def get(self, plan: bytes) -> Butterfly | None:
        """The exchange by this plan, if it is one of the latest."""
        return self._butterflies.get(plan)

    def add(self, butterfly: Butterfly) -> None:
        """From here on others can call; the oldest exchange may go."""
        while len(self._butterflies) >= KEPT:
            del self._butterflies[next(iter(self._butterflies))]
        self._butterflies[butterfly.digest] = butterfly
        self._arrived.set()
        self._arrived = asyncio.Event()

    def forget(self, but: Iterable[bytes]) -> None:
        """Drop all but those of these plans."""
        for digest in self._butterflies.keys() - set(but):
            del self._butterflies[digest]

    async def serve(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """A member's stream to this reducer; its first frame names the plan and the slice.

        Raises:
            ProtocolViolation: it names none that arrives.
        """
        first = await anext(frames, None)
        if first is None:
            raise ProtocolViolation(sender, "opened an exchange and said nothing")
        header, _ = wire.unpack_frame(first)
        try:
            async with asyncio.timeout(PLAN_S):
                while header.plan not in self._butterflies:
                    await self._arrived.wait()
        except TimeoutError as error:
            raise ProtocolViolation(sender, "opened an exchange of an unknown plan") from error
        async with contextlib.aclosing(
            self._butterflies[header.plan].serve(sender, header.slice, frames)
        ) as reduced:
            async for frame in reduced:
                yield frame
