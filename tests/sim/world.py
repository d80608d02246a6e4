"""A whole swarm in one process: the shipped machines under a virtual clock and one seed.

Messages are encoded and decoded as on the wire, delayed, reordered, duplicated and lost; peers
crash, restart with or without what they had on disk, freeze and are cut off. The butterfly is
played: it takes a while and gives a member only some chunks of a reducer that it cannot reach or
that dies or freezes meanwhile. A peer that is new, too far behind or on a branch that lost gets the
whole state from several donors while the swarm goes on, and replays what was committed meanwhile:
which leaf comes from whom, and what donors keep, is decided by the shipped code (`getting`). What
is played of catching up is `catchup` around that: whom to ask, and when to replay instead. The
directory shows everybody, or only those on the same side. Averages and certificates are kept for a
while only.

After every event the world checks that no two majorities disagree, and that whoever goes on without
a majority cannot reach one. `check_history` looks at the end whether anything that was committed is
lost.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from coordinator_free import actions, certificates, revival, wire
from coordinator_free.catchup import Lookout, Shown
from coordinator_free.certificates import Head
from coordinator_free.chain import follows
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.machine import Machine
from coordinator_free.messages import (
    NO_DIGEST,
    Certificate,
    Commit,
    Join,
    Kind,
    Member,
    Message,
    Outcome,
    Plan,
)
from coordinator_free.partition import ALIGN_ELEMENTS, runs_of
from coordinator_free.state import State
from tests.sim import getting
from tests.sim.getting import Getting, Giver, after, contents

RUN = "00" * 20
PLAN_S = 5.0
FETCHES_BEFORE_RESYNC = 3
TICK_S = 0.2
WATCH_S = 5.0
FIND_S = 1.0  # before a newcomer that found nobody looks again
COLLECT_S = 0.5
KEPT_AVERAGES = 6  # of the last rounds; `replica` keeps 4 to 64
KEPT_CERTIFICATES = 12
VECTOR = 160_000  # elements that are averaged, for the `NUMEL` of a state
PROGRESS_S = 0.25  # in gradient mode: between two of a peer's micro-batches
NOTICE_S = 2.0  # after which who can be reached again has been heard


class Diverged(AssertionError):
    """Two peers hold different truths for one height of one branch."""


@dataclass(frozen=True)
class Key:
    """Signs by hashing: the simulator checks the protocol, not Ed25519."""

    peer_id: str

    def sign(self, domain: bytes, message: bytes) -> bytes:
        return blake3(domain + message, key=blake3(self.peer_id.encode()).digest()).digest(64)


def check(peer_id: str, domain: bytes, message: bytes, signature: bytes) -> bool:
    return Key(peer_id).sign(domain, message) == signature


@dataclass(kw_only=True)
class Faults:
    """What the network does to a message, and donors to a leaf; probabilities per message."""

    loss: float = 0.0
    duplicate: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.05)
    leaf_s: tuple[float, float] = (0.01, 0.1)  # a leaf of a state takes so long
    wrong_leaf: float = 0.0
    refused: float = 0.0  # of all averages: lead to no finite state


@dataclass(kw_only=True)
class Peer:
    me: Member
    machine: Machine
    state: State
    alive: bool = True
    frozen_until: float = 0.0
    getting: bool = False  # a whole state is on its way
    outcomes: dict[bytes, Outcome] = field(default_factory=dict)
    certificates: list[Certificate] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    chunks: dict[bytes, dict[int, Averaged]] = field(default_factory=dict)  # by plan
    averages: list[bytes] = field(default_factory=list)  # roots, the newest last
    undecided: set[bytes] = field(default_factory=set)  # of them
    failed_fetches: int = 0
    link_s: float = 0.0  # its exchanges and fetches take so much longer
    without: set[str] = field(default_factory=set)  # reducers given up in the exchange under way
    lookout: Lookout = field(default_factory=Lookout)
    stray: int = 0  # whose turn it is to be asked
    slowness: float = 1.0
    work: tuple[float, float, int] = (0.0, 1.0, 0)  # began, takes so long, gives so many samples
    handed_in_at: float = 0.0
    finished: bool = False
    left: bool = False
    giver: Giver = field(init=False)

    @property
    def state_root(self) -> bytes:
        return self.state.root

    @property
    def shown(self) -> list[Certificate]:
        """What others can still ask it for."""
        return self.certificates[-KEPT_CERTIFICATES:]

    def hold(self, root: bytes) -> None:
        """This average is here: undecided, and in place of the oldest one."""
        if root in self.averages:
            self.averages.remove(root)
        self.averages.append(root)
        self.undecided.add(root)
        del self.averages[:-KEPT_AVERAGES]


@dataclass(kw_only=True)
class Newcomer:
    """A peer that has not got a state yet, and so no place in any round."""

    me: Member
    alive: bool = True
    frozen_until: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint: the newest certificate, the one that proves it, and the state it names."""

    chain_end: tuple[Certificate, ...]
    state: State


