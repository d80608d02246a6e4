"""Getting to where the swarm is: as a newcomer, after a pause, or from a branch that lost.

A peer that is a few rounds behind replays them: it fetches the averages, which others keep, and
applies them. One that is further behind, new or on another branch downloads the whole state. The
swarm goes on meanwhile, so what it commits while the download runs is *collected*: certificates and
averages are fetched as they appear, and applied when the state is here. That is why a download may
take longer than others keep averages. Collected averages wait in an unlinked temporary file, not in
memory.

Guarantees: a state that comes out of here is the one that the newest link of a verified chain
names. It converges while averages arrive faster than rounds are committed; a peer whose link cannot
do that cannot take part in rounds either. What it gives no guarantee for is that the branch is the
best one: it is the best that was shown (docs/threat_model.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from coordinator_free.average import Average, AverageReader
from coordinator_free.certificates import Head
from coordinator_free.chain import Chain
from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.messages import Certificate, Kind
from coordinator_free.outer import NesterovOuter
from coordinator_free.replica import MIN_KEPT_AVERAGES, Replica, State
from coordinator_free.transfer import Transfer
from dht.directory import Directory
from dht.errors import PeerError, StateError, SwarmError
from dht.records import PeerRecord

logger = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at the directory while nobody was found
WATCH_S = 5.0  # how often the directory is asked whether others are ahead
FIND_S = 60.0  # how long a newcomer looks for a peer that has the state
COLLECT_S = 0.2  # how often a download asks what was committed meanwhile; four rounds are kept
MAX_COLLECTED = 4096  # averages that wait for one download
STEP_S = 0.01


class Place(Protocol):
    """What catching up needs of the session it is part of."""

    @property
    def stopped(self) -> bool:
        """Whether there is no use in going on."""
        ...

    @property
    def head(self) -> Head:
        """Where this peer stands. Not asked before it has a state."""
        ...

    @property
    def stuck(self) -> bool:
        """Whether the average of the next height cannot be had."""
        ...

    @property
    def strays(self) -> tuple[Contact, ...]:
        """Members that were lost: they may be on another branch."""
        ...

    def yields_to(self, head: Head) -> bool:
        """Whether this peer gives up where it stands for that head."""
        ...

    def knows(self, head: bytes) -> bool:
        """Whether this peer passed that head."""
        ...

    def replay(self, certificate: Certificate, holder: str) -> bool:
        """Hand over the next certificate; False if it is not believed alone."""
        ...

    def install(self, state: State, chain: Chain) -> None:
        """Go on from this state, if it still outranks what there is."""
        ...


@dataclass(frozen=True, slots=True)
class Shown:
    """What a peer's record shows of where it stands; some seconds old, and only its word."""

    samples: int
    head: bytes


class Lookout:
    """Whom to ask where it stands, after each look into the directory. No I/O.

    After a partition nobody may tell that there are two branches: each has leaders of its own. But
    the directory shows everybody's samples and heads. Ahead is who had more samples at the look
    before than this peer has now: in a swarm that is one, everybody has the same a moment later.
    Elsewhere is whose head of the look before is still not known here. Asking costs a message;
    `Head.rank` then settles which branch gives way.
    """

    def __init__(self) -> None:
        self._before: Mapping[str, Shown] = {}
        self._asked = 0

    def whom_to_ask(
        self, shown: Mapping[str, Shown], head: Head, knows: Callable[[bytes], bool]
    ) -> str | None:
        """One of the peers shown, or None.

        Args:
            shown: the others, by peer id.
            head: where this peer stands.
            knows: whether a head was passed on the way there.
        """
        before, self._before = self._before, shown
        ahead = any(earlier.samples > head.samples for earlier in before.values())
        elsewhere = sorted(
            peer for peer in shown if peer in before and not knows(before[peer].head)
        )
        if ahead and shown:
            most = sorted(shown, key=lambda peer: (-shown[peer].samples, peer))
            elsewhere = [peer for peer in most if shown[peer].samples > head.samples] or most[:1]
        if not elsewhere:
            return None
        # Each in turn: some of them are records of the dead.
        self._asked += 1
        return elsewhere[(self._asked - 1) % len(elsewhere)]


