"""One member's turn at leading a ballot: collect, plan, judge, propose, count.

The leader passes small messages only; tensors never go through it because it leads. It decides
nothing either: what it proposes holds once a majority of the roster has signed it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

from coordinator_free import certificates, wire
from coordinator_free.bandwidth import Rate
from coordinator_free.certificates import Head, Verify
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.membership import Membership
from coordinator_free.messages import (
    NO_DIGEST,
    Accepted,
    Certificate,
    Kept,
    Kind,
    Lead,
    Member,
    Message,
    Outcome,
    Plan,
    Prepare,
    Progress,
    Promise,
    Propose,
    Ready,
    Report,
    Run,
    Signature,
    Slice,
    samples_after,
)
from coordinator_free.partition import runs_of
from coordinator_free.planning import STALLS, Seat, divide_again, draft

K = TypeVar("K")

NO_RATE = Rate(up_bps=0.0, down_bps=0.0)

BEAT_S = 1.0  # heartbeats, and the time after which an unanswered message is repeated
JUDGE_MARGIN_S = 2.0  # members notice the deadline of an exchange before their leader does
LOST_S = 1.5  # an exchange goes on without a member that cannot be reached for so long
MAX_MENDS = 8  # of one plan; each leaves somebody out
KEPT_BYTES = 192 << 10  # of a mend: who reports chunks one by one must not fill the message
KEPT_HOLDERS = 16  # named of each run of chunks: enough to share the load of handing them out

# Stragglers are asked for what they have when the quorum has waited for a quarter of its own time.
GRACE_SHARE = 0.25
# Where a round's exchange hides behind the training for the next one, nobody stands still yet.
GRACE_SHARE_HIDDEN = 1.0
GRACE_FLOOR_S = 0.5


class Floor(Protocol):
    """What the leader needs of the member whose turn it is (`machine.Machine`)."""

    me: Member
    run_id: str
    layout: Layout
    config: RoundConfig
    pace_s: float | None
    head: Head
    membership: Membership
    check: Verify

    @property
    def gathering(self) -> bool:
        """Whether the first round still waits for enough peers."""
        ...

    def plausible(self, outcome: Outcome) -> bool:
        """Whether this outcome could follow on the current head."""
        ...

    def sound(self, plan: Plan) -> bool:
        """Whether a leader of this height may have made this plan."""
        ...

    def send(self, to: str, message: Message) -> None:
        """To one peer, which may be this one."""
        ...

    def send_roster(self, message: Message) -> None:
        """To every member, this one included."""
        ...

    def commit(self, certificate: Certificate, holders: tuple[str, ...], now: float) -> None:
        """There is a quorum: tell everyone concerned, then commit. The turn is over."""
        ...

    def lead_again(self, now: float) -> None:
        """The proposal found no quorum: take this peer's next turn."""
        ...


