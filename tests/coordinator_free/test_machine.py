"""The round's state machine and its certificates, one message at a time."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import pytest
from blake3 import blake3

from coordinator_free import certificates, leadership, messages, wire
from coordinator_free.certificates import ACCEPT_DOMAIN, Head, found, signed_text
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.leadership import KEPT_BYTES, LOST_S
from coordinator_free.machine import (
    ANSWERS,
    BEHIND_S,
    EARLY_BYTES,
    PAUSE_S,
    Action,
    Apply,
    CatchUp,
    CloseWork,
    Fetch,
    Finished,
    GoOnWithout,
    Left,
    Machine,
    Send,
    StartExchange,
    StartWork,
)
from coordinator_free.messages import (
    NO_DIGEST,
    U64_MAX,
    Accepted,
    Certificate,
    Commit,
    Contribution,
    Join,
    Kept,
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
    Signature,
)
from coordinator_free.partition import ALIGN_ELEMENTS, runs_of, share
from tests.sim.world import RUN, Key, check

T = TypeVar("T")
M = TypeVar("M")
CONFIG = RoundConfig(codec="fp32")
LAYOUT = Layout(lengths=(160_000,), largest_chunk=ALIGN_ELEMENTS)
CHUNKS = 40
HEIGHT, ROUND, SAMPLES = 4, 2, 500


def seat(name: str, *, session: int = 1, can_reduce: bool = True) -> Member:
    return Member(
        peer_id=name,
        session=session,
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=can_reduce,
    )


def beginning(*roster: Member) -> Certificate:
    """What put this roster at HEIGHT: a machine believes the certificate it starts from."""
    outcome = Outcome(
        height=HEIGHT - 1,
        round=ROUND,
        kind=Kind.AVERAGE,
        previous=NO_DIGEST,
        plan=NO_DIGEST,
        vector_root=NO_DIGEST,
        state_root=blake3(b"state").digest(),
        samples=SAMPLES,
        contributions=(),
        roster=roster,
    )
    return Certificate(outcome=outcome, ballot=0, provisional=False, signatures=())


def order(names: str, height: int = HEIGHT) -> list[str]:
    """Who leads ballots 0, 1, ... of a height, by docs/protocol.md."""
    seed = b"shoal order v1\0" + RUN.encode() + b"\0"
    ring = sorted(names, key=lambda name: blake3(seed + name.encode()).digest())
    return [ring[(height + ballot) % len(ring)] for ballot in range(len(ring))]


FIVE = "abcde"
L0, L1, L2, L3, L4 = order(FIVE)


class Rig:
    """One machine, the roster around it, and what it does."""

    def __init__(
        self,
        me: str,
        names: str = FIVE,
        *,
        session: int = 1,
        cannot_reduce: str = "",
        config: RoundConfig = CONFIG,
        layout: Layout = LAYOUT,
    ) -> None:
        roster = tuple(seat(n, can_reduce=n not in cannot_reduce) for n in names)
        self.now = 100.0
        self.certificate = beginning(*roster)
        self.head = Head.after(self.certificate)
        self.machine = Machine(
            me=seat(me, session=session, can_reduce=me not in cannot_reduce),
            run_id=RUN,
            layout=layout,
            config=config,
            certificate=self.certificate,
            signer=Key(me),
            check=check,
            now=self.now,
        )
        self.me = me
        self.began = self.machine.start(self.now)

    def hears(self, sender: str, message: Message) -> list[Action]:
        # As on the wire.
        return self.machine.receive(sender, wire.decode(wire.encode(message)), self.now)

    def passes(self, seconds: float, step_s: float = 0.25) -> list[Action]:
        actions = []
        for _ in range(round(seconds / step_s)):
            self.now += step_s
            actions += self.machine.tick(self.now)
        return actions

    def works(self, samples: int = 10) -> list[Action]:
        return self.machine.work_done(self.machine.head.round, samples, self.now)

    def exchanges(self, plan: Plan, outcome: Outcome) -> list[Action]:
        return self.machine.exchange_done(
            wire.plan_digest(plan), outcome.vector_root, outcome.state_root, self.now
        )

    # -- messages as correct peers would make them here

    def plan(self, ballot: int = 0, **changes: Any) -> Plan:
        plan = Plan(
            height=HEIGHT,
            round=ROUND,
            ballot=ballot,
            attempt=0,
            previous=self.head.digest,
            base=NO_DIGEST,
            receivers=self.head.peers,
            contributions=tuple(Contribution(peer_id=peer, samples=10) for peer in self.head.peers),
            slices=share([Run(start=0, stop=CHUNKS)], self.head.peers),
            kept=(),
            numel=LAYOUT.numel(ROUND),
            chunk_elements=ALIGN_ELEMENTS,
            codec="fp32",
            exchange_s=60.0,
            stall_s=12.0,
        )
        return dataclasses.replace(plan, **changes)

    def average(self, mark: bytes = b"", **changes: Any) -> Outcome:
        outcome = Outcome(
            height=HEIGHT,
            round=ROUND + 1,
            kind=Kind.AVERAGE,
            previous=self.head.digest,
            plan=wire.plan_digest(self.plan()),
            vector_root=blake3(b"vector" + mark).digest(),
            state_root=blake3(b"next" + mark).digest(),
            samples=SAMPLES + 10 * len(self.head.peers),
            contributions=self.plan().contributions,
            roster=self.head.roster,
        )
        return dataclasses.replace(outcome, **changes)

    def regroup(self, *roster: Member, **changes: Any) -> Outcome:
        outcome = Outcome(
            height=HEIGHT,
            round=ROUND,
            kind=Kind.REGROUP,
            previous=self.head.digest,
            plan=NO_DIGEST,
            vector_root=NO_DIGEST,
            state_root=self.head.state_root,
            samples=SAMPLES,
            contributions=(),
            roster=roster or self.head.roster,
        )
        return dataclasses.replace(outcome, **changes)

    def promise(self, ballot: int, **changes: Any) -> Promise:
        fields: dict[str, Any] = {
            "accepted_ballot": None,
            "accepted": None,
            "plan": None,
            "report": None,
        }
        return Promise(height=HEIGHT, ballot=ballot, **{**fields, **changes})

    def ready(self, ballot: int = 0, samples: int = 10) -> Ready:
        return Ready(height=HEIGHT, ballot=ballot, head=self.head.digest, samples=samples)


def propose(outcome: Outcome, ballot: int = 0, holders: tuple[str, ...] = ("a",)) -> Propose:
    return Propose(height=HEIGHT, ballot=ballot, outcome=outcome, holders=holders)


def signed(
    outcome: Outcome, voters: str, ballot: int = 0, *, provisional: bool = False, run: str = RUN
) -> Certificate:
    text = signed_text(run, ballot, outcome)
    return Certificate(
        outcome=outcome,
        ballot=ballot,
        provisional=provisional,
        signatures=tuple(
            Signature(peer_id=v, signature=Key(v).sign(ACCEPT_DOMAIN, text)) for v in voters
        ),
    )


def commit(certificate: Certificate, holders: tuple[str, ...] = ("a",)) -> Commit:
    return Commit(certificate=certificate, holders=holders)


def of(kind: type[T], actions: list[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def sent(kind: type[M], actions: list[Action]) -> list[tuple[str, M]]:
    return [(a.to, a.message) for a in of(Send, actions) if isinstance(a.message, kind)]


# -- certificates -----------------------------------------------------------------------------

OUTCOME = beginning(seat("z")).outcome


@pytest.mark.parametrize(
    ("voters", "signers", "enough"),
    [("abc", "ab", True), ("abc", "a", False), ("abcd", "ab", False), ("abcd", "abd", True),
     ("a", "a", True), ("a", "", False), ("ab", "a", False)],
)  # fmt: skip
def test_more_than_half_of_the_voters_must_sign(voters: str, signers: str, enough: bool) -> None:
    assert certificates.verify(signed(OUTCOME, signers), RUN, tuple(voters), check) is enough


def test_a_signature_of_a_stranger_spoils_a_certificate() -> None:
    assert not certificates.verify(signed(OUTCOME, "abx"), RUN, tuple("abc"), check)


def test_a_signature_counts_once() -> None:
    (one,) = signed(OUTCOME, "a").signatures
    with pytest.raises(ValueError, match="twice"):
        Certificate(outcome=OUTCOME, ballot=0, provisional=False, signatures=(one, one))


def test_a_signature_is_for_one_run_ballot_and_outcome() -> None:
    good = signed(OUTCOME, "ab", ballot=3)
    assert certificates.verify(good, RUN, tuple("abc"), check)
    others = [
        dataclasses.replace(good, ballot=2),
        dataclasses.replace(good, outcome=dataclasses.replace(OUTCOME, samples=SAMPLES + 1)),
        signed(OUTCOME, "ab", ballot=3, run="11" * 20),
        dataclasses.replace(
            good,
            signatures=(
                dataclasses.replace(good.signatures[0], peer_id="c"),
                good.signatures[1],
            ),
        ),
    ]
    for other in others:
        assert not certificates.verify(other, RUN, tuple("abc"), check)


def test_a_provisional_certificate_needs_a_voter_but_no_majority() -> None:
    voters = tuple("abcde")
    assert certificates.verify(signed(OUTCOME, "a", provisional=True), RUN, voters, check)
    assert not certificates.verify(signed(OUTCOME, "", provisional=True), RUN, voters, check)
    assert not certificates.verify(signed(OUTCOME, "ax", provisional=True), RUN, voters, check)


def test_a_run_is_founded_by_its_creator() -> None:
    first = found(RUN, seat("a"), Key("a"), NO_DIGEST)
    assert certificates.verify(first, RUN, ("a",), check)
    assert not certificates.verify(first, RUN, ("b",), check)
    assert first.outcome.kind == Kind.FOUND
    assert Head.after(first).height == 1


def test_the_branch_with_more_samples_wins_then_the_higher_one() -> None:
    low = Head.after(beginning(seat("a")))
    assert dataclasses.replace(low, samples=SAMPLES + 1, height=1).rank > low.rank
    assert dataclasses.replace(low, height=HEIGHT + 1).rank > low.rank


# -- work and turns ---------------------------------------------------------------------------


def test_work_is_dealt_by_the_place_in_the_roster_and_reported_to_the_leader() -> None:
    member = Rig(L1)
    assert of(StartWork, member.began) == [StartWork(round=ROUND, seat=FIVE.index(L1), seats=5)]
    assert sent(Ready, member.works(33)) == [(L0, member.ready(samples=33))]
    assert sent(Ready, member.machine.work_done(ROUND, 44, member.now)) == []  # once is enough


@pytest.mark.parametrize("height", [0, 1, 2, 6])
def test_leaders_follow_the_order_of_the_protocol(height: int) -> None:
    rig = Rig("a")
    regroup = rig.regroup()
    previous = beginning(*rig.head.roster)
    certificate = dataclasses.replace(previous, outcome=dataclasses.replace(regroup, height=height))
    machine = Machine(
        me=seat("a"),
        run_id=RUN,
        layout=LAYOUT,
        config=CONFIG,
        certificate=certificate,
        signer=Key("a"),
        check=check,
        now=0.0,
    )
    assert machine.leader == order(FIVE, height + 1)[0]


def test_a_silent_leader_is_replaced_by_the_next_and_a_lost_one_at_once() -> None:
    member = Rig(L2)
    member.works()
    assert sent(Ready, member.passes(CONFIG.suspect_s - 0.5))[-1][0] == L0
    assert sent(Ready, member.passes(1.5))[-1] == (L1, member.ready(ballot=1))
    quick = Rig(L2)
    quick.works()
    actions = quick.machine.undeliverable(L0, quick.now)
    assert sent(Ready, actions) == [(L1, quick.ready(ballot=1))]


def test_a_heartbeat_keeps_a_leader_in_office() -> None:
    member = Rig(L2)
    for _ in range(5):
        member.passes(CONFIG.suspect_s - 1)
        member.hears(L0, Lead(height=HEIGHT, ballot=0, closing=False))
    assert member.machine.leader == L0
    for _ in range(5):  # of somebody else it does not
        member.passes(CONFIG.suspect_s - 1)
        member.hears(L3, Lead(height=HEIGHT, ballot=0, closing=False))
    assert member.machine.leader != L0


def test_one_that_cannot_lead_waits_when_all_who_can_are_down() -> None:
    member = Rig("b", "ab", cannot_reduce="b")
    member.works()
    member.machine.undeliverable("a", member.now)  # must come to an end
    assert member.machine.leader == "a"
    assert member.machine.ballot == 0
    member.passes(1000.0)
    assert member.machine.ballot <= 1000 / CONFIG.suspect_s


def test_a_refusal_from_nowhere_does_not_use_up_the_ballots() -> None:
    leader = Rig(L0)
    leader.hears(L1, Refused(height=HEIGHT, ballot=0, promised=U64_MAX))
    leader.works()
    leader.passes(60.0)  # every message of it can still be built
    assert leader.machine.ballot < 2**32


def test_a_refused_leader_goes_to_the_ballot_it_is_told() -> None:
    leader = Rig(L0)
    leader.hears(L3, Refused(height=HEIGHT, ballot=0, promised=2))
    assert (leader.machine.ballot, leader.machine.leader) == (2, L2)


# -- a leader's turn --------------------------------------------------------------------------


def test_the_plan_follows_at_once_when_all_are_ready() -> None:
    leader = Rig(L0)
    leader.works()
    for peer in (L1, L2, L3):
        assert sent(Plan, leader.hears(peer, leader.ready())) == []
    actions = leader.hears(L4, leader.ready())
    assert sorted(sent(Plan, actions), key=lambda entry: entry[0]) == [
        (peer, leader.plan()) for peer in FIVE if peer != L0
    ]
    assert of(StartExchange, actions) == [
        StartExchange(plan=leader.plan(), digest=wire.plan_digest(leader.plan()))
    ]


@pytest.mark.parametrize(("work_s", "grace_s"), [(0.5, 0.5), (20.0, 5.0), (100.0, 10.0)])
def test_stragglers_are_asked_to_hand_in_and_then_left_behind(
    work_s: float, grace_s: float
) -> None:
    leader = Rig(L0)
    leader.works()
    leader.hears(L1, leader.ready())
    waiting = leader.passes(work_s)  # two of five are no quorum
    leader.hears(L2, leader.ready())
    waiting += leader.passes(grace_s - 0.25)
    assert sent(Lead, waiting)
    assert not any(lead.closing for _, lead in sent(Lead, waiting))
    closing = {to for to, lead in sent(Lead, leader.passes(0.5)) if lead.closing}
    assert closing == set(FIVE) - {L0}
    plans = sent(Plan, leader.passes(CONFIG.close_s))
    assert {to for to, _ in plans} == {L1, L2}
    assert set(plans[0][1].receivers) == {L0, L1, L2}


def test_one_of_two_is_quorum_enough_to_ask_the_other_for_what_it_has() -> None:
    first, _ = order("ab")
    leader = Rig(first, "ab")
    leader.works()
    assert any(lead.closing for _, lead in sent(Lead, leader.passes(1.5)))


def test_a_leader_that_is_the_straggler_is_asked_as_well() -> None:
    leader = Rig(L0)
    for peer in (L1, L2, L3, L4):
        leader.hears(peer, leader.ready())
    assert of(CloseWork, leader.passes(1.5)) == [CloseWork(round=ROUND)]


def test_a_straggler_hands_in_once_when_its_leader_asks() -> None:
    member = Rig(L1)
    closing = Lead(height=HEIGHT, ballot=0, closing=True)
    assert of(CloseWork, member.hears(L2, closing)) == []
    assert of(CloseWork, member.hears(L0, dataclasses.replace(closing, closing=False))) == []
    assert of(CloseWork, member.hears(L0, closing)) == [CloseWork(round=ROUND)]
    assert of(CloseWork, member.hears(L0, closing)) == []
    done = Rig(L1)
    done.works()
    assert of(CloseWork, done.hears(L0, closing)) == []


def test_a_majority_with_one_result_is_proposed_signed_and_committed() -> None:
    leader = Rig(L0)
    leader.works()
    for peer in (L1, L2, L3, L4):
        leader.hears(peer, leader.ready())
    outcome = leader.average()
    report = Report(
        height=HEIGHT,
        ballot=0,
        plan=wire.plan_digest(leader.plan()),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
        lost=(),
    )
    leader.exchanges(leader.plan(), outcome)
    leader.hears(L1, dataclasses.replace(report, vector_root=blake3(b"other").digest()))
    assert sent(Propose, leader.hears(L2, report)) == []  # two of five
    proposals = sent(Propose, leader.hears(L3, report))
    assert {to for to, _ in proposals} == set(FIVE) - {L0}
    assert proposals[0][1] == propose(outcome, holders=tuple(sorted((L0, L2, L3))))

    def accepted(peer: str, key: str, ballot: int = 0) -> Accepted:
        text = signed_text(RUN, ballot, outcome)
        return Accepted(
            height=HEIGHT,
            ballot=0,
            outcome=wire.outcome_digest(outcome),
            signature=Key(key).sign(ACCEPT_DOMAIN, text),
        )

    for wrong in (accepted(L2, "x"), accepted(L2, L3), accepted(L2, L2, ballot=1)):
        leader.hears(L2, wrong)
    leader.hears(L2, accepted(L2, L2))
    leader.hears(L2, accepted(L2, L2))  # again: still two of five with its own
    assert leader.machine.head.height == HEIGHT
    actions = leader.hears(L3, accepted(L3, L3))
    (applied,) = of(Apply, actions)
    assert applied.certificate == signed(outcome, "".join(sorted((L0, L2, L3))))
    assert {to for to, _ in sent(Commit, actions)} == set(FIVE) - {L0}
    assert leader.machine.head == Head.after(applied.certificate)


def averaging(me: str = L0, **config: Any) -> Rig:
    """The leader of an exchange that is under way."""
    leader = Rig(me, config=dataclasses.replace(CONFIG, **config))
    leader.works()
    for peer in (L1, L2, L3, L4):
        leader.hears(peer, leader.ready())
    assert leader.machine.phase == "averaging"
    return leader


def incomplete(plan: Plan, *held: int, lost: tuple[str, ...] = (), ballot: int = 0) -> Report:
    return Report(
        height=HEIGHT,
        ballot=ballot,
        plan=wire.plan_digest(plan),
        complete=False,
        vector_root=NO_DIGEST,
        state_root=NO_DIGEST,
        lost=lost,
        held=runs_of(held),
    )


def test_a_dead_reducers_chunks_are_kept_where_somebody_has_them_and_shared_out_again() -> None:
    leader = averaging()
    plan = leader.plan()
    dead = FIVE.index(L4)
    rest = [n for n in range(CHUNKS) if n // 8 != dead]
    leader.machine.exchange_failed(wire.plan_digest(plan), (L4,), runs_of(rest), leader.now)
    leader.machine.undeliverable(L4, leader.now)
    leader.hears(L1, incomplete(plan, *sorted([*rest, 8 * dead]), lost=(L4,)))
    leader.hears(L2, incomplete(plan, *sorted([*rest, 8 * dead, 8 * dead + 1]), lost=(L4,)))
    mends = sent(Plan, leader.hears(L3, incomplete(plan, *rest, lost=(L4,))))
    assert {to for to, _ in mends} == {L1, L2, L3}
    mend = mends[0][1]
    assert (mend.attempt, mend.ballot, mend.base) == (1, 0, wire.plan_digest(plan))
    assert set(mend.receivers) == set(FIVE) - {L4}
    assert mend.contributions == plan.contributions  # chunks that are kept may have its part
    holders = {n: set(k.holders) for k in mend.kept for n in range(k.start, k.stop)}
    assert holders.keys() == {*rest, 8 * dead, 8 * dead + 1}
    assert holders[8 * dead] == {L1, L2}
    assert holders[8 * dead + 1] == {L2}
    assert all(holders[n] == set(FIVE) - {L4} for n in rest)
    again = [n for piece in mend.slices for n in range(piece.start, piece.stop)]
    assert again == list(range(8 * dead + 2, 8 * dead + 8))
    assert {piece.reducer for piece in mend.slices} == set(FIVE) - {L4}


def test_a_member_follows_a_mend_and_never_goes_back() -> None:
    member = Rig(L1)
    member.works()
    plan = member.plan()
    member.hears(L0, plan)
    held = runs_of(range(8, CHUNKS))
    member.machine.exchange_failed(wire.plan_digest(plan), (L4,), held, member.now)
    mend = dataclasses.replace(
        plan,
        attempt=1,
        base=wire.plan_digest(plan),
        slices=share([Run(start=0, stop=8)], (L1, L2)),
        kept=(Kept(start=8, stop=CHUNKS, holders=(L1,)),),
    )
    assert [start.plan for start in of(StartExchange, member.hears(L0, mend))] == [mend]
    assert member.hears(L0, plan) == []
    assert member.hears(L0, mend) == []
    outcome = member.average(plan=wire.plan_digest(mend))
    assert sent(Report, member.exchanges(mend, outcome))[0][1].plan == wire.plan_digest(mend)


def test_what_cannot_be_mended_is_tried_again_without_the_accused() -> None:
    # Only L4 had anything to contribute, and it is gone.
    leader = Rig(L0)
    leader.machine.work_done(ROUND, 0, leader.now)
    for peer in (L1, L2, L3, L4):
        actions = leader.hears(peer, leader.ready(samples=10 if peer == L4 else 0))
    plan = sent(Plan, actions)[0][1]
    leader.machine.exchange_failed(wire.plan_digest(plan), (L4,), (), leader.now)
    leader.machine.undeliverable(L4, leader.now)
    for peer in (L1, L2):
        leader.hears(peer, incomplete(plan, lost=(L4,)))
    outcome = sent(Propose, leader.hears(L3, incomplete(plan, lost=(L4,))))[0][1].outcome
    assert outcome.kind == Kind.REGROUP
    assert {m.peer_id for m in outcome.roster} == set(FIVE) - {L4}
    assert outcome.state_root == leader.head.state_root


def test_the_exchange_goes_on_without_a_member_that_cannot_be_reached() -> None:
    leader = averaging()
    leader.machine.undeliverable(L4, leader.now)
    before = leader.passes(LOST_S - 0.25)
    assert of(GoOnWithout, before) == []
    now = leader.passes(0.25)
    assert [lead.lost for _, lead in sent(Lead, now)] == [(L4,)] * 4  # without waiting for a beat
    plan = wire.plan_digest(leader.plan())
    assert of(GoOnWithout, now) == [GoOnWithout(plan=plan, peers=(L4,))]
    member = Rig(L1)
    member.works()
    member.hears(L0, member.plan())
    told = member.hears(L0, Lead(height=HEIGHT, ballot=0, closing=False, lost=(L4,)))
    assert of(GoOnWithout, told) == [GoOnWithout(plan=plan, peers=(L4,))]


def test_nobody_waits_for_the_contribution_of_a_member_whose_exchange_failed() -> None:
    # Its streams may have broken before a reducer knew whose they were.
    leader = averaging()
    plan = leader.plan()
    digest = wire.plan_digest(plan)
    leader.hears(L4, incomplete(plan, lost=(L1, L2, L3)))
    told = leader.passes(0.25)
    leads = sent(Lead, told)
    assert {to for to, _ in leads} == set(FIVE) - {L0}
    assert all((lead.ended, lead.lost) == ((L4,), ()) for _, lead in leads)  # it still reduces
    go_on = GoOnWithout(plan=digest, peers=(), contributors=(L4,))
    assert of(GoOnWithout, told) == [go_on]
    assert sent(Lead, leader.passes(0.25)) == []  # once, and then with every beat
    # A member whose own part failed, too, still reduces for the others.
    member = Rig(L1)
    member.works()
    member.hears(L0, member.plan())
    member.machine.exchange_failed(digest, (L4,), (), member.now)
    lead = Lead(height=HEIGHT, ballot=0, closing=False, ended=(L4,))
    assert of(GoOnWithout, member.hears(L0, lead)) == [go_on]


def test_a_mend_begins_with_everybody_waited_for() -> None:
    leader = averaging()
    plan = leader.plan()
    leader.machine.exchange_failed(wire.plan_digest(plan), (), (), leader.now)
    for peer in (L1, L2, L3, L4):
        said = leader.hears(peer, incomplete(plan, 0, lost=(L0,)))
    assert sent(Plan, said)
    assert not any(lead.ended for _, lead in sent(Lead, leader.passes(2.0)))


def test_a_member_that_answers_again_is_not_given_up() -> None:
    leader = averaging()
    leader.machine.undeliverable(L4, leader.now)
    leader.machine.delivered(L4)
    assert not any(lead.lost for _, lead in sent(Lead, leader.passes(5.0)))


@pytest.mark.parametrize(("took_s", "exchange_s"), [(1.0, 15.0), (10.0, 40.0), (59.0, 60.0)])
def test_the_next_exchange_has_a_few_times_as_long_as_the_last_one_took(
    took_s: float, exchange_s: float
) -> None:
    member = Rig(L1)
    member.works()
    member.hears(L0, member.plan())
    member.passes(took_s)
    outcome = member.average()
    member.exchanges(member.plan(), outcome)
    member.hears(L0, commit(signed(outcome, "abc")))
    assert member.machine.leader == L1  # of the next height
    member.works()
    head = member.machine.head
    for peer in set(FIVE) - {L1}:
        ready = Ready(height=HEIGHT + 1, ballot=0, head=head.digest, samples=10)
        actions = member.hears(peer, ready)
    plan = sent(Plan, actions)[0][1]
    assert plan.exchange_s == pytest.approx(exchange_s)
    assert plan.stall_s == pytest.approx(exchange_s / 5)


def test_a_proposal_whose_holders_are_gone_gives_way_to_another_turn() -> None:
    leader = taken_over(1)
    plan, outcome = leader.plan(), leader.average()
    report = dataclasses.replace(
        incomplete(plan),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
    )
    leader.hears(L2, leader.promise(1, plan=plan, report=report))
    assert sent(Propose, leader.hears(L3, leader.promise(1)))
    leader.machine.undeliverable(L2, leader.now)
    assert leader.machine.ballot == 1
    leader.passes(LOST_S + 0.25)
    assert leader.machine.ballot == 1 + len(FIVE)


def test_what_is_decided_is_fetched_before_what_is_proposed() -> None:
    """The holders of a proposal may be dead, and one fetch is under way at a time."""
    member = Rig(L1)
    lost, real = member.average(b"lost"), member.average(b"real")
    fetches = of(Fetch, member.hears(L0, propose(lost, holders=(L4,))))
    fetches += of(Fetch, member.hears(L2, commit(signed(real, "abc"), holders=(L2,))))
    assert [fetch.outcome for fetch in fetches] == [lost, real]
    member.machine.fetched(lost, False, member.now)  # it was given up for the other
    assert of(Fetch, member.passes(1.25)) == []
    assert of(Apply, member.machine.fetched(real, True, member.now))


# -- taking over from a leader ----------------------------------------------------------------


def taken_over(ballot: int = 3) -> Rig:
    """The leader of a later ballot, which has just heard that it is its turn."""
    rig = Rig([L0, L1, L2, L3][ballot])
    rig.hears(L4, rig.ready(ballot=ballot))
    assert rig.machine.ballot == ballot
    prepares = sent(Prepare, rig.passes(0.25))
    assert {to for to, _ in prepares} == set(FIVE) - {rig.me}
    return rig


def test_the_outcome_accepted_under_the_highest_ballot_is_proposed_again() -> None:
    leader = taken_over(3)
    low, high = leader.average(b"low"), leader.average(b"high")
    first = leader.hears(L0, leader.promise(3, accepted_ballot=2, accepted=high))
    assert sent(Propose, first) == []  # two of five, itself included
    actions = leader.hears(L4, leader.promise(3, accepted_ballot=0, accepted=low))
    assert {to for to, _ in sent(Propose, actions)} == set(FIVE) - {L3}
    assert all(p == propose(high, 3, (L0,)) for _, p in sent(Propose, actions))


def test_the_own_acceptance_counts_when_taking_over() -> None:
    rig = Rig(L1)
    mine = rig.regroup(*rig.head.roster[:4])
    assert sent(Accepted, rig.hears(L0, propose(mine)))
    rig.hears(L2, rig.ready(ballot=1))
    rig.passes(0.25)
    rig.hears(L2, rig.promise(1))
    actions = rig.hears(L3, rig.promise(1))
    assert [p.outcome for _, p in sent(Propose, actions)] == [mine] * 4


def test_an_exchange_that_was_complete_is_taken_up() -> None:
    leader = taken_over(1)
    plan, outcome = leader.plan(), leader.average()
    report = Report(
        height=HEIGHT,
        ballot=0,
        plan=wire.plan_digest(plan),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
        lost=(),
    )
    leader.hears(L2, leader.promise(1, plan=plan, report=report))
    actions = leader.hears(L3, leader.promise(1))
    assert sent(Propose, actions)[0][1] == propose(outcome, 1, (L2,))


def test_an_exchange_that_is_under_way_is_taken_over_and_mended() -> None:
    leader = taken_over(1)
    plan = leader.plan()
    leader.hears(L2, leader.promise(1, plan=plan))  # still at it
    held = incomplete(plan, *range(8), lost=(L0,))
    actions = leader.hears(L3, leader.promise(1, plan=plan, report=held))
    assert sent(Plan, actions) == []
    actions = leader.hears(L2, dataclasses.replace(held, ballot=1))
    mend = sent(Plan, actions)[0][1]
    # This leader never had the plan: it takes part now. L0 and L4 did not answer.
    assert set(mend.receivers) == {L1, L2, L3}
    assert (mend.ballot, mend.attempt, mend.base) == (1, 1, wire.plan_digest(plan))
    assert [(k.start, k.stop, set(k.holders)) for k in mend.kept] == [(0, 8, {L2, L3})]


def test_an_exchange_that_most_never_heard_of_begins_anew() -> None:
    """Else the few who had the plan would average for all."""
    leader = taken_over(1)
    leader.works()
    leader.hears(L2, leader.promise(1, plan=leader.plan()))
    leader.hears(L3, leader.promise(1))
    for peer in (L0, L2):
        leader.hears(peer, leader.ready(1))
    fresh = sent(Plan, leader.hears(L3, leader.ready(1)))[0][1]
    assert fresh.attempt == 0
    assert {c.peer_id for c in fresh.contributions} == set(FIVE)


def test_a_leader_that_stopped_in_mid_exchange_is_waited_for_no_longer() -> None:
    leader = taken_over(1)
    plan = leader.plan()
    for peer in (L2, L3):
        leader.hears(peer, leader.promise(1, plan=plan))
    leader.machine.undeliverable(L0, leader.now)
    told = [lead.lost for _, lead in sent(Lead, leader.passes(LOST_S + 0.25))]
    assert (L0,) in told


def test_who_has_accepted_is_named_as_a_holder_too() -> None:
    leader = taken_over(1)
    plan, outcome = leader.plan(), leader.average()
    report = dataclasses.replace(
        incomplete(plan),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
    )
    leader.hears(L2, leader.promise(1, plan=plan, report=report))
    leader.hears(L3, leader.promise(1))
    leader.machine.fetched(outcome, True, leader.now)  # the leader has it as well now
    again = [p.holders for _, p in sent(Propose, leader.passes(1.25))]
    assert again
    assert set(again[-1]) == {L1, L2}


def test_the_larger_roster_stays_where_no_round_tells_two_branches_apart() -> None:
    """One who was cut off comes back alone, after as many samples and more heights."""
    rig = Rig(L1)
    alone = signed(rig.regroup(seat(L4), height=HEIGHT + 5), L4, provisional=True)
    assert Head.after(alone).rank > rig.machine.head.rank
    assert not rig.machine.yields_to(Head.after(alone))
    assert rig.machine.install(alone, rig.now) == []
    assert rig.machine.certificate == rig.certificate
    more = signed(rig.average(roster=(seat(L4),)), L4, provisional=True)
    assert rig.machine.yields_to(Head.after(more))  # it averaged a round, this one did not
    outsider = Rig("x", session=2)
    assert outsider.machine.yields_to(Head.after(alone))  # has no seat to lose
    lower = rig.regroup(seat("x", session=2), height=HEIGHT - 3)
    assert outsider.machine.yields_to(Head.after(signed(lower, L4)))  # and gets one there
    fewer = dataclasses.replace(lower, samples=SAMPLES - 1)
    assert not outsider.machine.yields_to(Head.after(signed(fewer, L4)))


def test_contributors_that_are_in_no_chunk_are_not_in_the_outcome() -> None:
    leader = averaging()
    outcome = leader.average()
    report = dataclasses.replace(
        incomplete(leader.plan()),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
        absent=(L4,),
    )
    for peer in (L1, L2):
        leader.hears(peer, report)
    proposed = sent(Propose, leader.hears(L3, report))[0][1].outcome
    assert {c.peer_id for c in proposed.contributions} == set(FIVE) - {L4}
    assert proposed.samples == SAMPLES + 40


def test_a_mend_in_which_nothing_is_missing_needs_no_reducer() -> None:
    """All who reduce are gone, and those who are left have every chunk between them."""
    order_of_two = order("".join(n for n in FIVE if n in (L0, L1)))
    first = order_of_two[0]
    leader = Rig(first, cannot_reduce="".join(set(FIVE) - {L0, L1}))
    second = L1 if first == L0 else L0
    clients = sorted(set(FIVE) - {first, second})
    for peer in (second, *clients):  # the leader is late, and left out
        leader.hears(peer, leader.ready())
    plans = sent(Plan, leader.passes(5.0))
    plan = plans[0][1]
    assert first not in plan.receivers
    leader.machine.undeliverable(second, leader.now)
    half = plan.chunks // 2
    report = dataclasses.replace(incomplete(plan), plan=wire.plan_digest(plan))
    leader.hears(clients[0], dataclasses.replace(report, held=runs_of(range(half))))
    leader.hears(clients[1], dataclasses.replace(report, held=runs_of(range(half, plan.chunks))))
    leader.hears(clients[2], report)
    mend = next(p for _, p in sent(Plan, leader.passes(3.0)) if p.attempt)
    assert mend.slices == ()
    assert set(mend.receivers) == set(clients)


def test_a_roster_in_which_nobody_can_reduce_waits_for_one_who_can() -> None:
    """To decide the same roster again and again took a simulated peer to height 30 000 at once."""
    lone = Rig("a", "a", cannot_reduce="a")
    assert sent(Propose, lone.works()) == []
    assert lone.machine.head == lone.head
    lone.passes(5.0)
    assert lone.machine.head.height == HEIGHT
    lone.hears("x", Join(member=seat("x", can_reduce=False), height=HEIGHT))
    lone.passes(1.0)
    assert lone.machine.head.height == HEIGHT
    lone.hears("y", Join(member=seat("y"), height=HEIGHT))
    lone.passes(1.0)
    assert {m.peer_id for m in lone.machine.head.roster} == {"a", "x", "y"}
    assert lone.machine.head.height == HEIGHT + 1


def test_work_that_leads_nowhere_is_done_once_more() -> None:
    member = Rig(L1)
    member.works()
    plan = member.plan()
    member.hears(L0, plan)
    refused = member.machine.exchange_refused(wire.plan_digest(plan), member.now)
    assert not sent(Report, refused)[0][1].complete
    actions = member.hears(L0, commit(signed(member.regroup(), "abc")))
    assert [work.round for work in of(StartWork, actions)] == [ROUND]


def test_a_plan_that_no_leader_here_made_is_not_taken_over() -> None:
    leader = taken_over(1)
    plan = leader.plan(numel=LAYOUT.numel(ROUND) - 1)
    leader.hears(L2, leader.promise(1, plan=plan))
    leader.works()
    leader.hears(L3, leader.promise(1))
    for peer in (L0, L2, L3):
        actions = leader.hears(peer, leader.ready(1))
    assert sent(Plan, actions)[0][1].attempt == 0


def test_with_nothing_accepted_or_complete_the_round_starts_again() -> None:
    leader = taken_over(1)
    leader.works()
    leader.hears(L2, leader.promise(1))
    leader.hears(L3, leader.promise(1))
    for peer in (L0, L2):  # L4 was ready before
        assert sent(Plan, leader.hears(peer, leader.ready(1))) == []
    actions = leader.hears(L3, leader.ready(1))
    assert sent(Propose, actions) == []
    assert {plan.ballot for _, plan in sent(Plan, actions)} == {1}


def test_a_promise_tells_what_was_accepted_and_binds() -> None:
    member = Rig(L4)
    outcome = member.regroup()
    assert [to for to, _ in sent(Accepted, member.hears(L0, propose(outcome)))] == [L0]
    actions = member.hears(L2, Prepare(height=HEIGHT, ballot=2))
    assert sent(Promise, actions) == [(L2, member.promise(2, accepted_ballot=0, accepted=outcome))]
    other = member.regroup(*member.head.roster[:3])
    for lower in (propose(other, 1), Prepare(height=HEIGHT, ballot=1), member.plan(1)):
        actions = member.hears(L1, lower)
        assert sent(Refused, actions) == [(L1, Refused(height=HEIGHT, ballot=1, promised=2))]
        assert len(of(Send, actions)) == len(actions) == 1
    again = sent(Accepted, member.hears(L2, propose(other, 2)))
    assert [(to, a.outcome) for to, a in again] == [(L2, wire.outcome_digest(other))]


def test_only_the_leader_of_a_ballot_is_heard_in_it() -> None:
    member = Rig(L4)
    member.works()
    for message in (
        propose(member.regroup(), 1),
        Prepare(height=HEIGHT, ballot=1),
        member.plan(1),
        Lead(height=HEIGHT, ballot=1, closing=True),
    ):
        assert member.hears(L2, message) == []
    assert member.machine.ballot == 0


def test_nobody_is_driven_further_in_a_second_than_turns_go() -> None:
    """A hostile member's few messages took one to ballots where the others never heard it again."""
    member = Rig(L4)
    for turn in range(1, 50):
        member.hears(L0, Prepare(height=HEIGHT, ballot=5 * turn))
    assert member.machine.ballot == 4 * 5
    member.passes(1.0)
    member.hears(L0, Prepare(height=HEIGHT, ballot=8 * 5))
    assert member.machine.ballot == 8 * 5


