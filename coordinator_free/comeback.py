"""Coming back to a run that may be dead: look for others who came back, or let the run go on.

A peer that starts from a checkpoint has no seat, and the roster that it knows has other addresses
by now; who came back is in the directory. `revival` says when it may go on without the others; this
does the asking and the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from coordinator_free import revival, wire
from coordinator_free.catchup import CatchUp
from coordinator_free.certificates import Head, Signer
from coordinator_free.chain import Chain
from coordinator_free.contact import Contact
from coordinator_free.machine import Machine
from coordinator_free.messages import Certificate, Join
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Client
from dht.errors import PeerError, StateError

ASK_S = 3.0  # deadline of one request for a seat
TRIES_BEFORE_REVIVAL = 3  # downloads of a state that somebody shows and does not deliver


class Place(Protocol):
    """What coming back needs of the session it is part of."""

    @property
    def stopped(self) -> bool:
        """Whether there is no use in going on."""
        ...

    @property
    def machine(self) -> Machine:
        """The protocol's state; another one after a revival."""
        ...

    @property
    def chain(self) -> Chain:
        """What proves where this peer stands."""
        ...

    def revive(self, certificate: Certificate) -> None:
        """Go on from this decree of one's own."""
        ...


class ComeBack:
    """Watches whether this peer is stranded, and ends that.

    Args:
        place: the session.
        catch_up: goes over to somebody who got further.
        transfer: asks for heads.
        client: asks for seats.
        signer: signs for this peer.
    """

    def __init__(
        self,
        place: Place,
        *,
        catch_up: CatchUp,
        transfer: Transfer,
        client: Client,
        signer: Signer,
    ) -> None:
        self._place = place
        self._catch_up = catch_up
        self._transfer = transfer
        self._client = client
        self._signer = signer
        self._tries: dict[bytes, int] = {}  # by head that was shown

    async def run(self) -> None:
        """For as long as the session lasts."""
        place, loop = self._place, asyncio.get_running_loop()
        head, since = b"", 0.0
        while True:
            await asyncio.sleep(revival.LOOK_S)
            machine = place.machine
            stranded = revival.is_stranded(machine)
            if not stranded or machine.head.digest != head:
                head, since = machine.head.digest, loop.time()
            if not stranded or place.stopped or self._catch_up.busy:
                continue
            if await self._finds_somebody_further():
                continue
            if place.machine is not machine or machine.head.digest != head or place.stopped:
                continue
            now = loop.time()
            certificate = revival.revival(
                machine, place.chain.links, self._signer, now - since, now
            )
            if certificate is not None and not self._catch_up.busy:
                place.revive(certificate)

    async def _finds_somebody_further(self) -> bool:
        """Ask everybody in the directory for a seat, and go over to who got further."""
        try:
            others = await self._catch_up.others()
            await self._ask_for_a_seat(others)
            claims = await self._transfer.claims(others)
        except (PeerError, StateError):
            return False  # nobody is there
        for newest, donor in claims:
            further = Head.after(newest)
            tried = self._tries.get(further.digest, 0)
            if self._place.machine.yields_to(further) and tried < TRIES_BEFORE_REVIVAL:
                self._tries[further.digest] = tried + 1
                self._catch_up.follow(donor)
                return True
        return False

    async def _ask_for_a_seat(self, others: list[Contact]) -> None:
        machine = self._place.machine
        join = wire.encode(Join(member=machine.me, height=machine.head.height))
        async with asyncio.TaskGroup() as tasks:
            for contact in others:
                tasks.create_task(self._ask(contact, join))

    async def _ask(self, contact: Contact, join: bytes) -> None:
        with contextlib.suppress(PeerError):
            await self._client.deliver(contact, join, ASK_S)