class Leadership:
    """The leader's side of ballot `ballot` at the machine's current height."""

    def __init__(self, machine: Floor, ballot: int, now: float) -> None:
        self._machine = machine
        self._ballot = ballot
        self._prepared = ballot == 0  # nothing can have been accepted before the first ballot
        self._promises: dict[str, Promise] = {}
        self._readies: dict[str, Ready] = {}
        self._progress: dict[str, int] = {}  # samples so far
        self._reports: dict[str, Report] = {}
        self._accepts: dict[str, Signature] = {}
        self._began = now
        self._quorum_at: float | None = None
        self._closing_at: float | None = None
        self._plan: Plan | None = None
        self._plan_digest = NO_DIGEST
        self._judge_at = 0.0
        self._awaited: set[str] = set()  # who takes part in the plan
        self._lost: set[str] = set()  # of them
        self._ended: set[str] = set()  # of them: their own exchange failed
        self._proposal: Propose | None = None
        self._proposed_at = 0.0
        self._beat_at = now

    def receive(
        self, sender: str, message: Ready | Progress | Promise | Report | Accepted, now: float
    ) -> None:
        """A member's answer in this ballot."""
        machine = self._machine
        match message:
            case Ready() if message.head == machine.head.digest:
                self._readies[sender] = message
            case Progress():
                self._progress[sender] = message.samples
            case Promise():
                self._promises[sender] = message
                self._join_in(sender, message)
            case Report() if message.plan == self._plan_digest:
                self._reports[sender] = message
            case Accepted() if self._proposal is not None:
                outcome = self._proposal.outcome
                text = certificates.signed_text(machine.run_id, self._ballot, outcome)
                if message.outcome == wire.outcome_digest(outcome) and machine.check(
                    sender, certificates.ACCEPT_DOMAIN, text, message.signature
                ):
                    self._accepts[sender] = Signature(peer_id=sender, signature=message.signature)
        self._step(now)

    def advance(self, now: float) -> None:
        """Time passed."""
        if self._missing_more(now) or now >= self._beat_at:
            self._beat(now)
        self._step(now)

    # -- the steps ----------------------------------------------------------------------------

    def _step(self, now: float) -> None:
        if self._proposal is not None:
            self._count(self._proposal, now)
        elif not self._prepared:
            self._learn(now)
        elif self._plan is not None:
            self._judge(self._plan, now)
        else:
            self._collect(now)

    def _beat(self, now: float) -> None:
        """Heartbeat, and once more whatever has not been answered."""
        machine = self._machine
        self._beat_at = now + BEAT_S
        height = machine.head.height
        lead = Lead(
            height=height,
            ballot=self._ballot,
            closing=self._closing_at is not None,
            lost=tuple(sorted(self._lost)),
            ended=tuple(sorted(self._ended)),
        )
        machine.send_roster(lead)
        if self._proposal is not None:
            # Who has accepted has the average as well; the first holders may be dead by now.
            holders = {*self._proposal.holders, *self._accepts}
            self._tell(self._accepts, replace(self._proposal, holders=tuple(sorted(holders))))
        elif not self._prepared:
            self._tell(self._promises, Prepare(height=height, ballot=self._ballot))
        elif self._plan is not None and self._plan.ballot == self._ballot:
            for peer in self._plan.receivers:
                if peer not in self._reports:
                    machine.send(peer, self._plan)
            for assistant in self._plan.assistants:  # which also shows whether they are there
                machine.send(assistant.peer_id, self._plan)

    def _tell(self, answered: Iterable[str], message: Prepare | Propose) -> None:
        for peer in self._machine.head.peers:
            if peer not in answered:
                self._machine.send(peer, message)

    def _learn(self, now: float) -> None:
        """Take up what may have been accepted, or what an earlier exchange brought about."""
        machine = self._machine
        if self._quorum(self._promises, now) is None:
            return
        self._prepared = True
        accepted = [
            (promise.accepted_ballot, promise.accepted)
            for promise in self._promises.values()
            if promise.accepted is not None
            and promise.accepted_ballot is not None
            and machine.plausible(promise.accepted)
        ]
        if accepted:
            _, outcome = max(accepted, key=lambda entry: entry[0])
            self._propose(outcome, self._holders_of(outcome), now)
            return
        best = _largest(
            {
                peer: (
                    promise.report.plan,
                    promise.report.vector_root,
                    promise.report.state_root,
                    promise.report.absent,
                )
                for peer, promise in self._promises.items()
                if promise.report is not None and promise.report.complete
            }
        )
        if best is not None:
            (digest, vector_root, state_root, absent), holders = best
            plan = self._promises[holders[0]].plan
            if (
                plan is not None
                and wire.plan_digest(plan) == digest
                and plan.previous == machine.head.digest
            ):
                self._propose_average(plan, vector_root, state_root, absent, holders, now)
                return
        self._take_over(now)

    def _take_over(self, now: float) -> None:
        """Go on with the exchange that an earlier leader began, if there is one."""
        plans = [
            promise.plan
            for promise in self._promises.values()
            if promise.plan is not None and self._machine.sound(promise.plan)
        ]
        if not plans:
            return
        plan = max(plans, key=lambda plan: (plan.ballot, plan.attempt))
        answered = [peer for peer in plan.receivers if peer in self._promises]
        if 2 * sum(self._promises[peer].plan == plan for peer in answered) <= len(answered):
            return  # its leader died before most had it: begin anew
        self._follow(plan, now)
        self._awaited.clear()
        for peer, promise in self._promises.items():
            self._join_in(peer, promise)

    def _join_in(self, peer: str, promise: Promise) -> None:
        """Somebody takes part in the plan that an earlier leader made."""
        if promise.plan is not None and wire.plan_digest(promise.plan) == self._plan_digest:
            self._awaited.add(peer)
            if promise.report is not None and promise.report.plan == self._plan_digest:
                self._reports[peer] = promise.report

    def _follow(self, plan: Plan, now: float) -> None:
        """Wait for the reports on this plan."""
        self._plan = plan
        self._plan_digest = wire.plan_digest(plan)
        self._judge_at = now + plan.exchange_s + JUDGE_MARGIN_S
        self._reports.clear()
        self._awaited = set(plan.receivers)
        self._lost.clear()
        self._ended.clear()

    def _collect(self, now: float) -> None:
        """Wait for work to be done; start at once when everybody is ready."""
        machine, members = self._machine, self._machine.membership
        live = {peer for peer in members.live() if not members.leaving(peer)}
        if machine.gathering:
            enough = len(members.next_roster(now)) >= machine.config.start_peers
            if enough or self._must_go(now):
                self._regroup(now)
            return
        ready = live & self._readies.keys()
        if ready and ready == live:
            self._start(ready, now)
        elif self._must_go(now):
            self._regroup(now)
        elif self._closing_at is None and self._is_batch_full(live):
            self._closing_at = now
            self._beat(now)
        elif ready and self._closing_at is not None:
            if now - self._closing_at >= machine.config.close_s:
                self._start(ready, now)
        elif len(ready) >= max(1, math.ceil(machine.config.quorum * len(machine.head.roster))):
            self._quorum_at = self._quorum_at if self._quorum_at is not None else now
            share = GRACE_SHARE if machine.config.parts == 1 else GRACE_SHARE_HIDDEN
            share = max(GRACE_FLOOR_S, share * (self._quorum_at - self._began))
            if now - self._quorum_at >= min(machine.config.grace_s, share):
                self._closing_at = now
                self._beat(now)

    def _is_batch_full(self, live: set[str]) -> bool:
        """In gradient mode: whether all together have the samples of a step."""
        target = self._machine.config.target_batch
        done = {**self._progress, **{peer: r.samples for peer, r in self._readies.items()}}
        return 0 < target <= sum(count for peer, count in done.items() if peer in live)

    def _must_go(self, now: float) -> bool:
        """Whether a member asked to leave or has been lost for good."""
        machine, members = self._machine, self._machine.membership
        return any(
            members.leaving(peer) or members.gone_for(peer, now) >= machine.config.suspect_s
            for peer in machine.head.peers
        )

    def _start(self, ready: set[str], now: float) -> None:
        """Send everyone who is ready the plan of the exchange."""
        machine = self._machine
        seated = [member for member in machine.head.roster if member.peer_id in ready]
        if not any(member.can_reduce for member in machine.head.roster):
            # Nobody here can average: to decide anything but on one who can would never end.
            if any(member.can_reduce for member in machine.membership.joiners(now)):
                self._regroup(now, admit=True)
            return
        contributors = any(self._readies[member.peer_id].samples for member in seated)
        if not contributors or not any(member.can_reduce for member in seated):
            self._regroup(now)  # everybody was closed before a first step: try again
            return
        assistants = {a.member.peer_id: a for a in machine.membership.assistants(now)}
        drafted = draft(
            [self._seat(member) for member in seated],
            machine.layout,
            machine.head.round,
            machine.config,
            machine.pace_s,
            {
                peer: Rate(up_bps=assist.up_bps, down_bps=assist.down_bps)
                for peer, assist in assistants.items()
            },
        )
        self._send_plan(
            Plan(
                height=machine.head.height,
                round=machine.head.round,
                ballot=self._ballot,
                attempt=0,
                previous=machine.head.digest,
                base=NO_DIGEST,
                receivers=tuple(member.peer_id for member in seated),
                contributions=drafted.contributions,
                slices=drafted.slices,
                kept=(),
                assistants=tuple(assistants[peer].member for peer in drafted.assistants),
                links=drafted.links,
                expected_s=drafted.expected_s,
                numel=machine.layout.numel(machine.head.round),
                chunk_elements=drafted.chunk_elements,
                codec=machine.config.codec,
                exchange_s=drafted.exchange_s,
                stall_s=drafted.exchange_s / STALLS,
            ),
            now,
        )

    def _seat(self, member: Member) -> Seat:
        """What is known of a member; little, where it said it to an earlier leader."""
        ready = self._readies.get(member.peer_id)
        return Seat(
            peer_id=member.peer_id,
            can_reduce=member.can_reduce,
            samples=ready.samples if ready is not None else 0,
            rate=Rate(up_bps=ready.up_bps, down_bps=ready.down_bps) if ready else NO_RATE,
            views=ready.views if ready is not None else (),
        )

    def _send_plan(self, plan: Plan, now: float) -> None:
        self._follow(plan, now)
        for peer in _partners(plan):
            self._machine.send(peer, plan)

    def _missing_more(self, now: float) -> bool:
        """Whether somebody has fallen silent, or failed, since the last look: others wait for it.

        A stream that breaks before a reducer knows whose it is leaves that one waiting.
        """
        members = self._machine.membership
        # Also of those who have reported: others may still wait for them.
        partners = _partners(self._plan) if self._plan is not None else ()
        silent = {peer for peer in partners if members.gone_for(peer, now) >= LOST_S}
        ended = {peer for peer, report in self._reports.items() if not report.complete}
        more = not (silent <= self._lost and ended <= self._ended)
        self._lost |= silent
        self._ended |= ended
        return more

    def _judge(self, plan: Plan, now: float) -> None:
        """Propose what came out as soon as a majority holds it, or when no more can come."""
        machine = self._machine
        best = _largest(
            {
                peer: (report.vector_root, report.state_root, report.absent)
                for peer, report in self._reports.items()
                if report.complete
            }
        )
        live = set(machine.membership.live()) - self._lost
        pending = self._awaited & live - self._reports.keys()
        late = not pending or now >= self._judge_at
        if best is not None and (len(best[1]) >= machine.head.majority or late):
            (vector_root, state_root, absent), holders = best
            self._propose_average(plan, vector_root, state_root, absent, holders, now)
        elif late:
            self._mend(plan, now)

    def _mend(self, plan: Plan, now: float) -> None:
        """Nobody has everything: keep what somebody has, and average the rest once more.

        One plan decides about every chunk which of its averages counts, as members may have got it
        from a reducer that died before the others did, and a second one would sum up differently.
        """
        machine = self._machine
        accused = self._accused(plan)
        machine.membership.shun(accused | self._lost, now)
        survivors = tuple(peer for peer in plan.receivers if peer not in accused | self._lost)
        reducers = [m.peer_id for m in machine.head.roster if m.can_reduce]
        reducers = [peer for peer in survivors if peer in reducers]
        contributors = {c.peer_id for c in plan.contributions} & set(survivors)
        kept = _kept(
            plan.chunks, {p: self._reports[p].held for p in survivors if p in self._reports}
        )
        found = {chunk for run in kept for chunk in range(run.start, run.stop)}
        missing = runs_of(chunk for chunk in range(plan.chunks) if chunk not in found)
        hopeless = missing and not (reducers and contributors)
        if not survivors or hopeless or plan.attempt >= MAX_MENDS or self._is_refused():
            # Where more than half are to blame, it is rather this leader's network.
            few = len(accused) < machine.head.majority
            self._regroup(now, without=accused if few else ())
            return
        self._send_plan(
            replace(
                plan,
                ballot=self._ballot,
                attempt=plan.attempt + 1,
                base=self._plan_digest,
                receivers=survivors,
                slices=self._divide_again(missing, survivors, reducers, contributors),
                assistants=(),
                links=(),
                expected_s=0.0,
                kept=kept,
            ),
            now,
        )

    def _divide_again(
        self,
        missing: tuple[Run, ...],
        survivors: tuple[str, ...],
        reducers: list[str],
        contributors: set[str],
    ) -> tuple[Slice, ...]:
        if not missing:
            return ()
        return divide_again(
            [self._seat(member) for member in self._machine.head.roster],
            missing,
            receivers=survivors,
            reducers=reducers,
            contributors=contributors,
        )

    def _is_refused(self) -> bool:
        """Whether most who reported have nothing and blame nobody.

        The average leads to a state that is not finite, so they discarded their work with it and
        follow no mend; or the network is too slow for any chunk to arrive, and a mend is no better.
        """
        empty = [r for r in self._reports.values() if not (r.complete or r.held or r.lost)]
        return 2 * len(empty) > len(self._reports)

    def _accused(self, plan: Plan) -> set[str]:
        """Members that more than half of those who reported say broke off, and the silent."""
        blame: dict[str, int] = defaultdict(int)
        for report in self._reports.values():
            for peer in report.lost:
                blame[peer] += 1
        silent = set(plan.receivers) - self._reports.keys()
        # Who takes part in this ballot and never had the plan is not to blame.
        silent -= self._promises.keys() - self._awaited
        return silent | {peer for peer, count in blame.items() if 2 * count > len(self._reports)}

    def _count(self, proposal: Propose, now: float) -> None:
        """Commit once a quorum has signed; try again under a new ballot if none ever does."""
        machine = self._machine
        quorum = self._quorum(self._accepts, now)
        if quorum is not None:
            certificate = Certificate(
                outcome=proposal.outcome,
                ballot=self._ballot,
                provisional=quorum == "provisional",
                signatures=tuple(self._accepts[peer] for peer in sorted(self._accepts)),
            )
            machine.commit(certificate, tuple(sorted(self._accepts)), now)
        elif (
            now - self._proposed_at > machine.config.exchange_s + machine.config.provisional_s
            or self._is_stranded(proposal, now)
        ):
            # Those who hold the proposed bytes may have died before anyone else fetched them.
            machine.lead_again(now)

    def _is_stranded(self, proposal: Propose, now: float) -> bool:
        """Whether nobody is left who has the average that is proposed."""
        holders = {*proposal.holders, *self._accepts}
        gone = self._machine.membership.gone_for
        return bool(proposal.holders) and all(gone(peer, now) >= LOST_S for peer in holders)

    # -- proposing ----------------------------------------------------------------------------

    def _propose_average(
        self,
        plan: Plan,
        vector_root: bytes,
        state_root: bytes,
        absent: tuple[str, ...],
        holders: tuple[str, ...],
        now: float,
    ) -> None:
        head = self._machine.head
        contributions = tuple(c for c in plan.contributions if c.peer_id not in absent)
        roster = self._machine.membership.next_roster(now)
        self._propose(
            Outcome(
                height=head.height,
                round=head.round + 1,
                kind=Kind.AVERAGE,
                previous=head.digest,
                plan=wire.plan_digest(plan),
                vector_root=vector_root,
                state_root=state_root,
                samples=samples_after(head.samples, contributions),
                contributions=contributions,
                roster=roster or head.roster,
            ),
            holders,
            now,
        )

    def _regroup(self, now: float, *, without: Iterable[str] = (), admit: bool = False) -> None:
        """Propose a roster for another attempt at the same round.

        Joiners are admitted only while no work has begun: those who train share out the round's
        blocks by the roster that it began with.
        """
        head = self._machine.head
        members = self._machine.membership
        if all(members.leaving(peer) for peer in head.peers):
            return
        roster: tuple[Member, ...] = members.next_roster(
            now, without=without, admit=admit or self._machine.gathering
        )
        self._propose(
            Outcome(
                height=head.height,
                round=head.round,
                kind=Kind.GATHER if self._machine.gathering else Kind.REGROUP,
                previous=head.digest,
                plan=NO_DIGEST,
                vector_root=NO_DIGEST,
                state_root=head.state_root,
                samples=head.samples,
                contributions=(),
                roster=roster or head.roster,
            ),
            (),
            now,
        )

    def _propose(self, outcome: Outcome, holders: tuple[str, ...], now: float) -> None:
        self._proposal = Propose(
            height=outcome.height, ballot=self._ballot, outcome=outcome, holders=holders
        )
        self._proposed_at = now
        self._machine.send_roster(self._proposal)

    def _holders_of(self, outcome: Outcome) -> tuple[str, ...]:
        return tuple(
            peer
            for peer, promise in self._promises.items()
            if promise.accepted == outcome
            or (
                promise.report is not None
                and promise.report.complete
                and promise.report.vector_root == outcome.vector_root
            )
        )

    def _quorum(self, peers: Iterable[str], now: float) -> str | None:
        """Whether these are enough: a majority, or all that is left after a long wait."""
        machine = self._machine
        present = set(peers)
        if len(present) >= machine.head.majority:
            return "majority"
        gone = all(
            machine.membership.gone_for(peer, now) >= machine.config.provisional_s
            for peer in machine.head.peers
            if peer not in present
        )
        return "provisional" if present and gone else None


