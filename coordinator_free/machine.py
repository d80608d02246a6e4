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
A leader that falls silent, or that gets nowhere, is replaced by that of the next ballot, which
first learns from a majority what may have been accepted (Prepare, Promise) and must propose that
again.

Guarantees, for peers that crash, stall or are cut off: no two outcomes are committed at one height
by majorities; a void attempt changes nothing; what a majority committed is not given up while one
that signed it can be reached. If more than half of a roster is gone for `provisional_s`, the rest
goes on with a provisional certificate; then two branches can exist, and the one with fewer samples
gives way when they meet. Not guaranteed: anything against a member that lies about having been
partitioned (docs/threat_model.md).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

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
from coordinator_free.bandwidth import Rate
from coordinator_free.certificates import Head, Signer, Verify
from coordinator_free.config import KEPT_CANDIDATES, Layout, RoundConfig
from coordinator_free.leadership import BEAT_S, MAX_MENDS, Leadership
from coordinator_free.membership import Membership
from coordinator_free.messages import (
    MAX_MEMBERS,
    NO_DIGEST,
    Accepted,
    Assist,
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
    Progress,
    Promise,
    Propose,
    Ready,
    Refused,
    Report,
    Run,
    View,
)
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.planning import DEADLINE_FLOOR_S, STALLS, longest_s

BEHIND_S = 1.0  # how long a message from a later height may overtake the commit before it
KEPT_HEADS = 1024  # peer records in the directory are older than a round
PAUSE_S = 2.0  # who was not called for so long was stopped itself, and heard nobody for that reason
ANSWERS = 16  # newest commits in a second for peers without a seat, at addresses that they chose
EARLY_BYTES = 4 << 20  # of messages that overtook a commit; half of that for others than members
STRANGE_HOLDERS = 8  # of a decided average that are in no roster concerned


