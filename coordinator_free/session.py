"""One peer's place in a swarm: the protocol's machine between a network and a training thread.

The network side (`run`) lives in an asyncio loop. The training side is blocking calls from one
other thread:

    while (work := session.next_assignment()) is not None:
        ... train from work.state until done, or until work.closing is set ...
        session.hand_in(update_E, samples)
        ... go on training, if that is the recipe (`local`) ...
        result = session.result()

Guarantees that `work.state` is bit-identical on all peers that begin the same round, and that the
state held here is always one that a certificate names. What others send is checked before it is
used. What a member can still do to the others is in docs/threat_model.md.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from coordinator_free import actions, certificates, codecs, failpoints, wire
from coordinator_free.actions import Action
from coordinator_free.announcer import Announcer
from coordinator_free.average import Average, absent, spans_of
from coordinator_free.butterfly import Butterfly, ExchangeFailed
from coordinator_free.catchup import FIND_S, CatchUp
from coordinator_free.certificates import Head
from coordinator_free.chain import Chain
from coordinator_free.checkpoints import Checkpoint, CheckpointStore, Keeper
from coordinator_free.codecs import codec
from coordinator_free.comeback import ComeBack
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.donor import Donor
from coordinator_free.exchanges import Exchanges
from coordinator_free.feedback import Feedback
from coordinator_free.handoff import Assignment, Handoff, RoundResult, SessionClosed
from coordinator_free.limits import Limits
from coordinator_free.links import Links
from coordinator_free.machine import Machine
from coordinator_free.marks import Marks
from coordinator_free.membership import Membership
from coordinator_free.memory import keep_freed
from coordinator_free.messages import (
    Certificate,
    Commit,
    FetchChunks,
    Hello,
    Kind,
    Member,
    Outcome,
    Plan,
)
from coordinator_free.optimizer import StateOptimizer
from coordinator_free.outbox import Outbox
from coordinator_free.partition import largest_chunk
from coordinator_free.replica import Replica
from coordinator_free.state import Shape, State
from coordinator_free.tls import ServerCertificate
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Carrier, Client, ExchangeStream, Server
from dht.directory import Directory
from dht.errors import (
    PeerError,
    ProtocolViolation,
    StateError,
    SwarmError,
    innermost,
)
from dht.identity import Identity, verify
from dht.records import MAX_COUNT, PEER_TTL_S, PeerRecord

logger = logging.getLogger(__name__)

TICK_S = 0.1
TELLINGS = 8  # how often a peer's share of a common batch is told, if that is oftener than ticks
WARN_S = 60.0  # between two warnings of the same thing
DELIVER_S = 3.0  # deadline of one small message
STRANGE_BYTES = 64 << 10  # of one from a peer without a seat: reading it takes the loop's time
LEAVE_S = 5.0  # how long a polite leaver waits to be let go
LINGER_S = 10.0  # how long a finished peer serves those that are not
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
        optimizer: turns averages into states.
        feedback: what the codec cuts off of averages is added to the next ones.
        host: address to listen on.
        port: 0 takes a free one.
        announce_hosts: what others dial, best first.
        can_reduce: offers to lead, reduce and serve state.
        serve_bps: most bytes per second of states sent to those who download them; 0: no cap.
        upload_bps: most bytes per second sent in all; 0: no limit.
        download_bps: the same, received.
        workers: threads that encode, add up and hash.
        checkpoints: folder for this run's checkpoints; None keeps nothing on disk.
        checkpoint_every: save after so many rounds; 0 for never.
        keep_checkpoints: how many of the last ones stay.
    """

    run_id: str
    creator: str
    layout: str
    numel: int
    round: RoundConfig
    optimizer: StateOptimizer
    feedback: bool = False
    host: str = "127.0.0.1"
    port: int = 0
    announce_hosts: tuple[str, ...] = ("127.0.0.1",)
    can_reduce: bool = True
    serve_bps: float = 0.0
    upload_bps: float = 0.0
    download_bps: float = 0.0
    workers: int = 2
    checkpoints: Path | None = None
    checkpoint_every: int = 1
    keep_checkpoints: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionStatus:
    """A snapshot for people; `checkpoint` is the round of the newest one on disk.

    `saving` tells that one is being written, perhaps the last thing that the session does.
    """

    phase: str
    round: int
    members: tuple[str, ...]
    leader: str
    digest: str
    samples: int
    bytes_sent: int
    bytes_received: int
    checkpoint: int | None = None
    saving: bool = False


