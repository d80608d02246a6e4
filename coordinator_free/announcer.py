"""Keeps this peer's record in the directory fresh for as long as it takes part."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace

from dht.directory import Directory
from dht.errors import PeerError, RecordError
from dht.records import PEER_REFRESH_S, PeerRecord

logger = logging.getLogger(__name__)

REANNOUNCE_S = 5.0  # after an announcement that failed
FAREWELL_S = 1.0  # for telling the directory that this peer is gone


class Announcer:
    """Announces one peer.

    Args:
        directory: where to.
        record: makes the record as it is now.
    """

    def __init__(self, directory: Directory, record: Callable[[], PeerRecord]) -> None:
        self._directory = directory
        self._record = record

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            announced = await self._announce(self._record())
            await asyncio.sleep(PEER_REFRESH_S if announced else REANNOUNCE_S)

    async def farewell(self) -> None:
        """Say that this peer goes; nobody should wait for it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._announce(replace(self._record(), leaving=True))

    async def _announce(self, record: PeerRecord) -> bool:
        try:
            await self._directory.announce(record)
        except (PeerError, RecordError) as error:
            logger.warning("announcer.failed %s", error)
            return False
        return True