@pytest.mark.parametrize("ballot", [21, 5 * 10**6])
def test_who_hears_of_a_ballot_out_of_reach_goes_to_the_last_of_its_turns_on_the_way(
    ballot: int,
) -> None:
    leader = [L0, L1, L2, L3, L4][ballot % 5]
    member = Rig(L4)
    assert sent(Promise, member.hears(leader, Prepare(height=HEIGHT, ballot=ballot))) == []
    assert (member.machine.ballot, member.machine.leader) == (19, L4)
    client = Rig(L4, cannot_reduce=L4)
    client.hears(client.machine.leader, Prepare(height=HEIGHT, ballot=4 * 10**6))
    assert client.machine.ballot == 16  # of four who can lead


def test_two_that_are_far_apart_meet() -> None:
    """One was driven on for a minute; the other learns of it by a refusal of its own turn."""
    behind = Rig(L0)
    for _ in range(60):
        refused = Refused(height=HEIGHT, ballot=behind.machine.ballot, promised=60 * 20 + 1)
        behind.hears(L3, refused)
        behind.passes(1.0)
    behind.hears(L1, Prepare(height=HEIGHT, ballot=60 * 20 + 1))
    assert behind.machine.ballot == 60 * 20 + 1


# -- plans ------------------------------------------------------------------------------------


