"""Getting to where the swarm is: as a newcomer, after a pause, or from a branch that lost.

A peer that is a few rounds behind replays them: it fetches the averages, which others keep, and
applies them. One that is further behind, new or on another branch downloads the whole state. The
swarm goes on meanwhile, so what it commits while the download runs is *collected*: certificates and
averages are fetched as they appear, and applied when the state is here. That is why a download may
take longer than others keep averages. Collected averages wait in an unlinked temporary file, not in
memory.

Anybody can show a head; it counts once its chain is here. Until then nobody holds up anybody else:
what records and strangers suggest is looked into a few at a time, apart from what members of the
roster show and from those who were lost from it, and who did not prove what it showed is left alone
for some minutes. Only a state that is proven occupies the one place for downloads.

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
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from coordinator_free.average import Average, AverageReader
from coordinator_free.certificates import Head
from coordinator_free.chain import Chain
from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.messages import Certificate, Kind, Outcome
from coordinator_free.optimizer import StateOptimizer
from coordinator_free.replica import MIN_KEPT_AVERAGES, Replica
from coordinator_free.state import Shape, State
from coordinator_free.transfer import Transfer
from dht.directory import Directory
from dht.errors import PeerError, ProtocolViolation, StateError, SwarmError
from dht.records import PeerRecord

logger = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at the directory while nobody was found
WATCH_S = 5.0  # how often the directory is asked whether others are ahead
FIND_S = 60.0  # how long a newcomer looks for a peer that has the state
COLLECT_S = 1.0  # how often a download asks what was committed meanwhile, at least
COLLECT_SOON_S = 0.2  # and at most, where rounds are short: others keep the last few only
IDLE_LOOKS = 30  # that bring nothing, before somebody else is asked
MAX_COLLECTED = 4096  # averages that wait for one download
STEP_S = 0.01

LOOKED_INTO = 4  # strangers at a time whose claims are looked into
PROOF_S = 20.0  # after which one of them makes room for the next
CHAINS_AT_ONCE = 4  # that a newcomer fetches; the next one when the others take their time
SOON_S = 0.3  # for the others, once one chain is here, and before the next is asked for
DOUBT_S = 180.0  # who did not prove what it showed is not looked into again for so long
SILENT_S = 20.0  # the same for who did not answer, or could not give what it had proven
_MEMBER, _STRAY = _KNOWN = ("a member", "a stray")  # in a place of their own; no peer id has blanks


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
        shape: of the run's states.
        optimizer: turns averages into states.
        folder: where rounds that pass during a download are kept, if it exists; else that is where
            the system keeps temporary files, often in memory.
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
        shape: Shape,
        optimizer: StateOptimizer,
        folder: Path | None = None,
    ) -> None:
        self._place = place
        self._transfer = transfer
        self._directory = directory
        self._run_id = run_id
        self._peer_id = peer_id
        self._round = round
        self._shape = shape
        self._optimizer = optimizer
        self._folder = folder
        self._looking: dict[str, tuple[asyncio.Task[None], float]] = {}  # and since when
        self._doubts: dict[str, float] = {}  # peer id: until when
        self._turn = 0
        self.downloading = False
        """Whether a state that is proven is on its way here."""

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
        """The furthest head that is proven from the run's beginning on, and who showed it.

        Some chains are fetched at once, so that who never gets done with its own holds up nobody.
        """
        claims = deque(await self._transfer.claims(contacts))
        proving: dict[asyncio.Task[Chain], Contact] = {}
        proven: list[tuple[Chain, Contact]] = []

        async def wait(timeout_s: float | None, return_when: str) -> None:
            done, _ = await asyncio.wait(proving, timeout=timeout_s, return_when=return_when)
            for task in done:
                contact = proving.pop(task)
                try:
                    proven.append((task.result(), contact))
                except PeerError as error:
                    failed.add(contact.peer_id)
                    logger.warning("catchup.not_proven %s", error)

        try:
            while not proven and (claims or proving):
                if claims and len(proving) < CHAINS_AT_ONCE:
                    claim, contact = claims.popleft()
                    proving[asyncio.create_task(self._proof(claim, contact))] = contact
                more = claims and len(proving) < CHAINS_AT_ONCE
                await wait(SOON_S if more else None, asyncio.FIRST_COMPLETED)
            if proving:
                await wait(SOON_S, asyncio.ALL_COMPLETED)  # those who showed more
        finally:
            for task in proving:
                task.cancel()
            await asyncio.gather(*proving, return_exceptions=True)
        if not proven:
            raise StateError("nobody proves what it shows")
        return max(proven, key=lambda one: Head.after(one[0].newest).rank)

    async def _proof(self, claim: Certificate, contact: Contact) -> Chain:
        """The chain behind what a peer showed.

        Raises:
            PeerError: it does not come, or proves less.
        """
        chain = await self._transfer.chain(contact)
        # The chain of an earlier head, which anybody may have, proves no claim to a later one.
        if chain.newest.outcome.samples < claim.outcome.samples:
            raise ProtocolViolation(contact.peer_id, "proves less than it shows")
        return chain

    async def others(self) -> list[Contact]:
        """Peers of the run that the directory knows and that can be dialled, this one excepted."""
        return [contact_of(record) for record in self._dialable(await self._records())]

    async def _donors(self, first: str = "") -> Sequence[Contact]:
        """Those of them that offer to serve states; all, if nobody does.

        Args:
            first: comes first, willing or not: where everybody who leads was restarted, nobody else
                may have its state. Who showed a head just now is there and has that; while a dead
                one is waited for, a short round ends and nobody has that state any more.
        """
        records = self._dialable(await self._records())
        willing = [record for record in records if record.can_reduce or record.peer_id == first]
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
        with _Collected(chain.newest, self._shape, self._folder, shower) as collected:
            here = asyncio.Event()
            collecting = asyncio.create_task(self._collect(collected, here))
            try:
                state = await self._transfer.state(
                    chain.newest.outcome.state_root, lambda: self._donors(first=shower.peer_id)
                )
                here.set()
                await collecting
            finally:
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)
            replica = Replica(self._optimizer, state, chain)
            # While this replays, more is committed. The machine can go the last step by itself.
            while await self._replay_collected(replica, collected) > 1:
                await self._collect_now(collected)
        return replica.state, replica.chain

    async def _collect(self, collected: _Collected, here: asyncio.Event) -> None:
        """Collect while the state is on its way, and once more when it is here."""
        pause_s = COLLECT_SOON_S
        idle = 0
        last = False
        while not last and not collected.full:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await here.wait()
            last = here.is_set()
            before = len(collected.certificates)
            await self._collect_now(collected)
            # Two at a time are one more than is safe; none is a look too many.
            new = len(collected.certificates) - before
            if new != 1:
                pause_s = min(max(pause_s / 2 if new else pause_s * 2, COLLECT_SOON_S), COLLECT_S)
            idle = 0 if new else idle + 1
            if idle == IDLE_LOOKS:  # the round is long, or who is asked does not go on with it
                idle = 0
                await self._collect_elsewhere(collected)

    async def _collect_now(self, collected: _Collected) -> None:
        """Fetch what follows on the newest collected certificate from whoever has it.

        That is who gave the last one; only when that one fails, somebody else is looked for.
        """
        if collected.full:
            return
        try:
            await self._collect_all(collected.source, collected)
        except PeerError as error:
            logger.info("catchup.not_collected %s", error)
            await self._collect_elsewhere(collected)

    async def _collect_elsewhere(self, collected: _Collected) -> None:
        """The same from somebody else, who is asked first from now on."""
        try:
            others = await self._donors()
        except PeerError as error:
            logger.info("catchup.no_directory %s", error)
            return
        others = [contact for contact in others if contact != collected.source]
        self._turn += 1
        first = self._turn % max(1, len(others))
        for contact in (*others[first:], *others[:first]):
            try:
                await self._collect_all(contact, collected)
            except PeerError as error:
                logger.info("catchup.not_collected %s", error)
            else:
                collected.source = contact
                return

    async def _collect_all(self, contact: Contact, collected: _Collected) -> None:
        """All that one peer has.

        Raises:
            PeerError: it does not answer, or has not got an average.
        """
        try:
            while await self._collect_from(contact, collected):
                pass
        except OSError as error:
            collected.give_up(error)

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
                average = await self._transfer.average(contact, certificate.outcome)
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
                    average = await asyncio.to_thread(collected.get, outcome)
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
        """Whether somebody is being looked into, or caught up with."""
        self._tidy()
        return bool(self._looking)

    def follow(self, contact: Contact, *, whole: bool = False) -> None:
        """This peer, from which the machine heard, seems to be ahead.

        Args:
            contact: of a member of the roster; of anybody else it is only a suggestion.
            whole: ask for its state even if replaying could do.
        """
        if contact.peer_id in self._place.head.peers:
            self._look_into(_MEMBER, contact, whole=whole)
        else:
            self.suggest(contact)

    def suggest(self, contact: Contact, samples: int = 0) -> bool:
        """This peer says that it is ahead, and nobody knows it; whether that is looked into now.

        Args:
            contact: of the peer.
            samples: that its record shows.
        """
        self._tidy()
        if self.downloading or self._doubted(contact.peer_id) or contact.peer_id in self._looking:
            return False
        return self._has_room() and self._look_into(contact.peer_id, contact, samples=samples)

    def _has_room(self) -> bool:
        """Whether one more stranger can be looked into; one that takes too long gives way."""
        strangers = [(since, of) for of, (_, since) in self._looking.items() if of not in _KNOWN]
        if len(strangers) < LOOKED_INTO:
            return True
        since, longest = min(strangers)
        if self._now() - since < PROOF_S:
            return False
        task, _ = self._looking.pop(longest)
        task.cancel()
        self._doubt(longest, SILENT_S, "takes its time to prove what it shows")
        return True

    def _look_into(
        self, of: str, contact: Contact, *, whole: bool = False, samples: int = 0
    ) -> bool:
        """One at a time of each kind, and of each stranger."""
        self._tidy()
        if of in self._looking:
            return False
        task = self._tasks.create_task(self._follow(contact, whole=whole, samples=samples))
        self._looking[of] = (task, self._now())
        return True

    def _tidy(self) -> None:
        self._looking = {of: one for of, one in self._looking.items() if not one[0].done()}

    def _doubt(self, peer_id: str, seconds: float, reason: object) -> None:
        """Let no record of this peer, and nothing else it says, be looked into for a while."""
        now = self._now()
        self._doubts = {peer: until for peer, until in self._doubts.items() if until > now}
        self._doubts[peer_id] = max(self._doubts.get(peer_id, 0.0), now + seconds)
        logger.info("catchup.failed peer=%s for_s=%g %s", peer_id, seconds, reason)

    def _doubted(self, peer_id: str) -> bool:
        return self._doubts.get(peer_id, 0.0) > self._now()

    async def _follow(self, contact: Contact, *, whole: bool, samples: int) -> None:
        """Replay what was decided where that is possible, take the whole state where it is not."""
        place = self._place
        try:
            claim = await self._transfer.newest(contact)
            claimed = Head.after(claim)
            if claimed.samples < samples:
                raise ProtocolViolation(contact.peer_id, "has less than its record shows")
            if claimed.rank <= place.head.rank and not place.yields_to(claimed):
                return
            if not whole and self._is_cheaper(claim) and await self._replay(contact):
                return
            if self.downloading:
                return  # who is still ahead after that will be noticed again
            chain = await self._proven(claim, contact)
            if self.downloading or not place.yields_to(Head.after(chain.newest)):
                return
            self.downloading = True
            try:
                state, chain = await self._obtain(chain, contact)
            finally:
                self.downloading = False
        except ProtocolViolation as error:
            self._doubt(contact.peer_id, DOUBT_S, error)
        except (PeerError, StateError) as error:
            self._doubt(contact.peer_id, SILENT_S, error)
        else:
            place.install(state, chain)

    async def _proven(self, claim: Certificate, contact: Contact) -> Chain:
        """See `_proof`; who fails here is to be doubted, whether it lies or dawdles."""
        try:
            return await self._proof(claim, contact)
        except PeerError as error:
            self._doubt(contact.peer_id, DOUBT_S, error)
            raise

    def _is_cheaper(self, claim: Certificate) -> bool:
        """Whether to replay the averages up to there rather than to fetch the state.

        The last few always: everybody has them, and to throw a round's work away and fall further
        behind while a state downloads costs more than some bytes.
        """
        behind = claim.outcome.round - self._place.head.round
        elements = self._shape.averaged(claim.outcome.round)  # all fragments have nearly as many
        average_bytes = codec(codec(self._round.codec).average).encoded_bytes(elements)
        return behind <= MIN_KEPT_AVERAGES or behind * average_bytes <= 4 * self._shape.elements

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
            others = {
                record.peer_id: record
                for record in self._dialable(records)
                if not self._doubted(record.peer_id)
            }
            shown = {peer: Shown(r.samples, r.head) for peer, r in others.items()}
            peer = lookout.whom_to_ask(shown, self._place.head, self._place.knows)
            if peer is not None:
                self.suggest(contact_of(others[peer]), shown[peer].samples)
            await self._look_for_a_stray()

    async def _look_for_a_stray(self) -> None:
        """Ask one lost member where it stands, at its old address.

        A partition may have parted the directory as well, and it heals later than the network. Not
        only when the directory shows nobody: there, anybody can show anything.
        """
        strays = [stray for stray in self._place.strays if not self._doubted(stray.peer_id)]
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
            self._look_into(_STRAY, stray)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def contact_of(record: PeerRecord) -> Contact:
    """How the peer of a record is dialled."""
    return Contact(record.peer_id, record.hosts, record.port, record.certificate_sha256)


class _Collected:
    """Certificates that follow on a state that is being downloaded, and their averages on disk."""

    def __init__(
        self, after: Certificate, shape: Shape, folder: Path | None, source: Contact
    ) -> None:
        self.certificates: list[Certificate] = []
        self.newest_applied = after
        self.source = source  # who is asked what follows
        self._shape = shape
        self._places: dict[bytes, list[tuple[int, int]]] = {}  # offset and length of each frame
        self._lock = threading.Lock()  # a cancelled download leaves its last write to a thread
        self._gave_up = False
        self._file: IO[bytes] | None = None
        try:
            # Unbuffered: what found no room must not be tried again at the next seek.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115 closed in __exit__
                prefix="shoal-rounds-",
                dir=folder if folder is not None and folder.is_dir() else None,
                buffering=0,
            )
        except OSError as error:
            self.give_up(error)

    def __enter__(self) -> _Collected:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()

    @property
    def newest(self) -> Certificate:
        return self.certificates[-1] if self.certificates else self.newest_applied

    @property
    def full(self) -> bool:
        """Whether nothing more is to be collected."""
        return self._gave_up or len(self._places) >= MAX_COLLECTED

    def give_up(self, error: OSError) -> None:
        """For good: each further try would fetch a whole average only to find no room again."""
        self._gave_up = True
        logger.warning("catchup.no_room %s: rounds that pass are fetched later", error)

    def put(self, average: Average) -> None:
        """Keep an average.

        Raises:
            OSError: no room on the disk.
        """
        assert self._file is not None
        places = []
        with self._lock:
            at = self._file.seek(0, 2)
            for frame in average.frames():
                rest = memoryview(frame)
                while rest:
                    rest = rest[self._file.write(rest) :]
                places.append((at, len(frame)))
                at += len(frame)
            self._places[average.root] = places

    def get(self, outcome: Outcome) -> Average:
        """The average of an outcome, checked again: it was on a disk.

        Raises:
            ValueError: it is not what was put there.
            OSError: the disk does not give it back.
        """
        assert self._file is not None
        reader = AverageReader(self._shape.averaged(outcome.round - 1))
        with self._lock:
            for at, length in self._places[outcome.vector_root]:
                self._file.seek(at)
                reader.add(self._file.read(length))
        return reader.finish(outcome.vector_root)
