from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coordinator_free.codecs import (
    BLOCK,
    MAX_MAGNITUDE,
    SEGMENT,
    TINY,
    Codec,
    NonFinite,
    codec,
)
from dht.errors import ConfigError

NAMES = ["fp32", "bf16", "int8", "int4"]
REFUSAL = "bytes are not|not finite|scale is|padding"
Q_MAX = {"int8": 127, "int4": 7}

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
    largest = np.concatenate(
        [
            np.full(len(block), block.max())
            for block in np.split(magnitude, range(BLOCK, len(magnitude), BLOCK))
            if len(block)
        ]
        or [np.zeros(0)]
    )
    return 0.505 * largest / Q_MAX[name] + TINY * Q_MAX[name]


@pytest.mark.parametrize("name", NAMES)
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
        assert not into.any(), "a refused payload must leave the sum alone"
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
@pytest.mark.parametrize("place", [0, 255, 256, SEGMENT + 7, SEGMENT + BLOCK - 1])
def test_what_is_not_finite_is_never_encoded(any_codec: Codec, wild: float, place: int) -> None:
    values = torch.ones(SEGMENT + BLOCK)
    values[place] = wild
    out = bytearray(any_codec.encoded_bytes(len(values)))
    with pytest.raises(NonFinite):
        any_codec.encode(values, memoryview(out))
    assert not any(out), "a refused vector must leave the output alone"


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F], ids=hex)
def test_a_wild_bf16_payload_is_refused(bits: int) -> None:
    payload = np.array([0x3F80, bits], np.uint16).tobytes()
    with pytest.raises(ValueError, match="not finite"):
        codec("bf16").validate(payload, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_wild_fp32_payload_is_refused(value: float) -> None:
    payload = np.array([1.0, value], np.float32).tobytes()
    with pytest.raises(ValueError, match="not finite"):
        codec("fp32").validate(payload, 2)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bits", [0x7F80, 0x7FC0, 0xBF80, 0x8000, 0x7F00, 0x0001], ids=hex)
def test_a_wild_scale_is_refused_in_any_block(name: str, bits: int) -> None:
    c = codec(name)
    n = 2 * BLOCK + 1
    for block in range(3):
        payload = np.frombuffer(bytes(c.encode(torch.ones(n))), np.uint8).copy()
        payload[: 2 * 3].view(np.uint16)[block] = bits
        with pytest.raises(ValueError, match="scale"):
            c.decode(payload.tobytes(), n)


def test_the_padding_of_int4_must_be_zero() -> None:
    payload = bytearray(codec("int4").encode(torch.ones(3)))
    payload[-1] |= 0x10
    with pytest.raises(ValueError, match="padding"):
        codec("int4").validate(payload, 3)


def test_largest_and_tiniest_numbers_survive(any_codec: Codec) -> None:
    for value in (MAX_MAGNITUDE, -MAX_MAGNITUDE, 1e-45, -1e-38, 0.0, -0.0):
        values = torch.full((BLOCK + 1,), value)
        decoded = any_codec.decode(any_codec.encode(values), len(values))
        assert torch.isfinite(decoded).all()
        torch.testing.assert_close(decoded, values, rtol=0.01, atol=TINY * 128)


def test_golden_bytes() -> None:
    """The wire must not change unnoticed: peers of two versions would average garbage."""
    values = torch.tensor([1.0, -0.5, 0.25, 3.0e-3, -1.75], dtype=torch.float32)
    golden = {
        "fp32": "0000803f000000bf0000803ea69b443b0000e0bf",
        "bf16": "803f00bf803e453be0bf",
        # 1.75 / 127 = 0.013780 rounds up to 0.013794 = 0x3c62
        "int8": "623c48dc120081",
        # 1.75 / 7 = 0.25 = 0x3e80
        "int4": "803e6c8901",
    }
    for name, expected in golden.items():
        assert bytes(codec(name).encode(values)).hex() == expected
    decoded = codec("int4").decode(bytes.fromhex(golden["int4"]), 5)
    assert decoded.tolist() == [1.0, -0.5, 0.25, 0.0, -1.75]


def test_quantisation_matches_numpy_operation_by_operation() -> None:
    values = np.random.default_rng(3).standard_normal(4 * BLOCK + 77).astype(np.float32)
    for name, q_max in Q_MAX.items():
        decoded = codec(name).decode(codec(name).encode(torch.from_numpy(values)), len(values))
        for start in range(0, len(values), BLOCK):
            block = values[start : start + BLOCK]
            bits = (np.abs(block).max() / np.float32(q_max)).view(np.uint32)
            scale = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
            expected = np.rint(block / scale) * scale
            assert (decoded[start : start + BLOCK].numpy() == expected).all()


def test_slices_cut_at_blocks_encode_as_the_whole_does(any_codec: Codec) -> None:
    values = torch.randn(2 * SEGMENT + 3 * BLOCK + 17, generator=torch.manual_seed(1))
    whole = any_codec.decode(any_codec.encode(values), len(values))
    cut = SEGMENT + BLOCK
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
    assert (into.numpy() == before.numpy() + np.float32(0.3) * decoded).all()


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
        any_codec.encode(torch.zeros(8), memoryview(bytearray(3)))
    payload = any_codec.encode(torch.zeros(8))
    with pytest.raises(ValueError, match="elements, not 8"):
        any_codec.decode_add(payload, 8, 1.0, torch.zeros(7))
    with pytest.raises(ValueError, match="weight"):
        any_codec.decode_add(payload, 8, math.nan, torch.zeros(8))


def test_sizes_are_what_the_run_file_promises() -> None:
    n = 1_000_000
    assert codec("fp32").encoded_bytes(n) == 4 * n
    assert codec("bf16").encoded_bytes(n) == 2 * n
    assert codec("int8").encoded_bytes(n) / n == pytest.approx(1 + 2 / BLOCK, rel=1e-3)
    assert codec("int4").encoded_bytes(n) / n == pytest.approx(0.5 + 2 / BLOCK, rel=1e-3)


def test_an_unknown_codec_is_a_config_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'fp8'.*fp32, bf16, int8, int4"):
        codec("fp8")