class CatchUp:
    """Finds what this peer misses.

    Args:
        place: the session.
        transfer: downloads.
        directory: where the others are found.
        run_id: of the run.
        peer_id: of this peer.
        round: how rounds are run.
        layout: of the parameters.
        outer: the outer optimizer.
        numel: length of the vector.
    """

    def __init__(
        self,
        place: Place,
        *,
        transfer: Transfer,
        directory: Directory,
        run_id: str,
        peer_id: str,
        round: RoundConfig,
        layout: str,
        outer: NesterovOuter,
        numel: int,
    ) -> None:
        self._place = place
        self._transfer = transfer
        self._directory = directory
        self._run_id = run_id
        self._peer_id = peer_id
        self._round = round
        self._layout = layout
        self._outer = outer
        self._numel = numel
        self._running: asyncio.Task[None] | None = None
        self._turn = 0

    # -- from nothing -------------------------------------------------------------------------

    async def find(self, find_s: float) -> tuple[State, Chain] | None:
        """Ask the run's peers where they stand and get to the furthest place that is proven.

        Returns:
            None when stopped meanwhile.

        Raises:
            StateError: nobody had a state within `find_s`.
        """
        last: SwarmError = StateError("no peer of this run is in the directory")
        deadline = self._now() + find_s
        failed: set[str] = set()  # showed a head and could not prove it, or nobody has its state
        while not self._place.stopped:
            try:
                contacts = await self.others()
                if failed.issuperset(contact.peer_id for contact in contacts):
                    failed.clear()
                contacts = [contact for contact in contacts if contact.peer_id not in failed]
                if contacts:
                    chain, shower = await self._best(contacts, failed)
                    # The run lives: never found it anew beside that, however slow the way there.
                    deadline = max(deadline, self._now() + FIND_S)
                    try:
                        return await self._unless_stopped(self._obtain(chain, shower))
                    except StateError as error:
                        last = error
                        failed.add(shower.peer_id)
                        logger.info("catchup.no_state_yet %s", error)
            except (PeerError, StateError) as error:
                last = error
                failed.clear()  # those who are left show nothing at all
                logger.info("catchup.nobody_yet %s", error)
            if self._now() > deadline:
                raise StateError(f"no state of the run was found in {find_s:g} s: {last}") from last
            await asyncio.sleep(LOOK_S)
        return None

    async def _unless_stopped(
        self, work: Coroutine[None, None, tuple[State, Chain]]
    ) -> tuple[State, Chain] | None:
        """A download may take an hour; whoever stops this peer should not wait for it."""
        task = asyncio.create_task(work)
        try:
            while not task.done() and not self._place.stopped:
                await asyncio.wait([task], timeout=LOOK_S)
        finally:
            task.cancel()  # of no effect on what is done
            await asyncio.gather(task, return_exceptions=True)
        return None if task.cancelled() else task.result()

    async def _best(self, contacts: list[Contact], failed: set[str]) -> tuple[Chain, Contact]:
        """The furthest head that is proven from the run's beginning on, and who showed it."""
        for _, contact in await self._transfer.claims(contacts):
            try:
                return await self._transfer.chain(contact), contact
            except PeerError as error:
                failed.add(contact.peer_id)
                logger.warning("catchup.not_proven %s", error)
        raise StateError("nobody proves what it shows")

    async def others(self) -> list[Contact]:
        """Peers of the run that the directory knows and that can be dialled, this one excepted."""
        return [contact_of(record) for record in self._dialable(await self._records())]

    async def _donors(self, first: str = "") -> Sequence[Contact]:
        """Those of them that offer to serve states; all, if nobody does.

        Args:
            first: comes first. Who showed a head just now is there and has its state; while a dead
                one is waited for, a short round ends and nobody has that state any more.
        """
        records = self._dialable(await self._records())
        willing = [record for record in records if record.can_reduce]
        contacts = [contact_of(record) for record in willing or records]
        return sorted(contacts, key=lambda contact: contact.peer_id != first)

    async def _records(self) -> list[PeerRecord]:
        return await self._directory.peers(self._run_id)

    def _dialable(self, records: list[PeerRecord]) -> list[PeerRecord]:
        return [
            record
            for record in records
            if record.peer_id != self._peer_id and record.port and record.hosts
        ]

    # -- the whole state ----------------------------------------------------------------------

    async def _obtain(self, chain: Chain, shower: Contact) -> tuple[State, Chain]:
        """The state that a chain leads to, and then what was committed while it came.

        Raises:
            StateError: nobody has that state any more.
        """
        with self._room(chain.newest) as collected:
            here = asyncio.Event()
            collecting = asyncio.create_task(self._collect(collected, shower, here))
            try:
                state = await self._transfer.state(
                    chain.newest.outcome.state_root, lambda: self._donors(first=shower.peer_id)
                )
                here.set()
                await collecting
            finally:
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)
            replica = Replica(self._layout, self._outer, state, chain)
            # While this replays, more is committed. The machine can go the last step by itself.
            while await self._replay_collected(replica, collected) > 1:
                await self._collect_now(collected, shower)
        return replica.state, replica.chain

    def _room(self, after: Certificate) -> _Collected:
        try:
            return _Collected(after, self._numel)
        except OSError as error:
            raise StateError(f"no room for a download's rounds: {error.strerror}") from error

    async def _collect(self, collected: _Collected, shower: Contact, here: asyncio.Event) -> None:
        """Collect while the state is on its way, and once more when it is here."""
        last = False
        while not last:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COLLECT_S):
                    await here.wait()
            last = here.is_set()
            await self._collect_now(collected, shower)

    async def _collect_now(self, collected: _Collected, shower: Contact) -> None:
        """Fetch what follows on the newest collected certificate from whoever has it."""
        try:
            others = [contact for contact in await self._donors() if contact != shower]
        except PeerError as error:
            logger.info("catchup.no_directory %s", error)
            others = []
        for contact in (shower, *others):
            try:
                while await self._collect_from(contact, collected):
                    pass
                return
            except PeerError as error:
                logger.info("catchup.not_collected %s", error)
            except OSError as error:
                logger.warning("catchup.no_room %s: rounds that pass are fetched later", error)
                return

    async def _collect_from(self, contact: Contact, collected: _Collected) -> bool:
        """A page of certificates and their averages; False if there is nothing new.

        Raises:
            PeerError: it does not answer, or has not got an average.
            OSError: no room on the disk.
        """
        height = collected.newest.outcome.height + 1
        for certificate in await self._transfer.heads(contact, height):
            if collected.full or not self._transfer.follows(collected.newest, certificate):
                return False
            if certificate.outcome.kind == Kind.AVERAGE:
                root = certificate.outcome.vector_root
                average = await self._transfer.average(contact, root)
                await asyncio.to_thread(collected.put, average)
            collected.certificates.append(certificate)
        return True

    async def _replay_collected(self, replica: Replica, collected: _Collected) -> int:
        """Apply what was collected; how many heights that was, 0 also if they lead elsewhere."""
        certificates, collected.certificates = collected.certificates, []
        for certificate in certificates:
            outcome = certificate.outcome
            try:
                if outcome.kind == Kind.AVERAGE:
                    average = await asyncio.to_thread(collected.get, outcome.vector_root)
                    await asyncio.to_thread(replica.consider, average)
                replica.apply(certificate)
            except (ValueError, OSError, StateError) as error:
                # What was got so far is a state of the run all the same.
                logger.warning("catchup.replay_ended height=%d %s", outcome.height, error)
                return 0
            collected.newest_applied = certificate
        return len(certificates)

    # -- from behind --------------------------------------------------------------------------

    def watch(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to look for peers that are ahead; from now on `follow` may be called."""
        self._tasks = tasks
        tasks.create_task(self._watch())

    @property
    def busy(self) -> bool:
        """Whether something is being caught up with."""
        return self._running is not None and not self._running.done()

    def follow(self, contact: Contact, *, whole: bool = False) -> None:
        """This peer seems to be ahead; `whole` asks for its state even if replaying could do."""
        if not self.busy:
            self._running = self._tasks.create_task(self._follow(contact, whole=whole))

    async def _follow(self, contact: Contact, *, whole: bool) -> None:
        """Replay what was decided where that is possible, take the whole state where it is not."""
        place = self._place
        try:
            claim = await self._transfer.newest(contact)
            claimed = Head.after(claim)
            if claimed.rank <= place.head.rank and not place.yields_to(claimed):
                return
            if not whole and self._is_cheaper(claim) and await self._replay(contact):
                return
            chain = await self._transfer.chain(contact)
            if not place.yields_to(Head.after(chain.newest)):
                return
            state, chain = await self._obtain(chain, contact)
        except (PeerError, StateError) as error:
            logger.info("catchup.failed %s", error)
            return
        place.install(state, chain)

    def _is_cheaper(self, claim: Certificate) -> bool:
        """Whether to replay the averages up to there rather than to fetch the state.

        The last few always: everybody has them, and to throw a round's work away and fall further
        behind while a state downloads costs more than some bytes.
        """
        behind = claim.outcome.round - self._place.head.round
        average_bytes = codec(self._round.codec).encoded_bytes(self._numel)
        return behind <= MIN_KEPT_AVERAGES or behind * average_bytes <= 8 * self._numel

    async def _replay(self, contact: Contact) -> bool:
        """Go from height to height; False if this peer's heights are on another branch or gone."""
        place = self._place
        while True:
            asked = place.head.height
            decided = await self._transfer.heads(contact, asked)
            if place.head.height > asked:
                continue  # this peer got on by itself meanwhile
            first = decided[0].outcome
            if (first.height, first.previous) != (asked, place.head.digest):
                # As when nothing is decided beyond this height yet.
                return Head.after(decided[-1]).rank <= place.head.rank
            for certificate in decided:
                if certificate.outcome.height < place.head.height:
                    continue
                if not place.replay(certificate, contact.peer_id):
                    return False  # provisional, and not believed: only as a whole branch
                if not await self._reaches(certificate.outcome.height + 1):
                    return False

    async def _reaches(self, height: int) -> bool:
        """Whether the machine gets to this height while an average is fetched for it."""
        end = self._now() + self._round.exchange_s
        while self._place.head.height < height:
            # Others may tell of more heights than they have averages of.
            if self._now() > end or self._place.stuck:
                return False
            await asyncio.sleep(STEP_S)
        return True

    async def _watch(self) -> None:
        """Look for peers that are ahead or on another branch: nobody else may tell."""
        lookout = Lookout()
        async for records in self._directory.watch(self._run_id, WATCH_S):
            if self._place.stopped:
                continue
            others = {record.peer_id: record for record in self._dialable(records)}
            shown = {peer: Shown(r.samples, r.head) for peer, r in others.items()}
            peer = lookout.whom_to_ask(shown, self._place.head, self._place.knows)
            if peer is not None:
                self.follow(contact_of(others[peer]))
            else:
                await self._look_for_a_stray()

    async def _look_for_a_stray(self) -> None:
        """Ask one lost member where it stands, at its old address.

        A partition may have parted the directory as well, and it heals later than the network.
        """
        strays = self._place.strays
        if not strays:
            return
        self._turn += 1
        stray = strays[self._turn % len(strays)]
        try:
            head = Head.after(await self._transfer.newest(stray))
        except PeerError as error:
            logger.debug("catchup.stray_silent %s", error)
            return
        if head.rank > self._place.head.rank and not self._place.knows(head.digest):
            self.follow(stray)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def contact_of(record: PeerRecord) -> Contact:
    """How the peer of a record is dialled."""
    return Contact(record.peer_id, record.hosts, record.port, record.certificate_sha256)


class _Collected:
    """Certificates that follow on a state that is being downloaded, and their averages on disk."""

    def __init__(self, after: Certificate, numel: int) -> None:
        self.certificates: list[Certificate] = []
        self.newest_applied = after
        self._numel = numel
        self._places: dict[bytes, list[tuple[int, int]]] = {}  # offset and length of each frame
        self._lock = threading.Lock()  # a cancelled download leaves its last write to a thread
        self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 closed in __exit__
            prefix="shoal-rounds-"
        )

    def __enter__(self) -> _Collected:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def newest(self) -> Certificate:
        return self.certificates[-1] if self.certificates else self.newest_applied

    @property
    def full(self) -> bool:
        return len(self._places) >= MAX_COLLECTED

    def put(self, average: Average) -> None:
        """Keep an average.

        Raises:
            OSError: no room on the disk.
        """
        places = []
        with self._lock:
            at = self._file.seek(0, 2)
            for frame in average.frames():
                self._file.write(frame)
                places.append((at, len(frame)))
                at += len(frame)
            self._file.flush()
            self._places[average.root] = places

    def get(self, root: bytes) -> Average:
        """The average, checked again: it was on a disk.

        Raises:
            ValueError: it is not what was put there.
            OSError: the disk does not give it back.
        """
        reader = AverageReader(self._numel)
        with self._lock:
            for at, length in self._places[root]:
                self._file.seek(at)
                reader.add(self._file.read(length))
        return reader.finish(root)
