from __future__ import annotations

import dataclasses
import math

import pytest

from coordinator_free import membership, wire
from coordinator_free.certificates import Head
from coordinator_free.leadership import KEPT_BYTES
from coordinator_free.membership import JOIN_BEHIND, JOIN_FRESH_S, Membership, fitting
from coordinator_free.messages import (
    NO_DIGEST,
    Certificate,
    Commit,
    Contribution,
    Join,
    Kind,
    Member,
    Message,
    Outcome,
    Plan,
    Promise,
    Propose,
    Report,
    Signature,
    Slice,
    View,
)


def seat(name: str, session: int = 1) -> Member:
    return Member(
        peer_id=name,
        session=session,
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    )


def head(*members: Member, height: int = 10) -> Head:
    return Head(
        height=height,
        round=1,
        digest=NO_DIGEST,
        state_root=NO_DIGEST,
        samples=0,
        roster=members,
        kind=Kind.AVERAGE,
    )


def names(roster: tuple[Member, ...]) -> list[str]:
    return [member.peer_id for member in roster]


A, B, C, D = map(seat, "abcd")


@pytest.fixture
def of_three() -> Membership:
    return Membership(A, head(A, B, C))


def test_silence_counts_from_the_first_failure_until_something_is_heard(
    of_three: Membership,
) -> None:
    of_three.lost("b", 5.0)
    of_three.lost("b", 8.0)
    assert of_three.is_down("b")
    assert of_three.gone_for("b", 9.0) == 4.0
    assert of_three.live() == ("a", "c")
    of_three.heard("b")
    assert of_three.gone_for("b", 9.0) == 0.0
    assert of_three.live() == ("a", "b", "c")


def test_a_peer_never_gives_itself_or_a_stranger_up(of_three: Membership) -> None:
    of_three.lost("a", 0.0)
    of_three.lost("x", 0.0)
    assert of_three.live() == ("a", "b", "c")
    assert not of_three.is_down("x")


def test_the_next_roster_is_the_live_less_leavers_plus_joiners_sorted(
    of_three: Membership,
) -> None:
    of_three.leave("b")
    of_three.lost("c", 0.0)
    of_three.join(Join(member=D, height=10), 1.0)
    assert of_three.next_roster(1.0) == (A, D)
    assert of_three.next_roster(1.0, admit=False) == (A,)
    assert names(of_three.next_roster(1.0, without=("a",))) == ["d"]


@pytest.mark.parametrize(
    ("height", "age_s", "admitted"),
    [
        (10, 0.0, True),
        (10 - JOIN_BEHIND, JOIN_FRESH_S, True),
        (10 - JOIN_BEHIND - 1, 0.0, False),
        (11, 0.0, False),
        (10, JOIN_FRESH_S + 0.1, False),
    ],
)
def test_joiners_get_in_while_fresh_and_nearly_up_to_date(
    of_three: Membership, height: int, age_s: float, admitted: bool
) -> None:
    of_three.join(Join(member=D, height=height), 100.0)
    assert (D in of_three.next_roster(100.0 + age_s)) is admitted


def test_a_new_session_declares_the_old_one_dead(of_three: Membership) -> None:
    again = seat("b", session=2)
    of_three.join(Join(member=again, height=10), 0.0)
    assert of_three.restarted("b")
    assert of_three.gone_for("b", 0.0) == math.inf
    assert of_three.live() == ("a", "c")
    assert of_three.next_roster(0.0) == (A, again, C)
    of_three.enter(head(A, again, C, height=11))
    assert not of_three.restarted("b")
    assert of_three.live() == ("a", "b", "c")


def test_a_leaver_that_came_back_as_a_new_session_stays(of_three: Membership) -> None:
    of_three.leave("b")
    again = seat("b", session=2)
    of_three.join(Join(member=again, height=10), 0.0)
    of_three.enter(head(A, again, C, height=11))
    assert not of_three.leaving("b")
    assert again in of_three.next_roster(0.0)


def test_a_wish_to_leave_outlasts_rosters_that_do_not_grant_it(of_three: Membership) -> None:
    of_three.leave("b")
    of_three.leave("x")
    of_three.enter(head(A, B, C, height=11))
    assert of_three.leaving("b")
    assert not of_three.leaving("x")
    of_three.enter(head(A, C, height=12))
    of_three.enter(head(A, B, C, height=13))
    assert not of_three.leaving("b")


def test_addresses_outlast_seats(of_three: Membership) -> None:
    moved = dataclasses.replace(B, port=2)
    of_three.enter(head(A, moved, height=11))
    assert of_three.member("b") == moved
    assert of_three.member("c") == C
    of_three.enter(head(A, height=12))
    assert of_three.member("b") == moved
    assert of_three.member("x") is None
    of_three.join(Join(member=D, height=12), 0.0)
    assert of_three.member("d") == D


def test_floods_of_strangers_neither_break_nor_lock_the_roster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "MAX_MEMBERS", 8)
    members = Membership(A, head(A, B, C))
    for number in range(20):
        members.join(Join(member=seat(f"x{number:02}"), height=10), 0.0)
    assert len(members.next_roster(0.0)) == 8
    members.enter(head(A, B, C, height=11))
    assert members.member("b") == B
    # Those did not come back: after a while there is room for others again.
    late = JOIN_FRESH_S + 1
    members.join(Join(member=D, height=11), late)
    assert members.next_roster(late) == (A, B, C, D)


