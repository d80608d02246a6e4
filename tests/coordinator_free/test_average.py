from __future__ import annotations

import itertools
import struct

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free.average import (
    Average,
    AverageReader,
    Chunk,
    check_bits,
    contributor_bits,
    contributors,
    spans_of,
)
from coordinator_free.codecs import codec
from coordinator_free.messages import NO_DIGEST, Contribution, Plan, Slice
from coordinator_free.partition import chunk_span
from coordinator_free.wire import tree_root
from dht.errors import ConfigError

NUMEL = 16_000
CHUNK = 4096


def average(name: str = "fp32", seed: int = 0) -> Average:
    values_N = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    chunks = []
    for index in range(-(-NUMEL // CHUNK)):
        start, stop = chunk_span(index, CHUNK, NUMEL)
        payload = codec(name).encode(values_N[start:stop])
        chunks.append(Chunk(index, stop - start, b"\x03", bytes(payload)))
    return Average(name, chunks)


def plan(count: int) -> Plan:
    names = tuple(f"p{number}" for number in range(count))
    return Plan(
        height=0,
        round=0,
        ballot=0,
        attempt=0,
        previous=NO_DIGEST,
        base=NO_DIGEST,
        receivers=names,
        contributions=tuple(Contribution(peer_id=name, samples=1) for name in names),
        slices=(Slice(reducer="p0", start=0, stop=1),),
        kept=(),
        numel=9,
        chunk_elements=9,
        codec="fp32",
        exchange_s=1.0,
        stall_s=1.0,
    )


def read(frames: list[bytes], numel: int = NUMEL) -> AverageReader:
    reader = AverageReader(numel)
    for frame in frames:
        reader.add(frame)
    return reader


def test_the_root_is_what_the_protocol_says() -> None:
    one = average("int4")
    leaves = [blake3(b"shoal average v1\0int4").digest()]
    for chunk in one.chunks:
        text = struct.pack(">IQI", chunk.index, chunk.elements, 1) + b"\x03"
        leaves.append(blake3(b"shoal chunk v1\0" + text + chunk.payload).digest())
    assert one.root == tree_root(leaves)


def test_a_digest_changes_with_everything_in_a_chunk() -> None:
    chunks = [
        Chunk(1, 2, b"\x01", b"\0\0\0\0"),
        Chunk(2, 2, b"\x01", b"\0\0\0\0"),
        Chunk(1, 3, b"\x01", b"\0\0\0\0"),
        Chunk(1, 2, b"\x02", b"\0\0\0\0"),
        Chunk(1, 2, b"\x01", b"\0\0\0\1"),
        Chunk(1, 2, b"\x01\0", b"\0\0\0"),  # the same bytes, cut elsewhere
    ]
    assert len({chunk.digest for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
def test_a_fetched_average_is_the_same_one(name: str) -> None:
    sent = average(name)
    got = read(list(sent.frames())).finish(sent.root)
    assert got.root == sent.root
    assert got.codec_name == name
    assert got.numel == NUMEL
    assert torch.equal(got.values(), sent.values())


def test_an_average_decodes_every_chunk_into_its_place() -> None:
    values_N = torch.randn(NUMEL, generator=torch.Generator().manual_seed(5))
    assert torch.equal(average(seed=5).values(), values_N)


def test_another_or_an_incomplete_average_is_refused() -> None:
    sent = average()
    frames = list(sent.frames())
    with pytest.raises(ValueError, match="another root"):
        read(frames).finish(average(seed=1).root)
    for count in range(len(frames)):
        with pytest.raises(ValueError, match="incomplete"):
            read(frames[:count]).finish(sent.root)
    swapped = [*frames[:1], frames[2], frames[1], *frames[3:]]
    with pytest.raises(ValueError, match="add up"):
        read(swapped)


def test_a_reader_holds_no_more_than_the_vector() -> None:
    frames = list(average().frames())
    with pytest.raises(ValueError, match="add up"):
        read([*frames, frames[-1]])
    with pytest.raises(ValueError, match="add up"):
        read([frames[0], Chunk(0, 0, b"", b"").frame()])
    # Payloads are decoded at the end: until then only their length can give them away.
    with pytest.raises(ValueError, match="over-long"):
        read([frames[0], Chunk(0, 1, b"\x01", bytes(8 << 20)).frame()])


def test_unsound_payloads_and_codecs_are_refused() -> None:
    sent = average()
    with pytest.raises(ValueError, match="not finite"):
        Average("fp32", [Chunk(0, 1, b"\x01", struct.pack("<f", float("nan")))])
    with pytest.raises(ValueError, match="bytes are not"):
        Average("bf16", sent.chunks)
    with pytest.raises(ConfigError):
        Average("zip", sent.chunks)
    for garbage in (b"", b"\xff" * 9):
        with pytest.raises(ValueError, match="frame"):
            AverageReader(NUMEL).add(garbage)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_bitmaps_name_who_is_in_a_mean(count: int, data: st.DataObject) -> None:
    names = [f"p{number}" for number in range(count)]
    present = data.draw(st.sets(st.sampled_from(names), min_size=1))
    bits = contributor_bits(plan(count), present)
    check_bits(plan(count), bits)
    named = {name for number, name in enumerate(names) if bits[number // 8] >> number % 8 & 1}
    assert named == present


@pytest.mark.parametrize(
    ("count", "bits"),
    [(3, b""), (3, b"\0"), (3, b"\x08"), (3, b"\x01\0"), (8, b"\xff\0"), (9, b"\xff\x02")],
)
def test_bitmaps_of_nobody_or_of_strangers_are_refused(count: int, bits: bytes) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        check_bits(plan(count), bits)


def test_who_is_in_a_chunk_is_told_by_the_outcome_though_the_plan_named_others() -> None:
    payload = bytes(4)
    # The plan named a, b, c and d; b is in no chunk, so the outcome does not name it.
    chunks = [Chunk(0, 1, b"\x0d", payload), Chunk(1, 1, b"\x08", payload)]
    a, c, d = (Contribution(peer_id=name, samples=1) for name in "acd")
    made = Average("fp32", chunks)
    assert contributors(made, (a, c, d)) == [(a, c, d), (d,)]
    with pytest.raises(ValueError, match="3 contributors are averaged, 2 are named"):
        contributors(made, (a, c))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 7)), min_size=1, max_size=12))
def test_spans_are_where_the_chunks_of_a_contributor_are(chunks: list[tuple[int, int]]) -> None:
    """Adjacent ones are one; the bitmaps may name anybody, but somebody."""
    made = Average(
        "fp32",
        [
            Chunk(n, length, bytes([who]), bytes(4 * length))
            for n, (length, who) in enumerate(chunks)
        ],
    )
    there = [bit for bit in range(3) if any(who >> bit & 1 for _, who in chunks)]
    named = tuple(Contribution(peer_id="abc"[bit], samples=1) for bit in there)
    for bit, name in enumerate("abc"):
        spans = spans_of(name, made, named)
        inside = [who >> bit & 1 for length, who in chunks for _ in range(length)]
        assert [n for span in spans for n in range(*span)] == [n for n, i in enumerate(inside) if i]
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert spans_of("nobody", made, named) == ()
    with pytest.raises(ValueError, match="are named"):
        spans_of("a", made, (*named, Contribution(peer_id="d", samples=1)))
