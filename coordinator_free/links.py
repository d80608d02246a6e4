"""What one peer knows of links: the speed of its own, and how far it believes the others' claims.

The asyncio shell of `bandwidth`: it looks at the bytes that pass while an exchange is under way and
draws its conclusions when that is over. The session says them to the next leader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

from coordinator_free.bandwidth import Gauge, Rate, Trust
from coordinator_free.butterfly import Butterfly
from coordinator_free.planning import deliveries

SAMPLE_S = 0.05


class Links:
    """Measures while an exchange runs.

    Args:
        traffic: bytes sent and received so far.
    """

    def __init__(self, traffic: Callable[[], tuple[int, int]]) -> None:
        self._traffic = traffic
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
        sampling = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            sampling.cancel()
            self._gauge.finish()
            plan = butterfly.plan
            self._trust.observe(*deliveries(plan, butterfly.slices_s, butterfly.parts_s))
            self._trust.keep(plan.receivers)

    async def _sample(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            self._gauge.sample(now(), *self._traffic())
            await asyncio.sleep(SAMPLE_S)