@dataclass(frozen=True, slots=True)
class _Early:
    """A message of the next height, and about what it takes up."""

    message: AtBallot | Plan
    size: int


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
        self.rate = Rate(up_bps=0.0, down_bps=0.0)  # of this peer's links, as far as it is known
        self.views: Mapping[str, Rate] = {}  # what it believes of others' links at most
        self._worked: tuple[int, int] | None = None  # round, samples: done and not yet averaged
        self._progress = 0  # samples of the work under way
        self._working: int | None = None  # round that the trainer is busy with
        self.certificate = certificate
        self.head = Head.after(certificate)
        self._passed: deque[bytes] = deque(maxlen=KEPT_HEADS)
        self.membership = Membership(me, self.head)
        self._early: dict[tuple[str, type], _Early] = {}
        self._answers = ANSWERS
        self._ahead: tuple[str, float] | None = None  # who sent something from a later height
        self._repeat_at = now
        self._awake_at = now
        self._turn = 0
        self._enter(certificate, now)

    # -- what goes in -------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        """The first actions after construction."""
        return self._drain(now)

    def receive(self, sender: str, message: Message, now: float) -> list[Action]:
        """An authentic message from `sender`."""
        self._wake(now)
        self.membership.heard(sender)
        self._handle(sender, message, now)
        return self._drain(now)

    def tick(self, now: float) -> list[Action]:
        """Time passed; call it at least every few hundred milliseconds."""
        self._wake(now)
        self._part()
        if self.is_member:
            self._suspect_leader(now)
            if self._leadership is not None:
                self._leadership.advance(now)
        if now >= self._repeat_at:
            self._repeat_at = now + BEAT_S
            self._answers = ANSWERS
            self._repeat(now)
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
            self._say_ready(now)
        return self._drain(now)

    def work_progress(self, round: int, samples: int, now: float) -> list[Action]:
        """The trainer has got so far with its work for a round; the leader adds that up."""
        if round == self.head.round and self._working == round and samples != self._progress:
            self._progress = samples
            self._say_progress()
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
            self._report_on(plan, vector_root, state_root, lost, (), absent, now)
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
            self.membership.shun(lost, now)
            self._report_on(plan, NO_DIGEST, NO_DIGEST, lost, held, (), now)
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
        self._wake(now)
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

    def revive(self, certificate: Certificate, now: float) -> list[Action]:
        """Go on from a decree of this peer's own, which keeps the state (`revival`)."""
        self._worked = self._working = None
        self._enter(certificate, now)
        return self._drain(now)

    # -- what can be seen ---------------------------------------------------------------------

    def yields_to(self, head: Head) -> bool:
        """Whether this peer gives up where it stands for that head, which need not follow on it.

        One who was cut off comes back with a roster of its own and, where no round was completed
        meanwhile, with as many samples: the larger roster stays, whoever counts more heights. One
        who has no seat here goes where it is given one, if that loses no samples.

        Nobody goes back to where it was: it has forgotten what it promised and accepted there.
        Samples never fall on the way, so the way back is open only while no round was averaged.
        """
        if self.knows(head.digest):
            return False
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
        return self._is_pending(certificate) or self.head.height > certificate.outcome.height

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
        self._reach_from, self._reach_at = 0, now
        self.ballot = 0
        self._waiting_since: float | None = None  # for what the leader makes of this peer's word
        self._leader_left = 0  # how often one that got nowhere was left at this height
        self._led_at = now  # when another peer last led this one
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
        for (sender, _), kept in early.items():
            self._handle(sender, kept.message, now)

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
                self._progress = 0
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

    def _reachable(self, now: float) -> int:
        """The highest ballot that this peer lets itself be taken to within this second.

        By taking turns nobody gets further. Whoever could drive one member far away from the
        others, and die, would leave them out of each other's reach for as long as that took.
        """
        if now - self._reach_at >= BEAT_S:
            self._reach_from, self._reach_at = self.ballot, now
        return self._reach_from + 4 * len(self._order)

    def _draw_near(self, now: float) -> None:
        """Others are at ballots out of reach: go to the last of this peer's turns within it.

        There it is refused by those who are further, and comes as near again.
        """
        me, within = self.me.peer_id, range(self.ballot + 1, self._reachable(now) + 1)
        turns = [b for b in within if self._leader_of(b) == me or me not in self._order]
        if turns:
            self._to_ballot(turns[-1], now)

    @property
    def _over(self) -> bool:
        return self.finished or self._left

    def _leader_of(self, ballot: int) -> str:
        return self._order[ballot % len(self._order)]

    def _to_ballot(self, ballot: int, now: float) -> None:
        if self._leader_of(ballot) != self.leader:
            self._waiting_since = None  # another turn of the same leader is no answer
        self.ballot = ballot
        self._leader_heard = now
        self._leadership = None
        if self.is_member and not self._over and self.leader == self.me.peer_id:
            self._leadership = Leadership(self, ballot, now)
        self._say_ready(now)
        if self._report is not None:
            self._send_report(self._report, now)

    def _waits(self, now: float) -> None:
        """What this leader needs of this peer is on its way: the next step is the leader's."""
        if self._waiting_since is None:
            self._waiting_since = now

    @property
    def _patience_s(self) -> float:
        """How long a leader may do nothing but beat, once this peer has said its part.

        That is longer than an exchange and the fetching of its average may take, and than this
        leader itself tries. Before an exchange it may rightly wait for others that are still at
        work, for as long as a round takes: there patience grows. To leave a leader too early costs
        a few messages, as the next one takes up all that was done.
        """
        config = self.config
        planned_s = self._plan.exchange_s if self._plan is not None else 0.0
        patience_s = max(config.exchange_s, planned_s) + config.provisional_s + config.grace_s
        if self._report is None and self._accepted is None:
            patience_s *= 2**self._leader_left
        return patience_s

    def _suspect_leader(self, now: float) -> None:
        while self.leader != self.me.peer_id and not self.finished:
            silent = now - self._leader_heard > self.config.suspect_s
            # Where this peer cannot lead and all who can are down, there is nobody to turn to.
            down = self.membership.is_down(self.leader) and not all(
                self.membership.is_down(peer) for peer in self._order
            )
            since = self._waiting_since
            stuck = since is not None and now - since > self._patience_s
            if not (silent or down or stuck):
                return
            if stuck:
                self._leader_left += 1
                self._waiting_since = None
            self._to_ballot(self.ballot + 1, now)

    # -- messages -----------------------------------------------------------------------------

    def _handle(self, sender: str, message: Message | AtBallot, now: float) -> None:
        match message:
            case Join():
                self._on_join(sender, message, now)
            case Assist():
                if message.member.peer_id == sender and message.member.can_reduce:
                    self.membership.assist(message, now)
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
        if to not in self.head.peers:
            if not self._answers:
                return  # it asks again, and others than this peer
            self._answers -= 1
        self.send(to, Commit(certificate=self.certificate, holders=(self.me.peer_id,)))

    def _on_future(self, sender: str, message: AtBallot | Plan, now: float) -> None:
        # The commit of our height may be on its way still: messages of different peers overtake
        # each other. Kept, one of a kind and sender, until it arrives or the catch-up does; only
        # such as open a height, as the others answer what this peer has not said yet.
        known, key = self._is_ahead(sender, now), (sender, type(message))
        opens = isinstance(message, Lead | Ready | Prepare | Plan | Propose)
        if known and opens and message.height == self.head.height + 1:
            size = _about_bytes(message)
            held = sum(kept.size for of, kept in self._early.items() if of != key)
            if held + size <= (EARLY_BYTES if sender in self.head.peers else EARLY_BYTES // 2):
                self._early[key] = _Early(message, size)

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
        if message.ballot > self._reachable(now):
            self._draw_near(now)
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
                if sender != self.me.peer_id:
                    self._led_at = now
            case Refused() if for_me:
                if self._leadership is not None and message.promised > self.ballot:
                    if message.promised <= self._reachable(now):
                        self._to_ballot(message.promised, now)
                    else:
                        self._draw_near(now)
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
                if self._accepted != (message.ballot, message.outcome):
                    self._waiting_since = None  # the next step is this peer's
                self._proposal = message
                self._data_arrived(now)
            case Ready() | Progress() | Promise() | Report() | Accepted():
                leadership = self._leadership
                if leadership is not None and message.ballot == self.ballot:
                    leadership.receive(sender, message, now)

    def _on_lead(self, lead: Lead) -> None:
        if lead.closing and self._working is not None and not self._closed:
            self._closed = True
            self._out.append(CloseWork(round=self.head.round))
        # Also where my own part has failed: others wait for what I reduce.
        if (lead.lost or lead.ended) and self._plan is not None:
            self._out.append(
                GoOnWithout(plan=self._plan_digest, peers=lead.lost, contributors=lead.ended)
            )

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
        self._waiting_since = None
        self._exchanging = True
        self._exchange_began = now
        self._out.append(StartExchange(plan=plan, digest=self._plan_digest))

    def sound(self, plan: Plan) -> bool:
        """Whether a leader of this height may have made this plan.

        How it is cut and timed is checked by bounds: leaders know what exchanges took, members not.
        """
        members = set(self.head.peers)
        able = {member.peer_id for member in self.head.roster if member.can_reduce}
        assistants = {member.peer_id for member in plan.assistants}
        shortest_s = min(DEADLINE_FLOOR_S, self.config.exchange_s)
        return (
            (plan.height, plan.round) == (self.head.height, self.head.round)
            and plan.previous == self.head.digest
            and plan.numel == self.layout.numel(plan.round)
            and plan.chunk_elements <= self.layout.largest_chunk
            and plan.chunk_elements % ALIGN_ELEMENTS == 0
            and shortest_s <= plan.exchange_s <= longest_s(self.config)
            and math.isclose(plan.stall_s * STALLS, plan.exchange_s)
            and plan.attempt <= MAX_MENDS
            and plan.codec == self.config.codec
            and members.issuperset(plan.receivers)
            and members.issuperset(c.peer_id for c in plan.contributions)
            and members.isdisjoint(assistants)
            and (able | assistants).issuperset(piece.reducer for piece in plan.slices)
            and all(members.issuperset(kept.holders) for kept in plan.kept)
        )

    # -- accepting and committing -------------------------------------------------------------

    def _data_arrived(self, now: float, *, retry: bool = True) -> None:
        """Commit what is decided and accept what is proposed, as far as the bytes are here."""
        decided, proposal = self._decided, self._proposal
        if decided is not None and self._holds(decided.certificate.outcome):
            self._commit(decided.certificate, now)
            return
        lost = decided is not None and self._is_lost(decided, now)
        if lost and self.is_member and self.leader == self.me.peer_id and not self._leadership:
            self.lead_again(now)
        if proposal is not None and not self.plausible(proposal.outcome):
            proposal = None
        # While those can be reached who have what a majority decided, nothing else is signed.
        free = decided is None or decided.certificate.provisional or lost
        if proposal is not None and free and self._holds(proposal.outcome):
            self._proposal = None
            self._accept(proposal, now)
            proposal = None
        if not retry:
            return
        # One fetch is under way at a time, and the holders of either may all be dead.
        if proposal is not None and (decided is None or lost):
            self._obtain(proposal.outcome, proposal.holders)
        elif decided is not None:
            self._obtain(decided.certificate.outcome, decided.holders)

    def plausible(self, outcome: Outcome) -> bool:
        """Whether this outcome could follow on the current head."""
        head = self.head
        if outcome.height != head.height or outcome.previous != head.digest:
            return False
        void = Kind.GATHER if self.gathering else Kind.REGROUP
        return outcome.kind in (Kind.AVERAGE, void) and certificates.adds_up(head, outcome)

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
        others = [peer for peer in holders if peer != self.me.peer_id]
        others.sort(key=self.membership.is_down)
        self._out.append(Fetch(outcome=outcome, holders=tuple(others) or self._holders()))

    def _holders(self) -> tuple[str, ...]:
        return tuple(peer for peer in self.membership.live() if peer != self.me.peer_id)

    def _accept(self, proposal: Propose, now: float) -> None:
        if proposal.ballot < self._promised:
            return
        before, outcome = self._accepted if self._accepted is not None else (-1, None)
        if before == proposal.ballot and outcome != proposal.outcome:
            return  # two outcomes under one ballot: its leader lies
        self._waits(now)
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
        elif self._is_pending(commit.certificate) or (
            self._supersedes(commit.certificate, now)
            and (not commit.certificate.provisional or self._believes(commit.certificate, now))
            and self.verifies(commit.certificate)
        ):
            self._decided = self._with_holders(commit)
            self._data_arrived(now)

    def _is_pending(self, certificate: Certificate) -> bool:
        return self._decided is not None and self._decided.certificate == certificate

    def _with_holders(self, commit: Commit) -> Commit:
        """A true certificate, whoever sent it, and all who may have its average.

        Those who signed it had it. Of others the members count first: anybody can name anybody.
        """
        current, certificate = self._decided, commit.certificate
        same = current is not None and current.certificate.outcome == certificate.outcome
        known = current.holders if current is not None and same else ()
        signers = (signature.peer_id for signature in certificate.signatures)
        named = tuple(dict.fromkeys((*commit.holders, *known, *signers)))
        concerned = {*self.head.peers, *(m.peer_id for m in certificate.outcome.roster)}
        members = [peer for peer in named if peer in concerned]
        others = [p for p in named if p not in concerned and self.membership.member(p) is not None]
        return replace(commit, holders=(*members, *others[:STRANGE_HOLDERS])[:MAX_MEMBERS])

    def _witnesses(self, commit: Commit) -> list[str]:
        """Other members that have the average of what was decided."""
        signers = (signature.peer_id for signature in commit.certificate.signatures)
        named = dict.fromkeys((*signers, *commit.holders))
        return [peer for peer in self.head.peers if peer in named and peer != self.me.peer_id]

    def _is_lost(self, commit: Commit, now: float) -> bool:
        """Whether all who have what was decided have been gone for so long that others may go on.

        More than half of the roster is gone then, or out of reach of this peer.
        """
        gone, patience_s = self.membership.gone_for, self.config.provisional_s
        return all(gone(peer, now) >= patience_s for peer in self._witnesses(commit))

    def _believes(self, certificate: Certificate, now: float) -> bool:
        """Whether a provisional certificate may settle this peer's height.

        Somebody who was cut off comes back with one. A member that signed it knows better; one that
        sees its roster at work does not follow it: if that branch is the better one, the directory
        will show it, and the whole of it is taken over (`install`). It does follow where its roster
        can decide nothing without those who signed, or where nobody has led it for so long that
        others may have gone on without it.
        """
        signers = {signature.peer_id for signature in certificate.signatures}
        if not self.is_member or self.me.peer_id in signers:
            return True
        patience_s = self.config.provisional_s
        if self.leader != self.me.peer_id:
            return now - self._led_at > patience_s
        gone = self.membership.gone_for
        rest = [p for p in self.head.peers if p not in signers and gone(p, now) < patience_s]
        return len(rest) < self.head.majority

    def _supersedes(self, certificate: Certificate, now: float) -> bool:
        """Whether to go by this certificate, or this news of who holds its average.

        A majority's word is given up for a provisional one only where nobody is left who could give
        its average.
        """
        current = self._decided
        if current is None or current.certificate.provisional or not certificate.provisional:
            return True
        return self._is_lost(current, now)

    def verifies(self, certificate: Certificate) -> bool:
        """Whether the current roster decided this about the current height."""
        return self.plausible(certificate.outcome) and certificates.verify(
            certificate, self.run_id, self.head.peers, self.check
        )

    def commit(self, certificate: Certificate, holders: tuple[str, ...], now: float) -> None:
        """The leadership has its quorum: tell everyone concerned, then commit."""
        if not self._supersedes(certificate, now):
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

    def _say_ready(self, now: float) -> None:
        if self.is_member and not self.finished and self._worked is not None:
            self._waits(now)
            self.send(
                self.leader,
                Ready(
                    height=self.head.height,
                    ballot=self.ballot,
                    head=self.head.digest,
                    samples=self._worked[1],
                    up_bps=int(self.rate.up_bps),
                    down_bps=int(self.rate.down_bps),
                    views=tuple(
                        View(peer_id=peer, up_bps=int(rate.up_bps), down_bps=int(rate.down_bps))
                        for peer, rate in self.views.items()
                    ),
                ),
            )

    def _say_progress(self) -> None:
        if self.is_member and self._working is not None and self._progress:
            height, ballot = self.head.height, self.ballot
            self.send(self.leader, Progress(height=height, ballot=ballot, samples=self._progress))

    def _report_on(
        self,
        plan: bytes,
        vector_root: bytes,
        state_root: bytes,
        lost: tuple[str, ...],
        held: tuple[Run, ...],
        absent: tuple[str, ...],
        now: float,
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
        self._waiting_since = None  # an exchange that was under way is no wait
        self._send_report(self._report, now)

    def _send_report(self, report: Report, now: float) -> None:
        self._waits(now)
        self.send(self.leader, replace(report, ballot=self.ballot))

    def _repeat(self, now: float) -> None:
        """Say again what others may have missed; every message here can arrive twice."""
        height = self.head.height
        if not self.is_member:
            if not self._leaving:
                self.send_roster(Join(member=self.me, height=height))
            return
        if self._leaving or self.finished:
            self.send_roster(Leave(height=height))
        if self._decided is not None:
            # Whether those who have its average are still there shows only when they are spoken to.
            witnesses = self._witnesses(self._decided)
            if witnesses:
                self._turn += 1
                self.send(witnesses[self._turn % len(witnesses)], self._decided)
        if self._accepted is not None and self._proposal is None:
            ballot, outcome = self._accepted
            self._accept(Propose(height=height, ballot=ballot, outcome=outcome, holders=()), now)
        if self._report is not None:
            self._send_report(self._report, now)
        if not self._exchanging:
            self._say_ready(now)
            self._say_progress()

    def _wake(self, now: float) -> None:
        """A process that was stopped for a while takes nobody for gone because of that."""
        pause_s = now - self._awake_at
        self._awake_at = now
        if pause_s > PAUSE_S:
            self.membership.paused(pause_s)
            self._leader_heard += pause_s
            self._led_at += pause_s
            if self._waiting_since is not None:
                self._waiting_since += pause_s

    def _drain(self, now: float) -> list[Action]:
        while self._to_self:
            self._handle(self.me.peer_id, self._to_self.popleft(), now)
        out, self._out = self._out, []
        return out


def _about_bytes(message: AtBallot | Plan) -> int:
    """About the memory that a message takes up, without encoding it again."""
    names = members = 0
    match message:
        case Plan():
            names = len(message.receivers) + len(message.contributions) + len(message.slices)
            names += len(message.links)
            names += sum(1 + len(kept.holders) for kept in message.kept)
        case Propose():
            members = len(message.outcome.roster)
            names = len(message.outcome.contributions) + len(message.holders)
        case Lead():
            names = len(message.lost) + len(message.ended)
        case Ready():
            names = len(message.views)
    return 256 + 128 * names + 1024 * members