def test_a_sound_plan_is_followed_once() -> None:
    member = Rig(L1)
    member.works()
    plan = member.plan()
    expected = [StartExchange(plan=plan, digest=wire.plan_digest(plan))]
    assert of(StartExchange, member.hears(L0, plan)) == expected
    assert of(StartExchange, member.hears(L0, plan)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"previous": NO_DIGEST},
        {"round": ROUND + 1},
        {"round": ROUND - 1},
        {"codec": "int8"},
        {"contributions": tuple(Contribution(peer_id=p, samples=11) for p in FIVE)},
        {"receivers": (*FIVE, "x")},
        {
            "receivers": tuple(p for p in FIVE if p != L1),
            "contributions": (Contribution(peer_id=L0, samples=10),),
            "slices": share([Run(start=0, stop=CHUNKS)], (L0,)),
        },
        {"numel": LAYOUT.numel(ROUND) - 1},
        {
            "numel": LAYOUT.numel(ROUND) - ALIGN_ELEMENTS,
            "slices": share([Run(start=0, stop=39)], FIVE),
        },
        {"chunk_elements": 2 * ALIGN_ELEMENTS, "slices": share([Run(start=0, stop=20)], FIVE)},
        {"chunk_elements": 4001},
        {"exchange_s": 601.0, "stall_s": 601.0 / 5},
        {"exchange_s": 14.9, "stall_s": 14.9 / 5},
        {"stall_s": 60.1},
        {"stall_s": 1e-9},
        {"stall_s": 11.9},
        {
            "attempt": 9,
            "base": blake3(b"base").digest(),
            "slices": share([Run(start=0, stop=CHUNKS)], FIVE),
        },
        {
            "attempt": 1,
            "base": blake3(b"base").digest(),
            "slices": (),
            "kept": (Kept(start=0, stop=CHUNKS, holders=("x",)),),
        },
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_is_not_followed(changes: dict[str, Any]) -> None:
    member = Rig(L1)
    member.works(10)
    actions = member.hears(L0, member.plan(**changes))
    assert actions == []
    assert sent(Report, member.passes(2.0)) == []


