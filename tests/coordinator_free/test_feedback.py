from __future__ import annotations

import torch

from coordinator_free.average import Average, Chunk
from coordinator_free.codecs import codec
from coordinator_free.feedback import Feedback

ELEMENTS = 1024


def chunk(index: int, seed: int = 0) -> Chunk:
    values_E = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(100 * seed + index))
    return Chunk(index, ELEMENTS, b"\x01", codec("int2").encode(values_E))


def residual(value: float) -> torch.Tensor:
    return torch.full((ELEMENTS,), value)


def test_what_was_committed_comes_back_and_only_there() -> None:
    feedback, chunks = Feedback(), [chunk(0), chunk(1), chunk(2)]
    feedback.keep(0, ELEMENTS, chunks[1], residual(0.5))
    before_E = torch.zeros(ELEMENTS)
    feedback.add(0, ELEMENTS, before_E)
    assert not before_E.any(), "nothing counts before the commit"
    feedback.commit(0, Average("int2", chunks))
    for start, expected in ((0, 0.0), (ELEMENTS, 0.5), (2 * ELEMENTS, 0.0)):
        sum_E = torch.zeros(ELEMENTS)
        feedback.add(0, start, sum_E)
        assert torch.equal(sum_E, residual(expected))


def test_a_span_cut_otherwise_gets_what_overlaps() -> None:
    feedback, chunks = Feedback(), [chunk(0), chunk(1)]
    feedback.keep(0, 0, chunks[0], residual(1.0))
    feedback.keep(0, ELEMENTS, chunks[1], residual(2.0))
    feedback.commit(0, Average("int2", chunks))
    sum_E = torch.zeros(ELEMENTS)
    feedback.add(0, 300, sum_E)
    assert torch.equal(sum_E[: ELEMENTS - 300], torch.ones(ELEMENTS - 300))
    assert torch.equal(sum_E[ELEMENTS - 300 :], torch.full((300,), 2.0))


def test_a_chunk_that_others_averaged_in_the_end_leaves_nothing() -> None:
    feedback, mine, theirs = Feedback(), chunk(0, seed=1), chunk(0, seed=2)
    feedback.keep(0, 0, mine, residual(1.0))
    feedback.commit(0, Average("int2", [theirs]))
    sum_E = torch.zeros(ELEMENTS)
    feedback.add(0, 0, sum_E)
    assert not sum_E.any()


def test_fragments_have_their_own_and_each_commit_replaces_the_last() -> None:
    feedback = Feedback()
    feedback.keep(0, 0, chunk(0, seed=1), residual(1.0))
    feedback.commit(0, Average("int2", [chunk(0, seed=1)]))
    feedback.keep(1, 0, chunk(0, seed=2), residual(2.0))
    feedback.commit(1, Average("int2", [chunk(0, seed=2)]))
    sums = [torch.zeros(ELEMENTS), torch.zeros(ELEMENTS)]
    for fragment, sum_E in enumerate(sums):
        feedback.add(fragment, 0, sum_E)
    assert [float(sum_E[0]) for sum_E in sums] == [1.0, 2.0]
    feedback.commit(0, Average("int2", [chunk(0, seed=3)]))  # somebody else reduced it
    sum_E = torch.zeros(ELEMENTS)
    feedback.add(0, 0, sum_E)
    assert not sum_E.any()
    feedback.clear()
    feedback.add(1, 0, sum_E)
    assert not sum_E.any()


def test_means_over_rounds_approach_the_truth() -> None:
    """The law of error feedback: what is sent in k rounds sums up to k times the truth."""
    truth_E = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(3))
    feedback, sent_E, errors = Feedback(), torch.zeros(ELEMENTS), {}
    for number in range(1, 201):
        sum_E = truth_E.clone()
        feedback.add(0, 0, sum_E)
        payload = codec("int4").encode(sum_E)
        one = Chunk(0, ELEMENTS, b"\x01", payload)
        sent_E += codec("int4").decode(payload, ELEMENTS)
        codec("int4").decode_add(payload, ELEMENTS, -1.0, sum_E)
        feedback.keep(0, 0, one, sum_E)
        feedback.commit(0, Average("int4", [one]))
        errors[number] = float((sent_E / number - truth_E).norm() / truth_E.norm())
    assert errors[50] < errors[1] / 3
    assert errors[200] < errors[50] / 3  # it falls with the number of rounds
