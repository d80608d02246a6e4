"""What names a state, how it is cut, and what states share."""

from __future__ import annotations

import itertools

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator_free import state as states
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.state import LEAF_ELEMENTS, Fragment, Leaf, Shape, State
from coordinator_free.wire import tree_root

NESTEROV = OuterOptimizer(OuterConfig())
SGD = OuterOptimizer(OuterConfig(kind="sgd"))
LAYOUT = "layout"
LAYOUT_LEAF = blake3(b"shoal layout v1\0layout").digest()
SMALL = 10  # elements of a leaf, where it is made small


def uneven(*lengths: int, layout: str = LAYOUT, optimizer: OuterOptimizer = NESTEROV) -> Shape:
    """Fragments of these lengths, which need not be aligned."""
    cuts = itertools.accumulate(lengths, initial=0)
    return Shape(layout, tuple(itertools.pairwise(cuts)), tuple(map(optimizer.lengths, lengths)))


def vectors(shape: Shape, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, generator=generator) for n in each] for each in shape.lengths]


def raw(vector: Tensor) -> bytes:
    return vector.numpy().tobytes()


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "LEAF_ELEMENTS", SMALL)


# -- the root ---------------------------------------------------------------------------------


def test_the_root_is_what_the_protocol_says() -> None:
    shape = Shape.of(LAYOUT, LEAF_ELEMENTS + 10, 1, NESTEROV)  # two leaves a vector
    held = State.of(shape, vectors(shape))
    mebibyte = 1 << 20
    leaves = [LAYOUT_LEAF]
    for text in map(raw, held.vectors()):
        leaves += [blake3(text[:mebibyte]).digest(), blake3(text[mebibyte:]).digest()]
    assert len(leaves) == 5
    assert held.root == tree_root(leaves)


@pytest.mark.usefixtures("small_leaves")
@pytest.mark.parametrize("optimizer", [NESTEROV, SGD], ids=["nesterov", "sgd"])
def test_leaves_go_fragment_by_fragment_and_vector_by_vector(optimizer: OuterOptimizer) -> None:
    shape = uneven(25, 7, 30, optimizer=optimizer)
    made = vectors(shape)
    held = State.of(shape, made)
    expected = [
        raw(vector)[start : start + 4 * SMALL]
        for each in made
        for vector in each
        for start in range(0, 4 * len(vector), 4 * SMALL)
    ]
    assert [bytes(held.leaf(number)) for number in range(len(shape.leaves))] == expected
    assert held.digests == [blake3(leaf).digest() for leaf in expected]
    assert held.root == tree_root([LAYOUT_LEAF, *held.digests]) == shape.root(held.digests)
    fourth = Leaf(0, 1, 0, 40) if optimizer is NESTEROV else Leaf(1, 0, 0, 28)
    three = (Leaf(0, 0, 0, 40), Leaf(0, 0, 40, 80), Leaf(0, 0, 80, 100))
    assert shape.leaves[:4] == (*three, fourth)
    for outside in (-1, len(shape.leaves)):
        with pytest.raises(IndexError, match="no leaf"):
            held.leaf(outside)