@dataclass(frozen=True)
class Averaged:
    """A chunk: what names its bytes, and whose work is in them."""

    version: bytes
    contributors: frozenset[str]


def _averaged(digest: bytes, chunk: int, contributors: frozenset[str]) -> Averaged:
    text = digest + chunk.to_bytes(4, "big") + "|".join(sorted(contributors)).encode()
    return Averaged(blake3(text).digest(), contributors)


class World:
    """Peers, a clock and what goes wrong."""

    def __init__(
        self,
        seed: int,
        *,
        config: RoundConfig,
        faults: Faults | None = None,
        work_s: tuple[float, float] = (1.0, 2.0),
        exchange_s: tuple[float, float] = (0.2, 0.6),
        save_every: int = 0,
        fragments: tuple[int, ...] = (getting.NUMEL,),
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.config = config
        self.faults = faults or Faults()
        self.work_s = work_s
        self.exchange_s = exchange_s
        self.save_every = save_every
        self.overlap = False  # training goes on while an exchange runs
        self.initial = getting.initial(getting.shape(fragments))
        self.layout = Layout(
            lengths=tuple(VECTOR * numel // getting.NUMEL for numel in fragments),
            largest_chunk=ALIGN_ELEMENTS,
        )
        self.disks: dict[str, list[Saved]] = {}  # what each peer saved, in order
        self.revived = 0
        self.downloads: list[dict[str, int]] = []  # whole states that came: leaves by donor
        self.lost_downloads = 0  # nobody had the state any more
        self.lies_noticed = 0
        self.peers: dict[str, Peer] = {}
        self.newcomers: dict[str, Newcomer] = {}
        self.clients: frozenset[str] = frozenset()  # can neither lead nor reduce
        self.cut: set[frozenset[str]] = set()
        self.hidden: set[frozenset[str]] = set()  # in the directory from each other
        self.healed: dict[frozenset[str], float] = {}  # when a pair was last cut off
        self.mute: dict[str, tuple[type[Message], ...]] = {}  # by sender: what never arrives
        self.majorities: dict[tuple[int, bytes], Certificate] = {}  # by what they follow on
        self.provisional: list[Certificate] = []
        self.by_head: dict[bytes, Certificate] = {}
        self.trace = blake3()  # of everything that happened, to see that a seed replays
        self.reduced: dict[tuple[bytes, str], frozenset[str]] = {}
        self.voids = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # -- building -----------------------------------------------------------------------------

    def found(self, name: str) -> Peer:
        me = self._member(name)
        certificate = certificates.found(RUN, me, Key(name), self.initial.root)
        self.by_head[wire.head_digest(certificate.outcome)] = certificate
        return self._start(me, self.initial, [certificate])

    def join(self, name: str, contact: str) -> None:
        """A peer with no memory looks for a state to start from, at first where `contact` is."""
        self.newcomers[name] = newcomer = Newcomer(me=self._member(name))
        self._find(newcomer, contact)

    def restart(self, name: str) -> Peer | None:
        """A peer starts again from its disk; None if there is nothing on it."""
        self.crash(name)
        whole = self.disks.get(name)
        if not whole:
            return None
        newest = max(whole, key=lambda saved: Head.after(saved.chain_end[-1]).rank)
        return self._start(self._member(name), newest.state, newest.chain_end)

    def _member(self, name: str) -> Member:
        return Member(
            peer_id=name,
            session=self.random.getrandbits(64),
            hosts=("sim",),
            port=1,
            certificate_sha256=NO_DIGEST,
            can_reduce=name not in self.clients,
        )

    def _start(self, me: Member, state: State, links: Sequence[Certificate]) -> Peer:
        peer = Peer(me=me, machine=self._machine(me, links[-1]), state=state)
        peer.giver = Giver(peer, lambda: self.now)
        peer.certificates.extend(links)
        self.peers[me.peer_id] = peer
        self._do(peer, peer.machine.start(self.now))
        self._tick(peer)
        self._watch(peer)
        self._come_back(peer, b"", 0.0)
        return peer

    def _machine(self, me: Member, certificate: Certificate) -> Machine:
        return Machine(
            me=me,
            run_id=RUN,
            layout=self.layout,
            config=self.config,
            certificate=certificate,
            signer=Key(me.peer_id),
            check=check,
            now=self.now,
        )

    # -- faults -------------------------------------------------------------------------------

    def crash(self, name: str) -> None:
        self.newcomers.pop(name, None)
        self.peers[name].alive = False

    def freeze(self, name: str, seconds: float) -> None:
        (self.newcomers.get(name) or self.peers[name]).frozen_until = self.now + seconds

    def partition(self, *sides: set[str], directory: bool = False) -> None:
        """Part these, and what the directory shows of them as well if it runs among them."""
        self.heal()
        self.cut = {
            frozenset((a, b))
            for one, other in itertools.combinations(sides, 2)
            for a in one
            for b in other
        }
        self.hidden.clear()
        self.hidden.update(self.cut if directory else ())

    def heal(self) -> None:
        """The network is one again; a directory that was parted is not yet."""
        self.healed.update(dict.fromkeys(self.cut, self.now))
        self.cut = set()

    # -- running ------------------------------------------------------------------------------

    def at(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), event))

    def run(self, until: Callable[[], bool], *, limit_s: float) -> None:
        """Let time pass until the condition holds; AssertionError if it never does."""
        end = self.now + limit_s
        while not until():
            assert self._events, "nothing is left to happen"
            self.now, _, event = heapq.heappop(self._events)
            assert self.now <= end, f"not within {limit_s} s: {self.describe()}"
            self.trace.update(repr(self.now).encode())
            event()

    def describe(self) -> str:
        return "; ".join(
            f"{name}{'' if peer.alive else ' dead'} {peer.machine.phase}"
            f" height {peer.machine.head.height} round {peer.machine.head.round}"
            f" ballot {peer.machine.ballot} of {len(peer.machine.head.roster)}"
            for name, peer in self.peers.items()
        )

    @property
    def live(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.alive and not peer.left]

    def one_branch(self) -> bool:
        """Whether nobody is further than a height from, or on another branch than, the rest."""
        best = max(self.live, key=lambda peer: peer.machine.head.height)
        chain = {wire.head_digest(c.outcome) for c in best.certificates[-3:]}
        return all(peer.machine.head.digest in chain for peer in self.live)

    def check_history(self) -> None:
        """Whether what the peers hold now is what was decided, one outcome after the other.

        Raises:
            Diverged: a state is not the replay of its certificates, or what a majority committed
                gave way to something else than a branch of peers who could not reach one.
        """
        for peer in self.live:
            chain = self._chain_to(peer.machine.head.digest)
            state = self.initial
            for certificate in reversed(chain.values()):
                if certificate.outcome.kind == Kind.AVERAGE:
                    outcome = certificate.outcome
                    state = after(state, outcome.round - 1, outcome.vector_root)
            if (
                contents(state) != contents(peer.state)
                or state.root != peer.machine.head.state_root
            ):
                raise Diverged(f"the state of {peer.me.peer_id} is not what was decided")
            here = {certificate.outcome.previous: certificate for certificate in chain.values()}
            for digest in self.by_head.keys() - chain.keys():
                for certificate in reversed(self._chain_to(digest).values()):
                    instead = here.get(certificate.outcome.previous)
                    if instead is None:
                        break  # only further than this peer
                    if instead.outcome == certificate.outcome:
                        continue
                    if not (certificate.provisional or instead.provisional):
                        raise Diverged(f"{certificate.outcome} was committed, and then {instead}")
                    break

    def _chain_to(self, head: bytes) -> dict[bytes, Certificate]:
        """The certificates that lead to a head, by the heads they led to, the last one first."""
        chain = {}
        while head in self.by_head:
            chain[head] = self.by_head[head]
            head = chain[head].outcome.previous
        return chain

    def all_at(self, round: int) -> bool:
        """Whether everybody got that far, those included who came as newcomers."""
        return not self.newcomers and all(peer.machine.head.round >= round for peer in self.live)

    # -- the shell ----------------------------------------------------------------------------

    def _runs(self, peer: Peer | Newcomer) -> bool:
        name = peer.me.peer_id
        return peer.alive and (self.peers.get(name) is peer or self.newcomers.get(name) is peer)

    def _later(self, peer: Peer | Newcomer, delay_s: float, event: Callable[[], None]) -> None:
        """An event at a peer: not after its death, and not while it is frozen."""

        def happen() -> None:
            if not self._runs(peer):
                return
            if self.now < peer.frozen_until:
                self.at(peer.frozen_until - self.now + 1e-6, happen)
            else:
                event()

        self.at(delay_s, happen)

    def _tick(self, peer: Peer) -> None:
        self._do(peer, peer.machine.tick(self.now))
        self._later(peer, TICK_S, lambda: self._tick(peer))

    def _reaches(self, a: str, b: str) -> bool:
        return (
            a in self.peers
            and b in self.peers
            and self.peers[a].alive
            and self.peers[b].alive
            and not self.is_cut(a, b)
        )

    def is_cut(self, a: str, b: str) -> bool:
        return frozenset((a, b)) in self.cut

    def _do(self, peer: Peer, wanted: list[actions.Action]) -> None:
        for action in wanted:
            match action:
                case actions.Send():
                    if isinstance(action.message, Commit):
                        self._check_decree(peer, action.message.certificate)
                    self._send(peer, action.to, action.message)
                case actions.StartWork():
                    self._work(peer, action)
                case actions.CloseWork():
                    self._close(peer, action.round)
                case actions.Finished():
                    peer.finished = peer.machine.finished
                case actions.Left():
                    peer.left = True
                case actions.StartExchange():
                    self._exchange(peer, action.plan, action.digest)
                case actions.GoOnWithout():
                    peer.without |= set(action.peers)
                case actions.Fetch():
                    self._fetch(peer, action.outcome, action.holders)
                case actions.Apply():
                    self._apply(peer, action.certificate)
                case actions.CatchUp():
                    self._catch_up(peer, action.peer)

    def _send(self, peer: Peer, to: str, message: Message) -> None:
        raw = wire.encode(message)
        sender = peer.me.peer_id
        lost = self.random.random() < self.faults.loss
        target = self.peers.get(to)
        known = peer.machine.membership.member(to)
        # A restarted peer listens elsewhere, under another certificate.
        moved = target is not None and known is not None and known.session != target.me.session
        if target is None or moved or not self._reaches(sender, to):
            self._later(
                peer,
                0.01 if target is None or not target.alive else 1.0,
                lambda: self._do(peer, peer.machine.undeliverable(to, self.now)),
            )
            return
        if lost or target.frozen_until > self.now + 2.0:
            self._later(peer, 2.0, lambda: self._do(peer, peer.machine.undeliverable(to, self.now)))
        if isinstance(message, self.mute.get(sender, ())):
            return
        copies = (0 if lost else 1) + (self.random.random() < self.faults.duplicate)
        for _ in range(copies):
            self._later(
                target,
                self.random.uniform(*self.faults.delay_s),
                lambda: self._receive(target, peer, raw),
            )

    def _receive(self, peer: Peer, sender: Peer, raw: bytes) -> None:
        self.trace.update(raw)
        self._do(peer, peer.machine.receive(sender.me.peer_id, wire.decode(raw), self.now))
        if self._runs(sender) and sender.frozen_until <= self.now:
            sender.machine.delivered(peer.me.peer_id)

    def _check_decree(self, peer: Peer, certificate: Certificate) -> None:
        """Whether this may have been decided when somebody first says that it was.

        Raises:
            Diverged: another majority decided otherwise, or who goes on without one reaches one.
        """
        outcome = certificate.outcome
        if not certificate.provisional:
            key = (outcome.height, outcome.previous)
            other = self.majorities.setdefault(key, certificate)
            if other.outcome != outcome:
                raise Diverged(f"two majorities at height {outcome.height}: {other} {certificate}")
        elif certificate not in self.provisional:
            self.provisional.append(certificate)
            voters = self.by_head[outcome.previous].outcome.roster
            there = {signature.peer_id for signature in certificate.signatures}
            there |= {member.peer_id for member in voters if self._is_close(peer, member)}
            if len(there) > len(voters) // 2:
                raise Diverged(
                    f"{peer.me.peer_id} went on without {len(voters)} voters at height"
                    f" {outcome.height} and reaches {sorted(there)}"
                )

    def _is_close(self, peer: Peer, member: Member) -> bool:
        """Whether these two could speak to each other for the last `NOTICE_S`."""
        me, other = peer.me.peer_id, self.peers.get(member.peer_id)
        if other is None or other.me != member or other.left or not other.alive:
            return False
        since = self.healed.get(frozenset((me, member.peer_id)), 0.0)
        since = max(since, peer.frozen_until, other.frozen_until)
        return not self.is_cut(me, member.peer_id) and self.now - since > NOTICE_S

    def _work(self, peer: Peer, action: actions.StartWork) -> None:
        takes_s = self.random.uniform(*self.work_s) * peer.slowness
        samples = self.random.randint(50, 100)
        began = peer.handed_in_at if self.overlap else self.now
        peer.work = (began, takes_s, samples)
        if self.config.mode == "gradient":
            self._accumulate(peer, peer.work, action.round)
            return
        left_s = max(0.0, began + takes_s - self.now)
        self._later(peer, left_s, lambda: self._hand_in(peer, action.round, samples))

    def _accumulate(self, peer: Peer, work: tuple[float, float, int], round: int) -> None:
        """In gradient mode: on and on, until the batch is full or the work is another one's."""
        if peer.work is not work or peer.machine.head.round != round:
            return
        samples = self._done(peer)
        if samples >= self.config.target_batch:
            self._hand_in(peer, round, samples)
            return
        self._do(peer, peer.machine.work_progress(round, samples, self.now))
        self._later(peer, PROGRESS_S, lambda: self._accumulate(peer, work, round))

    def _done(self, peer: Peer) -> int:
        """Samples so far."""
        began, takes_s, samples = peer.work
        share = (self.now - began) / takes_s
        return int(samples * (share if self.config.mode == "gradient" else min(1.0, share)))

    def _close(self, peer: Peer, round: int) -> None:
        """Hand in what is done by now."""
        self._hand_in(peer, round, self._done(peer))

    def _hand_in(self, peer: Peer, round: int, samples: int) -> None:
        peer.handed_in_at = self.now
        self._do(peer, peer.machine.work_done(round, samples, self.now))

    def _watch(self, peer: Peer) -> None:
        """The look into the directory, which shows everybody's samples, cut off or not.

        Unless it is parted itself: then those who were lost are asked, where they were last.
        """
        machine, me = peer.machine, peer.me.peer_id
        shown = {
            other.me.peer_id: Shown(
                other.machine.head.samples if other.machine.is_member else 0,
                other.machine.head.digest,
            )
            for other in self.live
            if other is not peer and frozenset((me, other.me.peer_id)) not in self.hidden
        }
        ask = peer.lookout.whom_to_ask(shown, machine.head, machine.knows)
        if ask is not None:
            self._catch_up(peer, ask)
        strays = machine.membership.strays
        if strays:
            peer.stray += 1
            stray = strays[peer.stray % len(strays)]
            there = self.peers.get(stray.peer_id)
            if there is not None and there.me == stray and self._answers(me, stray.peer_id):
                head = there.machine.head
                if head.rank > machine.head.rank and not machine.knows(head.digest):
                    self._catch_up(peer, stray.peer_id)
        self._later(peer, WATCH_S, lambda: self._watch(peer))

    def _come_back(self, peer: Peer, head: bytes, since: float) -> None:
        """What a session does for a peer without a seat when nobody of the roster is there."""
        machine = peer.machine
        stranded = revival.is_stranded(machine)
        if not stranded or machine.head.digest != head:
            head, since = machine.head.digest, self.now
        self._later(peer, revival.LOOK_S, lambda: self._come_back(peer, head, since))
        if not stranded:
            return
        name = peer.me.peer_id
        others = [p for p in self.live if p is not peer and self._reaches(name, p.me.peer_id)]
        for other in others:
            join = Join(member=peer.me, height=machine.head.height)
            self._later(
                other,
                self.random.uniform(*self.faults.delay_s),
                lambda other=other, join=join: self._do(
                    other, other.machine.receive(name, join, self.now)
                ),
            )
        further = [other for other in others if machine.yields_to(other.machine.head)]
        best = max(further, key=lambda other: other.machine.head.rank, default=None)
        if best is not None:
            self._catch_up(peer, best.me.peer_id)
            return
        chain_end = peer.certificates[-2:]
        waited_s = self.now - since
        revived = revival.revival(machine, chain_end, Key(name), waited_s, self.now)
        if revived is not None:
            self.revived += 1
            self.provisional.append(revived)
            others = [m for m in machine.head.roster if m.can_reduce and m.peer_id != name]
            if any(self._is_close(peer, member) for member in others):
                raise Diverged(f"{name} revived a run in which somebody could lead")
            if revived.outcome.height == chain_end[-1].outcome.height:
                peer.certificates.pop()
            peer.certificates.append(revived)
            self.by_head[wire.head_digest(revived.outcome)] = revived
            self._do(peer, machine.revive(revived, self.now))

    def _save(self, peer: Peer) -> None:
        """A checkpoint, by the rules of `checkpoints.Keeper`."""
        outcome, name = peer.certificates[-1].outcome, peer.me.peer_id
        chain_end = tuple(peer.certificates[-2:])
        due = self.save_every and outcome.round % self.save_every == 0
        whole = len(chain_end) == 2 and certificates.has_vote(chain_end, name)
        if due and whole and outcome.kind == Kind.AVERAGE:
            self.disks.setdefault(name, []).append(Saved(chain_end, peer.state))
            del self.disks[name][:-3]

    def _exchange(self, peer: Peer, plan: Plan, digest: bytes) -> None:
        """Get every slice from its reducer and every kept run from a holder, or a part of it."""
        me = peer.me.peer_id
        deadline, patience = self.now + plan.exchange_s, self.now + PLAN_S
        chunks: dict[int, Averaged] = {}
        peer.plans.append(plan)
        peer.chunks[digest] = chunks
        base = peer.chunks.get(plan.base, {})
        for kept in plan.kept:
            for chunk in range(kept.start, kept.stop):
                if chunk in base:
                    chunks[chunk] = base[chunk]
        peer.without = set()
        waiting = {piece.reducer for piece in plan.slices}
        lost: set[str] = set()

        def step() -> None:
            if next(reversed(peer.chunks)) != digest:
                return  # another plan has begun
            for name in sorted(waiting):
                reducer = self.peers.get(name)
                reached = name == me or self._reaches(me, name)
                ready = reached and reducer is not None and digest in reducer.chunks
                frozen = reached and reducer is not None and reducer.frozen_until > self.now
                late = self.now >= deadline or name in peer.without
                # A reducer that has not heard of the plan yet is waited for, not for ever.
                if reached and (frozen or (not ready and self.now < patience)) and not late:
                    continue
                waiting.discard(name)
                who = self._contributors(plan, digest, name) if ready and not frozen else None
                for piece in plan.slices:
                    if piece.reducer == name and ready:
                        stop = piece.stop if who else self.random.randrange(piece.start, piece.stop)
                        for chunk in range(piece.start, stop):
                            whose = who or self._contributors(plan, digest, name)
                            chunks[chunk] = _averaged(digest, chunk, whose)
                if not who:
                    lost.add(name)
            if waiting:
                self._later(peer, 0.5, step)
                return
            for kept in plan.kept:
                for holder in kept.holders:
                    if holder == me or not self._answers(me, holder):
                        continue
                    theirs = self.peers[holder].chunks.get(plan.base, {})
                    for chunk in range(kept.start, kept.stop):
                        if chunk not in chunks and chunk in theirs:
                            chunks[chunk] = theirs[chunk]
            if len(chunks) < plan.chunks:
                held = runs_of(sorted(chunks))
                gone = tuple(sorted(lost))
                self._do(peer, peer.machine.exchange_failed(digest, gone, held, self.now))
                return
            root = blake3(b"".join(chunks[n].version for n in sorted(chunks))).digest()
            if self._is_refused(root):
                self._do(peer, peer.machine.exchange_refused(digest, self.now))
                return
            peer.hold(root)
            present = frozenset().union(*(chunk.contributors for chunk in chunks.values()))
            self._do(
                peer,
                peer.machine.exchange_done(
                    digest,
                    root,
                    after(peer.state, plan.round, root).root,
                    self.now,
                    absent=tuple(c.peer_id for c in plan.contributions if c.peer_id not in present),
                ),
            )

        self._later(peer, self.random.uniform(*self.exchange_s) + peer.link_s, step)

    def _is_refused(self, root: bytes) -> bool:
        """Whether an average leads to a state that is not finite, as everybody finds who has it."""
        return root[0] < 256 * self.faults.refused

    def _contributors(self, plan: Plan, digest: bytes, reducer: str) -> frozenset[str]:
        """Whose work a reducer has in its slices: what it is when somebody asks first, it stays.

        A reducer that sums up once more, by a mend, may do so without somebody who has died since.
        """
        if (digest, reducer) not in self.reduced:
            self.reduced[digest, reducer] = frozenset(
                c.peer_id
                for c in plan.contributions
                if c.peer_id in plan.receivers
                and (c.peer_id == reducer or self._answers(reducer, c.peer_id))
                and digest in self.peers[c.peer_id].chunks
            )
        return self.reduced[digest, reducer]

    def _answers(self, a: str, b: str) -> bool:
        return self._reaches(a, b) and self.peers[b].frozen_until <= self.now

    def _fetch(self, peer: Peer, outcome: Outcome, holders: tuple[str, ...]) -> None:
        def end() -> None:
            me = peer.me.peer_id
            known = [h for h in holders if peer.machine.membership.member(h) is not None]
            has = [h for h in known if h in self.peers and self._answers(me, h)]
            held = any(outcome.vector_root in self.peers[h].averages for h in has)
            held = held and not self._is_refused(outcome.vector_root)
            if held:
                peer.hold(outcome.vector_root)
            peer.failed_fetches = 0 if held else peer.failed_fetches + 1
            self._do(peer, peer.machine.fetched(outcome, held, self.now))
            if peer.failed_fetches >= FETCHES_BEFORE_RESYNC and has:
                self._catch_up(peer, has[0], whole=True)

        self._later(peer, 0.3 + peer.link_s, end)

    def _apply(self, peer: Peer, certificate: Certificate) -> None:
        outcome = certificate.outcome
        self._check_decree(peer, certificate)
        if outcome.kind != Kind.AVERAGE:
            self.voids += 1
            if outcome.state_root != peer.state_root:
                raise Diverged(f"a regroup changed the state of {peer.me.peer_id}")
        else:
            peer.state = self._follow(peer.me.peer_id, peer.state, outcome)
            given_up = peer.undecided - {outcome.vector_root}
            peer.averages = [root for root in peer.averages if root not in given_up]
            peer.undecided.clear()
        peer.certificates.append(certificate)
        self.by_head.setdefault(wire.head_digest(outcome), certificate)
        self._save(peer)

    def _follow(self, name: str, state: State, outcome: Outcome) -> State:
        """What this average makes of a peer's state."""
        state = after(state, outcome.round - 1, outcome.vector_root)
        if state.root != outcome.state_root:
            raise Diverged(f"{name} applied what does not follow from its state")
        return state

    def _catch_up(self, peer: Peer, donor: str, *, whole: bool = False) -> None:
        """Ask what was decided: replay it where it follows, get the whole state elsewhere."""

        def end() -> None:
            if peer.getting or not self._answers(peer.me.peer_id, donor):
                return
            source = self.peers[donor]
            for certificate in () if whole else source.shown:
                outcome = certificate.outcome
                there = outcome.kind != Kind.AVERAGE or outcome.vector_root in source.averages
                if outcome.previous == peer.machine.head.digest and there:
                    commit = Commit(certificate=certificate, holders=(donor,))
                    self._do(peer, peer.machine.receive(donor, commit, self.now))
                    stuck = peer.failed_fetches >= FETCHES_BEFORE_RESYNC
                    if peer.machine.takes(certificate) and not stuck:
                        return
            if peer.machine.yields_to(Head.after(source.certificates[-1])):
                peer.getting = True
                self._obtain(peer, source, install, lost)

        def install(state: State, links: list[Certificate]) -> None:
            peer.getting = False
            if peer.machine.yields_to(Head.after(links[-1])):
                peer.failed_fetches = 0
                peer.state = state
                peer.certificates = links
                self._do(peer, peer.machine.install(links[-1], self.now))

        def lost() -> None:
            peer.getting = False  # whoever is ahead is noticed once more, at a newer head

        if not peer.getting:
            self._later(peer, 0.2, end)

    def _find(self, newcomer: Newcomer, contact: str = "") -> None:
        """Get the state of the furthest head that anybody shows, again and again."""
        name = newcomer.me.peer_id
        shown = [peer for peer in self.live if self._is_there(name, peer)]
        best = max(shown, key=lambda peer: peer.machine.head.rank, default=None)
        source = next((peer for peer in shown if peer.me.peer_id == contact), best)
        if source is None:
            self._later(newcomer, FIND_S, lambda: self._find(newcomer))
            return

        def begin(state: State, links: list[Certificate]) -> None:
            del self.newcomers[name]
            self._start(newcomer.me, state, links)

        self._obtain(newcomer, source, begin, lambda: self._find(newcomer))

    def _obtain(
        self,
        host: Peer | Newcomer,
        source: Peer,
        here: Callable[[State, list[Certificate]], None],
        lost: Callable[[], None],
    ) -> None:
        """Download the state at a peer's head, and replay what is committed meanwhile."""
        links = list(source.certificates)
        got, name = len(links), host.me.peer_id
        over = False

        def collect() -> None:
            if not over:
                self._collect(name, links)
                self._later(host, COLLECT_S, collect)

        def arrived(state: State, received: dict[str, int]) -> None:
            nonlocal over
            over = True
            self.downloads.append(received)
            self._collect(name, links)
            for certificate in links[got:]:
                if certificate.outcome.kind == Kind.AVERAGE:
                    state = self._follow(name, state, certificate.outcome)
            here(state, links)

        def gone() -> None:
            nonlocal over
            over = True
            lost()

        root = links[-1].outcome.state_root
        Getting(self, host, root, source.me.peer_id, here=arrived, lost=gone)
        collect()

    def _collect(self, name: str, links: list[Certificate]) -> None:
        """What follows on a state that is being downloaded, as far as somebody has the averages."""
        for other in self.live:
            for certificate in other.shown if self._is_there(name, other) else ():
                outcome = certificate.outcome
                if not follows(links[-1], certificate, RUN, check):
                    continue
                if outcome.kind == Kind.AVERAGE and outcome.vector_root not in other.averages:
                    break
                links.append(certificate)

    def _is_there(self, name: str, other: Peer) -> bool:
        """Whether that peer answers this one, which need not be a peer of the swarm yet."""
        cut = self.is_cut(name, other.me.peer_id)
        return self._runs(other) and other.frozen_until <= self.now and not cut
