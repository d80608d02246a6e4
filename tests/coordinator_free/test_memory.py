from __future__ import annotations

import gc

import pytest
import torch

from coordinator_free import memory
from coordinator_free.memory import KEPT, SMALLEST, bytes_of, empty_bytes, empty_vector

NUMEL = (SMALLEST // 4) * 3


@pytest.fixture(autouse=True)
def _nothing_free() -> None:
    memory._free.clear()


def free() -> int:
    return sum(len(pieces) for pieces in memory._free.values())


def test_memory_that_nobody_refers_to_is_lent_again() -> None:
    vector_N = empty_vector(NUMEL)
    vector_N.fill_(1.0)
    address = vector_N.data_ptr()
    assert free() == 0
    del vector_N
    assert free() == 1
    assert empty_vector(NUMEL).data_ptr() == address


@pytest.mark.parametrize(
    "view",
    [
        lambda vector_N: vector_N[5:10],
        lambda vector_N: vector_N.view(3, -1)[1],
        lambda vector_N: torch.split(vector_N, [1, len(vector_N) - 1]),
        lambda vector_N: vector_N.numpy()[7:],
        lambda vector_N: bytes_of(vector_N[:100]),
        lambda vector_N: bytes_of(vector_N)[4:8],
    ],
)
def test_every_view_keeps_its_memory(view: object) -> None:
    vector_N = empty_vector(NUMEL)
    kept = view(vector_N)  # type: ignore[operator]
    del vector_N
    gc.collect()
    assert free() == 0
    other_N = empty_vector(NUMEL)  # would be the same memory
    other_N.fill_(3.0)
    del other_N
    assert free() == 1
    del kept
    assert free() == 2


def test_bytes_of_a_part_keep_the_whole() -> None:
    part = empty_bytes(SMALLEST)[10:20]
    assert free() == 0
    part[:] = b"0123456789"
    assert bytes(empty_bytes(SMALLEST)[10:20]) != b"0123456789"
    assert bytes(part) == b"0123456789"


def test_what_is_kept_is_bounded() -> None:
    lent = [empty_vector(NUMEL) for _ in range(KEPT + 3)]
    assert len({vector_N.data_ptr() for vector_N in lent}) == KEPT + 3
    lent.clear()
    assert free() == KEPT


def test_little_memory_is_not_worth_it() -> None:
    del (vector_N := [empty_vector(100)])[:]
    assert vector_N == []
    assert free() == 0


def test_more_than_there_can_be_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="are not to be had"):
        empty_vector(1 << 55)


def test_lengths_are_what_was_asked_for() -> None:
    for numel in (0, 1, NUMEL - 1, NUMEL, NUMEL + 1):
        assert len(empty_vector(numel)) == numel
        assert len(empty_bytes(4 * numel)) == 4 * numel
        assert empty_vector(numel).dtype == torch.float32