def test_who_restarted_is_heard_though_there_is_no_room_for_strangers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "MAX_MEMBERS", 8)
    members = Membership(A, head(A, B, C))
    for number in range(20):
        members.join(Join(member=seat(f"x{number:02}"), height=10), 0.0)
    members.join(Join(member=seat("b", session=2), height=10), 0.0)
    assert members.restarted("b")


def test_strangers_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_MEMBERS", 8)
    members = Membership(A, head(A, B, C))
    now = 0.0
    for wave in range(10):
        now += JOIN_FRESH_S + 1
        for number in range(8):
            members.join(Join(member=seat(f"x{wave}-{number}"), height=10), now)
    known = [n for w in range(10) for n in range(8) if members.member(f"x{w}-{n}") is not None]
    assert len(known) == 8
    assert members.member("b") == B


def stranger(number: int) -> Member:
    """Whose seat takes up as much room as one can."""
    return Member(
        peer_id=f"12D3KooW{number:044}",
        session=2**64 - 1,
        hosts=("h" * 255, "i" * 255),
        port=65535,
        certificate_sha256=bytes(32),
        can_reduce=True,
    )


def test_a_roster_grows_no_further_than_messages_about_it() -> None:
    """Strangers with long addresses made one of which nothing could be decided any more."""
    members = Membership(A, head(A, B, C))
    for number in range(4096):
        members.join(Join(member=stranger(number), height=10), 0.0)
    roster = members.next_roster(0.0)
    assert set(names(roster)) >= {"a", "b", "c"}
    assert len(roster) > 400
    for message in largest(roster):
        assert len(wire.encode(message)) < wire.MAX_MESSAGE_BYTES - KEPT_BYTES
    assert fitting((A, *roster)) == roster
    honest = fitting(
        dataclasses.replace(stranger(n), hosts=("192.168.100.100",)) for n in range(4096)
    )
    assert len(honest) > 1000
    for message in largest(honest):
        assert len(wire.encode(message)) < wire.MAX_MESSAGE_BYTES - KEPT_BYTES


def largest(roster: tuple[Member, ...]) -> list[Message]:
    """What says most of a whole roster: a decree and its signatures, and a promise."""
    peers = tuple(names(roster))
    contributions = tuple(Contribution(peer_id=p, samples=2**48, omitted=255) for p in peers)
    outcome = Outcome(
        height=2**40,
        round=2**40,
        kind=Kind.AVERAGE,
        previous=bytes(32),
        plan=bytes(32),
        vector_root=bytes(32),
        state_root=bytes(32),
        samples=2**50,
        contributions=contributions,
        roster=roster,
    )
    chunks = len(peers)
    plan = Plan(
        height=2**40,
        round=2**40,
        ballot=2**40,
        attempt=1,
        previous=bytes(32),
        base=b"x" * 32,
        receivers=peers,
        contributions=contributions,
        slices=tuple(Slice(start=n, stop=n + 1, reducer=p) for n, p in enumerate(peers)),
        kept=(),
        links=tuple(View(peer_id=p, up_bps=2**40, down_bps=2**40) for p in peers),
        expected_s=1.0,
        numel=chunks * 4096,
        chunk_elements=4096,
        codec="int4",
        exchange_s=60.0,
        stall_s=12.0,
    )
    report = Report(
        height=2**40,
        ballot=2**40,
        plan=bytes(32),
        complete=True,
        vector_root=bytes(32),
        state_root=bytes(32),
        lost=peers,
        absent=peers,
    )
    certificate = Certificate(
        outcome=outcome,
        ballot=2**40,
        provisional=True,
        signatures=tuple(Signature(peer_id=p, signature=bytes(64)) for p in peers),
    )
    return [
        Commit(certificate=certificate, holders=peers),
        Propose(height=2**40, ballot=2**40, outcome=outcome, holders=peers),
        Promise(
            height=2**40,
            ballot=2**40,
            accepted_ballot=2**40,
            accepted=outcome,
            plan=plan,
            report=report,
        ),
    ]


def test_a_pause_of_ones_own_is_not_the_silence_of_others(of_three: Membership) -> None:
    of_three.lost("b", 5.0)
    of_three.paused(100.0)
    assert of_three.gone_for("b", 108.0) == 3.0
    assert of_three.is_down("b")


def test_the_book_forgets_those_without_a_seat_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_MEMBERS", 3)
    members = Membership(A, head(A, B, C))
    members.enter(head(A, C, D, height=11))
    assert members.member("b") is None
    assert members.member("d") == D


def test_who_is_lost_is_remembered_until_it_is_back_and_who_left_is_not(
    of_three: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert of_three.strays == ()
    of_three.leave("c")
    of_three.enter(head(A, height=11))
    assert of_three.strays == (B,)
    of_three.enter(head(A, D, height=12))
    assert of_three.strays == (B,)
    of_three.enter(head(A, B, height=13))
    assert of_three.strays == (D,)
    monkeypatch.setattr(membership, "MAX_STRAYS", 3)
    for number in range(6):
        of_three.enter(head(A, seat(f"x{number}"), height=14 + 2 * number))
        of_three.enter(head(A, height=15 + 2 * number))
    assert len(of_three.strays) <= 3
    assert of_three.strays[-1].peer_id == "x5"