class Session:
    """One peer of one run.

    Args:
        config: see there.
        identity: signs for this peer.
        directory: where peers of the run are found and this one is announced; one that is a
            `Carrier` as well serves as that, too.
    """

    def __init__(self, config: SessionConfig, *, identity: Identity, directory: Directory) -> None:
        keep_freed()
        self.config = config
        self._identity = identity
        self._directory = directory
        self._carrier = directory if isinstance(directory, Carrier) else None
        limits = Limits(config.upload_bps, config.download_bps)
        self._client = Client(identity, config.run_id, carrier=self._carrier, limits=limits)
        self._tls = ServerCertificate.generate()
        self._server = Server(
            identity, config.run_id, self, config.host, config.port, self._tls, limits=limits
        )
        self._links = Links(self._traffic)
        self._executor = ThreadPoolExecutor(config.workers, "shoal-compute")
        self._shape = Shape.of(config.layout, config.numel, config.round.parts, config.optimizer)
        self._transfer = Transfer(
            client=self._client,
            run_id=config.run_id,
            creator=config.creator,
            shape=self._shape,
            round=config.round,
            check=verify,
        )
        self._catch_up = CatchUp(
            self,
            transfer=self._transfer,
            directory=directory,
            run_id=config.run_id,
            peer_id=identity.peer_id,
            round=config.round,
            shape=self._shape,
            optimizer=config.optimizer,
            folder=config.checkpoints,
        )
        self._come_back = ComeBack(
            self,
            catch_up=self._catch_up,
            transfer=self._transfer,
            client=self._client,
            signer=identity,
        )
        self._layout = Layout(
            lengths=tuple(lengths[0] for lengths in self._shape.lengths),
            largest_chunk=largest_chunk(codec(config.round.codec).encoded_bytes),
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handoff = Handoff()
        self._marks = Marks()
        self._broken: SwarmError | None = None
        self._machine: Machine | None = None
        self._replica: Replica | None = None
        self._donor: Donor | None = None
        self._exchanges = Exchanges()
        self._feedback = Feedback()
        self._exchange_task: asyncio.Task[None] | None = None
        self._fetch_task: asyncio.Task[None] | None = None
        self._failed_fetches = 0
        self._done_so_far = (0, 0)  # round and samples, as training says
        self._said_so_far = (-1, 0)  # of that what was told between two ticks
        self._warn_at = 0.0
        self._telling = 0.0  # so many more samples are worth telling at once
        self._ending: str | None = None
        self._stop_asked = False
        self._last_round: int | None = None  # to stop after, if that was asked
        self._head_since = 0.0
        self._traffic_before = (0, 0)
        self._round_began = 0.0
        self._exchanged: dict[bytes, tuple[float, float]] = {}  # vector root: from when till when
        self._keeper: Keeper | None = None

    # -- the training thread's side -----------------------------------------------------------

    def next_assignment(self) -> Assignment | None:
        """Wait for the next round's work; None when the session is over."""
        return self._handoff.next()

    def hand_in(self, update_E: Tensor, samples: int) -> bool:
        """Offer this peer's contribution to the round of the last assignment; never waits.

        Args:
            update_E: (E,) float32, CPU: pseudo-gradient or gradient of that round's fragment. Not
                to be changed before `result` has returned.
            samples: sequences trained on; the weight of this peer in the average.

        Returns:
            Whether it is finite. If not, it counts for nothing.

        Raises:
            SessionClosed: the session is over.
        """
        return self._handoff.hand_in(
            update_E, samples, lambda round, count: self._call(self._work_done, round, count)
        )

    def result(self) -> RoundResult:
        """Wait until the round of the last assignment is committed, with or without this peer.

        Raises:
            SessionClosed: the session ended first.
            RoundError: the work is void, as the swarm went on from another state.
        """
        return self._handoff.result()

    def progress(self, samples: int) -> None:
        """Say how many samples the work on the last assignment has so far; costs little."""
        round = self._handoff.round
        said_round, said = self._said_so_far
        self._done_so_far = (round, samples)
        # Short steps make a whole batch between two ticks.
        if round != said_round or samples - said >= self._telling:
            self._said_so_far = self._done_so_far
            self._call(self._work_progress)

    @property
    def hurried(self) -> bool:
        """Whether the others wait for work that was not handed in yet."""
        return self._handoff.hurried

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
            checkpoint=self._keeper.round if self._keeper is not None else None,
            saving=self._keeper is not None and self._keeper.saving,
        )

    @property
    def state(self) -> State:
        """The newest state held.

        Raises:
            SessionClosed: none was ever held.
        """
        if self._replica is None:
            raise SessionClosed("the session ended before it had a state")
        return self._replica.state

    @property
    def newest(self) -> tuple[Certificate, Average | None]:
        """What was decided last, and its average if that was one and is still held.

        Raises:
            SessionClosed: there was never a state.
        """
        if self._replica is None:
            raise SessionClosed("the session ended before it had a state")
        certificate = self._replica.certificates[-1]
        return certificate, self._replica.average(certificate.outcome.vector_root)

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

        Where there is a checkpoint, this peer goes on from it instead: with those who are further
        if there are any, and else, as one of those who come back, by itself.

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
            # While others are looked for: to compile what the rounds need can take seconds.
            preparing = self._compute(self._prepare)
            port = await self._server.start()
            if self._carrier is not None:
                self._carrier.offer(self.config.host, port)
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
                begun = await self._get_state(me, initial_N, rejoin_s)
                await preparing
                if begun:
                    announcer = Announcer(self._directory, lambda: self._record(me, maddrs()))
                    announcing = tasks.create_task(announcer.run())
                    self._catch_up.watch(tasks)
                    tasks.create_task(self._come_back.run())
                    await self._take_part()
                    announcing.cancel()
                    await announcer.farewell()
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
            if self._keeper is not None:
                await asyncio.to_thread(self._keeper.close)

    def _prepare(self) -> None:
        codecs.prepare(self.config.round.codec)
        self.config.optimizer.prepare()

    async def _get_state(self, me: Member, initial_N: Tensor | None, rejoin_s: float) -> bool:
        """Begin with a state and the certificate that names it; False if stopped before."""
        found = None
        saved = await asyncio.to_thread(self._open_checkpoints)
        if saved is not None:
            found = saved
        elif initial_N is None:
            found = await self._catch_up.find(FIND_S)
        elif rejoin_s:
            try:
                found = await self._catch_up.find(rejoin_s)
            except StateError as error:
                logger.info("session.found_anew %s", error)
        if self._stop_asked:
            return False
        if found is not None:
            state, chain = found
        else:
            assert initial_N is not None
            state = await asyncio.to_thread(State.begin, self._shape, initial_N)
            founding = certificates.found(self.config.run_id, me, self._identity, state.root)
            chain = Chain.begin(founding)
        self._traffic_before = self._traffic()
        self._replica = Replica(self.config.optimizer, state, chain)
        self._donor = Donor(self._replica, self.config.serve_bps, self._now)
        self._note()
        self._start_machine(me, chain.newest)
        return True

    def _start_machine(self, me: Member, certificate: Certificate) -> None:
        now = self._now()
        self._head_since = self._round_began = now
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
        self._say_links()
        if self._last_round is not None:
            self._finish_after(self._last_round)
        self._do(self._machine.start(now))

    async def _take_part(self) -> None:
        """Drive the machine until the run or this peer's part in it is over."""
        asked_at: float | None = None
        while True:
            await asyncio.sleep(TICK_S)
            if self._broken is not None:
                raise self._broken
            now, protocol = self._now(), self._protocol
            self._do(protocol.tick(now))
            self._work_progress()
            self._warn_outside(now)
            self._serving.tidy()
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
        marks = self._marks.passed(wanted)
        for mark in marks:
            failpoints.reach(f"{mark}.before")
        try:
            self._carry_out(wanted)
        except SwarmError as error:
            # Machine and replica differ now: nothing of this session can be believed any more.
            self._broken = error
            raise
        for mark in marks:
            if failpoints.armed(f"{mark}.after"):
                self._tasks.create_task(self._reach_after(mark))

    async def _reach_after(self, mark: str) -> None:
        await self._outbox.flush()  # handed over is not yet on its way
        failpoints.reach(f"{mark}.after")

    def _carry_out(self, wanted: list[Action]) -> None:
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
                            samples=self._protocol.head.samples,
                            state=self._held.state,
                            closing=threading.Event(),
                        )
                    )
                case actions.CloseWork():
                    self._handoff.close_work(action.round)
                case actions.StartExchange():
                    self._start_exchange(action.plan, action.digest)
                case actions.GoOnWithout():
                    butterfly = self._exchanges.get(action.plan)
                    if butterfly is not None:
                        for peer in action.peers:
                            butterfly.drop(peer)
                        for peer in action.contributors:
                            butterfly.drop_contributor(peer)
                case actions.Fetch():
                    if self._fetch_task is not None:
                        self._fetch_task.cancel()
                    fetching = self._fetch(action.outcome, action.holders)
                    self._fetch_task = self._tasks.create_task(fetching)
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
        if self._exchange_task is not None:
            self._exchange_task.cancel()
        mine = any(c.peer_id == self._identity.peer_id for c in plan.contributions)
        values_N = self._handoff.update(plan.round) if mine else None
        butterfly = Butterfly(
            plan,
            digest,
            self._identity.peer_id,
            values_N,
            _Lines(self._client, self._protocol.membership, plan),
            self._executor,
            self._exchanges.get(plan.base),
            weight_cap=self.config.round.effective_weight_cap,
            feedback=(self._feedback, self._shape.fragment(plan.round))
            if self.config.feedback
            else None,
        )
        self._exchanges.add(butterfly)
        self._exchange_task = self._tasks.create_task(self._exchange(butterfly))

    async def _exchange(self, butterfly: Butterfly) -> None:
        """Take part in both roles: what others get of this one does not depend on what it gets."""
        try:
            async with self._links.watching(butterfly), asyncio.TaskGroup() as tasks:
                tasks.create_task(butterfly.reduce())
                tasks.create_task(self._average(butterfly, butterfly.digest))
        finally:
            butterfly.release()
            self._say_links()

    def _say_links(self) -> None:
        """What is known of links goes to the next leader."""
        self._protocol.rate, self._protocol.views = self._links.rate, self._links.views

    async def _average(self, butterfly: Butterfly, digest: bytes) -> None:
        """Average, and compute what that leads to."""
        began = self._now()
        try:
            average = await butterfly.run()
        except ExchangeFailed as error:
            logger.warning("session.exchange_failed %s lost=%s", error, ",".join(error.lost))
            self._do(self._protocol.exchange_failed(digest, error.lost, error.held, self._now()))
            return
        self._exchanged = {average.root: (began, self._now())}
        try:
            root = await self._compute(self._held.consider, average)
        except ValueError as error:
            logger.error("session.average_refused round=%d %s", self._protocol.head.round, error)
            self._do(self._protocol.exchange_refused(digest, self._now()))
            return
        self._do(
            self._protocol.exchange_done(
                digest,
                average.root,
                root,
                self._now(),
                lost=butterfly.lost,
                absent=absent(butterfly.plan, average),
            )
        )

    async def _fetch(self, outcome: Outcome, holders: tuple[str, ...]) -> None:
        """Get an average that was missed: what lacks of it, or else all, from those who hold it."""
        held = False
        average = None
        butterfly = self._exchanges.get(outcome.plan)
        if butterfly is not None:
            average = await butterfly.complete(holders)
            if average is not None and average.root != outcome.vector_root:
                logger.error("session.chunks_differ round=%d: fetching all", outcome.round)
                average = None
        for holder in beginning_after(self._identity.peer_id, holders):
            member = self._protocol.membership.member(holder)
            if average is not None or member is None:
                continue
            try:
                average = await self._transfer.average(member.contact, outcome)
            except PeerError as error:
                logger.info("session.fetch_failed %s", error)
        if average is not None:
            try:
                held = await self._compute(self._held.consider, average) == outcome.state_root
                if not held:
                    logger.error("session.state_differs round=%d: resynchronising", outcome.round)
            except ValueError as error:
                logger.error("session.average_refused round=%d %s", outcome.round, error)
        self._failed_fetches = 0 if held else self._failed_fetches + 1
        self._do(self._protocol.fetched(outcome, held, self._now()))
        if self._failed_fetches >= FETCHES_BEFORE_RESYNC:
            for holder in holders[:1]:
                self._catch_up_with(holder, whole=True)

    def _apply(self, certificate: Certificate) -> None:
        """A height is decided: step on to its state and tell the training thread."""
        self._held.apply(certificate)
        self._note()
        outcome = certificate.outcome
        # Slower members may still want chunks of the plan that was decided on, and of no other.
        self._exchanges.forget(but=[outcome.plan])
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
        average = self._held.average(outcome.vector_root)
        if average is not None:
            self._feedback.commit(self._shape.fragment(outcome.round - 1), average)
        sent, received = self._traffic()
        before_sent, before_received = self._traffic_before
        peers = {c.peer_id: c.samples for c in outcome.contributions}
        began, ended = self._exchanged.get(outcome.vector_root, (now, now))
        self._handoff.resolve(
            RoundResult(
                round=outcome.round - 1,
                spans=self._spans(outcome),
                members=len(peers),
                digest=outcome.state_root.hex(),
                samples=peers.get(self._identity.peer_id, 0),
                total_samples=sum(peers.values()),
                bytes_sent=sent - before_sent,
                bytes_received=received - before_received,
                allreduce_s=ended - began,
                commit_s=now - began,
                round_s=now - self._round_began,
            )
        )
        self._round_began = now
        self._traffic_before = (sent, received)

    def _spans(self, outcome: Outcome) -> tuple[tuple[int, int], ...]:
        """Where this peer's contribution is in the average, in elements of its fragment."""
        average, me = self._held.average(outcome.vector_root), self._identity.peer_id
        if average is None or all(c.peer_id != me for c in outcome.contributions):
            return ()
        try:
            return spans_of(me, average, outcome.contributions)
        except ValueError as error:  # a leader that lies about who is in the average
            logger.warning("session.contributors_differ round=%d %s", outcome.round, error)
            return ()

    # -- on disk ------------------------------------------------------------------------------

    def _open_checkpoints(self) -> tuple[State, Chain] | None:
        """The newest checkpoint from which this peer can go on. Blocks."""
        config, me = self.config, self._identity.peer_id
        if config.checkpoints is None:
            return None
        store = CheckpointStore(
            config.checkpoints,
            run_id=config.run_id,
            shape=self._shape,
            keep=config.keep_checkpoints,
        )
        chains: list[Chain] = []

        def usable(checkpoint: Checkpoint) -> bool:
            chains[:] = [Chain.from_bytes(checkpoint.chain, config.run_id, config.creator, verify)]
            return certificates.has_vote(chains[0].links, me)

        saved = store.newest(usable)
        self._keeper = Keeper(store, me=me, every=config.checkpoint_every, saved=saved)
        return (saved.state, chains[0]) if saved is not None else None

    def _note(self) -> None:
        if self._keeper is not None:
            self._keeper.note(self._held.state, self._held.chain)

    # -- catching up and coming back (catchup.Place, comeback.Place) --------------------------

    def _catch_up_with(self, peer: str, *, whole: bool = False) -> None:
        member = self._protocol.membership.member(peer)
        if member is not None:
            self._catch_up.follow(member.contact, whole=whole)

    @property
    def machine(self) -> Machine:
        """The protocol's state."""
        return self._protocol

    @property
    def chain(self) -> Chain:
        """What proves where this peer stands."""
        return self._held.chain

    def revive(self, certificate: Certificate) -> None:
        """Go on with a roster of those who came back."""
        outcome = certificate.outcome
        logger.warning(
            "session.revived round=%d roster=%d: nobody of the roster could be reached",
            outcome.round,
            len(outcome.roster),
        )
        self._held.revive(certificate)
        self._head_since = self._round_began = self._now()
        self._do(self._protocol.revive(certificate, self._now()))

    @property
    def stopped(self) -> bool:
        """Whether this session is about to end."""
        return self._stop_asked or self._ending is not None

    @property
    def head(self) -> Head:
        """Where this peer stands."""
        return self._protocol.head

    @property
    def stuck(self) -> bool:
        """Whether the average of the next height cannot be had from those who should have it."""
        return self._failed_fetches >= FETCHES_BEFORE_RESYNC

    @property
    def strays(self) -> tuple[Contact, ...]:
        """Members that were lost: they may be on another branch."""
        return tuple(member.contact for member in self._protocol.membership.strays)

    def yields_to(self, head: Head) -> bool:
        """Whether this peer gives up where it stands for that head."""
        return self._protocol.yields_to(head)

    def knows(self, head: bytes) -> bool:
        """Whether this peer passed that head."""
        return self._protocol.knows(head)

    def replay(self, certificate: Certificate, holder: str) -> bool:
        """Hand a certificate of this height to the machine; False if it does not go by it."""
        commit = Commit(certificate=certificate, holders=(holder,))
        self._do(self._protocol.receive(holder, commit, self._now()))
        return self._protocol.takes(certificate)

    def install(self, state: State, chain: Chain) -> None:
        """Go on from a state that was downloaded as a whole, if that is still further."""
        newest = chain.newest
        if not self._protocol.yields_to(Head.after(newest)):
            return
        logger.info("session.resynchronised round=%d", newest.outcome.round)
        # Before the machine: messages that came early may take it a height further at once.
        self._held.install(state, chain)
        self._note()
        self._handoff.restart()
        self._feedback.clear()
        self._head_since = self._round_began = self._now()
        self._failed_fetches = 0
        self._do(self._protocol.install(newest, self._now()))

    def _record(self, me: Member, maddrs: tuple[str, ...]) -> PeerRecord:
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
            # At the bounds, if need be: a record past them is none, and leads nobody here.
            round=min(head.round, MAX_COUNT),
            # Who is a member goes by this: never to a state that nobody has a seat to go on from.
            samples=min(head.samples, MAX_COUNT) if self._protocol.is_member else 0,
            head=head.digest,
            leaving=False,
            expires_at=time.time() + PEER_TTL_S,
        )

    # -- what others want (transport.Service) -------------------------------------------------

    async def deliver(self, sender: str, message: bytes) -> bytes:
        """One small message; a `Hello` is answered, everything else only confirmed."""
        if self._machine is None:
            raise StateError("this peer has no state yet")
        if len(message) > STRANGE_BYTES and sender not in self._machine.head.peers:
            raise ValueError(f"{len(message)} bytes are too many for somebody without a seat")
        content = wire.decode(message, reply=False)
        if isinstance(content, Hello):
            return self._serving.answer(content)
        self._do(self._machine.receive(sender, content, self._now()))
        return b""

    async def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A member's stream to this reducer; its first frame names the plan."""
        async with contextlib.aclosing(self._exchanges.serve(sender, frames)) as reduced:
            async for frame in reduced:
                yield frame

    async def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        """Somebody missed something."""
        wanted = wire.decode_fetch(request)
        if isinstance(wanted, FetchChunks):
            butterfly = self._exchanges.get(wanted.plan)
            if butterfly is None:
                raise StateError("nothing of this plan is held")
            for frame in butterfly.frames(wanted):
                yield frame
            return
        async with contextlib.aclosing(self._serving.serve(sender, wanted)) as frames:
            async for frame in frames:
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

    @property
    def _serving(self) -> Donor:
        if self._donor is None:
            raise StateError("this peer has no state yet")
        return self._donor

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

    def _warn_outside(self, now: float) -> None:
        """Only members let anybody in: without them a newcomer waits, and should know why."""
        protocol = self._protocol
        if protocol.is_member or protocol.membership.live() or now < self._warn_at:
            return
        self._warn_at = now + WARN_S
        logger.warning(
            "session.outside none of the run's %d members answers: waiting for one to come back",
            len(protocol.head.peers),
        )

    def _work_progress(self) -> None:
        self._telling = self.config.round.target_batch / (TELLINGS * len(self._protocol.head.peers))
        self._do(self._protocol.work_progress(*self._done_so_far, self._now()))

    def _work_done(self, round: int, samples: int) -> None:
        self._do(self._protocol.work_done(round, samples, self._now()))

    def _leave(self) -> None:
        if self._keeper is not None:
            self._keeper.save()  # while the others let this peer go
        if self._machine is not None:
            self._do(self._machine.leave(self._now()))

    def _finish_after(self, round: int) -> None:
        self._last_round = round
        if self._machine is not None:
            self._do(self._machine.finish_after(round, self._now()))


