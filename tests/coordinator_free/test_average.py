from __future__ import annotations

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
    chunk_places,
    contributor_bits,
)
from coordinator_free.codecs import codec
from coordinator_free.messages import NO_DIGEST, Contribution, Plan, Slice
from coordinator_free.wire import tree_root
from dht.errors import ConfigError

NUMEL = 1000
SLICES = (Slice(reducer="a", start=0, stop=600), Slice(reducer="b", start=600, stop=NUMEL))


def average(name: str = "fp32", seed: int = 0) -> Average:
    values_N = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    chunks, start = [], 0
    for number, index, elements in chunk_places(SLICES, 256):
        payload = codec(name).encode(values_N[start : start + elements])
        chunks.append(Chunk(number, index, elements, b"\x03", bytes(payload)))
        start += elements
    return Average(name, chunks)


def plan(count: int) -> Plan:
    names = tuple(f"p{number}" for number in range(count))
    return Plan(
        height=0,
        round=0,
        ballot=0,
        previous=NO_DIGEST,
        receivers=names,
        contributions=tuple(Contribution(peer_id=name, samples=1) for name in names),
        slices=(Slice(reducer="p0", start=0, stop=9),),
        chunk_elements=9,
        codec="fp32",
        exchange_s=1.0,
    )


def read(frames: list[bytes], numel: int = NUMEL) -> AverageReader:
    reader = AverageReader(numel)
    for frame in frames:
        reader.add(frame)
    return reader


def test_chunks_are_listed_in_the_order_of_the_vector() -> None:
    assert list(chunk_places(SLICES, 256)) == [
        (0, 0, 256),
        (0, 1, 256),
        (0, 2, 88),
        (1, 0, 256),
        (1, 1, 144),
    ]


def test_the_root_is_what_the_protocol_says() -> None:
    one = average("int4")
    leaves = [blake3(b"shoal average v1\0int4").digest()]
    for chunk in one.chunks:
        text = struct.pack(">IIQI", chunk.slice, chunk.index, chunk.elements, 1) + b"\x03"
        leaves.append(blake3(b"shoal chunk v1\0" + text + chunk.payload).digest())
    assert one.root == tree_root(leaves)


def test_a_digest_changes_with_everything_in_a_chunk() -> None:
    chunks = [
        Chunk(0, 1, 2, b"\x01", b"\0\0\0\0"),
        Chunk(1, 1, 2, b"\x01", b"\0\0\0\0"),
        Chunk(0, 2, 2, b"\x01", b"\0\0\0\0"),
        Chunk(0, 1, 3, b"\x01", b"\0\0\0\0"),
        Chunk(0, 1, 2, b"\x02", b"\0\0\0\0"),
        Chunk(0, 1, 2, b"\x01", b"\0\0\0\1"),
        Chunk(0, 1, 2, b"\x01\0", b"\0\0\0"),  # the same bytes, cut elsewhere
    ]
    assert len({chunk.digest() for chunk in chunks}) == len(chunks)


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
    with pytest.raises(ValueError, match="another root"):
        read(swapped).finish(sent.root)


def test_a_reader_holds_no_more_than_the_vector() -> None:
    frames = list(average().frames())
    with pytest.raises(ValueError, match="add up"):
        read([*frames, frames[-1]])
    with pytest.raises(ValueError, match="add up"):
        read([frames[0], Chunk(0, 0, 0, b"", b"").frame()])
    # Payloads are decoded at the end: until then only their length can give them away.
    with pytest.raises(ValueError, match="over-long"):
        read([frames[0], Chunk(0, 0, 1, b"\x01", bytes(8 << 20)).frame()])


def test_unsound_payloads_and_codecs_are_refused() -> None:
    sent = average()
    with pytest.raises(ValueError, match="not finite"):
        Average("fp32", [Chunk(0, 0, 1, b"\x01", struct.pack("<f", float("nan")))])
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
