"""Getting what was missed: certificates, their chain, an average, or the whole state.

Everything fetched is checked against a digest that a certificate names before anybody uses it, and
a newcomer's certificate against the chain from the run's creator to it (`chain`). Every read has a
deadline and every download a bound on its bytes. What to ask whom for is decided in `download`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from coordinator_free import certificates, wire
from coordinator_free.average import Average, AverageReader
from coordinator_free.certificates import Head, Verify
from coordinator_free.chain import MAX_CHAIN_BYTES, MAX_LINKS, Chain, follows
from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.download import AskDigests, AskLeaf, Cancel, Download, Drop, Step
from coordinator_free.messages import (
    DIGEST_BYTES,
    DIGESTS_A_FRAME,
    U64_MAX,
    Certificate,
    FetchChain,
    FetchOutcome,
    FetchState,
    Heads,
    Hello,
    Kind,
    Outcome,
)
from coordinator_free.state import Shape, State
from coordinator_free.transport import Client
from dht.errors import (
    ConfigError,
    Declined,
    Overloaded,
    PeerError,
    ProtocolViolation,
    StateError,
    TimedOut,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

ASK_S = 5.0  # for one small question
SOON_S = 0.3  # after one answer, for the next one
IDLE_S = 10.0  # between two frames of an average or a chain, and to begin with
LEAF_S = 120.0  # for a leaf, whatever the download thinks of its donor
SLOWEST_BPS = 50e3  # bytes per second; who sends an average or a chain more slowly is given up
CHAIN_S = 120.0  # for a whole chain
STEP_S = 0.25  # how often a download looks at the clock
LOOK_S = 2.0  # how often it looks for more donors


class Transfer:
    """Downloads from other peers.

    Args:
        client: carries the requests.
        run_id: of the run.
        creator: who may sign the run's first certificate.
        shape: of the run's states, bounds every download; None for who downloads none.
        round: how rounds are run.
        check: verifies one signature.

    Attributes:
        liars: donors that sent what no correct peer sends, and how often that was noticed.
    """

    def __init__(
        self,
        *,
        client: Client,
        run_id: str,
        creator: str,
        shape: Shape | None,
        round: RoundConfig,
        check: Verify,
    ) -> None:
        self.liars: Counter[str] = Counter()
        self._client = client
        self._run_id = run_id
        self._creator = creator
        self._shape = shape
        self._check = check
        # Who takes part sends and gets a vector in `exchange_s`: nobody needs longer for one.
        largest = max(lengths[0] for lengths in shape.lengths) if shape is not None else 0
        average_bytes = codec(codec(round.codec).average).encoded_bytes(largest)
        self._average_bps = max(SLOWEST_BPS, average_bytes / round.exchange_s)
        self._average_s = IDLE_S + round.exchange_s

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
        """A peer's newest certificate, verified against the one before it and nothing else.

        Enough to choose whom to ask for the whole `chain`.

        Raises:
            PeerError: it does not answer, or cannot prove what it says.
        """
        *before, newest = await self.heads(contact, U64_MAX)
        if newest.outcome.kind == Kind.FOUND:
            voters = (self._creator,)
            proven = certificates.verify(newest, self._run_id, voters, self._check)
        else:
            proven = bool(before) and self.follows(before[-1], newest)
        if not proven:
            raise ProtocolViolation(contact.peer_id, "shows a head that nothing proves")
        return newest

    def follows(self, before: Certificate, after: Certificate) -> bool:
        """Whether `after` was decided by the roster of `before`, as the very next thing."""
        return follows(before, after, self._run_id, self._check)

    async def chain(self, contact: Contact) -> Chain:
        """The proof of a peer's newest certificate, verified from the run's creator on.

        Raises:
            PeerError: it does not answer, or its chain proves nothing.
        """
        links: list[Certificate] = []
        size = 0

        def add(frame: bytes) -> None:
            nonlocal size
            header, payload = wire.unpack_frame(frame)
            size += len(payload)
            if header.chunk != len(links) or len(links) >= MAX_LINKS or size > MAX_CHAIN_BYTES:
                raise ValueError("a chain that is too long, or out of order")
            links.append(wire.decode_certificate(bytes(payload)))

        await self._download(contact, FetchChain(), add, SLOWEST_BPS, CHAIN_S)
        return await self._checked(
            contact,
            lambda: Chain.verified(links, self._run_id, self._creator, self._check),
        )

    async def claims(self, contacts: Iterable[Contact]) -> list[tuple[Certificate, Contact]]:
        """The heads that these peers show, the furthest first, and who shows each.

        Only `newest` was checked so far, so a liar may come first: see whose `chain` holds.

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
        return sorted(found, key=lambda entry: Head.after(entry[0]).rank, reverse=True)

    async def state(self, root: bytes, donors: Callable[[], Awaitable[Sequence[Contact]]]) -> State:
        """The whole state with this root, from as many donors as there are.

        Args:
            root: named by a certificate.
            donors: who may have it; asked again and again while the download runs.

        Raises:
            StateError: nobody is left who has it.
        """
        assert self._shape is not None
        download = Download(root, self._shape)
        return await _Running(self._client, root, download, donors, self.liars).run()

    async def average(self, contact: Contact, outcome: Outcome) -> Average:
        """The encoded average of an outcome, from one holder.

        Raises:
            PeerError: it does not have it, breaks off, dawdles, or sends another.
        """
        assert self._shape is not None
        root = outcome.vector_root
        reader = AverageReader(self._shape.averaged(outcome.round - 1))
        request = FetchOutcome(vector_root=root)
        await self._download(contact, request, reader.add, self._average_bps, self._average_s)
        return await self._checked(contact, lambda: reader.finish(root))

    async def _download(
        self,
        contact: Contact,
        request: FetchOutcome | FetchChain,
        add: Callable[[bytes], None],
        slowest_bps: float,
        limit_s: float,
    ) -> None:
        """Read frame by frame; who is behind `slowest_bps` by more than `IDLE_S` is given up.

        So a frame now and then is not enough: a dawdler costs seconds, whatever it has to send.
        """
        fetching = self._client.fetch(contact, wire.encode_fetch(request), IDLE_S)
        clock = asyncio.get_running_loop().time
        began = clock()
        late = began + IDLE_S
        try:
            async with asyncio.timeout_at(late) as limit, contextlib.aclosing(fetching) as frames:
                async for frame in frames:
                    late += len(frame) / slowest_bps
                    limit.reschedule(min(late, began + limit_s))
                    add(frame)
        except TimeoutError as error:
            raise TimedOut(contact.peer_id, "sends too slowly") from error
        except ValueError as error:
            raise ProtocolViolation(contact.peer_id, str(error)) from error

    async def _checked(self, contact: Contact, finish: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(finish)
        except (ValueError, ConfigError) as error:
            raise ProtocolViolation(contact.peer_id, str(error)) from error


class _Running:
    """Carries out what a `Download` decides: one request of its own for each leaf.

    A leaf is looked at as soon as it is here, so that no more than the windows of all donors can
    be in memory beside the state.
    """

    def __init__(
        self,
        client: Client,
        root: bytes,
        download: Download,
        donors: Callable[[], Awaitable[Sequence[Contact]]],
        liars: Counter[str],
    ) -> None:
        self._client = client
        self._root = root
        self._download = download
        self._donors = donors
        self._liars = liars
        self._contacts: dict[str, Contact] = {}
        self._asking: dict[AskDigests | AskLeaf, asyncio.Task[None]] = {}
        self._arrived = asyncio.Event()

    async def run(self) -> State:
        failure: StateError | None = None
        began = self._now()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            looking = tasks.create_task(self._look())
            try:
                while not self._download.done:
                    self._do(self._download.tick(self._now()))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(STEP_S):
                            await self._arrived.wait()
            except StateError as error:
                failure = error
            finally:
                for task in (looking, *self._asking.values()):
                    task.cancel()
        if failure is not None:
            raise failure
        logger.info(
            "transfer.state root=%s seconds=%.1f leaves=%s",
            self._root.hex()[:16],
            self._now() - began,
            ",".join(f"{peer}:{count}" for peer, count in self._download.received.items()),
        )
        return self._download.state()

    async def _look(self) -> None:
        """Find donors, now and then again: some have come, some have room now."""
        while True:
            try:
                contacts = await self._donors()
            except PeerError as error:
                logger.info("transfer.no_directory %s", error)
            else:
                self._contacts |= {contact.peer_id: contact for contact in contacts}
                peers = [contact.peer_id for contact in contacts]
                self._do(self._download.offer(peers, self._now()))
            await asyncio.sleep(LOOK_S)

    def _do(self, steps: list[Step]) -> None:
        for step in steps:
            match step:
                case AskDigests() | AskLeaf():
                    self._asking[step] = self._tasks.create_task(self._ask(step))
                case Cancel():
                    self._cancel(AskLeaf(step.donor, step.leaf))
                case Drop():
                    if step.lied:
                        self._liars[step.donor] += 1
                        logger.warning("transfer.donor_lied peer=%s %s", step.donor, step.reason)
                    else:
                        logger.info("transfer.donor_dropped peer=%s %s", step.donor, step.reason)
                    for asked in [a for a in self._asking if a.donor == step.donor]:
                        self._cancel(asked)
        if self._download.done:
            self._arrived.set()

    def _cancel(self, asked: AskDigests | AskLeaf) -> None:
        task = self._asking.pop(asked, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _ask(self, asked: AskDigests | AskLeaf) -> None:
        donor, download = asked.donor, self._download
        try:
            steps = await self._answer(asked)
        except Overloaded:
            steps = download.busy(donor, self._now())
        except Declined:
            steps = download.gone(donor, self._now())
        except (ProtocolViolation, ValueError) as error:
            steps = download.lied(donor, str(error), self._now())
        except PeerError as error:
            steps = download.failed(donor, str(error), self._now())
        if self._asking.get(asked) is asyncio.current_task():
            del self._asking[asked]
        self._do(steps)

    async def _answer(self, asked: AskDigests | AskLeaf) -> list[Step]:
        """Ask and hand over what comes.

        Raises:
            PeerError: nothing comes.
            ValueError: something else.
        """
        if isinstance(asked, AskLeaf):
            request = FetchState(state_root=self._root, leaves=(asked.leaf,))
            limit = 1
        else:
            request = FetchState(state_root=self._root)
            limit = -(-self._download.leaves // DIGESTS_A_FRAME)
        fetching = self._client.fetch(
            self._contacts[asked.donor], wire.encode_fetch(request), LEAF_S
        )
        payloads: list[memoryview] = []
        try:
            async with asyncio.timeout(LEAF_S), contextlib.aclosing(fetching) as frames:
                async for frame in frames:
                    header, payload = wire.unpack_frame(frame)
                    if len(payloads) >= limit:
                        raise ValueError("sent more than it was asked for")
                    if isinstance(asked, AskLeaf) and header.chunk != asked.leaf:
                        raise ValueError("sent another leaf than it was asked for")
                    payloads.append(payload)
        except TimeoutError as error:
            raise TimedOut(asked.donor, "sends too slowly") from error
        if isinstance(asked, AskLeaf):
            if not payloads:
                raise ValueError("sent no leaf")
            return self._download.leaf(asked.donor, asked.leaf, payloads[0], self._now())
        raw = b"".join(payloads)
        digests = [raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES)]
        return self._download.digests(asked.donor, digests, self._now())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
