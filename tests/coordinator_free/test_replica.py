from __future__ import annotations

import dataclasses

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free.average import Average, Chunk
from coordinator_free.codecs import codec
from coordinator_free.messages import (
    MAX_CERTIFICATES,
    NO_DIGEST,
    Certificate,
    FrameHeader,
    Kind,
    Member,
    Outcome,
)
from coordinator_free.outer import NesterovOuter, OuterConfig
from coordinator_free.replica import (
    KEPT_AVERAGES,
    KEPT_CANDIDATES,
    LEAF_ELEMENTS,
    Replica,
    State,
    StateReader,
    state_root,
)
from coordinator_free.wire import pack_frame, tree_root
from dht.errors import StateError

LAYOUT = "layout"
NUMEL = LEAF_ELEMENTS + 10  # two leaves a vector
ROSTER = (
    Member(
        peer_id="a",
        session=1,
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    ),
)


def state(seed: int = 0, numel: int = NUMEL) -> State:
    generator = torch.Generator().manual_seed(seed)
    theta_N = torch.randn(numel, generator=generator)
    momentum_N = torch.randn(numel, generator=generator)
    return State(theta_N, momentum_N, state_root(LAYOUT, theta_N, momentum_N))


def average(seed: int, numel: int) -> Average:
    delta_N = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return Average("fp32", [Chunk(0, 0, numel, b"\x01", bytes(codec("fp32").encode(delta_N)))])


def certificate(
    state_root: bytes, *, height: int = 1, kind: Kind = Kind.AVERAGE, vector_root: bytes = NO_DIGEST
) -> Certificate:
    outcome = Outcome(
        height=height,
        round=height,
        kind=kind,
        previous=NO_DIGEST,
        plan=NO_DIGEST,
        vector_root=vector_root,
        state_root=state_root,
        samples=0,
        contributions=(),
        roster=ROSTER,
    )
    return Certificate(outcome=outcome, ballot=0, provisional=False, signatures=())


def replica(numel: int = 100) -> Replica:
    first = state(numel=numel)
    return Replica(
        LAYOUT, NesterovOuter(OuterConfig()), first, certificate(first.root, kind=Kind.FOUND)
    )


# -- roots and downloads ----------------------------------------------------------------------


def test_the_root_is_what_the_protocol_says() -> None:
    held = state()
    raw = [vector.numpy().tobytes() for vector in (held.theta_N, held.momentum_N)]
    mebibyte = 1 << 20
    leaves = [blake3(b"shoal layout v1\0" + LAYOUT.encode()).digest()]
    for text in raw:
        leaves += [blake3(text[:mebibyte]).digest(), blake3(text[mebibyte:]).digest()]
    assert held.root == tree_root(leaves)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 299), st.booleans())
def test_every_element_and_the_layout_are_in_the_root(at: int, in_theta: bool) -> None:
    theta_N, momentum_N = torch.arange(300.0), torch.arange(300.0).flip(0)
    root = state_root(LAYOUT, theta_N, momentum_N)
    assert root == state_root(LAYOUT, theta_N.clone(), momentum_N.clone())
    assert root != state_root(LAYOUT + "x", theta_N, momentum_N)
    assert root != state_root(LAYOUT, momentum_N, theta_N)
    changed = theta_N if in_theta else momentum_N
    changed[at] = -changed[at] - 0.5
    assert root != state_root(LAYOUT, theta_N, momentum_N)


@pytest.mark.parametrize("numel", [1, LEAF_ELEMENTS, NUMEL])
def test_a_downloaded_state_is_the_same_one(numel: int) -> None:
    sent = state(numel=numel)
    reader = StateReader(LAYOUT, numel)
    for frame in sent.frames():
        reader.add(frame)
    got = reader.finish(sent.root)
    assert torch.equal(got.theta_N, sent.theta_N)
    assert torch.equal(got.momentum_N, sent.momentum_N)
    assert got.root == sent.root


def leaf(part: int, chunk: int, elements: int) -> bytes:
    return pack_frame(FrameHeader(part=part, chunk=chunk), bytes(4 * elements))


def test_frames_out_of_order_or_of_another_length_are_refused() -> None:
    frames = list(state().frames())
    assert len(frames) == 4
    foreign = [
        frames[0],  # again
        frames[2],
        frames[3],
        leaf(0, 1, 9),
        leaf(0, 1, 11),
        leaf(0, 1, 0),
        leaf(0, 2, 10),
        leaf(1, 1, 10),
        leaf(7, 0, 10),
        b"",
        b"\xff" * 12,
    ]
    for frame in foreign:
        reader = StateReader(LAYOUT, NUMEL)
        reader.add(frames[0])
        with pytest.raises(ValueError, match=r"leaf|frame"):
            reader.add(frame)
    with pytest.raises(ValueError, match="out of order"):
        StateReader(LAYOUT, NUMEL).add(frames[1])


