"""A whole swarm in one process: the shipped machines under a virtual clock and one seed.

Messages are encoded and decoded as on the wire, delayed, reordered, duplicated and lost; peers
crash, restart without memory, freeze and are cut off. The butterfly is played: it takes a while and
comes to nothing for a member that cannot reach another one of its plan. After every event the
world checks that no two certificates disagree.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from blake3 import blake3

from coordinator_free import actions, certificates, wire
from coordinator_free.certificates import Head
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.machine import Machine
from coordinator_free.messages import (
    NO_DIGEST,
    Certificate,
    Commit,
    Kind,
    Member,
    Message,
    Outcome,
    Plan,
)

RUN = "00" * 20
TICK_S = 0.2
WATCH_S = 5.0


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
    """What the network does to a message; probabilities per message."""

    loss: float = 0.0
    duplicate: float = 0.0
    delay_s: tuple[float, float] = (0.001, 0.05)


@dataclass(kw_only=True)
class Peer:
    me: Member
    machine: Machine
    alive: bool = True
    frozen_until: float = 0.0
    state_root: bytes = NO_DIGEST
    outcomes: dict[bytes, Outcome] = field(default_factory=dict)
    certificates: list[Certificate] = field(default_factory=list)
    finished: bool = False
    left: bool = False


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
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.config = config
        self.faults = faults or Faults()
        self.work_s = work_s
        self.exchange_s = exchange_s
        self.peers: dict[str, Peer] = {}
        self.cut: set[frozenset[str]] = set()
        self.decided: dict[tuple[int, bytes], Certificate] = {}
        self.rounds_committed: dict[str, int] = {}
        self.voids = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    # -- building -----------------------------------------------------------------------------

    def found(self, name: str) -> Peer:
        me = self._member(name)
        certificate = certificates.found(RUN, me, Key(name), blake3(b"initial").digest())
        return self._start(me, certificate)

    def join(self, name: str, donor: str) -> Peer:
        """A peer with no memory starts from a live donor's newest state."""
        return self._start(self._member(name), self.peers[donor].machine.certificate)

    def _member(self, name: str) -> Member:
        return Member(
            peer_id=name,
            session=self.random.getrandbits(64),
            hosts=("sim",),
            port=1,
            certificate_sha256=NO_DIGEST,
            can_reduce=True,
        )

    def _start(self, me: Member, certificate: Certificate) -> Peer:
        peer = Peer(
            me=me,
            machine=Machine(
                me=me,
                run_id=RUN,
                layout=Layout(numel=10_000, chunk_elements=1024),
                config=self.config,
                certificate=certificate,
                signer=Key(me.peer_id),
                check=check,
                now=self.now,
            ),
            state_root=certificate.outcome.state_root,
        )
        peer.certificates.append(certificate)
        self.peers[me.peer_id] = peer
        self._do(peer, peer.machine.start(self.now))
        self._tick(peer)
        self._watch(peer)
        return peer

    # -- faults -------------------------------------------------------------------------------

    def crash(self, name: str) -> None:
        self.peers[name].alive = False

    def freeze(self, name: str, seconds: float) -> None:
        self.peers[name].frozen_until = self.now + seconds

    def partition(self, *sides: set[str]) -> None:
        self.cut = {
            frozenset((a, b))
            for one, other in itertools.combinations(sides, 2)
            for a in one
            for b in other
        }

    def heal(self) -> None:
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

    def all_at(self, round: int) -> bool:
        return all(peer.machine.head.round >= round for peer in self.live)

    # -- the shell ----------------------------------------------------------------------------

    def _runs(self, peer: Peer) -> bool:
        return peer.alive and self.peers.get(peer.me.peer_id) is peer

    def _later(self, peer: Peer, delay_s: float, event: Callable[[], None]) -> None:
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
            and frozenset((a, b)) not in self.cut
        )

    def _do(self, peer: Peer, wanted: list[actions.Action]) -> None:
        for action in wanted:
            match action:
                case actions.Send():
                    self._send(peer, action.to, action.message)
                case actions.StartWork():
                    self._work(peer, action)
                case actions.CloseWork():
                    self._hand_in(peer, action.round, self.random.randint(0, 20))
                case actions.Finished():
                    peer.finished = peer.machine.finished
                case actions.Left():
                    peer.left = True
                case actions.StartExchange():
                    self._exchange(peer, action.plan, action.digest)
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
        if target is None or not self._reaches(sender, to):
            self._later(
                peer,
                0.01 if target is None or not target.alive else 1.0,
                lambda: self._do(peer, peer.machine.undeliverable(to, self.now)),
            )
            return
        if lost or target.frozen_until > self.now + 2.0:
            self._later(peer, 2.0, lambda: self._do(peer, peer.machine.undeliverable(to, self.now)))
        copies = (0 if lost else 1) + (self.random.random() < self.faults.duplicate)
        for _ in range(copies):
            self._later(
                target,
                self.random.uniform(*self.faults.delay_s),
                lambda: self._do(
                    target, target.machine.receive(sender, wire.decode(raw), self.now)
                ),
            )

    def _work(self, peer: Peer, action: actions.StartWork) -> None:
        self._later(
            peer,
            self.random.uniform(*self.work_s),
            lambda: self._hand_in(peer, action.round, self.random.randint(1, 100)),
        )

    def _hand_in(self, peer: Peer, round: int, samples: int) -> None:
        self._do(peer, peer.machine.work_done(round, samples, self.now))

    def _watch(self, peer: Peer, ahead: int = 0) -> None:
        """The look into the directory, which shows everybody's samples, cut off or not."""
        others = [other for other in self.live if other is not peer]
        best = max(others, key=lambda other: other.machine.head.samples, default=None)
        if best is not None and ahead > peer.machine.head.samples:
            self._catch_up(peer, best.me.peer_id)
        samples = best.machine.head.samples if best is not None else 0
        self._later(peer, WATCH_S, lambda: self._watch(peer, samples))

    def _exchange(self, peer: Peer, plan: Plan, digest: bytes) -> None:
        vector_root = blake3(b"vector" + digest).digest()
        state_root = blake3(peer.state_root + vector_root).digest()

        def end() -> None:
            lost = tuple(
                p
                for p in plan.receivers
                if not self._reaches(peer.me.peer_id, p) and p != peer.me.peer_id
            )
            if lost:
                self._do(peer, peer.machine.exchange_failed(digest, lost, self.now))
            else:
                self._do(
                    peer,
                    peer.machine.exchange_done(digest, vector_root, state_root, (), self.now),
                )

        self._later(peer, self.random.uniform(*self.exchange_s), end)

    def _fetch(self, peer: Peer, outcome: Outcome, holders: tuple[str, ...]) -> None:
        def end() -> None:
            held = any(self._reaches(peer.me.peer_id, holder) for holder in holders)
            self._do(peer, peer.machine.fetched(outcome, held, self.now))

        self._later(peer, 0.3, end)

    def _apply(self, peer: Peer, certificate: Certificate) -> None:
        outcome = certificate.outcome
        key = (outcome.height, outcome.previous)
        if outcome.kind != Kind.AVERAGE:
            self.voids += 1
            if outcome.state_root != peer.state_root:
                raise Diverged(f"a regroup changed the state of {peer.me.peer_id}")
        elif outcome.state_root != blake3(peer.state_root + outcome.vector_root).digest():
            raise Diverged(f"{peer.me.peer_id} applied what does not follow from its state")
        else:
            self.rounds_committed[peer.me.peer_id] = outcome.round
        peer.state_root = outcome.state_root
        peer.certificates.append(certificate)
        other = self.decided.setdefault(key, certificate)
        if (
            wire.outcome_digest(other.outcome) != wire.outcome_digest(outcome)
            and not other.provisional
            and not certificate.provisional
        ):
            raise Diverged(f"two majorities at height {outcome.height}: {other} {certificate}")

    def _catch_up(self, peer: Peer, donor: str) -> None:
        """Ask what was decided: replay it where it follows, take the whole state elsewhere."""

        def end() -> None:
            if not self._reaches(peer.me.peer_id, donor):
                return
            source = self.peers[donor]
            for certificate in source.certificates:
                if certificate.outcome.previous == peer.machine.head.digest:
                    commit = Commit(certificate=certificate, holders=(donor,))
                    self._do(peer, peer.machine.receive(donor, commit, self.now))
                    if peer.machine.takes(certificate):
                        return
            newest = source.machine.certificate
            if Head.after(newest).rank > peer.machine.head.rank:
                peer.state_root = newest.outcome.state_root
                peer.certificates = list(source.certificates)
                self._do(peer, peer.machine.install(newest, self.now))

        self._later(peer, 0.2, end)