def test_who_cannot_be_dialled_reduces_in_no_plan() -> None:
    member = Rig(L1, cannot_reduce=L3)
    member.works()
    leader = member.machine.leader
    assert member.hears(leader, member.plan()) == []
    able = tuple(peer for peer in FIVE if peer != L3)
    plan = member.plan(slices=share([Run(start=0, stop=CHUNKS)], able))
    assert of(StartExchange, member.hears(leader, plan))


def test_nobody_contributes_what_it_has_not_done() -> None:
    idle = Rig(L1)
    assert idle.hears(L0, idle.plan()) == []
    others = tuple(c for c in idle.plan().contributions if c.peer_id != L1)
    receiving = idle.plan(contributions=others)
    assert of(StartExchange, idle.hears(L0, receiving))


# -- accepting --------------------------------------------------------------------------------


def test_an_average_is_accepted_only_once_it_is_held() -> None:
    member = Rig(L1)
    outcome = member.average()
    actions = member.hears(L0, propose(outcome, holders=(L2, L1)))
    assert of(Fetch, actions) == [Fetch(outcome=outcome, holders=(L2,))]
    assert sent(Accepted, actions) == []
    failed = member.machine.fetched(outcome, False, member.now)
    assert sent(Accepted, failed) == []
    assert of(Fetch, member.passes(1.25))  # tries again, in its own time
    assert sent(Accepted, member.passes(3.0)) == []
    got = member.machine.fetched(outcome, True, member.now)
    ((to, accepted),) = sent(Accepted, got)
    assert to == L0
    assert accepted.outcome == wire.outcome_digest(outcome)
    text = signed_text(RUN, 0, outcome)
    assert check(L1, ACCEPT_DOMAIN, text, accepted.signature)


