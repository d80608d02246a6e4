"""Getting what was missed: certificates, an average, or the whole state, from those who have it.

Everything fetched is checked against a digest that a certificate names before anybody uses it. Two
consecutive certificates prove the newer one against the roster that the older one names; that the
older one belongs to the run is believed from the peer that gave it, whom the directory named.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

from coordinator_free import certificates, wire
from coordinator_free.average import Average, AverageReader
from coordinator_free.certificates import Head, Verify
from coordinator_free.contact import Contact
from coordinator_free.messages import (
    U64_MAX,
    Certificate,
    FetchOutcome,
    FetchState,
    Heads,
    Hello,
    Kind,
)
from coordinator_free.replica import Replica, State, StateReader
from coordinator_free.transport import Client
from dht.errors import ConfigError, PeerError, ProtocolViolation, StateError, TimedOut

logger = logging.getLogger(__name__)

T = TypeVar("T")

ASK_S = 5.0  # for one small question
SOON_S = 0.3  # after one answer, for the next one
IDLE_S = 10.0  # between two frames of a download
SLOWEST_BPS = 50e3  # bytes per second below which a donor is given up for another one


class Transfer:
    """Downloads from other peers.

    Args:
        client: carries the requests.
        run_id: of the run.
        creator: who may sign the run's first certificate.
        layout: of the model's parameters.
        numel: their number; bounds every download.
        check: verifies one signature.
    """

    def __init__(
        self,
        *,
        client: Client,
        run_id: str,
        creator: str,
        layout: str,
        numel: int,
        check: Verify,
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._creator = creator
        self._layout = layout
        self._numel = numel
        self._check = check

    async def heads(self, contact: Contact, height: int) -> tuple[Certificate, ...]:
        """What a peer says was decided: all from `height` on, or the newest it has.

        Raises:
            PeerError: it does not answer, or not with this.
        """
        raw = await self._client.deliver(contact, wire.encode(Hello(height=height)), ASK_S)
        try:
            reply = wire.decode(raw)
        except ValueError as error:
            raise ProtocolViolation(contact.peer_id, str(error)) from error
        if not isinstance(reply, Heads):
            raise ProtocolViolation(contact.peer_id, "answered a question with something else")
        return reply.certificates

    async def newest(self, contact: Contact) -> Certificate:
        """A peer's newest certificate, verified against the one before it.

        Raises:
            PeerError: it does not answer, or cannot prove what it says.
        """
        *before, newest = await self.heads(contact, U64_MAX)
        if newest.outcome.kind == Kind.FOUND:
            voters: tuple[str, ...] = (self._creator,)
        elif before and newest.outcome.previous == wire.head_digest(before[-1].outcome):
            voters = tuple(member.peer_id for member in before[-1].outcome.roster)
        else:
            raise ProtocolViolation(contact.peer_id, "shows a head without a chain behind it")
        if not certificates.verify(newest, self._run_id, voters, self._check):
            raise ProtocolViolation(contact.peer_id, "shows a certificate that nobody signed")
        return newest

    async def best(self, contacts: Iterable[Contact]) -> tuple[Certificate, Contact]:
        """The furthest head that any of these peers can show, and who showed it.

        Raises:
            StateError: none of them shows one.
        """
        asking = {asyncio.create_task(self.newest(contact)): contact for contact in contacts}
        pending = set(asking)
        found: list[tuple[Certificate, Contact]] = []
        try:
            # The first answer ends the wait for the dead, not for those who are a little later.
            while pending:
                done, pending = await asyncio.wait(
                    pending,
                    timeout=SOON_S if found else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    break
                for task in done:
                    try:
                        found.append((task.result(), asking[task]))
                    except PeerError as error:
                        logger.info("transfer.no_head %s", error)
        finally:
            for task in pending:
                task.cancel()
        if not found:
            raise StateError(f"none of {len(asking)} peers of the run shows where it stands")
        return max(found, key=lambda entry: Head.after(entry[0]).rank)

    async def state(self, contact: Contact, root: bytes) -> State:
        """The whole state with this root, from one donor.

        Raises:
            PeerError: it does not have it, breaks off, dawdles, or sends another.
        """
        reader = StateReader(self._layout, self._numel)
        await self._download(contact, FetchState(state_root=root), reader.add, 8 * self._numel)
        return await self._checked(contact, reader.finish, root)

    async def average(self, contact: Contact, root: bytes) -> Average:
        """The encoded average with this root, from one holder.

        Raises:
            PeerError: it does not have it, breaks off, dawdles, or sends another.
        """
        reader = AverageReader(self._numel)
        await self._download(contact, FetchOutcome(vector_root=root), reader.add, 4 * self._numel)
        return await self._checked(contact, reader.finish, root)

    async def _download(
        self,
        contact: Contact,
        request: FetchState | FetchOutcome,
        add: Callable[[bytes], None],
        size: int,
    ) -> None:
        fetching = self._client.fetch(contact, wire.encode_fetch(request), IDLE_S)
        try:
            async with (
                asyncio.timeout(IDLE_S + size / SLOWEST_BPS),
                contextlib.aclosing(fetching) as frames,
            ):
                async for frame in frames:
                    add(frame)
        except TimeoutError as error:
            raise TimedOut(contact.peer_id, "sends too slowly") from error
        except ValueError as error:
            raise ProtocolViolation(contact.peer_id, str(error)) from error

    async def _checked(self, contact: Contact, finish: Callable[[bytes], T], root: bytes) -> T:
        try:
            return await asyncio.to_thread(finish, root)
        except (ValueError, ConfigError) as error:
            raise ProtocolViolation(contact.peer_id, str(error)) from error


def answer_hello(replica: Replica, hello: Hello) -> bytes:
    """The `Heads` for a `Hello`, as many certificates as fit into one message."""
    kept = list(replica.certificates)
    wanted = [c for c in kept if c.outcome.height >= hello.height]
    if not wanted or wanted[0].outcome.height != hello.height:
        wanted = kept[-2:]
    while True:
        try:
            return wire.encode(Heads(certificates=tuple(wanted)))
        except ValueError:
            if len(wanted) == 1:
                raise
            wanted = wanted[:-1]


async def serve(
    replica: Replica, sender: str, request: FetchState | FetchOutcome
) -> AsyncIterator[bytes]:
    """The frames of what is asked for.

    Raises:
        StateError: it is not held, or no longer.
    """
    if isinstance(request, FetchState):
        state = replica.state
        if state.root != request.state_root:
            raise StateError("this state is not held any more")
        frames = state.frames()
    else:
        average = replica.average(request.vector_root)
        if average is None:
            raise StateError("this average is not held")
        frames = average.frames()
    logger.info("transfer.serve peer=%s %s", sender, type(request).__name__)
    for frame in frames:
        yield frame
