"""What numba compiles gives the same bits as torch does, whatever it is given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from coordinator_free import codecs, kernels
from coordinator_free.codecs import (
    BLOCK,
    PAGE,
    SEGMENT,
    Codec,
    codec,
    mean_of_sent,
    sparse_codec,
)
from coordinator_free.optimizer import Position
from coordinator_free.outer import OuterConfig, OuterOptimizer

NAMES = ["fp32", "bf16", "int8", "int4", "int2", "int1", "top64", "top128"]

both = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed")
lengths = st.one_of(st.integers(0, 20), st.integers(250, 260), st.integers(0, 3 * BLOCK + 5))
# All bit patterns: subnormals, infinities and NaNs, too.
any_floats = hnp.arrays(np.uint32, lengths).map(lambda bits: bits.view(np.float32))
magnitudes = st.integers(-150, 127)


@st.composite
def tame_floats(draw: st.DrawFn) -> np.ndarray:
    """Numbers that can be encoded, of a few magnitudes: by the block, and outliers."""
    n = draw(lengths)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponents = np.int32([draw(magnitudes) for _ in range(-(-n // BLOCK))])
    values = np.ldexp(generator.uniform(-1, 1, n), np.repeat(exponents, BLOCK)[:n])
    values = values.astype(np.float32)
    for place in draw(st.lists(st.integers(0, max(0, n - 1)), max_size=3 if n else 0)):
        values[place] = np.ldexp(np.float32(1), draw(magnitudes))
    return values


def outcome(work: Callable[[], object]) -> object:
    """What it returns, or that it refuses."""
    try:
        return work()
    except ValueError as error:
        return str(error)


def encoded(c: Codec, values: np.ndarray) -> object:
    return outcome(lambda: bytes(c.encode(torch.from_numpy(values))))


def decoded(c: Codec, payload: bytes, n: int, weight: float) -> list[object]:
    """By each way to decode; bits, as there may be minus zeros, and infinities after adding."""

    def added() -> bytes:
        into = torch.linspace(-3, 3, n)
        c.decode_add(payload, n, weight, into)
        return into.numpy().tobytes()

    return [
        outcome(lambda: c.decode(payload, n).numpy().tobytes()),
        outcome(lambda: c.decode(payload, n, weight=weight).numpy().tobytes()),
        outcome(added),
        outcome(lambda: c.validate(payload, n)),
    ]


@both
@pytest.mark.parametrize("name", NAMES)
@given(values=st.one_of(any_floats, tame_floats()))
@example(values=np.zeros(0, np.float32))
@settings(deadline=None)
def test_both_backends_encode_to_the_same_bytes(name: str, values: np.ndarray) -> None:
    by_numba = encoded(codec(name), values)
    with kernels.torch_only():
        assert encoded(codec(name), values) == by_numba


@both
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), n=lengths, weight=st.floats(-1, 1, width=32), tame=st.booleans())
@settings(deadline=None)
def test_both_backends_decode_any_bytes_to_the_same_bits(
    name: str, data: st.DataObject, n: int, weight: float, tame: bool
) -> None:
    c = codec(name)
    size = c.encoded_bytes(n)
    payload = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    if tame:  # scales, or else exponents, that are accepted; what is left is arbitrary
        step = 4 if name == "fp32" else 2
        end = size if c.block == 1 else 2 * -(-n // c.block)
        high = np.frombuffer(payload, np.uint8)[:end][step - 1 :: step]
        high &= 0x3F
        high[high < 4] = 4
    by_numba = decoded(c, bytes(payload), n, weight)
    with kernels.torch_only():
        assert decoded(c, bytes(payload), n, weight) == by_numba


@both
@pytest.mark.parametrize("name", NAMES)
def test_both_backends_agree_on_many_segments(name: str) -> None:
    n = 3 * SEGMENT + PAGE + 5 * BLOCK + 77
    values = torch.randn(n, generator=torch.manual_seed(8)).numpy()
    payload = encoded(codec(name), values)
    assert isinstance(payload, bytes)
    by_numba = decoded(codec(name), payload, n, 0.3)
    with kernels.torch_only():
        assert encoded(codec(name), values) == payload
        assert decoded(codec(name), payload, n, 0.3) == by_numba


@both
@pytest.mark.parametrize("name", ["top64", "top128"])
@given(data=st.data(), n=st.sampled_from([1, 65, 300, PAGE - 1, PAGE + 65]), tame=st.booleans())
@settings(deadline=None)
def test_both_backends_add_up_what_was_sent_to_the_same_bits(
    name: str, data: st.DataObject, n: int, tame: bool
) -> None:
    """And find the largest of all bit patterns; of payloads that are mangled, too."""
    c = sparse_codec(name)
    assert c is not None
    draws = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    wild = draws.integers(0, 2**32, n, np.uint32).view(np.float32)
    values = np.rint(draws.normal(0, 3, n)).astype(np.float32) if tame else wild
    payload = bytearray(c.encode(torch.from_numpy(draws.normal(size=n).astype(np.float32))))
    for place in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=2)):
        payload[place] ^= data.draw(st.integers(1, 255))

    def added() -> bytes:
        into, sent = torch.linspace(-3, 3, n), torch.linspace(-0.1, 0.1, n)
        c.decode_add_sent(payload, n, 0.3, into, sent)
        mean_of_sent(into, sent)
        return into.numpy().tobytes() + sent.numpy().tobytes()

    by_numba = encoded(c, values), decoded(c, bytes(payload), n, -0.3), outcome(added)
    with kernels.torch_only():
        assert encoded(c, values) == by_numba[0]
        assert decoded(c, bytes(payload), n, -0.3) == by_numba[1]
        assert outcome(added) == by_numba[2]


@both
@pytest.mark.parametrize("kind", ["nesterov", "sgd"])
@given(values=st.one_of(any_floats, tame_floats()), lr=st.floats(0.01, 2), mu=st.floats(0, 0.99))
@settings(deadline=None)
def test_both_backends_take_the_same_outer_step(
    kind: Literal["nesterov", "sgd"], values: np.ndarray, lr: float, mu: float
) -> None:
    outer = OuterOptimizer(OuterConfig(kind=kind, lr=lr, momentum=mu))
    theta, m, delta = (torch.from_numpy(np.roll(values, shift)) for shift in (0, 1, 3))

    def run() -> tuple[object, ...]:
        before = (theta, m)[: len(outer.lengths(1))]
        out = [torch.empty_like(vector) for vector in before]
        finite = outer.advance(before, delta, out, Position(round=0, samples=0))
        # NaNs as one: which of them comes out of an operation on two is the processor's choice.
        return finite, *(torch.nan_to_num(v, nan=0.125).numpy().tobytes() for v in out)

    with np.errstate(all="ignore"):
        by_numba = run()
        with kernels.torch_only():
            assert run() == by_numba


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_on_a_gpu_gives_the_same_on_the_cpu(name: str) -> None:
    """The device's path up to the copies: torch on both sides, bytes in a tensor."""
    n = 2 * SEGMENT + PAGE + BLOCK + 5
    values = torch.randn(n, generator=torch.manual_seed(9))
    c = codec(name)
    assert isinstance(c, codecs._Base)
    payload = bytes(c.encode(values))
    bytes_B = torch.zeros(len(payload) + 1, dtype=torch.uint8)[1:]
    largest = int(c._encode_by_torch(values, bytes_B))
    assert bytes_B.numpy().tobytes() == payload
    assert largest == values.abs().max().view(torch.int32)
    parts = [c._read(bytes_B, *cut, n) for cut in codecs._segments(n, c.block, on_device=True)]
    assert torch.equal(torch.cat(parts), c.decode(payload, n))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [0, 1, 255, 257, 3 * SEGMENT + 77, codecs.DEVICE_SEGMENT + 259])
