from __future__ import annotations

import dataclasses

import pytest
import torch
from blake3 import blake3

from coordinator_free.average import Average, Chunk
from coordinator_free.chain import Chain
from coordinator_free.codecs import codec
from coordinator_free.messages import NO_DIGEST, Certificate, Kind, Member, Outcome
from coordinator_free.optimizer import Position
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.replica import (
    KEPT_CANDIDATES,
    KEPT_CERTIFICATES,
    MAX_KEPT_AVERAGES,
    MIN_KEPT_AVERAGES,
    Replica,
)
from coordinator_free.state import LEAF_ELEMENTS, Fragment, Shape, State
from coordinator_free.wire import head_digest
from dht.errors import StateError

LAYOUT = "layout"
OPTIMIZER = OuterOptimizer(OuterConfig())
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


def shape(numel: int = NUMEL, fragments: int = 1) -> Shape:
    return Shape.of(LAYOUT, numel, fragments, OPTIMIZER)


def state(seed: int = 0, numel: int = NUMEL, fragments: int = 1) -> State:
    generator = torch.Generator().manual_seed(seed)
    of = shape(numel, fragments)
    return State.of(
        of, [[torch.randn(length, generator=generator) for length in each] for each in of.lengths]
    )


def average(seed: int, numel: int, codec_name: str = "fp32") -> Average:
    delta_N = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    payload = bytes(codec(codec_name).encode(delta_N))
    return Average(codec_name, [Chunk(0, numel, b"\x01", payload)])


def certificate(
    state_root: bytes,
    *,
    after: Certificate | None = None,
    kind: Kind = Kind.AVERAGE,
    vector_root: bytes = NO_DIGEST,
) -> Certificate:
    height = after.outcome.height + 1 if after is not None else 0
    round = after.outcome.round if after is not None else 0
    outcome = Outcome(
        height=height,
        round=round + (kind == Kind.AVERAGE),
        kind=kind,
        previous=head_digest(after.outcome) if after is not None else NO_DIGEST,
        plan=NO_DIGEST,
        vector_root=vector_root,
        state_root=state_root,
        samples=0,
        contributions=(),
        roster=ROSTER,
    )
    return Certificate(outcome=outcome, ballot=0, provisional=False, signatures=())


def replica(numel: int = 100, fragments: int = 1) -> Replica:
    first = state(numel=numel, fragments=fragments)
    chain = Chain.begin(certificate(first.root, kind=Kind.FOUND))
    return Replica(OPTIMIZER, first, chain)


def apply(held: Replica, root: bytes, one: Average | None) -> None:
    """The next height: this average leads to this root; none: the roster changes."""
    kind, vector = (Kind.AVERAGE, one.root) if one is not None else (Kind.REGROUP, NO_DIGEST)
    newest = held.chain.newest
    held.apply(certificate(root, after=newest, kind=kind, vector_root=vector))


def after(before: State, one: Average, number: int = 0, *, round: int = 0) -> list[torch.Tensor]:
    """The vectors of a fragment after one outer step."""
    vectors = before.fragments[number].vectors
    out = [torch.empty_like(vector) for vector in vectors]
    OPTIMIZER.advance(vectors, one.values(), out, Position(round=round, samples=0))
    return out


# -- becoming the next state ------------------------------------------------------------------


def test_applying_an_average_is_one_outer_step() -> None:
    held = replica()
    before = held.state
    one = average(1, 100)
    root = held.consider(one)
    assert held.state is before  # only considered
    apply(held, root, one)
    expected = after(before, one)
    assert [*map(torch.Tensor.tolist, held.state.vectors())] == [v.tolist() for v in expected]
    assert held.state.root == root == State.of(before.shape, [expected]).root


def test_what_was_never_considered_is_not_applied() -> None:
    held = replica()
    before = held.state
    one, other = average(1, 100), average(2, 100)
    root = held.consider(one)
    for wrong_root, wrong in ((root, other), (NO_DIGEST, one)):
        with pytest.raises(StateError):
            apply(held, wrong_root, wrong)
    assert held.state is before
    assert len(held.certificates) == len(held.chain) == 1


