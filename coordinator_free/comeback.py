"""Coming back to a run that may be dead: look for others who came back, or let the run go on.

A peer that starts from a checkpoint has no seat, and the roster that it knows has other addresses
by now; who came back is in the directory. `revival` says when it may go on without the others; this
does the asking and the waiting.

A head that somebody shows holds up a revival for as long as its state is on the way, if it is
proven; if not, for `UNPROVEN_S` in all: strangers with ever new ones must not keep a run dead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
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
TRIES_BEFORE_REVIVAL = 3  # with one who shows a head and does not deliver its state
UNPROVEN_S = 30.0  # heads that nothing proves hold up a revival for no longer than this


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
        self._tries: Counter[str] = Counter()  # by peer: a head costs nothing to make up

    async def run(self) -> None:
        """For as long as the session lasts."""
        place, loop = self._place, asyncio.get_running_loop()
        head, since, proven = b"", 0.0, 0.0
        while True:
            await asyncio.sleep(revival.LOOK_S)
            machine = place.machine
            stranded = revival.is_stranded(machine)
            if not stranded or machine.head.digest != head:
                head, since = machine.head.digest, loop.time()
                proven = since
                self._tries.clear()
            if self._catch_up.downloading:
                proven = loop.time()
                continue
            if not stranded or place.stopped:
                continue
            somebody = await self._finds_somebody_further()
            if somebody and loop.time() - proven < UNPROVEN_S:
                continue
            if place.machine is not machine or machine.head.digest != head or place.stopped:
                continue
            now = loop.time()
            certificate = revival.revival(
                machine, place.chain.links, self._signer, now - since, now
            )
            if certificate is not None and not self._catch_up.downloading:
                place.revive(certificate)

    async def _finds_somebody_further(self) -> bool:
        """Ask everybody in the directory for a seat, and go over to who got further.

        Returns:
            Whether somebody may have got further who is being looked into, or will be once more.
        """
        try:
            others = await self._catch_up.others()
            await self._ask_for_a_seat(others)
            claims = await self._transfer.claims(others)
        except (PeerError, StateError):
            return False  # nobody is there
        further = [
            donor
            for newest, donor in claims
            if self._place.machine.yields_to(Head.after(newest))
            and self._tries[donor.peer_id] < TRIES_BEFORE_REVIVAL
        ]
        for donor in further:
            self._tries[donor.peer_id] += self._catch_up.suggest(donor)
        return bool(further) or self._catch_up.busy

    async def _ask_for_a_seat(self, others: list[Contact]) -> None:
        machine = self._place.machine
        join = wire.encode(Join(member=machine.me, height=machine.head.height))
        async with asyncio.TaskGroup() as tasks:
            for contact in others:
                tasks.create_task(self._ask(contact, join))

    async def _ask(self, contact: Contact, join: bytes) -> None:
        with contextlib.suppress(PeerError):
            await self._client.deliver(contact, join, ASK_S)