def test_an_average_of_the_own_exchange_needs_no_download() -> None:
    member = Rig(L1)
    member.works()
    member.hears(L0, member.plan())
    outcome = member.average()
    # The proposal overtakes the exchange: it is about to end anyway.
    assert of(Fetch, member.hears(L0, propose(outcome))) == []
    actions = member.exchanges(member.plan(), outcome)
    assert [to for to, _ in sent(Accepted, actions)] == [L0]
    assert sent(Report, actions)[0][1].complete


@pytest.mark.parametrize("part", ["vector_root", "state_root"])
def test_another_result_than_the_proposed_one_is_not_signed(part: str) -> None:
    member = Rig(L1)
    member.works()
    member.hears(L0, member.plan())
    outcome = member.average()
    mine = dataclasses.replace(outcome, **{part: blake3(b"mine").digest()})
    member.exchanges(member.plan(), mine)
    actions = member.hears(L0, propose(outcome))
    assert sent(Accepted, actions) == []
    assert of(Fetch, actions)


@pytest.mark.parametrize(
    "changes",
    [
        {"previous": NO_DIGEST},
        {"round": ROUND},
        {"round": ROUND + 2},
        {"samples": SAMPLES + 51},
        {"kind": Kind.FOUND},
        {"kind": Kind.GATHER},
        {"kind": Kind.REGROUP},
    ],
    ids=str,
)
def test_an_outcome_that_does_not_follow_from_here_is_not_accepted(
    changes: dict[str, Any],
) -> None:
    member = Rig(L1)
    outcome = member.average(**changes)
    held = member.machine.fetched(outcome, True, member.now)
    assert held == []
    assert member.hears(L0, propose(outcome)) == []


@pytest.mark.parametrize(
    "changes", [{"state_root": NO_DIGEST}, {"samples": SAMPLES + 1}, {"round": ROUND + 1}], ids=str
)
def test_a_regroup_that_changes_the_state_is_not_accepted(changes: dict[str, Any]) -> None:
    member = Rig(L1)
    assert member.hears(L0, propose(member.regroup(**changes))) == []
    assert sent(Accepted, member.hears(L0, propose(member.regroup())))


def test_a_restarted_session_never_votes_in_its_old_seat() -> None:
    again = Rig(L1, session=2)
    assert again.began == []
    outcome = again.regroup()
    for message in (
        Lead(height=HEIGHT, ballot=0, closing=True),
        again.plan(),
        propose(outcome),
    ):
        assert again.hears(L0, message) == []
    assert again.hears(L2, Prepare(height=HEIGHT, ballot=2)) == []
    actions = again.passes(20.0)
    assert {type(a.message) for a in of(Send, actions)} == {Join}
    assert len(of(Send, actions)) == len(actions)
    assert {message.member.session for _, message in sent(Join, actions)} == {2}


# -- committing -------------------------------------------------------------------------------


def test_a_commit_is_applied_once_its_average_is_held() -> None:
    member = Rig(L1)
    outcome = member.average()
    actions = member.hears(L0, commit(signed(outcome, "abc"), holders=("c",)))
    (fetch,) = of(Fetch, actions)
    assert fetch.outcome == outcome
    assert fetch.holders[0] == "c"
    assert set(fetch.holders) == set("abc") - {L1}  # who signed it had it
    assert of(Apply, actions) == []
    actions = member.machine.fetched(outcome, True, member.now)
    assert of(Apply, actions) == [Apply(certificate=signed(outcome, "abc"))]
    assert member.machine.head.round == ROUND + 1
    assert of(StartWork, actions)[0].round == ROUND + 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rig: signed(rig.regroup(), "ab"),
        lambda rig: signed(rig.regroup(), "abx"),
        lambda rig: signed(rig.regroup(), "abc", run="11" * 20),
        lambda rig: dataclasses.replace(signed(rig.regroup(), "abc"), ballot=1),
        lambda rig: signed(rig.regroup(samples=SAMPLES + 1), "abc"),
        lambda rig: signed(rig.regroup(state_root=NO_DIGEST), "abc"),
        lambda rig: signed(rig.average(round=ROUND + 5), "abc"),
    ],
)
def test_a_commit_that_the_roster_did_not_sign_changes_nothing(spoil: Any) -> None:
    member = Rig(L1)
    assert member.hears(L0, commit(spoil(member))) == []
    assert member.machine.head == member.head
    assert of(Apply, member.hears(L0, commit(signed(member.regroup(), "abc"))))


def test_a_majoritys_word_replaces_a_provisional_one_and_never_the_reverse() -> None:
    member = Rig(L1)
    alone, real = member.average(b"alone"), member.average(b"real")
    provisional = signed(alone, "".join(sorted((L1, L4))), provisional=True)
    fetches = of(Fetch, member.hears(L4, commit(provisional, holders=(L4,))))
    fetches += of(Fetch, member.hears(L0, commit(signed(real, "abc"), holders=(L0,))))
    fetches += of(Fetch, member.hears(L4, commit(provisional, holders=(L4,))))
    assert [fetch.outcome for fetch in fetches] == [alone, real]
    assert of(Apply, member.machine.fetched(alone, True, member.now)) == []
    actions = member.machine.fetched(real, True, member.now)
    assert of(Apply, actions) == [Apply(certificate=signed(real, "abc"))]


def test_a_regroup_leaves_finished_work_as_it_is() -> None:
    member = Rig(L2)
    member.works(33)
    actions = member.hears(L0, commit(signed(member.regroup(), "abc")))
    assert of(StartWork, actions) == []
    ((to, ready),) = sent(Ready, actions)
    assert to == order(FIVE, HEIGHT + 1)[0] == L1
    assert (ready.height, ready.samples) == (HEIGHT + 1, 33)