def test_a_state_has_an_end() -> None:
    reader = StateReader(LAYOUT, NUMEL)
    for frame in state().frames():
        with pytest.raises(ValueError, match="incomplete"):
            reader.finish(state().root)
        reader.add(frame)
    with pytest.raises(ValueError, match="out of order"):
        reader.add(leaf(2, 0, LEAF_ELEMENTS))


def test_another_state_or_another_layout_is_refused() -> None:
    for layout, root in ((LAYOUT, state(1).root), ("other", state().root)):
        reader = StateReader(layout, NUMEL)
        for frame in state().frames():
            reader.add(frame)
        with pytest.raises(ValueError, match="another root"):
            reader.finish(root)


# -- becoming the next state ------------------------------------------------------------------


def test_applying_an_average_is_one_outer_step() -> None:
    held = replica()
    before = held.state
    one = average(1, 100)
    root = held.consider(one)
    assert held.state is before  # only considered
    held.apply(certificate(root, vector_root=one.root))
    theta_N, momentum_N = before.theta_N.clone(), before.momentum_N.clone()
    NesterovOuter(OuterConfig()).step(theta_N, momentum_N, one.values())
    assert torch.equal(held.state.theta_N, theta_N)
    assert torch.equal(held.state.momentum_N, momentum_N)
    assert held.state.root == root == state_root(LAYOUT, theta_N, momentum_N)


def test_what_was_never_considered_is_not_applied() -> None:
    held = replica()
    before = held.state
    one, other = average(1, 100), average(2, 100)
    root = held.consider(one)
    for wrong in (
        certificate(root, vector_root=other.root),
        certificate(NO_DIGEST, vector_root=one.root),
    ):
        with pytest.raises(StateError):
            held.apply(wrong)
    assert held.state is before
    assert len(held.certificates) == 1


def test_what_was_considered_for_another_state_is_not_applied_to_this_one() -> None:
    held = replica()
    one, other = average(1, 100), average(2, 100)
    stale = held.consider(other)
    held.apply(certificate(held.consider(one), vector_root=one.root))
    with pytest.raises(StateError):
        held.apply(certificate(stale, vector_root=other.root))


def test_a_regroup_changes_nothing_but_the_certificate() -> None:
    held = replica()
    before = held.state
    one = average(1, 100)
    root = held.consider(one)
    regroup = certificate(before.root, kind=Kind.REGROUP)
    held.apply(regroup)
    assert held.state is before
    assert held.certificates[-1] is regroup
    held.apply(certificate(root, height=2, vector_root=one.root))  # the work was not lost
    assert held.state.root == root


def test_a_state_that_is_being_served_stays_valid_while_the_next_one_is_applied() -> None:
    held = replica(numel=NUMEL)
    old = held.state
    trained_from = old.theta_N
    copy = trained_from.clone()
    serving = old.frames()
    reader = StateReader(LAYOUT, NUMEL)
    reader.add(next(serving))
    one = average(1, NUMEL)
    held.apply(certificate(held.consider(one), vector_root=one.root))
    for frame in serving:
        reader.add(frame)
    assert reader.finish(old.root).root == old.root
    assert torch.equal(trained_from, copy)
    assert held.state.root != old.root


def test_old_averages_candidates_and_certificates_are_forgotten() -> None:
    held = replica()
    averages = [average(seed, 100) for seed in range(1, 9)]
    roots = [held.consider(one) for one in averages]
    kept = [held.average(one.root) is not None for one in averages]
    assert kept == [False] * (8 - KEPT_AVERAGES) + [True] * KEPT_AVERAGES
    oldest = 8 - KEPT_CANDIDATES
    with pytest.raises(StateError):
        held.apply(certificate(roots[oldest - 1], vector_root=averages[oldest - 1].root))
    held.apply(certificate(roots[oldest], vector_root=averages[oldest].root))
    for height in range(2, MAX_CERTIFICATES + 9):
        held.apply(certificate(held.state.root, height=height, kind=Kind.REGROUP))
    assert [c.outcome.height for c in held.certificates] == list(range(9, MAX_CERTIFICATES + 9))


def test_installing_needs_the_certificate_of_that_state() -> None:
    held = replica()
    before = held.state
    root = held.consider(one := average(1, 100))
    other = state(7, numel=100)
    with pytest.raises(StateError, match="differ"):
        held.install(other, certificate(before.root))
    assert held.state is before
    held.install(other, fresh := certificate(other.root, height=9))
    assert held.state is other
    assert list(held.certificates) == [fresh]
    with pytest.raises(StateError):  # it followed from the state before
        held.apply(certificate(root, vector_root=one.root))


def test_peers_that_apply_the_same_bytes_stay_identical() -> None:
    one, two = replica(), replica()
    for round in range(3):
        step = average(round, 100)
        decided = certificate(one.consider(step), vector_root=step.root)
        assert two.consider(copy_of(step)) == decided.outcome.state_root
        one.apply(decided)
        two.apply(decided)
    assert torch.equal(one.state.theta_N, two.state.theta_N)


def copy_of(one: Average) -> Average:
    return Average(one.codec_name, [dataclasses.replace(chunk) for chunk in one.chunks])
