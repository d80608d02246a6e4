"""What one peer knows of links: the speed of its own, and how far it believes the others' claims.

The asyncio shell of `bandwidth`: it looks at the bytes that pass while an exchange is under way and
draws its conclusions when that is over. The session says them to the next leader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from coordinator_free.bandwidth import LATE, Gauge, Rate, Trust
from coordinator_free.butterfly import Butterfly
from coordinator_free.planning import deliveries
from coordinator_free.sockets import Outgoing

SAMPLE_S = 0.05


class Links:
    """Measures while an exchange runs.

    Args:
        traffic: bytes written and received so far.
        outgoing: `Outgoing.look` of this process, or what plays it.
    """

    def __init__(
        self,
        traffic: Callable[[], tuple[int, int]],
        outgoing: Callable[[], tuple[int, bool] | None] | None = None,
    ) -> None:
        self._traffic = traffic
        self._outgoing = Outgoing().look if outgoing is None else outgoing
        self._gauge = Gauge()
        self._trust = Trust()

    @property
    def rate(self) -> Rate:
        """Of this peer's own links; 0 where that is unknown."""
        return self._gauge.rate

    @property
    def views(self) -> Mapping[str, Rate]:
        """The most that is believed of some others."""
        return self._trust.view

    @contextlib.asynccontextmanager
    async def watching(self, butterfly: Butterfly) -> AsyncIterator[None]:
        """While the block runs, its exchange is; learn from it at the end."""
        now = asyncio.get_running_loop().time
        plan, began = butterfly.plan, now()
        look = self._looking()
        look()
        sampling = asyncio.create_task(self._sample(look))
        try:
            yield
        finally:
            sampling.cancel()
            look()
            late = 0 < LATE * plan.expected_s < now() - began and not plan.attempt
            others = self._trust.observe(*deliveries(plan, butterfly.slices_s, butterfly.parts_s))
            self._gauge.finish(late=late and not others)
            self._trust.keep(plan.receivers)

    def _looking(self) -> Callable[[], None]:
        """Takes a sample, counted from now on."""
        now = asyncio.get_running_loop().time
        (before, _), (arrived_before, _) = self._traffic(), self._outgoing() or (0, False)

        def look() -> None:
            (written, received), seen = self._traffic(), self._outgoing()
            sent, full = written - before, None
            if seen is not None:
                # Neither what the sockets hold, nor what others in this process have sent.
                sent, full = min(sent, seen[0] - arrived_before), seen[1]
            self._gauge.sample(now(), sent, received, full)

        return look

    async def _sample(self, look: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            look()
