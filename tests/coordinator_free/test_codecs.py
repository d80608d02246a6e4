from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coordinator_free import kernels
from coordinator_free.codecs import (
    BLOCK,
    MAX_MAGNITUDE,
    PAGE,
    SEGMENT,
    TINY,
    Codec,
    NonFinite,
    SparseCodec,
    codec,
    mean_of_sent,
    prepare,
    sparse_codec,
)
from dht.errors import ConfigError

SPARSE = ["top64", "top128"]
NAMES = ["fp32", "bf16", "int8", "int4", "int2", "int1", *SPARSE]
QUANTISED = ["int8", "int4", "int2", "int1"]
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "int2": 2, "int1": 1}
ONE_IN = {"top64": 64, "top128": 32}
LENGTHS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 127, 128, 129, 130, 131]
LENGTHS += [253, 254, 255, 256, 257, 258, 259, 260, 383, 511, 512, 513, 2 * BLOCK + 129]
LENGTHS += [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 97]
REFUSAL = "bytes are not|not finite|scale is|padding"
Q_MAX = {"int8": 127, "int4": 7}
FEEDBACK = {
    "int2": 10,
    "int1": 20,
    "top64": 40,
    "top128": 25,
}  # what is kept is at most so many times what is to be sent

GOLDEN_DIGESTS = {
    "fp32": "78c6ebdc7b94b5ba",
    "bf16": "35257c4de5989ee3",
    "int8": "1ac964c223c4fefb",
    "int4": "5f11a789bd4ee035",
    "int2": "78e658a14d0525d1",
    "int1": "c14336ee143bba2c",
    "top64": "11c37b299565fce2",
    "top128": "54b3f76120ca6135",
}

finite = st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE, width=32, allow_nan=False)
vectors = st.one_of(
    hnp.arrays(np.float32, st.integers(0, 3 * BLOCK + 5), elements=finite),
    hnp.arrays(
        np.float32,
        st.integers(0, 3 * BLOCK + 5),
        elements=st.floats(-1, 1, width=32),
        fill=st.just(0.5),
    ),
)


