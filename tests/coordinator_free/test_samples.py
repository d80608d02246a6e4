"""How many samples a run can have, whoever claims how many: one bound for heads and records."""

from __future__ import annotations

import dataclasses
import time

import pytest

from coordinator_free import wire
from coordinator_free.messages import MAX_SAMPLES, Contribution, Propose, samples_after
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.session import Session, SessionConfig
from dht.identity import Identity
from dht.records import open_peer_record, seal
from tests.coordinator_free import test_machine
from tests.coordinator_free.test_machine import FIVE, L0, L1, Rig, propose, sent

NEAR = MAX_SAMPLES - 7


@pytest.fixture
def near_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_machine, "SAMPLES", NEAR)


def test_more_than_a_run_can_have_is_refused_where_it_is_decoded() -> None:
    rig = Rig("a")
    message = propose(rig.average(samples=MAX_SAMPLES))
    proto = wire.rounds_pb2.Envelope()
    proto.ParseFromString(wire.encode(message))
    assert isinstance(wire.decode(proto.SerializeToString()), Propose)
    for samples in (MAX_SAMPLES + 1, 2**64 - 1):
        proto.propose.outcome.samples = samples
        with pytest.raises(ValueError, match="samples"):
            wire.decode(proto.SerializeToString())


def test_samples_grow_up_to_the_bound_and_no_further() -> None:
    claims = [Contribution(peer_id=name, samples=2**48) for name in "ab"]
    assert samples_after(5, claims) == 5 + 2**49
    assert samples_after(NEAR, claims) == MAX_SAMPLES
    assert samples_after(MAX_SAMPLES, claims) == MAX_SAMPLES


@pytest.mark.usefixtures("near_the_end")
def test_a_leader_and_its_members_go_on_at_the_bound() -> None:
    """Each contributes 10 samples, and there is room for 7."""
    leader = Rig(L0)
    leader.works()
    actions = [a for name in FIVE if name != L0 for a in leader.hears(name, leader.ready())]
    (_, plan), *_ = sent(test_machine.Plan, actions)
    report = test_machine.Report(
        height=test_machine.HEIGHT,
        ballot=0,
        plan=wire.plan_digest(plan),
        complete=True,
        vector_root=bytes([1]) * 32,
        state_root=bytes([2]) * 32,
        lost=(),
    )
    actions = [a for name in FIVE if name != L0 for a in leader.hears(name, report)]
    proposals = sent(Propose, actions)
    assert {proposal.outcome.samples for _, proposal in proposals} == {MAX_SAMPLES}
    member = Rig(L1)
    assert member.machine.plausible(proposals[0][1].outcome)
    less = dataclasses.replace(proposals[0][1].outcome, samples=MAX_SAMPLES - 1)
    assert not member.machine.plausible(less)


def test_a_peer_at_the_bound_can_still_be_found() -> None:
    identity = Identity.generate()
    rig = Rig("a")
    config = SessionConfig(
        run_id="ab" * 20,
        creator=identity.peer_id,
        layout="00",
        numel=10,
        round=test_machine.CONFIG,
        optimizer=OuterOptimizer(OuterConfig()),
    )
    session = Session(config, identity=identity, directory=None)  # type: ignore[arg-type]
    session._machine = rig.machine
    rig.machine.head = dataclasses.replace(rig.machine.head, samples=2**64 - 1, round=2**64 - 1)
    me = dataclasses.replace(rig.machine.me, peer_id=identity.peer_id)
    record = session._record(me, ())
    raw = seal(record, identity)
    assert open_peer_record(raw, now=time.time()).samples == MAX_SAMPLES