def test_a_certificate_that_does_not_follow_is_not_applied() -> None:
    held = replica()
    root = held.consider(one := average(1, 100))
    with pytest.raises(StateError, match="follow"):
        held.apply(certificate(root, vector_root=one.root))
    apply(held, root, one)
    assert held.chain.newest == held.certificates[-1]


def test_what_was_considered_for_another_state_is_not_applied_to_this_one() -> None:
    held = replica()
    one, other = average(1, 100), average(2, 100)
    stale = held.consider(other)
    apply(held, held.consider(one), one)
    with pytest.raises(StateError):
        apply(held, stale, other)


def test_a_regroup_changes_nothing_but_the_certificate() -> None:
    held = replica()
    before = held.state
    one = average(1, 100)
    root = held.consider(one)
    apply(held, before.root, None)
    assert held.state is before
    assert held.certificates[-1].outcome.kind == Kind.REGROUP
    apply(held, root, one)  # the work was not lost
    assert held.state.root == root


def test_a_state_that_is_being_served_stays_valid_while_the_next_one_is_applied() -> None:
    held = replica(numel=NUMEL)
    old = held.state
    copies = [vector.clone() for vector in old.vectors()]
    served = [bytes(old.leaf(0))]
    one = average(1, NUMEL)
    apply(held, held.consider(one), one)
    served += [bytes(old.leaf(number)) for number in range(1, len(old.shape.leaves))]
    assert tuple(blake3(leaf).digest() for leaf in served) == Fragment.of(copies).digests
    assert held.state.root != old.root


def test_candidates_and_certificates_are_forgotten() -> None:
    held = replica()
    averages = [average(seed, 100) for seed in range(1, 9)]
    roots = [held.consider(one) for one in averages]
    oldest = 8 - KEPT_CANDIDATES
    with pytest.raises(StateError):
        apply(held, roots[oldest - 1], averages[oldest - 1])
    apply(held, roots[oldest], averages[oldest])
    for _ in range(2, KEPT_CERTIFICATES + 9):
        apply(held, held.state.root, None)
    heights = [c.outcome.height for c in held.certificates]
    assert heights == list(range(9, KEPT_CERTIFICATES + 9))


@pytest.mark.parametrize(
    ("codec_name", "numel", "kept"),
    [
        ("fp32", 1000, MIN_KEPT_AVERAGES),  # two would be as much as a state
        ("int8", 4096, 7),  # 4128 bytes each of 32768
        ("int4", 4096, 15),
    ],
)
def test_averages_are_kept_up_to_the_bytes_of_a_state(
    codec_name: str, numel: int, kept: int
) -> None:
    held = replica(numel=numel)
    averages = [average(seed, numel, codec_name) for seed in range(20)]
    for one in averages:
        held.consider(one)
    have = [held.average(one.root) is not None for one in averages]
    fit = 8 * numel // averages[0].nbytes
    count = min(max(MIN_KEPT_AVERAGES, fit), MAX_KEPT_AVERAGES, 20)
    assert have == [False] * (20 - count) + [True] * count
    assert count == kept


def test_installing_needs_the_certificate_of_that_state() -> None:
    held = replica()
    before = held.state
    root = held.consider(one := average(1, 100))
    other = state(7, numel=100)
    with pytest.raises(StateError, match="differ"):
        held.install(other, held.chain)
    assert held.state is before
    first = certificate(NO_DIGEST, kind=Kind.FOUND)
    chain = Chain.begin(first).then(certificate(other.root, after=first))
    held.install(other, chain)
    assert held.state is other
    assert held.chain is chain
    assert tuple(held.certificates) == chain.links  # the newest, and what proves it
    with pytest.raises(StateError):  # it followed from the state before
        apply(held, root, one)