@pytest.mark.parametrize("numel", [1, LEAF_ELEMENTS, LEAF_ELEMENTS + 10])
def test_leaves_put_together_are_the_state(numel: int) -> None:
    shape = Shape.of(LAYOUT, numel, 1, NESTEROV)
    held = State.of(shape, vectors(shape))
    leaves = [bytes(held.leaf(number)) for number in range(len(shape.leaves))]
    assert [len(leaf) for leaf in leaves] == [leaf.stop - leaf.start for leaf in shape.leaves]
    assert b"".join(leaves) == b"".join(map(raw, held.vectors()))
    assert held.digests == [blake3(leaf).digest() for leaf in leaves]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_element_the_layout_and_the_cut_are_in_the_root(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    shape = uneven(*lengths)
    made = vectors(shape)
    held = State.of(shape, made)
    assert State.of(shape, [[v.clone() for v in each] for each in made]).root == held.root
    assert State.of(uneven(*lengths, layout=LAYOUT + "x"), made).root != held.root
    number = data.draw(st.integers(0, len(lengths) - 1))
    which = data.draw(st.integers(0, 1))
    at = data.draw(st.integers(0, lengths[number] - 1))
    changed = [vector.clone() for vector in made[number]]
    changed[which][at] = -changed[which][at] - 0.5
    assert held.then(number, Fragment.of(changed)).root != held.root
    # Each vector is a leaf of its own here, so their places are in the root as well.
    swapped = Fragment.of([*reversed(made[number])])
    assert held.then(number, swapped).root != held.root
    if len(lengths) > 1:
        parts = [torch.cat([each[n] for each in made]) for n in (0, 1)]
        assert State.of(uneven(sum(lengths)), [parts]).root != held.root


# -- fragments --------------------------------------------------------------------------------


def test_a_run_is_founded_with_its_parameters_and_moments_of_zero() -> None:
    numel = 5 * ALIGN_ELEMENTS + 3
    shape = Shape.of(LAYOUT, numel, 4, NESTEROV)
    theta_N = torch.randn(numel)
    held = State.begin(shape, theta_N.clone())
    assert torch.equal(held.theta_N, theta_N)
    assert shape.numel == numel
    assert shape.elements == 2 * numel
    for fragment, (start, stop) in zip(held.fragments, shape.bounds, strict=True):
        assert torch.equal(fragment.theta_E, theta_N[start:stop])
        assert fragment.vectors[1].count_nonzero() == 0
        assert len(fragment.vectors[1]) == stop - start
    whole = State.begin(Shape.of(LAYOUT, numel, 1, NESTEROV), theta_N.clone())
    assert torch.equal(whole.theta_N, theta_N)
    assert whole.root != held.root


def test_the_parameters_of_all_fragments_are_put_together_in_order() -> None:
    shape = uneven(3, 1, 2)
    made = [[torch.tensor(part), torch.zeros(len(part))] for part in ([1.0, 2, 3], [4.0], [5.0, 6])]
    assert State.of(shape, made).theta_N.tolist() == [1, 2, 3, 4, 5, 6]


def test_the_next_state_shares_all_fragments_but_one() -> None:
    shape = uneven(3, 5, 4)
    first = State.of(shape, vectors(shape))
    root, text = first.root, [raw(vector) for vector in first.vectors()]
    for number in range(3):
        fragment = Fragment.of(vectors(shape, seed=1)[number])
        second = first.then(number, fragment)
        assert second.shape is first.shape
        assert second.fragments[number] is fragment
        for other in {0, 1, 2} - {number}:
            assert second.fragments[other] is first.fragments[other]
        # It is named by what it holds, however it came about.
        whole = State.of(shape, [fragment.vectors for fragment in second.fragments])
        assert second.root == whole.root != root
    assert first.root == root
    assert [raw(vector) for vector in first.vectors()] == text


def test_rounds_take_the_fragments_in_turn() -> None:
    shape = uneven(3, 5, 4)
    assert [shape.fragment(round) for round in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [shape.averaged(round) for round in range(4)] == [3, 5, 4, 3]


def test_memory_for_a_state_has_its_shape() -> None:
    shape = uneven(3, 5, 4)
    assert tuple(tuple(map(len, each)) for each in shape.empty()) == shape.lengths
    assert Shape.of(LAYOUT, 10, 3, SGD).lengths == ((10,),)  # too short for more than one


@settings(deadline=None)
@given(st.integers(1, 40 * ALIGN_ELEMENTS), st.integers(1, 64))
def test_a_shape_is_cut_as_the_parameters_are(numel: int, fragments: int) -> None:
    shape = Shape.of(LAYOUT, numel, fragments, NESTEROV)
    assert shape.numel == numel
    assert shape.lengths == tuple((stop - start,) * 2 for start, stop in shape.bounds)
    assert len(shape.bounds) == min(fragments, -(-numel // ALIGN_ELEMENTS))
    assert shape == Shape.of(LAYOUT, numel, fragments, NESTEROV)
    assert shape != Shape.of(LAYOUT, numel, fragments, SGD)
