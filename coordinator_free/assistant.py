"""A peer that reduces for a swarm without a seat in it: it has no model, no data and no vote.

A plain server with a good link takes work off those who train behind slow ones. It offers itself to
the roster every second; a leader whose members' links are known gives it a share of the exchange;
it adds up what members send it and hands that back. It believes the certificates alone: it follows
the chain from the run's creator on, as a newcomer does, and takes a plan only from a member of the
roster that the newest one names.

Guarantees: it can delay an exchange by no more than a member that reduces and fails, and is then
left alone for a while (`membership`); what strangers send it costs bounded time and memory. Not
guaranteed: that it averages honestly, which holds for every reducer.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass

from coordinator_free import wire
from coordinator_free.butterfly import Butterfly, Stream
from coordinator_free.chain import Chain
from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.exchanges import Exchanges
from coordinator_free.limits import Limits
from coordinator_free.links import Links
from coordinator_free.memory import keep_freed
from coordinator_free.messages import Assist, FetchChunks, Member, Plan
from coordinator_free.planning import longest_s
from coordinator_free.tls import ServerCertificate
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Carrier, Client, Server
from dht.directory import Directory
from dht.errors import (
    ConfigError,
    PeerError,
    ProtocolViolation,
    StateError,
    SwarmError,
    Unreachable,
    innermost,
)
from dht.identity import Identity, verify
from dht.records import PeerRecord

logger = logging.getLogger(__name__)

OFFER_S = 1.0  # between two offers; a leader takes those of the last five seconds
OFFER_DEADLINE_S = 3.0
LEAVE_S = 5.0  # to finish the exchange under way
FIND_S = 5.0  # between two looks for a roster that does not answer
LOOK_S = 10.0  # for one such look
STRANGE_BYTES = 64 << 10  # of a message from a peer without a seat
MAX_EXCHANGES = 2  # at once: one, and the attempt that replaces it
MAX_BYTES = 1 << 36  # of an encoded vector; only what is sent here takes up memory


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantConfig:
    """What an assistant needs to know; `SessionConfig` says more of each.

    Attributes:
        round: how the run's rounds are run.
        workers: threads that add up.
    """

    run_id: str
    creator: str
    round: RoundConfig
    host: str = "127.0.0.1"
    port: int = 0
    announce_hosts: tuple[str, ...] = ("127.0.0.1",)
    upload_bps: float = 0.0
    download_bps: float = 0.0
    workers: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistantStatus:
    """A snapshot for people."""

    round: int
    members: int
    exchanges: int
    bytes_sent: int
    bytes_received: int


class Assistant:
    """One such peer of one run.

    Args:
        config: see there.
        identity: signs for this peer.
        directory: where peers of the run are found; one that is a `Carrier` as well serves as that.
        on_reduced: called after each exchange with its round and the seconds it took.
    """

    def __init__(
        self,
        config: AssistantConfig,
        *,
        identity: Identity,
        directory: Directory,
        on_reduced: Callable[[int, float], None] = lambda round, seconds: None,
    ) -> None:
        keep_freed()
        self._config = config
        self._identity = identity
        self._directory = directory
        self._on_reduced = on_reduced
        carrier = directory if isinstance(directory, Carrier) else None
        self._carrier = carrier
        limits = Limits(config.upload_bps, config.download_bps)
        self._client = Client(identity, config.run_id, carrier=carrier, limits=limits)
        self._tls = ServerCertificate.generate()
        self._server = Server(
            identity, config.run_id, self, config.host, config.port, self._tls, limits=limits
        )
        self._executor = ThreadPoolExecutor(config.workers, "shoal-compute")
        self._transfer = Transfer(
            client=self._client,
            run_id=config.run_id,
            creator=config.creator,
            shape=None,
            round=config.round,
            check=verify,
        )
        self._exchanges = Exchanges()
        self._links = Links(self._traffic)
        self._chain: Chain | None = None
        self._under_way: dict[bytes, asyncio.Task[None]] = {}
        self._following = asyncio.Lock()
        self._done = 0
        self._stopped = asyncio.Event()

    def status(self) -> AssistantStatus:
        """Where the run stands, as far as this peer knows, and what it did."""
        newest = self._chain.newest.outcome if self._chain is not None else None
        sent, received = self._traffic()
        return AssistantStatus(
            round=newest.round if newest is not None else 0,
            members=len(newest.roster) if newest is not None else 0,
            exchanges=self._done,
            bytes_sent=sent,
            bytes_received=received,
        )

    def stop(self) -> None:
        """Have `run` return. In the loop's thread."""
        self._stopped.set()

    async def run(self) -> None:
        """Help until stopped.

        Raises:
            ConfigError: an address cannot be listened on.
            StateError: nobody of the run could be found at the start.
        """
        try:
            port = await self._server.start()
            if self._carrier is not None:
                self._carrier.offer(self._config.host, port)
            me = Member(
                peer_id=self._identity.peer_id,
                session=secrets.randbits(64),
                hosts=self._config.announce_hosts,
                port=port,
                certificate_sha256=self._tls.sha256,
                can_reduce=True,
            )
            self._chain = await self._find()
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                offering = tasks.create_task(self._offer(me))
                await self._stopped.wait()
                offering.cancel()
                # Politely: who leaves in the middle of an exchange costs the members a mend.
                if self._under_way:
                    await asyncio.wait(self._under_way.values(), timeout=LEAVE_S)
                for task in self._under_way.values():
                    task.cancel()
        except BaseExceptionGroup as group:
            raise innermost(group) from group
        finally:
            await self._client.close()
            await self._server.close(grace_s=1.0)
            self._executor.shutdown(wait=False, cancel_futures=True)

    # -- following the run --------------------------------------------------------------------

    async def _find(self) -> Chain:
        """The furthest head that anybody proves.

        Raises:
            StateError: nobody does.
        """
        records = await self._directory.peers(self._config.run_id)
        contacts = [_contact(r) for r in records if r.peer_id != self._identity.peer_id and r.port]
        for _, contact in await self._transfer.claims(contacts):
            try:
                return await self._transfer.chain(contact)
            except PeerError as error:
                logger.info("assistant.no_chain %s", error)
        raise StateError("nobody of the run proves where it stands")

    async def _offer(self, me: Member) -> None:
        """Say to all of the roster, again and again, that this peer is there."""
        while True:
            rate = self._links.rate
            offer = Assist(member=me, up_bps=int(rate.up_bps), down_bps=int(rate.down_bps))
            raw = wire.encode(offer)
            members = [member.contact for member in self._held.newest.outcome.roster]
            told = await asyncio.gather(*(self._tell(contact, raw) for contact in members))
            if not any(told):  # a roster of the past, or everybody is gone
                await self._look_again()
                await asyncio.sleep(FIND_S)
            await asyncio.sleep(OFFER_S)

    async def _tell(self, contact: Contact, raw: bytes) -> bool:
        try:
            await self._client.deliver(contact, raw, OFFER_DEADLINE_S)
        except PeerError:
            return False
        return True

    async def _look_again(self) -> None:
        with suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(LOOK_S):
                found = await self._find()
            if found.newest.outcome.height > self._held.newest.outcome.height:
                self._chain = found

    async def _follow(self, sender: str, head: bytes) -> bool:
        """Have the chain end at a head that a member builds on; whether it does."""
        if wire.head_digest(self._held.newest.outcome) == head:
            return True  # without waiting for those who ask about another one
        async with self._following:
            for _ in range(2):
                newest = self._held.newest.outcome
                if wire.head_digest(newest) == head:
                    return True
                member = next((m for m in newest.roster if m.peer_id == sender), None)
                try:
                    if member is None:  # it came after what is known here
                        await self._look_again()
                        continue
                    for certificate in await self._transfer.heads(
                        member.contact, newest.height + 1
                    ):
                        if self._transfer.follows(self._held.newest, certificate):
                            self._chain = self._held.then(certificate)
                except (PeerError, ValueError) as error:
                    logger.info("assistant.cannot_follow %s", error)
                    return False
                if wire.head_digest(self._held.newest.outcome) != head:
                    await self._look_again()
            return wire.head_digest(self._held.newest.outcome) == head

    # -- taking part --------------------------------------------------------------------------

    async def _reduce(self, sender: str, plan: Plan, digest: bytes) -> None:
        try:
            if not (await self._follow(sender, plan.previous) and self._sound(sender, plan)):
                logger.info("assistant.plan_ignored peer=%s round=%d", sender, plan.round)
                return
            butterfly = Butterfly(
                plan,
                digest,
                self._identity.peer_id,
                None,
                _Nobody(),
                self._executor,
                weight_cap=self._config.round.effective_weight_cap,
            )
            self._exchanges.add(butterfly)
            began = time.monotonic()
            async with self._links.watching(butterfly):
                await butterfly.reduce()
            self._done += 1
            self._on_reduced(plan.round, time.monotonic() - began)
        except (PeerError, ConfigError, ValueError, MemoryError) as error:
            logger.warning("assistant.exchange_failed %s", error)
        finally:
            self._under_way.pop(digest, None)

    def _sound(self, sender: str, plan: Plan) -> bool:
        """Whether this is a plan that somebody of the roster may make, and that fits here."""
        newest = self._held.newest.outcome
        roster = {member.peer_id for member in newest.roster}
        return (
            sender in roster
            and (plan.height, plan.round) == (newest.height + 1, newest.round)
            and roster.issuperset(plan.receivers)
            and any(m.peer_id == self._identity.peer_id for m in plan.assistants)
            and plan.codec == self._config.round.codec
            and codec(plan.codec).encoded_bytes(plan.numel) <= MAX_BYTES
            and plan.exchange_s <= longest_s(self._config.round)
        )

    # -- what others want (transport.Service) -------------------------------------------------

    async def deliver(self, sender: str, message: bytes) -> bytes:
        """Plans count; all else is confirmed, as the sender cannot know better."""
        if self._chain is None:
            raise StateError("this peer does not know the run yet")
        # A member may be newer than what is known here; whoever else it is gets one place, not all.
        stranger = sender not in {m.peer_id for m in self._held.newest.outcome.roster}
        if stranger and len(message) > STRANGE_BYTES:
            raise ProtocolViolation(sender, f"a message of {len(message)} bytes from a stranger")
        content = wire.decode(message)
        if isinstance(content, Plan):
            digest = wire.plan_digest(content)
            known = digest in self._under_way or self._exchanges.get(digest) is not None
            if not known and len(self._under_way) < MAX_EXCHANGES - stranger:
                self._under_way[digest] = self._tasks.create_task(
                    self._reduce(sender, content, digest)
                )
        return b""

    async def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A member's stream to this reducer."""
        async with aclosing(self._exchanges.serve(sender, frames)) as reduced:
            async for frame in reduced:
                yield frame

    async def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        """There is nothing to fetch here."""
        raise StateError("this peer only reduces")
        yield b""  # an async generator, as the protocol says

    # -- small things -------------------------------------------------------------------------

    @property
    def _held(self) -> Chain:
        assert self._chain is not None
        return self._chain

    def _traffic(self) -> tuple[int, int]:
        return (
            self._client.bytes_sent + self._server.bytes_sent,
            self._client.bytes_received + self._server.bytes_received,
        )


class _Nobody:
    """An assistant opens no streams (`butterfly.Network`)."""

    def connect(self, peer: str) -> AbstractAsyncContextManager[Stream]:
        """Not even one."""
        raise Unreachable(peer, "is not called by assistants")

    def fetch(
        self, peer: str, request: FetchChunks, timeout_s: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Nor does it fetch."""
        raise Unreachable(peer, "is not called by assistants")


def _contact(record: PeerRecord) -> Contact:
    return Contact(record.peer_id, record.hosts, record.port, record.certificate_sha256)