def test_peers_that_apply_the_same_bytes_stay_identical() -> None:
    one, two = replica(), replica()
    for round in range(3):
        step = average(round, 100)
        root = one.consider(step)
        assert two.consider(copy_of(step)) == root
        apply(one, root, step)
        apply(two, root, step)
    assert torch.equal(one.state.theta_N, two.state.theta_N)


def copy_of(one: Average) -> Average:
    return Average(one.codec_name, [dataclasses.replace(chunk) for chunk in one.chunks])


# -- fragments --------------------------------------------------------------------------------

PIECES = 5 * ALIGN_ELEMENTS + 7  # in three fragments of two lengths


def test_a_round_moves_its_fragment_and_no_other() -> None:
    held = replica(PIECES, fragments=3)
    lengths = held.state.shape.lengths
    assert len(set(lengths)) > 1
    for round in range(7):
        before, number = held.state, round % 3
        one = average(round, lengths[number][0])
        root = held.consider(one)
        assert held.state is before
        apply(held, root, one)
        assert held.state.root == root
        for other in {0, 1, 2} - {number}:
            assert held.state.fragments[other] is before.fragments[other]
        # Nesterov, with the momentum of that fragment alone.
        expected = after(before, one, number, round=round)
        assert all(map(torch.equal, held.state.fragments[number].vectors, expected))
        assert not torch.equal(expected[1], before.fragments[number].vectors[1])


def test_each_fragments_momentum_is_what_an_optimizer_of_its_own_would_have() -> None:
    held = replica(PIECES, fragments=3)
    shape = held.state.shape
    alone = [torch.nn.Parameter(f.theta_E.clone()) for f in held.state.fragments]
    momenta = [fragment.vectors[1].clone() for fragment in held.state.fragments]
    config = OPTIMIZER.config
    for round in range(9):
        number = shape.fragment(round)
        one = average(round, shape.averaged(round))
        apply(held, held.consider(one), one)
        delta_E = one.values()
        momenta[number] = config.momentum * momenta[number] + delta_E
        with torch.no_grad():
            alone[number] -= config.lr * (delta_E + config.momentum * momenta[number])
    for fragment, theta_E, momentum_E in zip(held.state.fragments, alone, momenta, strict=True):
        assert torch.allclose(fragment.theta_E, theta_E, atol=1e-5)
        assert torch.allclose(fragment.vectors[1], momentum_E, atol=1e-5)


def test_an_average_of_another_length_is_refused() -> None:
    held = replica(PIECES, fragments=3)
    before = held.state
    lengths = [each[0] for each in before.shape.lengths]
    for wrong in (1, lengths[0] - 1, lengths[0] + 1, lengths[2], PIECES):
        assert wrong != lengths[0]
        with pytest.raises(ValueError, match=f"average of {wrong} elements, not {lengths[0]}"):
            held.consider(average(1, wrong))
    assert held.state is before
    assert held.consider(average(1, lengths[0])) != before.root


def test_a_regroup_does_not_pass_a_fragment_over() -> None:
    held = replica(PIECES, fragments=3)
    apply(held, held.state.root, None)
    one = average(1, held.state.shape.averaged(0))
    before = held.state
    apply(held, held.consider(one), one)
    assert held.state.fragments[0] is not before.fragments[0]
    assert held.state.fragments[1:] == before.fragments[1:]


def test_averages_of_fragments_are_kept_up_to_the_bytes_of_a_state() -> None:
    held = replica(PIECES, fragments=3)
    made = []
    for round in range(24):
        made.append(average(round, held.state.shape.averaged(round), "int8"))
        apply(held, held.consider(made[-1]), made[-1])
    have = [held.average(one.root) is not None for one in made]
    kept = [one.nbytes for one, here in zip(made, have, strict=True) if here]
    assert have == sorted(have)  # the last ones
    assert sum(kept) <= 4 * held.state.shape.elements < sum(kept) + made[-len(kept) - 1].nbytes