def test_a_commit_that_got_lost_is_made_good_by_what_members_repeat() -> None:
    leader, member = Rig(L0), Rig(L1)
    outcome = leader.regroup()
    certificate = signed(outcome, "abc")
    accepted = sent(Accepted, member.hears(L0, propose(outcome)))
    assert accepted
    leader.hears(L2, commit(certificate))
    assert leader.machine.head.height == HEIGHT + 1
    repeated = sent(Accepted, member.passes(1.0))
    assert accepted[0] in repeated
    answers = sent(Commit, leader.hears(L1, repeated[0][1]))
    assert answers == [(L1, commit(certificate, holders=(L0,)))]
    member.hears(L0, answers[0][1])
    assert member.machine.head == leader.machine.head


def test_work_that_is_done_is_said_again_every_second() -> None:
    member = Rig(L1)
    member.works()
    member.passes(1.0)
    assert len(sent(Ready, member.passes(3.0))) == 3


# -- a decree whose average is not here -------------------------------------------------------


def pending(me: str = L3, *, provisional: bool = False) -> tuple[Rig, Certificate]:
    """A member that knows what L0, L1 and L2 decided, and has not got the average."""
    member = Rig(me)
    signers = "".join(sorted((L0, L1, L2)[: 2 if provisional else 3]))
    certificate = signed(member.average(), signers, provisional=provisional)
    if provisional:
        member.passes(CONFIG.provisional_s + 1)  # nobody leads it
        assert member.machine.leader != me
    assert of(Fetch, member.hears(L0, commit(certificate, holders=(L0,))))
    member.machine.fetched(certificate.outcome, False, member.now)
    return member, certificate


def lose(member: Rig, *peers: str) -> list[Action]:
    """These cannot be reached, for so long that others may go on without them."""
    actions = []
    for _ in range(round(4 * CONFIG.provisional_s) + 4):
        for peer in peers:
            actions += member.machine.undeliverable(peer, member.now)
        actions += member.passes(0.25)
    return actions


def test_who_has_a_decided_average_is_spoken_to_in_turn() -> None:
    """Else nobody notices that they are dead."""
    member, certificate = pending()
    told = sent(Commit, member.passes(6.0))
    assert [to for to, _ in told] == 2 * [to for to, _ in told[:3]]
    assert {to for to, _ in told} == {L0, L1, L2}
    assert {commit.certificate for _, commit in told} == {certificate}


def test_nothing_else_is_signed_while_one_lives_who_has_what_was_decided() -> None:
    member, certificate = pending()
    lose(member, L0, L1)
    ballot = member.machine.ballot
    leader = order(FIVE)[ballot % 5]
    other = member.regroup()
    assert sent(Accepted, member.hears(leader, propose(other, ballot, holders=()))) == []
    alone = signed(other, "".join(sorted((L3, L4))), provisional=True)
    assert of(Apply, member.hears(L4, commit(alone, holders=(L4,)))) == []
    assert of(Apply, member.machine.fetched(certificate.outcome, True, member.now))


def test_when_all_are_gone_who_had_what_was_decided_the_others_go_on() -> None:
    member, _ = pending()
    leads = sent(Prepare, lose(member, L0, L1, L2))
    assert leads
    ballot = member.machine.ballot
    assert member.machine.leader == L3
    member.hears(L4, member.promise(ballot))
    outcome = member.regroup(*map(seat, sorted((L3, L4))))
    member.works()
    actions = member.passes(1.0)
    proposed = sent(Propose, actions)[0][1].outcome
    assert proposed == outcome
    text = signed_text(RUN, ballot, outcome)
    accepted = Accepted(
        height=HEIGHT,
        ballot=ballot,
        outcome=wire.outcome_digest(outcome),
        signature=Key(L4).sign(ACCEPT_DOMAIN, text),
    )
    (applied,) = of(Apply, member.hears(L4, accepted))
    assert applied.certificate.provisional


def test_what_others_decided_without_those_who_are_gone_is_believed_by_who_signed_it() -> None:
    member, _ = pending(L4)
    lose(member, L0, L1, L2)
    ballot = 8
    assert sent(Promise, member.hears(L3, Prepare(height=HEIGHT, ballot=ballot)))
    outcome = member.regroup()
    assert sent(Accepted, member.hears(L3, propose(outcome, ballot, holders=())))
    both = signed(outcome, "".join(sorted((L3, L4))), ballot, provisional=True)
    assert of(Apply, member.hears(L3, commit(both)))


def test_the_leader_of_a_decree_that_it_cannot_get_leads_again() -> None:
    leader = Rig(L0)
    leader.works()
    for peer in (L1, L2, L3, L4):
        leader.hears(peer, leader.ready())
    outcome = leader.average()
    plan = leader.plan()
    leader.machine.exchange_failed(wire.plan_digest(plan), (), runs_of(range(4)), leader.now)
    report = dataclasses.replace(
        incomplete(plan),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
    )
    for peer in (L1, L2, L3):
        leader.hears(peer, report)
    text = signed_text(RUN, 0, outcome)
    for peer in (L1, L2, L3):
        accepted = Accepted(
            height=HEIGHT,
            ballot=0,
            outcome=wire.outcome_digest(outcome),
            signature=Key(peer).sign(ACCEPT_DOMAIN, text),
        )
        actions = leader.hears(peer, accepted)
    assert sent(Commit, actions)
    assert of(Apply, actions) == []
    leader.machine.fetched(outcome, False, leader.now)
    assert sent(Prepare, leader.passes(5.0)) == []
    lose(leader, L1, L2, L3)
    assert (leader.machine.ballot, leader.machine.leader) == (5, L0)
    assert {to for to, _ in sent(Prepare, leader.passes(1.0))} == set(FIVE) - {L0}


def test_a_provisional_decree_that_is_not_here_keeps_nobody_from_voting() -> None:
    member, certificate = pending(provisional=True)
    ballot = member.machine.ballot
    accepted = sent(
        Accepted, member.hears(member.machine.leader, propose(member.regroup(), ballot))
    )
    assert accepted
    assert of(Apply, member.machine.fetched(certificate.outcome, True, member.now))


def test_news_of_holders_adds_to_what_is_known_of_them() -> None:
    """Anybody can repeat a true certificate, and name whom it likes."""
    member, certificate = pending()
    bogus = tuple(f"bogus{number}" for number in range(100))
    for sender, holders in (("x", bogus), (L4, (*bogus, L4)), ("x", ())):
        member.hears(sender, commit(certificate, holders=holders))
        member.machine.fetched(certificate.outcome, False, member.now)
    (fetch,) = of(Fetch, member.passes(1.25))
    assert set(fetch.holders) == {L0, L1, L2, L4}
    for name in bogus:
        member.hears(name, Join(member=seat(name), height=HEIGHT))
    member.hears("x", commit(certificate, holders=bogus))
    member.machine.fetched(certificate.outcome, False, member.now)
    member.machine.undeliverable(L0, member.now)
    (fetch,) = of(Fetch, member.passes(1.25))
    assert fetch.holders[-1] == L0  # who is down is asked last
    assert set(fetch.holders[:3]) == {L1, L2, L4}
    assert len(fetch.holders) < 20


def test_a_provisional_decree_is_followed_where_nothing_can_be_decided_without_its_signers() -> (
    None
):
    two = order("ab")
    leader = Rig(two[0], "ab")
    alone = signed(leader.regroup(seat(two[1])), two[1], provisional=True)
    assert of(Apply, leader.hears(two[1], commit(alone)))
    of_five = Rig(L0)
    cut_off = signed(of_five.regroup(seat(L4)), L4, provisional=True)
    assert of_five.hears(L4, commit(cut_off)) == []
    lose(of_five, L1)
    assert of_five.hears(L4, commit(cut_off)) == []  # three of five are left
    lose(of_five, L1, L2)
    assert of(Apply, of_five.hears(L4, commit(cut_off)))


def test_a_provisional_decree_is_followed_by_who_was_led_by_nobody_for_long() -> None:
    """Turns that pass in silence are nobody's word."""
    member = Rig(L4, cannot_reduce=L4)
    cut_off = signed(member.regroup(*map(seat, sorted((L1, L4)))), L1, provisional=True)
    for _ in range(20):
        member.hears(member.machine.leader, Lead(height=HEIGHT, ballot=0, closing=False))
        member.passes(1.0)
        assert member.hears(L1, commit(cut_off)) == []
    member.passes(CONFIG.provisional_s)
    assert member.machine.ballot > 0
    assert of(Apply, member.hears(L1, commit(cut_off)))


# -- a leader that gets nowhere ---------------------------------------------------------------

PATIENCE_S = CONFIG.exchange_s + CONFIG.provisional_s + CONFIG.grace_s


def beaten(member: Rig, seconds: float) -> list[Action]:
    """Time passes, and the leader of now does nothing but beat."""
    actions = []
    for _ in range(round(seconds)):
        ballot = member.machine.ballot
        lead = Lead(height=HEIGHT, ballot=ballot, closing=False)
        actions += member.hears(order(FIVE)[ballot % 5], lead)
        actions += member.passes(1.0)
    return actions


@pytest.mark.parametrize("word", ["ready", "report", "accepted"])
def test_a_leader_that_only_beats_is_left_when_it_has_ones_word_for_long(word: str) -> None:
    member = Rig(L4)
    member.works()
    if word != "ready":
        member.hears(L0, member.plan())
        beaten(member, CONFIG.exchange_s)  # an exchange may take its time
        assert member.machine.ballot == 0
        member.exchanges(member.plan(), member.average())
    if word == "accepted":
        beaten(member, 30)
        assert sent(Accepted, member.hears(L0, propose(member.average())))
    beaten(member, PATIENCE_S - 1)
    assert member.machine.ballot == 0
    beaten(member, 3)
    assert member.machine.ballot == 1