@pytest.fixture(params=["numba", "torch"], scope="module", autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of this file runs on both."""
    with contextlib.ExitStack() as stack:
        if request.param == "torch":
            stack.enter_context(kernels.torch_only())
        elif not kernels.compiled():
            pytest.skip("numba is not installed")
        yield request.param


@pytest.fixture(params=NAMES)
def any_codec(request: pytest.FixtureRequest) -> Codec:
    return codec(request.param)


def bound(name: str, values: np.ndarray) -> np.ndarray:
    """The documented error bound of each element."""
    magnitude = np.abs(values.astype(np.float64))
    if name == "fp32":
        return np.zeros_like(magnitude)
    if name == "bf16":
        return magnitude * 2.0**-8 + TINY
    return 0.505 * per_block(np.max, magnitude) / Q_MAX[name] + TINY * Q_MAX[name]


def per_block(summary: Callable[[np.ndarray], float], values: np.ndarray) -> np.ndarray:
    """A number for each block, repeated for each of its elements."""
    blocks = np.split(values, range(BLOCK, len(values), BLOCK)) if len(values) else []
    return np.concatenate([np.full(len(b), summary(b)) for b in blocks] or [np.zeros(0)])


def sent_scales(payload: memoryview, n: int, block: int = BLOCK) -> np.ndarray:
    """The scale of each element, in float64."""
    blocks = -(-n // block)
    bits = np.frombuffer(payload, np.uint16, blocks).astype(np.uint32) << 16
    return np.repeat(bits.view(np.float32).astype(np.float64), block)[:n]


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4"])
@given(values=vectors)
@settings(deadline=None)
def test_decoding_what_was_encoded_stays_within_the_documented_bound(
    name: str, values: np.ndarray
) -> None:
    c = codec(name)
    payload = c.encode(torch.from_numpy(values))
    assert payload.nbytes == c.encoded_bytes(len(values))
    c.validate(payload, len(values))
    decoded = c.decode(payload, len(values)).numpy()
    assert np.isfinite(decoded).all()
    assert (np.abs(decoded.astype(np.float64) - values) <= bound(name, values)).all()


@pytest.mark.parametrize("name", ["int2", "int1"])
@given(values=vectors)
@settings(deadline=None)
def test_the_nearest_level_is_taken_of_a_scale_that_follows_the_blocks_mean(
    name: str, values: np.ndarray
) -> None:
    n = len(values)
    payload = codec(name).encode(torch.from_numpy(values))
    assert payload.nbytes == codec(name).encoded_bytes(n)
    codec(name).validate(payload, n)
    decoded = codec(name).decode(payload, n).numpy().astype(np.float64)
    scale = sent_scales(payload, n)
    magnitude = np.abs(values.astype(np.float64))
    # Exactly: each level is a float32, and so the nearest one is compared for without an error.
    if name == "int2":
        assert (np.abs(decoded - values) <= np.maximum(scale / 2, magnitude - 1.5 * scale)).all()
    else:
        assert (np.abs(decoded - values) == np.abs(scale - magnitude)).all()
    factor, top = (1.5, 1.5) if name == "int2" else (1.0, 1.0)
    mean = per_block(np.mean, magnitude)
    ideal = np.minimum(factor * mean, MAX_MAGNITUDE / top)
    # bfloat16's rounding, and nine of float32; then what was too small to count.
    assert (np.abs(scale - ideal) <= ideal * (2.0**-8 + 2.0**-20) + 1.5 * 2.0**-110).all()


@pytest.mark.parametrize("name", NAMES)
@given(payload=st.binary(max_size=700), n=st.integers(0, 600), exact=st.booleans())
@settings(deadline=None)
def test_arbitrary_bytes_decode_to_finite_numbers_or_are_a_value_error(
    name: str, payload: bytes, n: int, exact: bool
) -> None:
    c = codec(name)
    if exact:  # the right length, so that the contents are looked at
        payload = (payload * (c.encoded_bytes(n) // max(1, len(payload)) + 1))[: c.encoded_bytes(n)]
    into = torch.zeros(n)
    try:
        decoded = c.decode(payload, n)
    except ValueError:
        with pytest.raises(ValueError, match=REFUSAL):
            c.validate(payload, n)
        with pytest.raises(ValueError, match=REFUSAL):
            c.decode_add(payload, n, 1.0, into)
    else:
        assert decoded.shape == (n,)
        assert torch.isfinite(decoded).all()
        c.decode_add(payload, n, 1.0, into)
        assert torch.equal(into, decoded)


def test_every_wrong_length_is_refused(any_codec: Codec) -> None:
    payload = bytes(any_codec.encode(torch.ones(BLOCK + 3)))
    for mangled in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(ValueError, match="are not 259 elements"):
            any_codec.decode(mangled, BLOCK + 3)
    with pytest.raises(ValueError, match="are not -1 elements"):
        any_codec.decode(b"", -1)


@pytest.mark.parametrize(
    "wild", [math.nan, math.inf, -math.inf, 3e38, -3e38], ids=["nan", "inf", "-inf", "big", "-big"]
)
def test_what_is_not_finite_is_never_encoded(any_codec: Codec, wild: float) -> None:
    for n in (1, 3, BLOCK, 2 * BLOCK + 5):
        for place in {*range(0, n, 1 + n // 50), n - 1}:
            values = torch.linspace(-1, 1, n)
            values[place] = wild
            with pytest.raises(NonFinite):
                any_codec.encode(values)
    for place in (0, SEGMENT - 1, SEGMENT, SEGMENT + 7, SEGMENT + BLOCK + 2):
        values = torch.ones(SEGMENT + BLOCK + 3)
        values[place] = wild
        with pytest.raises(NonFinite):
            any_codec.encode(values)


def refused(name: str, payload: bytes, n: int, match: str) -> None:
    """By each of the three that look at payloads."""
    c = codec(name)
    with pytest.raises(ValueError, match=match):
        c.validate(payload, n)
    with pytest.raises(ValueError, match=match):
        c.decode(payload, n)
    with pytest.raises(ValueError, match=match):
        c.decode_add(payload, n, 0.5, torch.zeros(n))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFC0, 0x7F01, 0xFF7F], ids=hex)
def test_a_wild_bf16_payload_is_refused(bits: int) -> None:
    n = 131
    for place in range(n):
        halves = np.full(n, 0xBF80, np.uint16)
        halves[place] = bits
        refused("bf16", halves.tobytes(), n, "not finite")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_a_wild_fp32_payload_is_refused(value: float) -> None:
    n = 131
    for place in range(n):
        values = np.ones(n, np.float32)
        values[place] = value
        refused("fp32", values.tobytes(), n, "not finite")


@pytest.mark.parametrize("name", [*QUANTISED, *SPARSE])
@pytest.mark.parametrize(
    "bits", [0x7F80, 0x7FC0, 0xFFC0, 0xBF80, 0x8000, 0x7F01, 0x0001, 0x037F], ids=hex
)
def test_a_wild_scale_is_refused_in_any_block(name: str, bits: int) -> None:
    n = 2 * codec(name).block + 1
    for block in range(3):
        payload = np.frombuffer(bytes(codec(name).encode(torch.ones(n))), np.uint8).copy()
        payload[: 2 * 3].view(np.uint16)[block] = bits
        refused(name, payload.tobytes(), n, "scale")


@pytest.mark.parametrize("name", [*QUANTISED, *SPARSE])
def test_the_largest_scale_that_is_sent_is_the_largest_accepted(name: str) -> None:
    values = torch.full((BLOCK,), MAX_MAGNITUDE)
    payload = np.frombuffer(bytes(codec(name).encode(values)), np.uint8).copy()
    codec(name).validate(payload.data, BLOCK)
    payload[:2].view(np.uint16)[0] += 1
    refused(name, payload.tobytes(), BLOCK, "scale")


@pytest.mark.parametrize("name", ["int4", "int2", "int1"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 255, BLOCK + 1, BLOCK + 3, 2 * BLOCK - 2])
def test_padding_is_zero_and_must_be(name: str, n: int) -> None:
    """Every bit of the last block either shows in what is decoded, or must be zero."""
    c = codec(name)
    sound = bytes(c.encode(torch.linspace(-1, 1, n)))
    whole = c.decode(sound, n)
    rest = n % BLOCK
    height = -(-rest * BITS[name] // 8)
    padding = 0
    for bit in range(8 * height):
        mangled = bytearray(sound)
        mangled[len(sound) - height + bit // 8] ^= 1 << bit % 8
        try:
            c.validate(mangled, n)
        except ValueError:
            refused(name, bytes(mangled), n, "padding")
            padding += 1
        else:
            assert (c.decode(mangled, n) != whole).sum() == 1
    assert padding == 8 * height - BITS[name] * rest


@pytest.mark.parametrize("n", LENGTHS)
def test_any_length_in_memory_of_any_alignment_between_bytes_left_alone(
    any_codec: Codec, n: int
) -> None:
    values = torch.randn(n, generator=torch.manual_seed(n))
    size = any_codec.encoded_bytes(n)
    alone = bytes(any_codec.encode(values))
    assert len(alone) == size
    reference = any_codec.decode(alone, n)
    weighted = reference.numpy() * np.float32(0.3)
    for offset in range(1, 9):
        message = bytearray(b"\xaa" * (offset + size + 9))
        written = any_codec.encode(values, memoryview(message)[offset : offset + size])
        assert bytes(written) == alone
        assert bytes(message[offset : offset + size]) == alone
        assert set(message[:offset] + message[offset + size :]) == {0xAA}
        payload = memoryview(bytes(message))[offset : offset + size]
        any_codec.validate(payload, n)
        assert torch.equal(any_codec.decode(payload, n), reference)
        memory = torch.full((n + 8,), 7.0)
        into = memory[offset - 1 : offset - 1 + n]
        assert any_codec.decode(payload, n, into) is into
        assert torch.equal(into, reference)
        any_codec.decode(payload, n, into, 0.3)
        assert into.numpy().tobytes() == weighted.tobytes()
        any_codec.decode_add(payload, n, 0.3, into)
        assert into.numpy().tobytes() == (weighted + weighted).tobytes()
        assert (memory[: offset - 1] == 7).all()
        assert (memory[offset - 1 + n :] == 7).all()


def test_largest_and_tiniest_numbers_survive(any_codec: Codec) -> None:
    for value in (MAX_MAGNITUDE, -MAX_MAGNITUDE, 1e-45, -1e-38, 0.0, -0.0):
        values = torch.full((BLOCK + 1,), value)
        decoded = any_codec.decode(any_codec.encode(values), len(values))
        assert torch.isfinite(decoded).all()
        if any_codec.sparse:  # the first ones, as all are as large
            values[-(-len(values) // ONE_IN[any_codec.name]) :] = 0
        rtol = 0.51 if any_codec.name in ("int2", *SPARSE) else 0.01
        torch.testing.assert_close(decoded, values, rtol=rtol, atol=TINY * 128)


def test_golden_bytes() -> None:
    """The wire must not change unnoticed: peers of two versions would average garbage."""
    values = torch.tensor([1.0, -0.5, 0.25, 3.0e-3, -1.75], dtype=torch.float32)
    golden = {
        "fp32": "0000803f000000bf0000803ea69b443b0000e0bf",
        "bf16": "803f00bf803e453be0bf",
        # 1.75 / 127 = 0.013780 rounds up to 0.013794 = 0x3c62
        "int8": "623c48dc120081",
        # 1.75 / 7 = 0.25 = 0x3e80; 4 -2 1 0 -7, of which 4 and 0, -2 and -7 share a byte
        "int4": "803e8c1609",
        # 1.5 * mean = 1.0509 rounds to 1.0546875 = 0x3f87; 2 1 2 2 0: 2, 2, 0 and 1, 2
        "int2": "873f0a09",
        # mean = 0.7006 rounds to 0.69921875 = 0x3f33; signs 1 0 1 1 0
        "int1": "333f0d",
        # One of five, the last: 4 in six bits, in the first bucket, -1 times 1.75 = 0x3fe0
        "top64": "e03f040101",
        "top128": "e03f040101",
    }
    for name, expected in golden.items():
        assert bytes(codec(name).encode(values)).hex() == expected
    decoded = codec("int4").decode(bytes.fromhex(golden["int4"]), 5)
    assert decoded.tolist() == [1.0, -0.5, 0.25, 0.0, -1.75]
    decoded = codec("int2").decode(bytes.fromhex(golden["int2"]), 5)
    assert decoded.tolist() == [0.52734375, -0.52734375, 0.52734375, 0.52734375, -1.58203125]
    decoded = codec("int1").decode(bytes.fromhex(golden["int1"]), 5)
    assert decoded.tolist() == [0.69921875, -0.69921875, 0.69921875, 0.69921875, -0.69921875]


def test_golden_digests() -> None:
    """The same for many blocks and a short one, of magnitudes from 2^-140 to 2^120."""
    n = 300 * BLOCK + 77
    places = np.arange(n, dtype=np.uint64)
    scattered = (places * 2_654_435_761 % 2**32 // 2**11).astype(np.float64) - 2**20
    values = np.ldexp(scattered, (places // BLOCK * 260 // 300).astype(np.int32) - 160)
    values = values.astype(np.float32)
    digests = {
        name: hashlib.sha256(codec(name).encode(torch.from_numpy(values))).hexdigest()[:16]
        for name in NAMES
    }
    assert digests == GOLDEN_DIGESTS


def levels(name: str, block: np.ndarray, scale: np.float32) -> np.ndarray:
    """What a block decodes to, over its scale."""
    if name == "int1":
        return np.where(block >= 0, np.float32(1), np.float32(-1))
    if name == "int2":
        thresholds = np.float32([-1, 0, 1]) * scale
        return np.searchsorted(thresholds, block, side="right").astype(np.float32) - np.float32(1.5)
    return np.rint(block / scale)


def scale_of(name: str, block: np.ndarray) -> np.float32:
    """By numpy, one operation after the other."""
    if name in ("int2", "int1"):
        shares = np.zeros(BLOCK, np.float32)
        shares[: len(block)] = np.abs(block) * np.float32(1 / BLOCK)
        while len(shares) > 1:
            shares = shares[: len(shares) // 2] + shares[len(shares) // 2 :]
        factor = np.float32(1.5 if name == "int2" else 1)
        exact = shares * factor / np.float32(len(block) / BLOCK)
        bits = exact.view(np.uint32)[0]
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    else:
        bits = (np.abs(block).max() / np.float32(Q_MAX[name])).view(np.uint32) + np.uint32(0xFFFF)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantisation_matches_numpy_operation_by_operation(name: str) -> None:
    values = np.random.default_rng(3).standard_normal(4 * BLOCK + 77).astype(np.float32)
    decoded = codec(name).decode(codec(name).encode(torch.from_numpy(values)), len(values))
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        scale = scale_of(name, block)
        expected = levels(name, block, scale) * scale
        assert (decoded[start : start + BLOCK].numpy() == expected).all()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -1e-40, -(2.0**-125)])
def test_a_block_of_nothing_decodes_to_exact_zeros(name: str, value: float) -> None:
    for n in (1, 3, BLOCK, BLOCK + 2):
        payload = codec(name).encode(torch.full((n,), value))
        decoded = codec(name).decode(payload, n).numpy()
        assert decoded.tobytes() == bytes(4 * n), "a minus zero is not the same bits"


def test_ties_go_to_even_and_int2s_upwards() -> None:
    ties = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0])  # the scale is 1
    decoded = codec("int4").decode(codec("int4").encode(ties), len(ties))
    assert decoded.tolist() == [7, 0, 2, 2, 0, -2, -2, -7]
    ties = torch.tensor([1.0, -1.0, 0.0, -0.0, 1.0, -1.0, 0.667, -0.667])  # the scale is 1
    decoded = codec("int2").decode(codec("int2").encode(ties), len(ties))
    assert decoded.tolist() == [1.5, -0.5, 0.5, 0.5, 1.5, -0.5, 0.5, -0.5]


def test_int2_gives_up_an_eighth_of_the_best_for_what_feedback_brings() -> None:
    values = torch.randn(1000 * BLOCK, generator=torch.manual_seed(6))
    decoded = codec("int2").decode(codec("int2").encode(values), len(values))
    # Max 1960: 0.1188 is the least that four evenly spaced levels can leave of the variance.
    assert ((decoded - values) ** 2).mean().item() < 0.1188 * 1.13
    same = 0.8 * values  # four fifths of what comes are the same in every round
    draws = torch.Generator().manual_seed(7)
    residual = torch.zeros_like(values)
    for _ in range(15):
        now = same + 0.6 * torch.randn(len(values), generator=draws) + residual
        residual = now - codec("int2").decode(codec("int2").encode(now), len(values))
    assert residual.square().mean().sqrt().item() < 0.8  # with the best for one round, 1.05


def test_slices_cut_at_blocks_encode_as_the_whole_does(any_codec: Codec) -> None:
    values = torch.randn(2 * SEGMENT + 3 * PAGE + 17, generator=torch.manual_seed(1))
    whole = any_codec.decode(any_codec.encode(values), len(values))
    cut = SEGMENT + max(BLOCK, any_codec.block)
    parts = [any_codec.decode(any_codec.encode(p), len(p)) for p in (values[:cut], values[cut:])]
    assert torch.equal(torch.cat(parts), whole)


def test_decode_add_rounds_twice_like_numpy(any_codec: Codec) -> None:
    n = SEGMENT + 5 * BLOCK + 9
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(n, generator=generator)
    before = torch.randn(n, generator=generator)
    payload = any_codec.encode(values)
    into = before.clone()
    any_codec.decode_add(payload, n, 0.3, into)
    decoded = any_codec.decode(payload, n).numpy()
    twice = before.numpy() + np.float32(0.3) * decoded
    assert into.numpy().tobytes() == twice.tobytes()
    # Products and sums of these are exact, or nearly, in float64: what fused operations would give.
    fused = (before.numpy() + np.float64(np.float32(0.3)) * decoded).astype(np.float32)
    differ = fused != twice
    if any_codec.sparse:
        assert differ.any()
        return
    for lane in range(64):  # in every lane of a vector unit, and after the last whole one
        assert differ[lane::64].any(), "the test cannot tell"


def test_read_only_and_unaligned_memory_is_as_good(any_codec: Codec) -> None:
    values = torch.randn(BLOCK + 9, generator=torch.manual_seed(2))
    size = any_codec.encoded_bytes(len(values))
    out = bytearray(size + 5)
    written = any_codec.encode(values, memoryview(out)[3:])
    assert written.nbytes == size
    assert bytes(written) == bytes(out[3 : 3 + size]) == bytes(any_codec.encode(values))
    shifted = memoryview(b"x" + bytes(written))[1:]
    assert torch.equal(
        any_codec.decode(shifted, len(values)), any_codec.decode(written, len(values))
    )


def test_thread_count_does_not_show(any_codec: Codec) -> None:
    values = torch.randn(3 * SEGMENT + 1, generator=torch.manual_seed(4))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = bytes(any_codec.encode(values))
        torch.set_num_threads(4)
        assert bytes(any_codec.encode(values)) == alone
    finally:
        torch.set_num_threads(threads)


def test_callers_mistakes_are_value_errors(any_codec: Codec) -> None:
    with pytest.raises(ValueError, match="float32"):
        any_codec.encode(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="contiguous"):
        any_codec.encode(torch.zeros(8)[::2])
    with pytest.raises(ValueError, match="writable"):
        any_codec.encode(torch.zeros(8), memoryview(bytes(64)))
    with pytest.raises(ValueError, match="writable"):
        any_codec.encode(torch.zeros(8), memoryview(bytearray(2)))
    payload = any_codec.encode(torch.zeros(8))
    with pytest.raises(ValueError, match="elements, not 8"):
        any_codec.decode_add(payload, 8, 1.0, torch.zeros(7))
    for out in (torch.zeros(9), torch.zeros(16)[::2], torch.zeros(8, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"must be|elements, not 8"):
            any_codec.decode(payload, 8, out)
    for weight in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="weight"):
            any_codec.decode_add(payload, 8, weight, torch.zeros(8))
        with pytest.raises(ValueError, match="weight"):
            any_codec.decode(payload, 8, weight=weight)


def test_sizes_are_what_the_run_file_promises() -> None:
    n = 1_000_000
    assert codec("fp32").encoded_bytes(n) == 4 * n
    assert codec("bf16").encoded_bytes(n) == 2 * n
    assert codec("int8").encoded_bytes(n) / n == pytest.approx(1 + 2 / BLOCK, rel=1e-3)
    assert codec("int4").encoded_bytes(n) / n == pytest.approx(0.5 + 2 / BLOCK, rel=1e-3)
    assert codec("int2").encoded_bytes(n) / n == pytest.approx(0.25 + 2 / BLOCK, rel=1e-3)
    assert codec("int1").encoded_bytes(n) / n == pytest.approx(0.125 + 2 / BLOCK, rel=1e-3)
    # A bfloat16, and for each of those sent an index of 8 or 7 bits and a value of 2.
    assert codec("top64").encoded_bytes(100 * PAGE) == 100 * (2 + 64 * (8 + 2) // 8)
    assert codec("top128").encoded_bytes(100 * PAGE) == 100 * (2 + 128 * (7 + 2) // 8)


def test_an_unknown_codec_is_a_config_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=rf"'fp8'.*{', '.join(NAMES)}"):
        codec("fp8")


def test_preparing_leaves_nothing_to_compile(any_codec: Codec) -> None:
    prepare(any_codec.name)
    with pytest.raises(ConfigError):
        prepare("fp8")


def test_what_comes_back_is_of_a_codec_that_averages_in_itself(any_codec: Codec) -> None:
    back = codec(any_codec.average)
    assert back.average == back.name
    assert back.needs_feedback == any_codec.needs_feedback
    assert (any_codec.name == back.name) == (any_codec.name not in ("int1", "top64"))
    assert any_codec.sparse == back.sparse == (sparse_codec(any_codec.name) is any_codec)
    assert any_codec.sparse or sparse_codec(any_codec.name) is None


@pytest.mark.parametrize("name", NAMES)
@given(values=vectors)
@settings(deadline=None)
def test_decoding_times_minus_one_leaves_what_was_lost(name: str, values: np.ndarray) -> None:
    n = len(values)
    payload = codec(name).encode(torch.from_numpy(values))
    decoded = codec(name).decode(payload, n).numpy()
    lost = torch.from_numpy(values.copy())
    codec(name).decode_add(payload, n, -1.0, lost)
    assert lost.numpy().tobytes() == (values - decoded).tobytes()


@pytest.mark.parametrize("name", [name for name in NAMES if codec(name).needs_feedback])
@pytest.mark.parametrize("n", [BLOCK + 77, 3])
def test_with_feedback_the_mean_of_what_was_sent_comes_near_what_was_to_be(
    name: str, n: int
) -> None:
    c = codec(name)
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, generator=generator)
    kept, total = torch.zeros(n), torch.zeros(n, dtype=torch.float64)
    off = {}
    for k in range(1, 257):
        kept += values
        payload = c.encode(kept)
        total += c.decode(payload, n)
        c.decode_add(payload, n, -1.0, kept)
        off[k] = (total / k - values).norm().item() / values.norm().item()
    # Of a Gaussian, and a long time after which what is kept grows no more.
    for k in (16, 64, 256):
        assert off[k] < FEEDBACK[name] / k
    # Without it, the mean stays as far off as the first message.
    assert off[1] > 2 * off[256]


def the_sparse(name: str) -> SparseCodec:
    found = sparse_codec(name)
    assert found is not None
    return found


def reference_of_top(name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is sent and what it decodes to, by numpy, page by page."""
    sent, decoded = np.zeros(len(values), bool), np.zeros_like(values)
    slots = PAGE // ONE_IN[name]
    for start in range(0, len(values), PAGE):
        page = values[start : start + PAGE]
        count = -(-len(page) // ONE_IN[name])
        places = np.sort(np.argsort(-np.abs(page), kind="stable")[:count])
        shares = np.zeros(slots, np.float32)
        shares[:count] = np.abs(page[places]) * np.float32(1 / slots)
        while len(shares) > 1:
            shares = shares[: len(shares) // 2] + shares[len(shares) // 2 :]
        bits = (shares / np.float32(count / slots)).view(np.uint32)[0]
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        scale = (bits & np.uint32(0xFFFF0000)).view(np.float32)
        far = np.searchsorted(np.float32([-1.25, 0, 1.25]) * scale, page[places], side="right")
        decoded[start + places] = np.float32([-1.5, -1, 1, 1.5])[far] * scale
        sent[start + places] = True
    return sent, decoded


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("kind", ["gaussian", "ties", "outliers"])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 130])
def test_the_largest_are_sent_as_numpy_finds_them(name: str, kind: str, n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    if kind == "ties":
        values = np.rint(values * 2) / 2 + np.float32(0.25)
    elif kind == "outliers":
        values **= 5
    payload = codec(name).encode(torch.from_numpy(values))
    sent, expected = reference_of_top(name, values)
    decoded = codec(name).decode(payload, n).numpy()
    assert decoded.tobytes() == expected.tobytes()
    into, weights = torch.zeros(n), torch.full((n,), 0.125)
    the_sparse(name).decode_add_sent(payload, n, 0.25, into, weights)
    assert np.array_equal(into.numpy(), expected * np.float32(0.25))
    assert np.array_equal(weights.numpy(), np.where(sent, np.float32(0.375), np.float32(0.125)))
    # What is not sent is not larger than what is.
    for start in range(0, n, PAGE):
        page, there = np.abs(values[start : start + PAGE]), sent[start : start + PAGE]
        assert page[~there].max(initial=0) <= page[there].min()


@pytest.mark.parametrize("name", SPARSE)
@given(values=vectors)
@settings(deadline=None)
def test_what_is_sent_stays_within_the_documented_bound(name: str, values: np.ndarray) -> None:
    n = len(values)
    payload = codec(name).encode(torch.from_numpy(values))
    assert payload.nbytes == codec(name).encoded_bytes(n)
    codec(name).validate(payload, n)
    decoded = codec(name).decode(payload, n).numpy().astype(np.float64)
    sent = decoded != 0
    magnitude = np.abs(values.astype(np.float64))
    if not sent.any():  # a scale of 0
        assert magnitude.max(initial=0) <= 128 * 2.0**-110
        return
    count = -(-n // ONE_IN[name])
    assert sent.sum() == count
    scale = sent_scales(payload, n, PAGE)[0]
    nearest = np.minimum(np.abs(magnitude - scale), np.abs(magnitude - 1.5 * scale))
    assert (np.abs(decoded - values) == np.where(sent, nearest, magnitude)).all()
    ideal = min(np.sort(magnitude)[-count:].mean(), MAX_MAGNITUDE / 1.5)
    assert abs(scale - ideal) <= ideal * (2.0**-8 + 2.0**-20) + 2.0**-110


def refused_sparse(name: str, payload: bytes, n: int) -> None:
    """By each of the four that look at payloads."""
    refused(name, payload, n, "indices")
    with pytest.raises(ValueError, match="indices"):
        the_sparse(name).decode_add_sent(payload, n, 0.5, torch.zeros(n), torch.zeros(n))


@pytest.mark.parametrize("name", SPARSE)
def test_indices_that_nobody_makes_are_refused(name: str) -> None:
    """Of a whole page and a short one of 100: mangled in one place at a time."""
    n = PAGE + 100
    c = codec(name)
    spread = torch.zeros(n)
    spread[:: ONE_IN[name]] = 1.0  # so that each bucket has one, at its beginning
    sound = bytes(c.encode(spread))
    c.validate(sound, n)
    low = {"top64": 6, "top128": 5}[name]
    count = PAGE >> low
    high = 2 * 2 + count * low // 8
    assert sound[high : high + count // 4] == b"\x55" * (count // 4)  # a one and a zero for each
    short = 2 * 2 + c.encoded_bytes(PAGE) - 2

    def mangled(changes: dict[int, int]) -> bytes:
        other = bytearray(sound)
        for place, value in changes.items():
            other[place] = value
        return bytes(other)

    for changes in (
        {high: 0x54},  # one too few
        {high: 0x57},  # one too many
        {high + count // 4 - 1: 0x95},  # the last index in a bucket after the page
        {high + count // 4 - 1: 0xD5},
        {high: 0x53},  # two in the first bucket: the same index twice
        {high: 0x53, 4: 0x01},  # and in descending order
        dict.fromkeys(range(high, high + count // 4), 0),
        dict.fromkeys(range(high, high + count // 4), 0xFF),
        {high + place: 0xFF for place in range(count // 8)},
    ):
        refused_sparse(name, mangled(changes), n)
    # Ascending in the same bucket is sound.
    two = {high: 0x53, 4: 1 << low & 0xFF, 5: 1 << low >> 8}
    assert c.decode(mangled(two), n)[:2].tolist() == [1.0, 1.0]
    # In the short page: an index of 100 and more, and any bit of padding.
    rest = -(-100 // ONE_IN[name])
    last = short + -(-rest * low // 8)
    assert len(sound) == last + 2 * -(-rest // 4)
    beyond = (100 - (rest - 1 << low)) << (rest - 1) * low
    for k in range(-(-rest * low // 8)):
        if beyond >> 8 * k & 0xFF:
            refused_sparse(name, mangled({short + k: sound[short + k] | beyond >> 8 * k & 0xFF}), n)
            break
    for start, used in ((short, rest * low), (last, 2 * rest), (last + -(-rest // 4), 2 * rest)):
        for bit in range(used, -(-used // 8) * 8):
            place = start + bit // 8
            refused_sparse(name, mangled({place: sound[place] | 1 << bit % 8}), n)


@pytest.mark.parametrize("name", SPARSE)
@given(st.data(), st.sampled_from([1, 64, 65, 300, PAGE, PAGE + 65]))
@settings(deadline=None)
def test_a_mangled_sparse_payload_is_refused_by_all_or_none(
    name: str, data: st.DataObject, n: int
) -> None:
    c = the_sparse(name)
    payload = bytearray(c.encode(torch.randn(n, generator=torch.manual_seed(n))))
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=4)):
        payload[place] ^= data.draw(st.integers(1, 255))
    into, sent = torch.zeros(n), torch.zeros(n)
    try:
        decoded = c.decode(payload, n)
    except ValueError:
        with pytest.raises(ValueError, match=REFUSAL):
            c.validate(payload, n)
        with pytest.raises(ValueError, match=REFUSAL):
            c.decode_add(payload, n, 1.0, into)
        with pytest.raises(ValueError, match=REFUSAL):
            c.decode_add_sent(payload, n, 1.0, into, sent)
    else:
        c.validate(payload, n)
        c.decode_add_sent(payload, n, 1.0, into, sent)
        assert torch.equal(into, decoded)
        assert ((sent == 1) >= (into != 0)).all()
        assert sent.sum() <= sum(-(-min(PAGE, n - i) // ONE_IN[name]) for i in range(0, n, PAGE))


@pytest.mark.parametrize("name", SPARSE)
def test_the_mean_is_over_those_who_sent(name: str) -> None:
    n = 2 * PAGE + 99
    c = the_sparse(name)
    sums, weights = torch.zeros(n), torch.zeros(n)
    above, below = np.zeros(n), np.zeros(n)
    for peer, weight in enumerate((0.5, 0.25, 0.25)):
        values = torch.randn(n, generator=torch.manual_seed(peer))
        values[PAGE : 2 * PAGE] *= 0.0 if peer else 1.0  # of two, a page of nothing says nothing
        payload = c.encode(values)
        c.decode_add_sent(payload, n, weight, sums, weights)
        decoded = c.decode(payload, n).numpy()
        above += weight * decoded.astype(np.float64)
        below += np.where(decoded != 0, weight, 0.0)
    only = c.decode(c.encode(torch.randn(n, generator=torch.manual_seed(0))), n)
    mean_of_sent(sums, weights)
    expected = np.divide(above, below, out=np.zeros(n), where=below > 0).astype(np.float32)
    assert np.allclose(sums.numpy(), expected, rtol=1e-6, atol=0)
    assert np.count_nonzero(sums) > -(-n // ONE_IN[name])
    assert torch.equal(sums[PAGE : 2 * PAGE], only[PAGE : 2 * PAGE])
    assert sums[weights == 0].numpy().tobytes() == bytes(4 * int((weights == 0).sum()))


def test_a_mean_of_sent_is_divided_as_numpy_does_and_checks_its_arguments() -> None:
    n = SEGMENT + 77
    generator = torch.Generator().manual_seed(1)
    sums, weights = torch.randn(2, n, generator=generator)
    expected = np.where(weights > 0, sums / weights, torch.zeros(())).astype(np.float32)
    mean_of_sent(sums, weights)
    assert sums.numpy().tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="3 sums, and 4 weights"):
        mean_of_sent(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="float32"):
        mean_of_sent(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
    payload = codec("top64").encode(torch.zeros(8))
    for into, sent in ((torch.zeros(7), torch.zeros(8)), (torch.zeros(8), torch.zeros(7))):
        with pytest.raises(ValueError, match="elements, not 8"):
            the_sparse("top64").decode_add_sent(payload, 8, 1.0, into, sent)
    with pytest.raises(ConfigError):
        sparse_codec("fp8")