def beginning_after(peer_id: str, holders: tuple[str, ...]) -> tuple[str, ...]:
    """Sorted holders as a ring: not all who miss the same ask the same one first."""
    first = bisect.bisect(holders, peer_id)
    return holders[first:] + holders[:first]


class _Lines:
    """The wire as a butterfly sees it (`butterfly.Network`).

    Args:
        client: dials.
        membership: knows the members' addresses.
        plan: has those of assistants.
    """

    def __init__(self, client: Client, membership: Membership, plan: Plan) -> None:
        self._client = client
        self._membership = membership
        self._assistants = {member.peer_id: member for member in plan.assistants}

    def connect(self, peer: str) -> AbstractAsyncContextManager[ExchangeStream]:
        """Open a stream to a reducer."""
        return self._client.exchange(self._contact(peer))

    def fetch(
        self, peer: str, request: FetchChunks, timeout_s: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask a member for chunks."""
        raw = wire.encode_fetch(request)
        return contextlib.aclosing(self._client.fetch(self._contact(peer), raw, timeout_s))

    def _contact(self, peer: str) -> Contact:
        member = self._assistants.get(peer) or self._membership.member(peer)
        if member is None:
            raise ProtocolViolation(peer, "is a member without an address")
        return member.contact


class _Over(Exception):
    """The session came to its end; takes down the tasks around it."""