def test_who_is_at_work_waits_for_nobody() -> None:
    member = Rig(L4)
    beaten(member, 10 * PATIENCE_S)
    assert member.machine.ballot == 0


def test_in_a_long_round_leaders_that_wait_for_others_are_left_ever_more_rarely() -> None:
    member = Rig(L4)
    member.works()
    beaten(member, 3600)
    assert 3 <= member.machine.ballot <= 6


def test_another_turn_of_the_same_leader_is_no_answer() -> None:
    """It begins again before the patience of the others ends, and gets nowhere again."""
    member = Rig(L4)
    member.works()
    beaten(member, PATIENCE_S / 2)
    member.hears(L0, Prepare(height=HEIGHT, ballot=5))
    assert member.machine.ballot == 5
    beaten(member, PATIENCE_S / 2 + 2)
    assert member.machine.ballot == 6


def test_a_proposal_that_is_repeated_is_no_answer_either() -> None:
    member = Rig(L4)
    outcome = member.regroup()
    for _ in range(round(PATIENCE_S) + 2):
        member.hears(L0, propose(outcome))
        beaten(member, 1)
    assert member.machine.ballot == 1


def test_many_small_pieces_fill_no_message() -> None:
    """Reported one by one: the mend is one that can be sent, and keeps the longest."""
    layout = Layout(lengths=(4000 * ALIGN_ELEMENTS,), largest_chunk=ALIGN_ELEMENTS)
    names = [f"{name}{'x' * 51}" for name in "abcdefghijklmnopqrstuvwxyz"]
    held = {
        name: runs_of(n for n in range(4000) if n < 1000 or (n + place) % 3)
        for place, name in enumerate(names)
    }
    kept = leadership._kept(4000, held)
    assert sum(len(wire.encode(mended(names, (run,), layout))) for run in kept[:1])
    assert kept[0].start == 0
    assert kept[0].stop >= 1000
    empty = len(wire.encode(mended(names, kept[:1], layout)))
    assert len(wire.encode(mended(names, kept, layout))) - empty < 2 * KEPT_BYTES


def mended(names: list[str], kept: tuple[Kept, ...], layout: Layout) -> Plan:
    found = {chunk for run in kept for chunk in range(run.start, run.stop)}
    return Plan(
        height=HEIGHT,
        round=ROUND,
        ballot=0,
        attempt=1,
        previous=NO_DIGEST,
        base=blake3(b"base").digest(),
        receivers=tuple(names),
        contributions=tuple(Contribution(peer_id=name, samples=2**40) for name in names),
        slices=share(runs_of(n for n in range(4000) if n not in found), names),
        kept=kept,
        numel=layout.numel(ROUND),
        chunk_elements=ALIGN_ELEMENTS,
        codec="fp32",
        exchange_s=60.0,
        stall_s=12.0,
    )


def test_an_average_that_most_refuse_is_tried_again_at_once() -> None:
    """Its contributors follow no mend: they have given up their work."""
    leader = averaging()
    plan = leader.plan()
    actions = leader.machine.exchange_refused(wire.plan_digest(plan), leader.now)
    for peer in (L1, L2, L3, L4):
        actions += leader.hears(peer, incomplete(plan))
    assert sent(Plan, actions) == []
    outcome = sent(Propose, actions)[0][1].outcome
    assert (outcome.kind, outcome.roster) == (Kind.REGROUP, leader.head.roster)


def test_a_refused_average_is_not_mended_for_the_sake_of_the_silent() -> None:
    leader = averaging()
    plan = leader.plan()
    leader.machine.exchange_refused(wire.plan_digest(plan), leader.now)
    for peer in (L1, L2, L3):
        leader.hears(peer, incomplete(plan))
    leader.machine.undeliverable(L4, leader.now)
    actions = leader.passes(LOST_S + 0.5)
    assert not any(plan.attempt for _, plan in sent(Plan, actions))
    assert {m.peer_id for m in sent(Propose, actions)[0][1].outcome.roster} == set(FIVE) - {L4}


# -- voting once ------------------------------------------------------------------------------


def test_nobody_votes_twice_by_going_to_another_branch_and_back() -> None:
    """With as many samples on both, a larger roster there, and one with a seat for it here."""
    member = Rig(L1)
    first = member.regroup()
    assert sent(Accepted, member.hears(L0, propose(first)))
    larger = signed(member.regroup(*map(seat, "pqrstu"), height=HEIGHT + 3), "a", provisional=True)
    member.machine.install(larger, member.now)
    assert not member.machine.is_member
    assert not member.machine.yields_to(member.head)
    assert member.machine.install(member.certificate, member.now) == []
    assert member.machine.head == Head.after(larger)


def test_a_revival_forgets_no_head_that_was_left() -> None:
    member = Rig(L1, session=2)
    alone = signed(member.regroup(seat(L1, session=2)), L1, provisional=True)
    actions = member.machine.revive(alone, member.now)
    assert [work.round for work in of(StartWork, actions)] == [ROUND]
    assert member.machine.head == Head.after(alone)
    assert not member.machine.yields_to(member.head)


def test_a_leader_gets_one_signature_for_each_of_its_turns() -> None:
    member = Rig(L1)
    one, other = member.regroup(), member.regroup(*member.head.roster[:4])
    assert sent(Accepted, member.hears(L0, propose(one)))
    assert sent(Accepted, member.hears(L0, propose(other))) == []
    again = sent(Accepted, member.hears(L0, propose(one)) + member.passes(1.25))
    assert {accepted.outcome for _, accepted in again} == {wire.outcome_digest(one)}


# -- other heights and strangers --------------------------------------------------------------


def test_who_was_stopped_itself_takes_nobody_for_gone() -> None:
    leader = taken_over(1)
    for peer in (L0, L2, L3, L4):
        leader.machine.undeliverable(peer, leader.now)
    assert leader.machine.ballot == 1
    leader.works()
    leader.now += 100 * PAUSE_S
    assert of(StartExchange, leader.machine.tick(leader.now)) == []
    assert of(StartExchange, leader.passes(CONFIG.provisional_s - 1)) == []
    assert of(StartExchange, leader.passes(3.0))  # all have been gone for long now


def test_strangers_that_ask_are_answered_so_often_and_no_more() -> None:
    """Each answer is a call to an address of their choice."""
    member = Rig(L1)
    answers = 0
    for number in range(200):
        name = f"x{number}"
        join = Join(member=seat(name), height=HEIGHT - 1)
        answers += len(sent(Commit, member.hears(name, join)))
        behind = Ready(height=HEIGHT - 1, ballot=0, head=NO_DIGEST, samples=0)
        answers += len(sent(Commit, member.hears(name, behind)))
        assert sent(Commit, member.hears(L2, behind))  # a member always is
    assert answers == ANSWERS
    member.passes(1.0)
    assert sent(Commit, member.hears("x0", Join(member=seat("x0"), height=HEIGHT - 1)))


def test_what_overtakes_a_commit_is_kept_within_bounds() -> None:
    member = Rig(L1)
    wide = tuple(
        Member(
            peer_id=f"r{number:04}",
            session=1,
            hosts=("h" * 255, "h" * 255),
            port=1,
            certificate_sha256=NO_DIGEST,
            can_reduce=True,
        )
        for number in range(1500)
    )
    big = Propose(
        height=HEIGHT + 1,
        ballot=0,
        outcome=member.regroup(*wide, height=HEIGHT + 1),
        holders=(),
    )
    for number in range(100):
        name = f"x{number:02}"
        member.hears(name, Join(member=seat(name), height=HEIGHT))
        member.machine.receive(name, big, member.now)
    assert sum(kept.size for kept in member.machine._early.values()) <= EARLY_BYTES // 2
    certificate, plan = ahead(member)
    leader = order(FIVE, HEIGHT + 1)[0]
    sender = leader if leader != L1 else order(FIVE, HEIGHT + 1)[1]
    member.hears(sender, plan)  # for members there is room still
    assert (sender, Plan) in member.machine._early
    before = len(member.machine._early)
    for other in (
        dataclasses.replace(member.ready(), height=HEIGHT + 2),
        dataclasses.replace(member.promise(0), height=HEIGHT + 1),
        Accepted(height=HEIGHT + 1, ballot=0, outcome=NO_DIGEST, signature=bytes(64)),
    ):
        member.hears(L2, other)
    assert len(member.machine._early) == before
    member.hears(L0, commit(certificate))
    assert member.machine._early == {}


def ahead(rig: Rig) -> tuple[Certificate, Plan]:
    """The commit of this height, and a plan of the next by its leader."""
    certificate = signed(rig.regroup(), "abc")
    plan = rig.plan(height=HEIGHT + 1, previous=Head.after(certificate).digest)
    return certificate, plan


def test_a_message_of_the_next_height_waits_for_the_commit() -> None:
    member = Rig(order(FIVE, HEIGHT + 1)[1])
    member.works()
    certificate, plan = ahead(member)
    leader = order(FIVE, HEIGHT + 1)[0]
    assert member.hears(leader, plan) == []
    actions = member.hears(L0, commit(certificate))
    assert [start.plan for start in of(StartExchange, actions)] == [plan]


def test_who_stays_behind_catches_up_with_whoever_spoke_last() -> None:
    member = Rig(L1)
    certificate, plan = ahead(member)
    others = [peer for peer in FIVE if peer != L1]
    member.hears(others[0], plan)
    assert of(CatchUp, member.passes(BEHIND_S - 0.25)) == []
    member.hears(others[1], Lead(height=HEIGHT + 2, ballot=0, closing=False))
    assert of(CatchUp, member.passes(0.25)) == [CatchUp(peer=others[1])]
    # That one is silent, too: another one who is ahead is asked next.
    later = dataclasses.replace(certificate.outcome, height=HEIGHT + 1)
    member.hears(others[2], commit(signed(later, "abc")))
    assert of(CatchUp, member.passes(1.0)) == [CatchUp(peer=others[2])]


