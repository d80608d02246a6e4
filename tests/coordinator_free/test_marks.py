from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator_free import certificates
from coordinator_free.actions import Apply, Send
from coordinator_free.marks import Marks
from coordinator_free.messages import (
    NO_DIGEST,
    Certificate,
    Commit,
    Join,
    Kind,
    Member,
    Message,
    Ready,
)
from dht.identity import Identity

ME = Identity.generate()
SEAT = Member(
    peer_id=ME.peer_id,
    session=1,
    hosts=("127.0.0.1",),
    port=1,
    certificate_sha256=bytes(32),
    can_reduce=True,
)


@pytest.fixture(scope="module")
def decided() -> Certificate:
    founded = certificates.found("ab" * 20, SEAT, ME, NO_DIGEST)
    return replace(founded, outcome=replace(founded.outcome, kind=Kind.AVERAGE))


def send(message: Message) -> Send:
    return Send(to="somebody", message=message)


def ready(height: int) -> Ready:
    return Ready(height=height, ballot=0, head=NO_DIGEST, samples=1)


def test_a_message_that_is_repeated_is_one_pass() -> None:
    marks = Marks()
    assert marks.passed([send(ready(3)), send(ready(3))]) == ["ready"]
    assert marks.passed([send(ready(3))]) == []
    assert marks.passed([send(ready(4))]) == ["ready"]


def test_a_commit_counts_for_who_decides_it(decided: Certificate) -> None:
    told = send(Commit(certificate=decided, holders=()))
    assert Marks().passed([told]) == []
    assert Marks().passed([told, told, Apply(certificate=decided)]) == ["leader.commit"]


def test_a_roster_is_no_round(decided: Certificate) -> None:
    regrouped = replace(decided, outcome=replace(decided.outcome, kind=Kind.REGROUP))
    told = send(Commit(certificate=regrouped, holders=()))
    assert Marks().passed([told, Apply(certificate=regrouped)]) == []


def test_other_messages_pass_nothing() -> None:
    assert Marks().passed([send(Join(member=SEAT, height=0))]) == []
