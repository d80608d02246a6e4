from __future__ import annotations

import dataclasses
import math

import pytest

from coordinator_free import membership
from coordinator_free.certificates import Head
from coordinator_free.membership import JOIN_BEHIND, JOIN_FRESH_S, Membership
from coordinator_free.messages import NO_DIGEST, Join, Kind, Member


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