def test_catching_up_is_over_when_the_commit_arrives() -> None:
    member = Rig(L1)
    certificate, plan = ahead(member)
    member.hears(L0, plan)
    member.hears(L0, commit(certificate))
    assert of(CatchUp, member.passes(5.0)) == []


STRANGE = [
    lambda rig: Lead(height=HEIGHT, ballot=0, closing=True),
    lambda rig: Lead(height=HEIGHT + 7, ballot=0, closing=True),
    lambda rig: rig.plan(),
    lambda rig: rig.plan(height=HEIGHT + 1),
    lambda rig: Prepare(height=HEIGHT, ballot=1),
    lambda rig: rig.promise(0),
    lambda rig: propose(rig.regroup()),
    lambda rig: rig.ready(),
    lambda rig: Refused(height=HEIGHT, ballot=0, promised=9),
    lambda rig: commit(signed(rig.regroup(), "x")),
    lambda rig: Leave(height=HEIGHT),
    lambda rig: Join(member=seat("a", session=9), height=HEIGHT),
    lambda rig: messages.Hello(height=0),
    lambda rig: messages.Heads(certificates=(rig.certificate,)),
]


@pytest.mark.parametrize("me", [L0, L1])
def test_strangers_are_ignored(me: str) -> None:
    rig, undisturbed = Rig(me), Rig(me)
    for say in STRANGE:
        assert rig.hears("x", say(rig)) == []
    assert rig.works() == undisturbed.works()
    assert rig.passes(3.0) == undisturbed.passes(3.0)
    assert rig.machine.head == rig.head


def test_a_member_that_is_behind_is_sent_the_newest_commit() -> None:
    rig = Rig(L1)
    behind = Ready(height=HEIGHT - 1, ballot=0, head=NO_DIGEST, samples=0)
    assert rig.hears(L2, behind) == [Send(to=L2, message=commit(rig.certificate, holders=(L1,)))]


# -- coming, going, ending --------------------------------------------------------------------


def test_a_joiner_asks_every_second_and_a_round_takes_it_in() -> None:
    joiner = Rig("x")
    assert {to for to, _ in sent(Join, joiner.passes(0.25))} == set(FIVE)
    leader = Rig(L0)
    newcomer = seat("x")
    leader.hears("x", Join(member=newcomer, height=HEIGHT))
    leader.works()
    for peer in (L1, L2, L3, L4):
        leader.hears(peer, leader.ready())
    outcome = leader.average()
    report = Report(
        height=HEIGHT,
        ballot=0,
        plan=wire.plan_digest(leader.plan()),
        complete=True,
        vector_root=outcome.vector_root,
        state_root=outcome.state_root,
        lost=(),
    )
    leader.hears(L1, report)
    leader.hears(L2, report)
    proposals = sent(Propose, leader.hears(L3, report))
    assert proposals[0][1].outcome.roster == (*leader.head.roster, newcomer)


def test_a_leaver_goes_when_an_outcome_leaves_it_out() -> None:
    member = Rig(L1)
    assert of(Left, member.machine.leave(member.now)) == []
    assert {to for to, _ in sent(Leave, member.passes(0.25))} == set(FIVE) - {L1}
    rest = tuple(m for m in member.head.roster if m.peer_id != L1)
    kept = member.hears(L0, commit(signed(member.regroup(), "abc")))
    assert of(Left, kept) == []
    head = member.machine.head
    without = member.regroup(*rest, height=HEIGHT + 1, previous=head.digest)
    assert of(Left, member.hears(L0, commit(signed(without, "abc"))))


def test_the_last_one_may_leave_at_once() -> None:
    alone = Rig("a", "a")
    assert of(Left, alone.machine.leave(alone.now))


def test_the_run_ends_with_its_last_round() -> None:
    member = Rig(L1, config=dataclasses.replace(CONFIG, rounds=ROUND + 1))
    outcome = member.average()
    member.hears(L0, commit(signed(outcome, "abc")))
    actions = member.machine.fetched(outcome, True, member.now)
    assert of(Finished, actions) == [Finished()]
    assert of(StartWork, actions) == []
    assert member.machine.finished
    assert not member.machine.all_finished
    for peer in FIVE:
        member.hears(peer, Leave(height=HEIGHT + 1))
    assert member.machine.all_finished


def test_another_branch_is_taken_only_if_it_outranks_this_one() -> None:
    rig = Rig(L1)
    rig.works()
    lesser = signed(rig.average(samples=SAMPLES - 1), "abc")
    assert rig.machine.install(lesser, rig.now) == []
    assert rig.machine.certificate == rig.certificate
    better = signed(rig.average(samples=SAMPLES + 10**6), "abc")
    actions = rig.machine.install(better, rig.now)
    assert rig.machine.certificate == better
    assert of(StartWork, actions)[0].round == ROUND + 1
    assert of(Apply, actions) == []  # the shell has installed the state itself


# -- gradients --------------------------------------------------------------------------------

BATCH = dataclasses.replace(CONFIG, mode="gradient", target_batch=100)


def progress(samples: int, ballot: int = 0) -> Progress:
    return Progress(height=HEIGHT, ballot=ballot, samples=samples)


def test_how_far_the_work_is_is_told_to_the_leader_when_it_grows_and_every_second() -> None:
    member = Rig(L1, config=BATCH)
    assert sent(Progress, member.machine.work_progress(ROUND, 0, member.now)) == []
    told = [(L0, progress(8))]
    assert sent(Progress, member.machine.work_progress(ROUND, 8, member.now)) == told
    assert sent(Progress, member.machine.work_progress(ROUND, 8, member.now)) == []
    assert sent(Progress, member.machine.work_progress(ROUND - 1, 9, member.now)) == []
    assert sent(Progress, member.passes(1.0)) == told  # the first one may be lost
    assert sent(Progress, member.works(12)) == []
    assert sent(Progress, member.passes(2.0)) == []  # it is ready, and says that
    assert sent(Progress, member.machine.work_progress(ROUND, 20, member.now)) == []


def test_the_next_leader_is_told_anew() -> None:
    member = Rig(L2, config=BATCH)
    member.machine.work_progress(ROUND, 8, member.now)
    member.machine.undeliverable(L0, member.now)
    assert sent(Progress, member.passes(1.0)) == [(L1, progress(8, ballot=1))]


def test_a_leader_closes_the_work_when_the_batch_is_full() -> None:
    leader = Rig(L0, config=BATCH)
    for peer, samples in ((L1, 30), (L2, 30), (L3, 30)):
        assert sent(Lead, leader.hears(peer, progress(samples))) == []
    assert sent(Lead, leader.hears(L1, progress(39))) == []  # 99: it grows, and counts once
    actions = leader.hears(L4, progress(1))
    assert {to for to, lead in sent(Lead, actions) if lead.closing} == set(FIVE) - {L0}
    assert of(CloseWork, actions) == [CloseWork(round=ROUND)]
    leader.works()
    for peer in (L1, L2, L3):
        assert sent(Plan, leader.hears(peer, leader.ready())) == []
    assert sent(Plan, leader.hears(L4, leader.ready()))  # as soon as all are ready


def test_after_a_batch_is_closed_nobody_is_waited_for_longer_than_the_time_to_hand_in() -> None:
    leader = Rig(L0, config=BATCH)
    leader.hears(L1, progress(100))
    leader.hears(L1, leader.ready(samples=100))  # one of five, which is no quorum
    assert sent(Plan, leader.passes(BATCH.close_s - 0.25)) == []
    plans = [plan for _, plan in sent(Plan, leader.passes(0.5))]
    assert plans
    assert {c.peer_id for c in plans[0].contributions} == {L1}


def test_what_was_handed_in_counts_for_what_was_said_before() -> None:
    leader = Rig(L0, config=BATCH)
    leader.hears(L1, progress(60))
    assert sent(Lead, leader.hears(L1, leader.ready(samples=60))) == []  # not 120
    assert any(lead.closing for _, lead in sent(Lead, leader.hears(L2, progress(40))))


def test_who_is_lost_does_not_fill_a_batch() -> None:
    leader = Rig(L0, config=BATCH)
    leader.hears(L1, progress(90))
    leader.machine.undeliverable(L1, leader.now)
    assert not any(lead.closing for _, lead in sent(Lead, leader.hears(L2, progress(20))))


def test_without_gradients_progress_closes_nothing() -> None:
    leader = Rig(L0)
    assert not any(lead.closing for _, lead in sent(Lead, leader.hears(L1, progress(2**48))))


def test_a_plan_averages_the_fragment_of_its_round() -> None:
    lengths = (3 * ALIGN_ELEMENTS, 5 * ALIGN_ELEMENTS, 4 * ALIGN_ELEMENTS - 7)
    layout = Layout(lengths=lengths, largest_chunk=ALIGN_ELEMENTS)
    assert [layout.numel(round) for round in range(4)] == [*lengths, lengths[0]]
    leader = Rig(L0, layout=layout)
    leader.works()
    actions = [a for peer in (L1, L2, L3, L4) for a in leader.hears(peer, leader.ready())]
    plans = [plan for _, plan in sent(Plan, actions)]
    assert {plan.numel for plan in plans} == {lengths[ROUND % 3]}
    member = Rig(L1, layout=layout)
    member.works()
    assert of(StartExchange, member.hears(L0, plans[0]))
    for number, length in enumerate(lengths):
        other = Rig(L1, layout=layout)
        other.works()
        chunks = -(-length // ALIGN_ELEMENTS)
        changed = dataclasses.replace(
            plans[0], numel=length, slices=share([Run(start=0, stop=chunks)], FIVE)
        )
        followed = bool(of(StartExchange, other.hears(L0, changed)))
        assert followed == (number == ROUND % 3)