def test_a_gpu_gives_the_same_bits(name: str, n: int) -> None:
    values = torch.randn(n, generator=torch.manual_seed(n))
    c = codec(name)
    payload = bytes(c.encode(values))
    assert bytes(c.encode(values.cuda())) == payload
    message = bytearray(len(payload) + 5)
    c.encode(values.cuda(), memoryview(message)[3:])
    assert bytes(message[3 : 3 + len(payload)]) == payload
    by_cpu, by_gpu = values.clone(), values.cuda()
    c.decode_add(payload, n, 0.3, by_cpu)
    c.decode_add(payload, n, 0.3, by_gpu)
    assert by_gpu.cpu().numpy().tobytes() == by_cpu.numpy().tobytes()
    c.decode(payload, n, by_gpu, 0.3)
    assert torch.equal(by_gpu.cpu(), c.decode(payload, n, weight=0.3))
    sparse = sparse_codec(name)
    if sparse is not None:
        sums, weights = torch.zeros(2, n)
        on_gpu = sums.cuda(), weights.cuda()
        for into, sent in ((sums, weights), on_gpu):
            sparse.decode_add_sent(payload, n, 0.3, into, sent)
            mean_of_sent(into, sent)
        assert torch.equal(on_gpu[0].cpu(), sums)
        assert torch.equal(on_gpu[1].cpu(), weights)
    if n:
        values[n // 2] = torch.nan
        with pytest.raises(codecs.NonFinite):
            c.encode(values.cuda())


def test_importing_the_codecs_imports_no_numba() -> None:
    """Half a second that every command, test and worker would pay for nothing."""
    code = "import sys, coordinator_free.codecs, coordinator_free.outer as o; print(o.__name__)"
    code += "; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100)


def test_without_numba_torch_does_the_work() -> None:
    code = """
import sys
sys.modules["numba"] = None  # importing it raises ImportError
import torch
from coordinator_free import kernels
from coordinator_free.codecs import codec
from coordinator_free.optimizer import Position
from coordinator_free.outer import OuterConfig, OuterOptimizer
assert not kernels.compiled()
assert bytes(codec("int4").encode(torch.tensor([7.0, 1.0, -2.0]))).hex() == "803f6f09"
outer, (theta, m, delta) = OuterOptimizer(OuterConfig()), torch.zeros(3, 5)
assert outer.advance((theta, m), delta, (theta.clone(), m.clone()), Position(round=0, samples=0))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@both
def test_a_kernel_is_compiled_once_whoever_comes_first() -> None:
    bodies: list[object] = []

    def body(values_N: np.ndarray) -> int:
        return len(values_N)

    kernel = kernels.Kernel(body, ("float32[:]",))
    start = threading.Barrier(4)

    def first() -> None:
        start.wait()
        assert kernel(np.zeros(3, np.float32)) == 3
        bodies.append(kernel.compile())

    threads = [threading.Thread(target=first) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies) == 4
    assert len(set(map(id, bodies))) == 1


@both
@pytest.mark.parametrize(
    "failure", ["OSError(28, 'disk full')", "RuntimeError('no locator')", "EOFError('cut short')"]
)
def test_a_cache_that_fails_costs_time_and_nothing_else(failure: str) -> None:
    code = f"""
import numpy as np, numba.core.caching as caching
from coordinator_free import kernels
def fail(*arguments):
    raise {failure}
caching.IndexDataCacheFile.save = fail
caching.IndexDataCacheFile.load = fail
assert kernels.largest_fp32(np.float32([1, -2])) == 0x40000000
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@both
@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        kernels.decode_fp32,
        kernels.decode_int4,
        kernels.encode_int2,
        kernels.add_sent_top,
        kernels.nesterov_step,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_no_processor_is_allowed_to_fuse_or_reorder(kernel: kernels.Kernel[...]) -> None:
    """What LLVM may do with these operations on any processor, ARM as well."""
    numba = kernels._numba()
    signature = tuple(kernels._type(numba.types, name) for name in kernel._arguments)
    compiled = numba.njit(signature, nogil=True, error_model="numpy")(kernel._body)
    (code,) = compiled.inspect_llvm().values()
    assert re.search(r"= fmul float|= fmul <", code), "there is something to look at"
    assert not re.search(r"= f\w+ (fast|reassoc|contract|arcp|afn|nnan|ninf|nsz) ", code)
    assert "llvm.fma" not in code  # nor fmuladd


@both
@pytest.mark.slow
def test_no_kernel_leaves_its_arrays_whatever_they_hold() -> None:
    """With every index checked by numba, arbitrary bytes and every length."""
    code = """
import contextlib
import numpy as np, torch
from coordinator_free.codecs import codec, sparse_codec
draws = np.random.default_rng(0)
refused = 0
for name in ("fp32", "bf16", "int8", "int4", "int2", "int1", "top64", "top128"):
    c = codec(name)
    for n in [*range(1, 20), 253, 254, 255, 256, 257, 258, 259, 511, 512, 513, 700, 4097]:
        values = torch.from_numpy(draws.integers(0, 2**32, n, np.uint32).view(np.float32))
        with contextlib.suppress(ValueError):
            c.encode(values)
        c.encode(torch.randn(n))
        for _ in range(4):
            payload = draws.bytes(c.encoded_bytes(n))
            if name.startswith("int"):  # accepted scales, arbitrary integers
                payload = bytes.fromhex("803f") * -(-n // 256) + payload[2 * -(-n // 256) :]
            if c.sparse:  # what was sound, with a byte or two of another
                payload = bytearray(c.encode(torch.randn(n)))
                for place in draws.integers(0, len(payload), 2):
                    payload[place] = draws.integers(0, 256)
                with contextlib.suppress(ValueError):
                    sparse_codec(name).decode_add_sent(payload, n, 0.5, *torch.zeros(2, n))
            try:
                c.decode_add(payload, n, 0.5, torch.zeros(n))
            except ValueError:
                refused += 1
            else:
                c.decode(payload, n)
assert 0 < refused < 1200, refused
"""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1"}
    with tempfile.TemporaryDirectory() as cache:
        environment["NUMBA_CACHE_DIR"] = cache  # of kernels compiled with the checks
        subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=environment)