def _partners(plan: Plan) -> tuple[str, ...]:
    """All who take part in an exchange."""
    return (*plan.receivers, *(member.peer_id for member in plan.assistants))


def _largest(votes: dict[str, K]) -> tuple[K, tuple[str, ...]] | None:
    """The value most peers name, and those peers; ties go to the value named first."""
    groups: dict[K, list[str]] = defaultdict(list)
    for peer, value in votes.items():
        groups[value].append(peer)
    if not groups:
        return None
    value, peers = max(groups.items(), key=lambda group: len(group[1]))
    return value, tuple(sorted(peers))


def _kept(chunks: int, held: dict[str, tuple[Run, ...]]) -> tuple[Kept, ...]:
    """Who has which of so many chunks, as runs of chunks that the same peers have."""
    holders: list[list[str]] = [[] for _ in range(chunks)]
    for peer, runs in held.items():
        for run in runs:
            for chunk in range(run.start, min(run.stop, chunks)):
                holders[chunk].append(peer)
    kept = []
    at = 0
    for peers, same in itertools.groupby(holders):
        start, at = at, at + len(list(same))
        if peers:
            named = tuple(dict.fromkeys(peers))[:KEPT_HOLDERS]
            kept.append(Kept(start=start, stop=at, holders=named))
    kept.sort(key=lambda run: run.start - run.stop)
    sizes = itertools.accumulate(16 + sum(len(h) + 2 for h in run.holders) for run in kept)
    longest = [run for run, size in zip(kept, sizes, strict=True) if size <= KEPT_BYTES]
    return tuple(sorted(longest, key=lambda run: run.start))
