"""One peer's part in agreeing on every round: a state machine without I/O.

Messages, clock ticks and the results of local work go in; actions come out. The shell (`session`)
and the simulator drive the same object.

The swarm decides one *outcome* at each *height*: a round was averaged, or only the roster changed.
Each height is a single-decree consensus among the roster that the height before decided. Ballots
number the attempts; who leads ballot b of height h follows from a shuffled order of the roster,
entered at h + b, so every round has another leader and nobody votes on who it is:

    Ready        work is done                                  member -> leader
    Plan         who averages what                             leader -> members
    (butterfly)  the tensors, among the members
    Report       the digests of what came out                  member -> leader
    Plan         once more, if all miss something: a mend      leader -> members
    Propose      the outcome: digests, next roster             leader -> members
    Accepted     a signature under it                          member -> leader
    Commit       a majority's signatures: the certificate      leader -> all

A member signs an average only once it holds its bytes and has computed the state that follows from
them, so what is committed exists on a majority and everyone who commits it is bit-identical.
A leader that falls silent is replaced by that of the next ballot, which first learns from a
majority what may have been accepted (Prepare, Promise) and must propose that again.

Guarantees, for peers that crash, stall or are cut off: no two outcomes are committed at one height
by majorities; a void attempt changes nothing. If more than half of a roster is gone for
`provisional_s`, the rest goes on with a provisional certificate; then two branches can exist, and
the one with fewer samples gives way when they meet. Not guaranteed: anything against a member that
lies about having been partitioned (docs/threat_model.md).
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from blake3 import blake3

from coordinator_free import certificates, wire
from coordinator_free.actions import (
    Action,
    Apply,
    CatchUp,
    CloseWork,
    Fetch,
    Finished,
    GoOnWithout,
    Left,
    Send,
    StartExchange,
    StartWork,
)
from coordinator_free.certificates import Head, Signer, Verify
from coordinator_free.config import KEPT_CANDIDATES, Layout, RoundConfig
from coordinator_free.leadership import BEAT_S, Leadership
from coordinator_free.membership import Membership
from coordinator_free.messages import (
    NO_DIGEST,
    Accepted,
    AtBallot,
    Certificate,
    Commit,
    Join,
    Kind,
    Lead,
    Leave,
    Member,
    Message,
    Outcome,
    Plan,
    Prepare,
    Promise,
    Propose,
    Ready,
    Refused,
    Report,
    Run,
)
from coordinator_free.partition import ALIGN_ELEMENTS

BEHIND_S = 1.0  # how long a message from a later height may overtake the commit before it
KEPT_HEADS = 1024  # peer records in the directory are older than a round


class Machine:
    """One replica's protocol state.

    Args:
        me: this peer's seat as others should see it.
        run_id: of the run.
        layout: of the averaged vector.
        config: of the run.
        certificate: verified, newest; the state it names is held.
        signer: signs acceptances as `me`.
        check: verifies signatures of others.
        now: seconds on the clock that all later calls use.
    """

    def __init__(
        self,
        *,
        me: Member,
        run_id: str,
        layout: Layout,
        config: RoundConfig,
        certificate: Certificate,
        signer: Signer,
        check: Verify,
        now: float,
    ) -> None:
        self.me = me
        self.run_id = run_id
        self.layout = layout
        self.config = config
        self._signer = signer
        self.check = check
        self._out: list[Action] = []
        self._to_self: deque[Message] = deque()
        self._leaving = False
        self._left = False
        self._leadership: Leadership | None = None
        self._rounds = config.rounds
        self._fetching: Outcome | None = None
        self.pace_s: float | None = None  # what the last complete exchange took here
        self._worked: tuple[int, int] | None = None  # round, samples: done and not yet averaged
        self._working: int | None = None  # round that the trainer is busy with
        self.certificate = certificate
        self.head = Head.after(certificate)
        self._passed: deque[bytes] = deque(maxlen=KEPT_HEADS)
        self.membership = Membership(me, self.head)
        self._early: dict[tuple[str, type], Message] = {}
        self._ahead: tuple[str, float] | None = None  # who sent something from a later height
        self._repeat_at = now
        self._enter(certificate, now)

    # -- what goes in -------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """The first actions after construction."""
        return self._drain(now)

    def receive(self, sender: str, message: Message, now: float) -> list[Action]:
        """An authentic message from `sender`."""
        self.membership.heard(sender)
        self._handle(sender, message, now)
        return self._drain(now)

    def tick(self, now: float) -> list[Action]:
        """Time passed; call it at least every few hundred milliseconds."""
        self._part()
        if self.is_member:
            self._suspect_leader(now)
            if self._leadership is not None:
                self._leadership.advance(now)
        if now >= self._repeat_at:
            self._repeat_at = now + BEAT_S
            self._repeat()
            self._data_arrived(now)
        if self._ahead is not None and now - self._ahead[1] >= BEHIND_S:
            self._out.append(CatchUp(peer=self._ahead[0]))
            self._ahead = (self._ahead[0], now)
        return self._drain(now)

    def work_done(self, round: int, samples: int, now: float) -> list[Action]:
        """The trainer handed in its work for a round."""
        if round == self.head.round and self._working == round:
            self._working = None
            self._worked = (round, samples)
            self._say_ready()
        return self._drain(now)

    def exchange_done(
        self,
        plan: bytes,
        vector_root: bytes,
        state_root: bytes,
        now: float,
        *,
        lost: tuple[str, ...] = (),
        absent: tuple[str, ...] = (),
    ) -> list[Action]:
        """The exchange of a plan ended here; the average is held and its state computed.

        Args:
            plan: its digest.
            vector_root: of the average.
            state_root: of the state that follows.
            now: the time.
            lost: contributors that my slices had to do without, from some chunk on.
            absent: contributors that are in no chunk at all.
        """
        if plan == self._plan_digest and self._plan is not None:
            if self._plan.attempt == 0:
                self.pace_s = now - self._exchange_began
            self._exchanging = False
            self._hold(vector_root, state_root)
            self._report_on(plan, vector_root, state_root, lost, (), absent)
            self._data_arrived(now)
        return self._drain(now)

    def exchange_failed(
        self, plan: bytes, lost: tuple[str, ...], held: tuple[Run, ...], now: float
    ) -> list[Action]:
        """The exchange of a plan ended here with only `held` chunks; `lost` peers broke off."""
        if plan == self._plan_digest:
            if self.pace_s is not None:
                self.pace_s *= 2  # perhaps the network has become slower
            self._exchanging = False
            self._report_on(plan, NO_DIGEST, NO_DIGEST, lost, held, ())
            self._data_arrived(now)
        return self._drain(now)

    def exchange_refused(self, plan: bytes, now: float) -> list[Action]:
        """The average of a plan leads to no state that anybody should go to: train once more."""
        if plan == self._plan_digest:
            self._worked = (self.head.round, 0)
        return self.exchange_failed(plan, (), (), now)

    def fetched(self, outcome: Outcome, held: bool, now: float) -> list[Action]:
        """A Fetch ended; `held` if its state matched the outcome's."""
        if outcome.height == self.head.height:
            if outcome == self._fetching:
                self._fetching = None
            if held:
                self._hold(outcome.vector_root, outcome.state_root)
            self._data_arrived(now, retry=held)
        return self._drain(now)

    def delivered(self, peer: str) -> None:
        """A message to this peer was confirmed."""
        self.membership.heard(peer)

    def undeliverable(self, peer: str, now: float) -> list[Action]:
        """A message to this peer could not be delivered in time."""
        self.membership.lost(peer, now)
        if self.is_member:
            self._suspect_leader(now)
        return self._drain(now)

    def leave(self, now: float) -> list[Action]:
        """Ask for a roster without this peer; `Left` follows when there is one."""
        if not self._leaving:
            self._leaving = True
            self.membership.leave(self.me.peer_id)
            self._repeat_at = now
            self._part()
        return self._drain(now)

    def finish_after(self, round: int, now: float) -> list[Action]:
        """End the run for this peer when this round is committed."""
        self._rounds = round + 1
        if self.finished:
            self._out.append(Finished())
        return self._drain(now)

    def install(self, certificate: Certificate, now: float) -> list[Action]:
        """Another, verified branch or a later height was downloaded whole: go on from there."""
        if self.yields_to(Head.after(certificate)):
            self._worked = self._working = None
            self._enter(certificate, now)
            if self._working is not None and self.head.kind == Kind.REGROUP:
                # The round's blocks are dealt out already, by a roster that is not known here.
                self._out = [a for a in self._out if not isinstance(a, StartWork)]
                self._working, self._worked = None, (self.head.round, 0)
        return self._drain(now)

    # -- what can be seen ---------------------------------------------------------------------

    def yields_to(self, head: Head) -> bool:
        """Whether this peer gives up where it stands for that head, which need not follow on it.

        One who was cut off comes back with a roster of its own and, where no round was completed
        meanwhile, with as many samples: the larger roster stays, whoever counts more heights. One
        who has no seat here goes where it is given one, if that loses no samples.
        """
        if not self.is_member and self.me in head.roster:
            return head.samples >= self.head.samples
        if self.is_member and head.samples == self.head.samples:
            theirs = (len(head.roster), head.height, head.digest)
            return theirs > (len(self.head.roster), self.head.height, self.head.digest)
        return head.rank > self.head.rank

    def knows(self, head: bytes) -> bool:
        """Whether this peer stands at that head, or passed it not long ago."""
        return head in self._passed

    def takes(self, certificate: Certificate) -> bool:
        """Whether this certificate settles its height here, now or once its average is fetched."""
        pending = self._decided is not None and self._decided.certificate == certificate
        return pending or self.head.height > certificate.outcome.height

    @property
    def is_member(self) -> bool:
        """Whether this session of this peer has a seat in the current roster."""
        return self.me in self.head.roster

    @property
    def finished(self) -> bool:
        """Whether the run's last round is committed."""
        return 0 < self._rounds <= self.head.round

    @property
    def all_finished(self) -> bool:
        """Whether every live member has said that it needs nothing more."""
        return all(
            peer == self.me.peer_id or self.membership.leaving(peer)
            for peer in self.membership.live()
        )

    @property
    def gathering(self) -> bool:
        """Whether the first round still waits for `start_peers`."""
        return (
            self.head.kind in (Kind.FOUND, Kind.GATHER)
            and len(self.head.roster) < self.config.start_peers
        )

    @property
    def leader(self) -> str:
        """Who leads the current ballot."""
        return self._leader_of(self.ballot)

    @property
    def phase(self) -> str:
        """One word for people."""
        if self.finished:
            return "finished"
        if not self.is_member:
            return "joining"
        if self.gathering:
            return "gathering"
        if self._exchanging:
            return "averaging"
        if self._accepted is not None or self._report is not None:
            return "agreeing"
        return "training" if self._working is not None else "waiting"

    # -- heights and ballots ------------------------------------------------------------------

    def _enter(self, certificate: Certificate, now: float) -> None:
        self.certificate = certificate
        self.head = Head.after(certificate)
        self._passed.append(self.head.digest)
        self.membership.enter(self.head)
        eligible = [m.peer_id for m in self.head.roster if m.can_reduce] or self.head.peers
        # One shuffled order for the run, entered one further at each height: a hash of the height
        # as well would give one peer in n two turns in a row.
        seed = b"shoal order v1\0" + self.run_id.encode() + b"\0"
        order = sorted(eligible, key=lambda peer: blake3(seed + peer.encode()).digest())
        first = self.head.height % len(order)
        self._order = order[first:] + order[:first]
        self._promised = 0
        self._accepted: tuple[int, Outcome] | None = None
        self._plan: Plan | None = None
        self._plan_digest = NO_DIGEST
        self._exchanging = False
        self._exchange_began: float = now
        self._report: Report | None = None
        self._held: dict[tuple[bytes, bytes], None] = {}
        self._proposal: Propose | None = None
        self._decided: Commit | None = None
        self._fetching = None
        self._closed = False
        self._ahead = None
        self._repeat_at = now
        if self.finished:
            self._out.append(Finished())
        elif self.is_member:
            self._begin_work()
        self._part()
        self._to_ballot(0, now)
        early, self._early = self._early, {}
        for (sender, _), message in early.items():
            self._handle(sender, message, now)

    def _begin_work(self) -> None:
        """Train for the round of this height, unless that is done or under way already.

        A height that only changed the roster in the middle of a round leaves the work as it is:
        its blocks were dealt out by the roster that the round began with. Work of no samples is
        none: who was closed before its first step tries again with the next attempt.
        """
        round = self.head.round
        if self.gathering or self._leaving:
            return
        if self._worked is None or self._worked[0] != round or self._worked[1] == 0:
            self._worked = None
            if self._working != round:
                self._working = round
                seat = self.head.peers.index(self.me.peer_id)
                self._out.append(StartWork(round=round, seat=seat, seats=len(self.head.roster)))

    def _part(self) -> None:
        """A leaver is let go by a roster without it, or when nobody stays to decide on one."""
        if self._leaving and not self._left:
            staying = [p for p in self.membership.live() if not self.membership.leaving(p)]
            if not self.is_member or not staying:
                self._left = True
                self._leadership = None
                self._out.append(Left())

    @property
    def _reachable(self) -> int:
        """Nobody gets to a higher ballot than this by taking turns."""
        return self.ballot + 4 * len(self._order)

    @property
    def _over(self) -> bool:
        return self.finished or self._left

    def _leader_of(self, ballot: int) -> str:
        return self._order[ballot % len(self._order)]

    def _to_ballot(self, ballot: int, now: float) -> None:
        self.ballot = ballot
        self._leader_heard = now
        self._leadership = None
        if self.is_member and not self._over and self.leader == self.me.peer_id:
            self._leadership = Leadership(self, ballot, now)
        self._say_ready()
        if self._report is not None:
            self._send_report(self._report)

    def _suspect_leader(self, now: float) -> None:
        while self.leader != self.me.peer_id and not self.finished:
            silent = now - self._leader_heard > self.config.suspect_s
            # Where this peer cannot lead and all who can are down, there is nobody to turn to.
            down = self.membership.is_down(self.leader) and not all(
                self.membership.is_down(peer) for peer in self._order
            )
            if not silent and not down:
                return
            self._to_ballot(self.ballot + 1, now)

    # -- messages -----------------------------------------------------------------------------

    def _handle(self, sender: str, message: Message, now: float) -> None:
        match message:
            case Join():
                self._on_join(sender, message, now)
            case Leave():
                self.membership.leave(sender)
            case Commit():
                self._on_commit(sender, message, now)
            case Plan() | AtBallot():
                if message.height < self.head.height:
                    if sender == self.me.peer_id:
                        return
                    self._send_newest(sender)
                elif message.height > self.head.height:
                    self._on_future(sender, message, now)
                elif sender in self.head.peers and self.is_member and not self.finished:
                    self._on_ballot_message(sender, message, now)
            case _:
                pass  # Hello and Heads are between the shells

    def _send_newest(self, to: str) -> None:
        self.send(to, Commit(certificate=self.certificate, holders=(self.me.peer_id,)))

    def _on_future(self, sender: str, message: Message, now: float) -> None:
        # The commit of our height may be on its way still: messages of different peers overtake
        # each other. Kept, one of a kind and sender, until it arrives or the catch-up does.
        if not self._is_ahead(sender, now):
            return
        if len(self._early) < 4 * len(self.head.roster) + 16:
            self._early[(sender, type(message))] = message

    def _is_ahead(self, sender: str, now: float) -> bool:
        """Remember who to catch up with; False for a stranger, who has no address to ask."""
        if sender not in self.head.peers and self.membership.member(sender) is None:
            return False
        # The last to speak is asked: the first may be dead by now.
        self._ahead = (sender, now if self._ahead is None else self._ahead[1])
        return True

    def _on_join(self, sender: str, join: Join, now: float) -> None:
        if join.member.peer_id != sender:
            return
        if join.member not in self.head.roster:
            self.membership.join(join, now)
        if join.height < self.head.height:
            self._send_newest(sender)

    def _on_ballot_message(self, sender: str, message: AtBallot | Plan, now: float) -> None:
        from_leader = sender == self._leader_of(message.ballot)
        for_me = self._leader_of(message.ballot) == self.me.peer_id
        if message.ballot > self._reachable:
            return
        match message:
            case Lead() | Prepare() | Plan() | Propose() if not from_leader:
                return
            case Lead() | Prepare() | Plan() | Propose():
                # After taking part in a later ballot, an earlier leader's turn is over.
                if message.ballot < max(self._promised, self.ballot):
                    promised = max(self._promised, self.ballot)
                    self.send(
                        sender,
                        Refused(height=message.height, ballot=message.ballot, promised=promised),
                    )
                    return
                if message.ballot > self.ballot:
                    self._to_ballot(message.ballot, now)
                self._leader_heard = now
            case Refused() if for_me:
                reached = self.ballot < message.promised <= self._reachable
                if self._leadership is not None and reached:
                    self._to_ballot(message.promised, now)
                return
            case _ if for_me and message.ballot > self.ballot:
                # Somebody gave up on those before me.
                self._to_ballot(message.ballot, now)
        match message:
            case Lead():
                self._on_lead(message)
            case Prepare():
                self._on_prepare(sender, message)
            case Plan():
                self._on_plan(message, now)
            case Propose():
                self._proposal = message
                self._data_arrived(now)
            case Ready() | Promise() | Report() | Accepted():
                leadership = self._leadership
                if leadership is not None and message.ballot == self.ballot:
                    leadership.receive(sender, message, now)

    def _on_lead(self, lead: Lead) -> None:
        if lead.closing and self._working is not None and not self._closed:
            self._closed = True
            self._out.append(CloseWork(round=self.head.round))
        if lead.lost and self._exchanging:
            self._out.append(GoOnWithout(plan=self._plan_digest, peers=lead.lost))

    def _on_prepare(self, sender: str, message: Prepare) -> None:
        self._promised = message.ballot
        ballot, outcome = self._accepted if self._accepted is not None else (None, None)
        self.send(
            sender,
            Promise(
                height=message.height,
                ballot=message.ballot,
                accepted_ballot=ballot,
                accepted=outcome,
                plan=self._plan,
                report=self._report,
            ),
        )

    def _on_plan(self, plan: Plan, now: float) -> None:
        # The one before a mend may arrive again after it.
        latest = (self._plan.ballot, self._plan.attempt) if self._plan is not None else (-1, 0)
        mine = next((c for c in plan.contributions if c.peer_id == self.me.peer_id), None)
        worked = self._worked[1] if self._worked is not None else 0
        if (
            (plan.ballot, plan.attempt) <= latest
            or not self.sound(plan)
            or self.me.peer_id not in plan.receivers
            or (mine is not None and mine.samples != worked)
        ):
            return
        self._plan, self._plan_digest = plan, wire.plan_digest(plan)
        self._report = None
        self._exchanging = True
        self._exchange_began = now
        self._out.append(StartExchange(plan=plan, digest=self._plan_digest))

    def sound(self, plan: Plan) -> bool:
        """Whether a leader of this height may have made this plan."""
        members = set(self.head.peers)
        return (
            (plan.height, plan.round) == (self.head.height, self.head.round)
            and plan.previous == self.head.digest
            and plan.numel == self.layout.numel
            and plan.chunk_elements <= self.layout.largest_chunk
            and plan.chunk_elements % ALIGN_ELEMENTS == 0
            and plan.stall_s <= plan.exchange_s <= self.config.exchange_s
            and plan.codec == self.config.codec
            and members.issuperset(plan.receivers)
            and members.issuperset(c.peer_id for c in plan.contributions)
            and all(members.issuperset(kept.holders) for kept in plan.kept)
        )

    # -- accepting and committing -------------------------------------------------------------

    def _data_arrived(self, now: float, *, retry: bool = True) -> None:
        """Accept what is proposed and commit what is decided, as far as the bytes are here."""
        if self._decided is not None:
            # First: one fetch is under way at a time, and a proposal's holders may all be dead.
            outcome = self._decided.certificate.outcome
            if self._holds(outcome):
                self._commit(self._decided.certificate, now)
            elif retry:
                self._obtain(outcome, self._decided.holders)
        elif self._proposal is not None and self.plausible(self._proposal.outcome):
            proposal = self._proposal
            if self._holds(proposal.outcome):
                self._proposal = None
                self._accept(proposal)
            elif retry:
                self._obtain(proposal.outcome, proposal.holders)

    def plausible(self, outcome: Outcome) -> bool:
        """Whether this outcome could follow on the current head."""
        head = self.head
        if outcome.height != head.height or outcome.previous != head.digest:
            return False
        if outcome.kind == (Kind.GATHER if self.gathering else Kind.REGROUP):
            return (outcome.round, outcome.state_root, outcome.samples) == (
                head.round,
                head.state_root,
                head.samples,
            )
        fresh = sum(contribution.samples for contribution in outcome.contributions)
        return (
            outcome.kind == Kind.AVERAGE
            and outcome.round == head.round + 1
            and outcome.samples == head.samples + fresh
        )

    def _holds(self, outcome: Outcome) -> bool:
        if outcome.kind != Kind.AVERAGE:
            return True
        return (outcome.vector_root, outcome.state_root) in self._held

    def _hold(self, vector_root: bytes, state_root: bytes) -> None:
        """This average is here and its state computed. The replica keeps as many (`config`)."""
        self._held.pop((vector_root, state_root), None)
        self._held[(vector_root, state_root)] = None
        if len(self._held) > KEPT_CANDIDATES:
            del self._held[next(iter(self._held))]

    def _obtain(self, outcome: Outcome, holders: tuple[str, ...]) -> None:
        if self._fetching == outcome:
            return
        if self._exchanging and outcome.plan == self._plan_digest:
            return
        self._fetching = outcome
        others = tuple(peer for peer in holders if peer != self.me.peer_id)
        self._out.append(Fetch(outcome=outcome, holders=others or self._holders()))

    def _holders(self) -> tuple[str, ...]:
        return tuple(peer for peer in self.membership.live() if peer != self.me.peer_id)

    def _accept(self, proposal: Propose) -> None:
        if proposal.ballot < self._promised:
            return
        self._promised = proposal.ballot
        self._accepted = (proposal.ballot, proposal.outcome)
        text = certificates.signed_text(self.run_id, proposal.ballot, proposal.outcome)
        self.send(
            self._leader_of(proposal.ballot),
            Accepted(
                height=proposal.height,
                ballot=proposal.ballot,
                outcome=wire.outcome_digest(proposal.outcome),
                signature=self._signer.sign(certificates.ACCEPT_DOMAIN, text),
            ),
        )

    def _on_commit(self, sender: str, commit: Commit, now: float) -> None:
        outcome = commit.certificate.outcome
        if outcome.height < self.head.height:
            return
        if outcome.height > self.head.height or outcome.previous != self.head.digest:
            self._is_ahead(sender, now)
        elif (
            self._supersedes(commit.certificate)
            and (not commit.certificate.provisional or self._believes(commit.certificate, now))
            and self.verifies(commit.certificate)
        ):
            self._decided = commit
            self._data_arrived(now)

    def _believes(self, certificate: Certificate, now: float) -> bool:
        """Whether a provisional certificate may settle this peer's height.

        Somebody who was cut off comes back with one. A member that signed it knows better; one that
        sees its roster at work does not follow it: if that branch is the better one, the directory
        will show it, and the whole of it is taken over (`install`).
        """
        if not self.is_member or any(
            signature.peer_id == self.me.peer_id for signature in certificate.signatures
        ):
            return True
        if self.leader == self.me.peer_id:
            return len(self.membership.live()) < self.head.majority
        return now - self._leader_heard > self.config.suspect_s

    def _supersedes(self, certificate: Certificate) -> bool:
        """Whether to go by this certificate, or this news of who holds its average.

        Those who held the average of an earlier one may be gone before it was fetched from them; a
        majority's word is never given up for a provisional one.
        """
        current = self._decided
        return current is None or current.certificate.provisional or not certificate.provisional

    def verifies(self, certificate: Certificate) -> bool:
        """Whether the current roster decided this about the current height."""
        return self.plausible(certificate.outcome) and certificates.verify(
            certificate, self.run_id, self.head.peers, self.check
        )

    def commit(self, certificate: Certificate, holders: tuple[str, ...], now: float) -> None:
        """The leadership has its quorum: tell everyone concerned, then commit."""
        if not self._supersedes(certificate):
            self._leadership = None  # a majority's word is here already, only its average is not
            return
        message = Commit(certificate=certificate, holders=holders)
        concerned = {*self.head.peers, *(m.peer_id for m in certificate.outcome.roster)}
        for peer in sorted(concerned - {self.me.peer_id}):
            self.send(peer, message)
        self._decided = message
        self._leadership = None
        self._data_arrived(now)

    def lead_again(self, now: float) -> None:
        """The proposal of this turn found no quorum: take the next ballot that is this peer's."""
        self._to_ballot(self.ballot + len(self._order), now)

    def _commit(self, certificate: Certificate, now: float) -> None:
        self._out.append(Apply(certificate=certificate))
        if certificate.outcome.kind == Kind.AVERAGE:
            self._worked = self._working = None
        self._enter(certificate, now)

    # -- sending ------------------------------------------------------------------------------

    def send_roster(self, message: Message) -> None:
        """To every member, this one included."""
        for peer in self.head.peers:
            self.send(peer, message)

    def send(self, to: str, message: Message) -> None:
        """To one peer, which may be this one."""
        if to == self.me.peer_id:
            self._to_self.append(message)
        else:
            self._out.append(Send(to=to, message=message))

    def _say_ready(self) -> None:
        if self.is_member and not self.finished and self._worked is not None:
            self.send(
                self.leader,
                Ready(
                    height=self.head.height,
                    ballot=self.ballot,
                    head=self.head.digest,
                    samples=self._worked[1],
                ),
            )

    def _report_on(
        self,
        plan: bytes,
        vector_root: bytes,
        state_root: bytes,
        lost: tuple[str, ...],
        held: tuple[Run, ...],
        absent: tuple[str, ...],
    ) -> None:
        self._report = Report(
            height=self.head.height,
            ballot=self.ballot,
            plan=plan,
            complete=vector_root != NO_DIGEST,
            vector_root=vector_root,
            state_root=state_root,
            lost=lost,
            held=held,
            absent=absent,
        )
        self._send_report(self._report)

    def _send_report(self, report: Report) -> None:
        self.send(self.leader, replace(report, ballot=self.ballot))

    def _repeat(self) -> None:
        """Say again what others may have missed; every message here can arrive twice."""
        height = self.head.height
        if not self.is_member:
            if not self._leaving:
                self.send_roster(Join(member=self.me, height=height))
            return
        if self._leaving or self.finished:
            self.send_roster(Leave(height=height))
        if self._accepted is not None and self._proposal is None:
            ballot, outcome = self._accepted
            self._accept(Propose(height=height, ballot=ballot, outcome=outcome, holders=()))
        if self._report is not None:
            self._send_report(self._report)
        if not self._exchanging:
            self._say_ready()

    def _drain(self, now: float) -> list[Action]:
        while self._to_self:
            self._handle(self.me.peer_id, self._to_self.popleft(), now)
        out, self._out = self._out, []
        return out
