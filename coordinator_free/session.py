"""One peer's place in a swarm: the protocol's machine between a network and a training thread.

The network side (`run`) lives in an asyncio loop. The training side is blocking calls from one
other thread:

    while (work := session.next_assignment()) is not None:
        ... train from work.theta_N until done, or until work.closing is set ...
        result = session.submit(local_N, samples)

Guarantees that `theta_N` is bit-identical on all peers that begin the same round, and that the
state held here is always one that a certificate names. What others send is checked before it is
used. What a member can still do to the others is in docs/threat_model.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from coordinator_free import actions, certificates, transfer, wire
from coordinator_free.actions import Action
from coordinator_free.butterfly import Butterfly, ExchangeFailed
from coordinator_free.certificates import Head
from coordinator_free.codecs import codec
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.handoff import Assignment, Handoff, RoundResult, SessionClosed
from coordinator_free.machine import Machine
from coordinator_free.messages import Certificate, Commit, Hello, Kind, Member, Outcome, Plan
from coordinator_free.outbox import Outbox
from coordinator_free.outer import NesterovOuter, OuterConfig
from coordinator_free.partition import chunk_elements
from coordinator_free.replica import Replica, State, state_root
from coordinator_free.tls import ServerCertificate
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Client, ExchangeStream, Server
from dht.directory import Directory
from dht.errors import (
    PeerError,
    ProtocolViolation,
    RecordError,
    StateError,
    SwarmError,
    innermost,
)
from dht.identity import Identity, verify
from dht.records import PEER_REFRESH_S, PEER_TTL_S, PeerRecord

logger = logging.getLogger(__name__)

TICK_S = 0.1
DELIVER_S = 3.0  # deadline of one small message
WATCH_S = 5.0  # how often the directory is asked whether others are ahead
FIND_S = 60.0  # how long a newcomer looks for a peer that has the state
PLAN_S = 5.0  # how long a member's stream may be ahead of the plan it belongs to
FAREWELL_S = 1.0  # for telling the directory that this peer is gone
LEAVE_S = 5.0  # how long a polite leaver waits to be let go
LINGER_S = 10.0  # how long a finished peer serves those that are not
KEPT_BUTTERFLIES = 3  # exchanges whose reduced slices slower members may still be reading
FETCHES_BEFORE_RESYNC = 3  # failed attempts to get one average before the whole state is fetched

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """What a session needs to know.

    Attributes:
        run_id: of the run.
        creator: peer id of who signed the run.
        layout: digest of names and shapes of the parameters, hex.
        numel: length of the flat vector.
        round: how rounds are run.
        outer: the outer optimizer's constants.
        host: address to listen on.
        port: 0 takes a free one.
        announce_hosts: what others dial, best first.
        can_reduce: offers to lead, reduce and serve state.
    """

    run_id: str
    creator: str
    layout: str
    numel: int
    round: RoundConfig
    outer: OuterConfig
    host: str = "127.0.0.1"
    port: int = 0
    announce_hosts: tuple[str, ...] = ("127.0.0.1",)
    can_reduce: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionStatus:
    """A snapshot for people."""

    phase: str
    round: int
    members: tuple[str, ...]
    leader: str
    digest: str
    samples: int
    bytes_sent: int
    bytes_received: int


class Session:
    """One peer of one run.

    Args:
        config: see there.
        identity: signs for this peer.
        directory: where peers of the run are found and this one is announced.
    """

    def __init__(self, config: SessionConfig, *, identity: Identity, directory: Directory) -> None:
        self.config = config
        self._identity = identity
        self._directory = directory
        self._client = Client(identity, config.run_id)
        self._tls = ServerCertificate.generate()
        self._server = Server(identity, config.run_id, self, config.host, config.port, self._tls)
        self._executor = ThreadPoolExecutor(2, "shoal-compute")
        self._transfer = Transfer(
            client=self._client,
            run_id=config.run_id,
            creator=config.creator,
            layout=config.layout,
            numel=config.numel,
            check=verify,
        )
        self._layout = Layout(
            numel=config.numel,
            chunk_elements=chunk_elements(codec(config.round.codec).encoded_bytes),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handoff = Handoff()
        self._machine: Machine | None = None
        self._replica: Replica | None = None
        self._butterflies: dict[bytes, Butterfly] = {}
        self._plan_arrived = asyncio.Condition()
        self._exchange_tasks: list[asyncio.Task[None]] = []
        self._catching_up: set[str] = set()
        self._failed_fetches = 0
        self._ending: str | None = None
        self._stop_asked = False
        self._last_round: int | None = None  # to stop after, if that was asked
        self._head_since = 0.0
        self._traffic_before = (0, 0)
        self._round_began = 0.0
        self._exchanged: dict[bytes, float] = {}  # vector root: seconds that its exchange took

    # -- the training thread's side -----------------------------------------------------------

    def next_assignment(self) -> Assignment | None:
        """Wait for the next round's work; None when the session is over."""
        return self._handoff.next()

    def submit(self, local_N: Tensor, samples: int) -> RoundResult:
        """Hand in trained parameters and wait until the round is committed.

        Args:
            local_N: (N,) float32, CPU: the parameters after training from the assignment's.
            samples: sequences trained on; the weight of this peer in the average.

        Returns:
            How the round ended, with or without this peer's work.

        Raises:
            SessionClosed: the session ended first.
            RoundError: the work is void, as the swarm went on from another state.
        """
        return self._handoff.submit(
            local_N, samples, lambda round, count: self._call(self._work_done, round, count)
        )

    def stop(self) -> None:
        """Leave politely; `run` returns soon. From any thread, at any time."""
        self._stop_asked = True
        self._call(self._leave)

    def finish_after(self, round: int) -> None:
        """Stop when this round is committed. From any thread."""
        self._call(self._finish_after, round)

    def status(self) -> SessionStatus:
        """Where this peer stands. From any thread."""
        protocol, replica = self._machine, self._replica
        return SessionStatus(
            phase=protocol.phase if protocol is not None else "connecting",
            round=protocol.head.round if protocol is not None else 0,
            members=protocol.head.peers if protocol is not None else (),
            leader=protocol.leader if protocol is not None else "",
            digest=replica.state.root.hex() if replica is not None else "",
            samples=protocol.head.samples if protocol is not None else 0,
            bytes_sent=self._traffic()[0],
            bytes_received=self._traffic()[1],
        )

    @property
    def final_N(self) -> Tensor:
        """(N,) float32 parameters of the newest state held.

        Raises:
            SessionClosed: none was ever held.
        """
        if self._replica is None:
            raise SessionClosed("the session ended before it had a state")
        return self._replica.state.theta_N

    def _call(self, function: Callable[..., None], *args: object) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *args)

    # -- the network's side -------------------------------------------------------------------

    async def run(
        self,
        initial_N: Tensor | None,
        maddrs: Callable[[], tuple[str, ...]],
        *,
        rejoin_s: float = 0.0,
    ) -> None:
        """Found the swarm or join it, and take part until stopped or finished.

        Args:
            initial_N: (N,) float32 initial parameters to found the swarm with; None joins it.
            maddrs: this peer's dialable addresses, for its record.
            rejoin_s: with `initial_N`: first look so long for peers that have the run already. For
                a founder that was restarted.

        Raises:
            ConfigError: an address cannot be listened on.
            StateError: nobody who has the run's state could be found.
        """
        self._loop = asyncio.get_running_loop()
        try:
            port = await self._server.start()
            me = Member(
                peer_id=self._identity.peer_id,
                session=secrets.randbits(64),
                hosts=self.config.announce_hosts,
                port=port,
                certificate_sha256=self._tls.sha256,
                can_reduce=self.config.can_reduce,
            )
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                self._outbox = Outbox(
                    client=self._client,
                    tasks=tasks,
                    deliver_s=DELIVER_S,
                    on_delivered=self._on_delivered,
                    on_failed=self._on_failed,
                )
                if await self._get_state(me, initial_N, rejoin_s):
                    announcing = tasks.create_task(self._announce(me, maddrs))
                    tasks.create_task(self._watch())
                    await self._take_part()
                    announcing.cancel()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(FAREWELL_S):
                            await self._announce_once(self._record(me, maddrs(), leaving=True))
                raise _Over
        except BaseExceptionGroup as group:
            _, errors = group.split(_Over)
            if errors is not None:
                raise innermost(errors) from group
        finally:
            self._handoff.close()
            await self._client.close()
            await self._server.close(grace_s=1.0)
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def _get_state(self, me: Member, initial_N: Tensor | None, rejoin_s: float) -> bool:
        """Begin with a state and the certificate that names it; False if stopped before."""
        found = None
        if initial_N is None:
            found = await self._find_state(FIND_S)
        elif rejoin_s:
            try:
                found = await self._find_state(rejoin_s)
            except StateError as error:
                logger.info("session.found_anew %s", error)
        if self._stop_asked:
            return False
        if found is not None:
            state, certificate = found
        else:
            assert initial_N is not None
            momentum_N = torch.zeros_like(initial_N)
            root = await asyncio.to_thread(state_root, self.config.layout, initial_N, momentum_N)
            state = State(initial_N, momentum_N, root)
            certificate = certificates.found(self.config.run_id, me, self._identity, root)
        now = self._now()
        self._head_since = self._round_began = now
        self._traffic_before = self._traffic()
        self._replica = Replica(
            self.config.layout, NesterovOuter(self.config.outer), state, certificate
        )
        self._machine = Machine(
            me=me,
            run_id=self.config.run_id,
            layout=self._layout,
            config=self.config.round,
            certificate=certificate,
            signer=self._identity,
            check=verify,
            now=now,
        )
        if self._last_round is not None:
            self._finish_after(self._last_round)
        self._do(self._machine.start(now))
        return True

    async def _find_state(self, find_s: float) -> tuple[State, Certificate] | None:
        """Ask the run's peers where they stand and take the furthest state from who has it.

        Returns:
            None when asked to stop meanwhile.

        Raises:
            StateError: nobody had one within `find_s`.
        """
        last: SwarmError = StateError("no peer of this run is in the directory")
        deadline = self._now() + find_s
        failed: set[str] = set()  # donors that showed a head and did not deliver its state
        while not self._stop_asked:
            try:
                contacts = await self._others()
                if failed.issuperset(contact.peer_id for contact in contacts):
                    failed.clear()
                contacts = [contact for contact in contacts if contact.peer_id not in failed]
                if contacts:
                    certificate, donor = await self._transfer.best(contacts)
                    # The run lives: never found it anew beside that, however slow the way there.
                    deadline = max(deadline, self._now() + FIND_S)
                    failed.add(donor.peer_id)
                    root = certificate.outcome.state_root
                    return await self._transfer.state(donor, root), certificate
            except (PeerError, StateError) as error:
                # The donor may have gone a round further meanwhile: ask again.
                last = error
                if isinstance(error, StateError):
                    failed.clear()  # those who are left show nothing at all
                logger.info("session.no_state_yet %s", error)
            if self._now() > deadline:
                raise StateError(f"no state of the run was found in {find_s:g} s: {last}") from last
            await asyncio.sleep(TICK_S)
        return None

    async def _others(self) -> list[Contact]:
        """Peers of the run that the directory knows and that can be dialled, this one excepted."""
        return [
            Contact(record.peer_id, record.hosts, record.port, record.certificate_sha256)
            for record in await self._directory.peers(self.config.run_id)
            if record.peer_id != self._identity.peer_id and record.port and record.hosts
        ]

    async def _take_part(self) -> None:
        """Drive the machine until the run or this peer's part in it is over."""
        protocol = self._protocol
        asked_at: float | None = None
        while True:
            await asyncio.sleep(TICK_S)
            now = self._now()
            self._do(protocol.tick(now))
            if self._stop_asked:
                self._leave()
                asked_at = asked_at if asked_at is not None else now
                if now - asked_at > LEAVE_S:
                    self._ending = self._ending or "left"
            if self._ending == "left":
                break
            if self._ending == "finished" and (
                protocol.all_finished or now - self._head_since > LINGER_S
            ):
                break
        # The last messages, a commit or a farewell, are still on their way.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DELIVER_S):
                await self._outbox.flush()

    # -- what the machine wants ---------------------------------------------------------------

    def _do(self, wanted: list[Action]) -> None:
        for action in wanted:
            match action:
                case actions.Send():
                    member = self._protocol.membership.member(action.to)
                    if member is not None:
                        self._outbox.send(member.contact, action.message)
                case actions.StartWork():
                    self._handoff.assign(
                        Assignment(
                            round=action.round,
                            seat=action.seat,
                            seats=action.seats,
                            theta_N=self._held.state.theta_N,
                            closing=threading.Event(),
                        )
                    )
                case actions.CloseWork():
                    self._handoff.close_work(action.round)
                case actions.StartExchange():
                    self._start_exchange(action.plan, action.digest)
                case actions.Fetch():
                    self._tasks.create_task(self._fetch(action.outcome, action.holders))
                case actions.Apply():
                    self._apply(action.certificate)
                case actions.CatchUp():
                    self._catch_up_with(action.peer)
                case actions.Finished():
                    self._ending = self._ending or "finished"
                    self._handoff.close()
                case actions.Left():
                    self._ending = "left"

    def _start_exchange(self, plan: Plan, digest: bytes) -> None:
        for task in self._exchange_tasks:
            task.cancel()
        mine = any(c.peer_id == self._identity.peer_id for c in plan.contributions)
        values_N = self._handoff.pseudo_gradient(plan.round) if mine else None
        butterfly = Butterfly(
            plan, digest, self._identity.peer_id, values_N, self._connect, self._executor
        )
        while len(self._butterflies) >= KEPT_BUTTERFLIES:
            del self._butterflies[next(iter(self._butterflies))]
        self._butterflies[digest] = butterfly
        # What others get from this reducer must not depend on what it gets from them.
        self._exchange_tasks = [
            self._tasks.create_task(butterfly.reduce()),
            self._tasks.create_task(self._exchange(butterfly, digest)),
        ]

    async def _exchange(self, butterfly: Butterfly, digest: bytes) -> None:
        """Average, and compute what that leads to."""
        began = self._now()
        async with self._plan_arrived:
            self._plan_arrived.notify_all()
        try:
            average = await butterfly.run()
        except ExchangeFailed as error:
            logger.warning("session.exchange_failed %s lost=%s", error, ",".join(error.lost))
            self._do(self._protocol.exchange_failed(digest, error.lost, self._now()))
            return
        try:
            root = await self._compute(self._held.consider, average)
        except ValueError as error:
            logger.error("session.average_refused round=%d %s", self._protocol.head.round, error)
            self._do(self._protocol.exchange_failed(digest, (), self._now()))
            return
        self._exchanged = {average.root: self._now() - began}
        self._do(
            self._protocol.exchange_done(digest, average.root, root, butterfly.lost, self._now())
        )

    def _connect(self, reducer: str) -> AbstractAsyncContextManager[ExchangeStream]:
        member = self._protocol.membership.member(reducer)
        if member is None:
            raise ProtocolViolation(reducer, "is a reducer without an address")
        return self._client.exchange(member.contact)

    async def _fetch(self, outcome: Outcome, holders: tuple[str, ...]) -> None:
        """Get an average that was missed from one of those who hold it."""
        held = False
        for holder in holders:
            member = self._protocol.membership.member(holder)
            if member is None:
                continue
            try:
                average = await self._transfer.average(member.contact, outcome.vector_root)
            except PeerError as error:
                logger.info("session.fetch_failed %s", error)
                continue
            try:
                held = await self._compute(self._held.consider, average) == outcome.state_root
            except ValueError as error:
                logger.error("session.average_refused round=%d %s", outcome.round, error)
                break
            if not held:
                logger.error("session.state_differs round=%d: resynchronising", outcome.round)
            break
        self._failed_fetches = 0 if held else self._failed_fetches + 1
        self._do(self._protocol.fetched(outcome, held, self._now()))
        if self._failed_fetches >= FETCHES_BEFORE_RESYNC:
            for holder in holders[:1]:
                self._catch_up_with(holder, whole=True)

    def _apply(self, certificate: Certificate) -> None:
        """A height is decided: step on to its state and tell the training thread."""
        self._held.apply(certificate)
        outcome = certificate.outcome
        now = self._now()
        self._head_since = now
        logger.info(
            "session.commit height=%d round=%d kind=%s roster=%d provisional=%s state=%s",
            outcome.height,
            outcome.round,
            outcome.kind.name,
            len(outcome.roster),
            certificate.provisional,
            outcome.state_root.hex()[:16],
        )
        if outcome.kind != Kind.AVERAGE:
            return
        sent, received = self._traffic()
        before_sent, before_received = self._traffic_before
        peers = {c.peer_id: c.samples for c in outcome.contributions}
        self._handoff.resolve(
            RoundResult(
                round=outcome.round - 1,
                included=self._identity.peer_id in peers,
                members=len(peers),
                digest=outcome.state_root.hex(),
                samples=peers.get(self._identity.peer_id, 0),
                total_samples=sum(peers.values()),
                bytes_sent=sent - before_sent,
                bytes_received=received - before_received,
                allreduce_s=self._exchanged.get(outcome.vector_root, 0.0),
                round_s=now - self._round_began,
            )
        )
        self._round_began = now
        self._traffic_before = (sent, received)

    # -- catching up --------------------------------------------------------------------------

    def _catch_up_with(self, peer: str, *, whole: bool = False) -> None:
        member = self._protocol.membership.member(peer)
        if member is not None:
            self._start_catching_up(member.contact, whole=whole)

    def _start_catching_up(self, contact: Contact, *, whole: bool = False) -> None:
        if not self._catching_up:
            self._catching_up.add(contact.peer_id)
            task = self._tasks.create_task(self._catch_up(contact, whole=whole))
            task.add_done_callback(lambda _: self._catching_up.clear())

    async def _catch_up(self, contact: Contact, *, whole: bool) -> None:
        """Replay what was decided where that is possible, take the whole state where it is not."""
        protocol = self._protocol
        try:
            if not whole:
                height = protocol.head.height
                decided = await self._transfer.heads(contact, height)
                if decided[0].outcome.previous == protocol.head.digest:
                    for certificate in decided:
                        commit = Commit(certificate=certificate, holders=(contact.peer_id,))
                        self._do(protocol.receive(contact.peer_id, commit, self._now()))
                        if not protocol.takes(certificate):
                            break  # provisional, and not believed: only as a whole branch
                        if not await self._reaches(certificate.outcome.height + 1):
                            break
                    else:
                        return
            newest = await self._transfer.newest(contact)
            if Head.after(newest).rank <= protocol.head.rank:
                return
            state = await self._transfer.state(contact, newest.outcome.state_root)
        except PeerError as error:
            logger.info("session.catch_up_failed %s", error)
            return
        wanted = protocol.install(newest, self._now())
        if protocol.certificate == newest:
            logger.info("session.resynchronised round=%d with=%s", newest.outcome.round, contact)
            self._held.install(state, newest)
            self._handoff.restart()
            self._head_since = self._round_began = self._now()
            self._failed_fetches = 0
        self._do(wanted)

    async def _reaches(self, height: int) -> bool:
        """Whether the machine gets to this height while an average is fetched for it."""
        end = self._now() + self.config.round.exchange_s
        while self._protocol.head.height < height:
            if self._now() > end:
                return False
            await asyncio.sleep(TICK_S / 10)
        return True

    async def _watch(self) -> None:
        """Look for peers that are ahead: after a partition nobody else may tell.

        Ahead is who had more samples at the look before than this peer has now. In a swarm that is
        one, everybody has the same a moment later.
        """
        ahead = 0
        async for records in self._directory.watch(self.config.run_id, WATCH_S):
            others = [
                record
                for record in records
                if record.peer_id != self._identity.peer_id and record.hosts and record.port
            ]
            if self._ending is not None or not others:
                continue
            best = max(others, key=lambda record: record.samples)
            if ahead > self._protocol.head.samples:
                self._start_catching_up(
                    Contact(best.peer_id, best.hosts, best.port, best.certificate_sha256)
                )
            ahead = best.samples

    async def _announce(self, me: Member, maddrs: Callable[[], tuple[str, ...]]) -> None:
        """Keep this peer's record in the directory fresh."""
        while True:
            announced = await self._announce_once(self._record(me, maddrs(), leaving=False))
            await asyncio.sleep(PEER_REFRESH_S if announced else WATCH_S)

    async def _announce_once(self, record: PeerRecord) -> bool:
        try:
            await self._directory.announce(record)
        except (PeerError, RecordError) as error:
            logger.warning("session.announce_failed %s", error)
            return False
        return True

    def _record(self, me: Member, maddrs: tuple[str, ...], *, leaving: bool) -> PeerRecord:
        head = self._protocol.head
        return PeerRecord(
            peer_id=me.peer_id,
            run_id=self.config.run_id,
            maddrs=maddrs,
            hosts=me.hosts,
            port=me.port,
            certificate_sha256=me.certificate_sha256,
            can_reduce=me.can_reduce,
            upload_bps=0.0,
            download_bps=0.0,
            round=head.round,
            samples=head.samples,
            head=head.digest,
            leaving=leaving,
            expires_at=time.time() + PEER_TTL_S,
        )

    # -- what others want (transport.Service) -------------------------------------------------

    async def deliver(self, sender: str, message: bytes) -> bytes:
        """One small message; a `Hello` is answered, everything else only confirmed."""
        content = wire.decode(message)
        if self._machine is None or self._replica is None:
            raise StateError("this peer has no state yet")
        if isinstance(content, Hello):
            return transfer.answer_hello(self._replica, content)
        self._do(self._machine.receive(sender, content, self._now()))
        return b""

    async def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A member's stream to this reducer; its first frame names the plan."""
        first = await anext(frames, None)
        if first is None:
            raise ProtocolViolation(sender, "opened an exchange and said nothing")
        header, _ = wire.unpack_frame(first)
        try:
            async with asyncio.timeout(PLAN_S), self._plan_arrived:
                await self._plan_arrived.wait_for(lambda: header.plan in self._butterflies)
        except TimeoutError as error:
            raise ProtocolViolation(sender, "opened an exchange of an unknown plan") from error
        async with contextlib.aclosing(
            self._butterflies[header.plan].serve(sender, frames)
        ) as reduced:
            async for frame in reduced:
                yield frame

    async def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        """Somebody missed something."""
        if self._replica is None:
            raise StateError("this peer has no state yet")
        async for frame in transfer.serve(self._replica, sender, wire.decode_fetch(request)):
            yield frame

    # -- small things -------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def _protocol(self) -> Machine:
        assert self._machine is not None
        return self._machine

    @property
    def _held(self) -> Replica:
        assert self._replica is not None
        return self._replica

    def _compute(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, work, *args)

    def _traffic(self) -> tuple[int, int]:
        return (
            self._client.bytes_sent + self._server.bytes_sent,
            self._client.bytes_received + self._server.bytes_received,
        )

    def _on_delivered(self, peer: str) -> None:
        self._protocol.delivered(peer)

    def _on_failed(self, peer: str) -> None:
        self._do(self._protocol.undeliverable(peer, self._now()))

    def _work_done(self, round: int, samples: int) -> None:
        self._do(self._protocol.work_done(round, samples, self._now()))

    def _leave(self) -> None:
        if self._machine is not None:
            self._do(self._machine.leave(self._now()))

    def _finish_after(self, round: int) -> None:
        self._last_round = round
        if self._machine is not None:
            self._do(self._machine.finish_after(round, self._now()))


class _Over(Exception):
    """The session came to its end; takes down the tasks around it."""
