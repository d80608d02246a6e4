from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator_free import gradient, gradient_kernels, kernels
from coordinator_free.bounds import shown
from coordinator_free.gradient import (
    FLOOR,
    PIECE,
    GradientConfig,
    GradientOptimizer,
    TensorSpec,
    orthogonalised,
    schedule,
)
from coordinator_free.gradient_kernels import (
    CACHED,
    COLUMNS,
    DEPTH,
    SEGMENT,
    product,
    segment_squares,
    total,
)
from coordinator_free.optimizer import Position
from dht.errors import ConfigError
from model import optimizers
from model.optimizers import InnerOptimizer, OptimizerConfig
from model.optimizers import schedule as inner_schedule

START = Position(round=0, samples=0)
KINDS = ["adamw", "muon", "sgd"]
both = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed")


@pytest.fixture(params=["numba", "numpy"], scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if request.param == "numpy":
            stack.enter_context(kernels.torch_only())
        elif not kernels.compiled():
            pytest.skip("numba is not installed")
        yield request.param


def layout(*shapes: tuple[int, ...]) -> list[TensorSpec]:
    """Tensors of these shapes in a row; all with two dimensions are Muon's, and decay."""
    starts = itertools.accumulate((math.prod(shape) for shape in shapes), initial=0)
    return [
        TensorSpec(
            name=f"{number}",
            start=start,
            shape=shape,
            matrix=len(shape) == 2,
            decay=len(shape) == 2,
        )
        for number, (start, shape) in enumerate(zip(starts, shapes, strict=False))
    ]


TENSORS = layout((7,), (24, 8), (8, 24), (5,), (3,), (16, 16))
NUMEL = TENSORS[-1].stop


def zeros(optimizer: GradientOptimizer, theta_N: Tensor) -> list[Tensor]:
    """The state at the start of a run."""
    return [theta_N, *(torch.zeros(n) for n in optimizer.lengths(len(theta_N))[1:])]


def after(
    optimizer: GradientOptimizer,
    before: Sequence[Tensor],
    average_N: Tensor,
    at: Position = START,
) -> list[Tensor]:
    """Where one step leads, in fresh memory."""
    out = [torch.full_like(vector, 7.0) for vector in before]
    finite = optimizer.advance(before, average_N, out, at)
    assert finite is all(bool(torch.isfinite(vector).all()) for vector in out)
    return out


def bits(vectors: Sequence[Tensor]) -> list[bytes]:
    """NaNs as one: which of them comes out of an operation on two is the processor's choice."""
    return [torch.nan_to_num(v, nan=0.125).numpy().tobytes() for v in vectors]


def gradients(count: int, numel: int = NUMEL, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator) for _ in range(count)]


# -- against others' -------------------------------------------------------------------------------


def parameters(theta_N: Tensor) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(theta_N[t.start : t.stop].reshape(t.shape).clone()) for t in TENSORS]


def give(parameters: Sequence[torch.nn.Parameter], gradient_N: Tensor) -> None:
    for p, tensor in zip(parameters, TENSORS, strict=True):
        p.grad = gradient_N[tensor.start : tensor.stop].reshape(tensor.shape).clone()


def flat(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@pytest.mark.usefixtures("backend")
def test_follows_torchs_own_adamw() -> None:
    config = GradientConfig(kind="adamw", lr=0.01, weight_decay=0.3, grad_clip=2.0)
    optimizer = GradientOptimizer(config, TENSORS)
    theta_N, *averages = gradients(51)
    ours, theirs = zeros(optimizer, theta_N), parameters(theta_N)
    groups = [
        {"params": [p for p in theirs if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for round, average_N in enumerate(averages):
        give(theirs, average_N)
        torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        reference.step()
        ours = after(optimizer, ours, average_N, Position(round=round, samples=0))
    torch.testing.assert_close(ours[0], flat(theirs), rtol=1e-5, atol=1e-5)
    assert (ours[0] - theta_N).norm() > 1


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_follows_torchs_own_sgd(momentum: float, nesterov: bool) -> None:
    config = GradientConfig(
        kind="sgd", lr=0.01, momentum=momentum, nesterov=nesterov, weight_decay=0.3, grad_clip=2.0
    )
    optimizer = GradientOptimizer(config, TENSORS)
    theta_N, *averages = gradients(51)
    ours, theirs = zeros(optimizer, theta_N), parameters(theta_N)
    assert len(ours) == (2 if momentum else 1)
    reference = torch.optim.SGD(theirs, lr=0.01, momentum=momentum, nesterov=nesterov)
    for average_N in averages:
        give(theirs, average_N)
        torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        with torch.no_grad():
            for p in theirs:
                if p.ndim == 2:
                    p.mul_(1 - 0.01 * 0.3)  # theirs is not decoupled
        reference.step()
        ours = after(optimizer, ours, average_N)
    torch.testing.assert_close(ours[0], flat(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_follows_the_local_optimizers_of_the_same_name(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedule, clipping, decay and all; a sample here is a step there."""
    monkeypatch.setattr(optimizers, "_products_in", lambda device_type: torch.float32)
    same = {"kind": kind, "lr": 0.02, "weight_decay": 0.2, "grad_clip": 3.0, "momentum": 0.9}
    config = GradientConfig(**same, warmup_samples=10, total_samples=40)
    optimizer = GradientOptimizer(config, TENSORS)
    theta_N, *averages = gradients(51, seed=1)
    ours, theirs = zeros(optimizer, theta_N), parameters(theta_N)
    matrices = [p for p in theirs if p.ndim == 2]
    reference = InnerOptimizer(
        theirs,
        matrices,
        OptimizerConfig(**same, warmup_samples=10, total_samples=40, joiner_warmup_steps=0),
    )
    for step, average_N in enumerate(averages):
        give(theirs, average_N)
        reference.clip()
        reference.step(step + 1)
        ours = after(optimizer, ours, average_N, Position(round=step, samples=step))
    torch.testing.assert_close(ours[0], flat(theirs), rtol=1e-5, atol=2e-5)
    assert (ours[0] - theta_N).norm() > 1


@pytest.mark.usefixtures("backend")
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_follows_torchs_own_muon() -> None:
    config = GradientConfig(kind="muon", lr=0.02, weight_decay=0.1, grad_clip=0.0)
    matrices = layout((24, 8), (8, 24), (16, 16))
    optimizer = GradientOptimizer(config, matrices)
    theta_N, *averages = gradients(51, matrices[-1].stop)
    ours = zeros(optimizer, theta_N)
    theirs = [
        torch.nn.Parameter(theta_N[t.start : t.stop].reshape(t.shape).clone()) for t in matrices
    ]
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1)
    for average_N in averages:
        for p, tensor in zip(theirs, matrices, strict=True):
            p.grad = average_N[tensor.start : tensor.stop].reshape(tensor.shape).clone()
        reference.step()
        ours = after(optimizer, ours, average_N)
    # Theirs orthogonalises in bf16, of three digits; the local Muon above has all of ours.
    moved = (flat(theirs) - theta_N).norm()
    assert (ours[0] - flat(theirs)).norm() < 0.01 * moved


@pytest.mark.usefixtures("backend")
@given(
    numel=st.integers(1, 3 * SEGMENT),
    spread=st.integers(-30, 30),
    limit=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=40)
def test_clips_as_torch_does(numel: int, spread: int, limit: float, seed: int) -> None:
    config = GradientConfig(kind="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, grad_clip=limit)
    average_N = gradients(1, numel, seed)[0] * 2.0**spread
    optimizer = GradientOptimizer(config, layout((numel,)))
    (moved,) = after(optimizer, [torch.zeros(numel)], average_N)
    theirs = torch.nn.Parameter(torch.zeros(numel))
    theirs.grad = average_N.clone()
    torch.nn.utils.clip_grad_norm_([theirs], limit)
    torch.testing.assert_close(-moved, theirs.grad, rtol=1e-5, atol=0)


# -- the same bits ---------------------------------------------------------------------------------


@st.composite
def trials(draw: st.DrawFn) -> tuple[GradientConfig, list[TensorSpec], int, int]:
    shape = st.one_of(
        st.tuples(),
        st.tuples(st.integers(0, 80)),
        st.tuples(st.integers(1, 70), st.integers(1, 70)),
        st.tuples(st.integers(0, 5), st.integers(0, 5)),
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    )
    tensors = layout(*draw(st.lists(shape, min_size=1, max_size=5)))
    config = GradientConfig(
        kind=draw(st.sampled_from(["adamw", "muon", "sgd"])),
        momentum=draw(st.sampled_from([0.0, 0.5, 0.95])),
        nesterov=draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 0.3])),
        grad_clip=draw(st.sampled_from([0.0, 1.0])),
        total_samples=draw(st.sampled_from([0, 100])),
    )
    return config, tensors, draw(st.integers(-40, 70)), draw(st.integers(0, 2**32 - 1))


@both
@given(trial=trials(), wild=st.sampled_from([None, math.nan, math.inf, -3e38]))
@settings(deadline=None, max_examples=150)
def test_both_backends_and_all_numbers_of_threads_give_the_same_bits(
    trial: tuple[GradientConfig, list[TensorSpec], int, int], wild: float | None
) -> None:
    config, tensors, spread, seed = trial
    numel = tensors[-1].stop
    theta_N, *averages = (vector * 2.0**spread for vector in gradients(3, numel, seed))
    if wild is not None and numel:
        averages[1][seed % numel] = wild

    def run(threads: int) -> list[bytes]:
        optimizer = GradientOptimizer(config, tensors, threads=threads)
        state = zeros(optimizer, theta_N)
        for round, average_N in enumerate(averages):
            state = after(optimizer, state, average_N, Position(round=round, samples=50 * round))
        return bits(state)

    by_numba = run(1)
    assert run(3) == by_numba
    with kernels.torch_only():
        assert run(1) == by_numba
        assert run(2) == by_numba


@both
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_of_tensors_longer_than_a_piece(kind: Any) -> None:
    tensors = layout((PIECE + 2 * CACHED + 77,), (150, 300), (PIECE + 3,), (300, 150))
    config = GradientConfig(kind=kind)
    theta_N, average_N = gradients(2, tensors[-1].stop)
    ones = [torch.ones_like(v) for v in zeros(GradientOptimizer(config, tensors), theta_N)[1:]]
    before = [theta_N, *ones]
    copies = bits([*before, average_N])
    once = bits(after(GradientOptimizer(config, tensors), before, average_N))
    assert bits(after(GradientOptimizer(config, tensors, threads=2), before, average_N)) == once
    with kernels.torch_only():
        assert bits(after(GradientOptimizer(config, tensors), before, average_N)) == once
    assert bits([*before, average_N]) == copies


def test_each_operation_of_adamw_is_rounded_on_its_own() -> None:
    """In any lane of a vector unit, nor after the last whole one."""
    numel = 5 * CACHED + 77
    theta_N, mean_N, square_N, average_N = gradients(4, numel)
    square_N.abs_()
    config = GradientConfig(lr=0.01, weight_decay=0.5, grad_clip=0.0)
    tensors = [TensorSpec(name="all", start=0, shape=(numel,), matrix=False, decay=True)]
    optimizer = GradientOptimizer(config, tensors)
    found = after(optimizer, [theta_N, mean_N, square_N], average_N, Position(round=2, samples=0))
    f, g = np.float32, average_N.numpy()
    mean = mean_N.numpy() * f(0.9)
    mean = mean + g * f(1 - 0.9)
    square = square_N.numpy() * f(0.99)
    squared = g * g
    square = square + squared * f(1 - 0.99)
    root = np.sqrt(square) * f(1 / math.sqrt(1 - 0.99 * (0.99 * 0.99)))
    direction = mean / (root + f(1e-8))
    theta = theta_N.numpy() * f(1 - 0.01 * 0.5)
    theta = theta - direction * f(0.01 / (1 - 0.9 * (0.9 * 0.9)))
    assert [v.numpy().tobytes() for v in found] == [v.tobytes() for v in (theta, mean, square)]
    # A product of two float32 is exact in float64, so this is what a fused multiply-add gives.
    fused = (np.float64(f(0.9)) * mean_N.numpy() + (g * f(1 - 0.9))).astype(f)
    for lane in range(64):
        assert (fused != mean)[lane::64].any(), "the test cannot tell"


sizes = st.one_of(
    st.integers(0, 9), st.integers(COLUMNS - 2, COLUMNS + 2), st.integers(DEPTH - 2, DEPTH + 9)
)


@pytest.mark.usefixtures("backend")
@given(rows=sizes, inner=sizes, columns=sizes, seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_a_product_sums_from_the_first_to_the_last_rounding_each(
    rows: int, inner: int, columns: int, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    left = draws.standard_normal((rows, inner)).astype(np.float32)
    right = draws.standard_normal((inner, columns)).astype(np.float32)
    expected = np.zeros((rows, columns), np.float32)
    for k in range(inner):
        expected = expected + left[:, k, None] * right[k]
    assert product(left, right).tobytes() == expected.tobytes()
    if inner > 100 and rows * columns > 100:
        exact = np.float64(left) @ np.float64(right)
        np.testing.assert_allclose(expected, exact, atol=1e-4)
        assert (np.float32(exact) != expected).any()
    gram = product(left, np.ascontiguousarray(left.T))
    half = product(left, np.ascontiguousarray(left.T), symmetric=True)
    assert half.tobytes() == gram.tobytes()
    assert gram.tobytes() == np.ascontiguousarray(gram.T).tobytes()


@pytest.mark.usefixtures("backend")
@given(numel=st.integers(0, 3 * SEGMENT), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_squares_are_summed_in_one_order(numel: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(numel).astype(np.float32)
    expected = 0.0
    for start in range(0, numel, SEGMENT):
        sums = [0.0] * 64
        for place, value in enumerate(values[start : start + SEGMENT].tolist()):
            sums[place % 64] += value * value
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [low + high for low, high in zip(sums[:half], sums[half:], strict=True)]
        expected += sums[0]
    assert total(segment_squares(values)) == expected


# What these states are, after three rounds from exact fractions; on every machine.
GOLDEN = {
    "adamw": "210a58cbdcb3e02f",
    "muon": "f6ee313f14723e6e",
    "sgd": "3942e55686beb395",
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
def test_a_short_trajectory_has_the_bits_that_it_always_had(kind: Any) -> None:
    """If this fails after a change, peers of two versions cannot train together."""
    tensors = layout((1000,), (70, 150), (3, 3), (150, 70), (5000,))
    numel = tensors[-1].stop
    draws = np.random.default_rng(7)  # integers: what numpy makes of them for a Gaussian may change
    vectors = draws.integers(-(2**20), 2**20, (4, numel)).astype(np.float32) / np.float32(2**20)
    theta_N, *averages = (torch.from_numpy(vector) for vector in vectors)
    config = GradientConfig(kind=kind, warmup_samples=150, total_samples=1000)
    optimizer = GradientOptimizer(config, tensors)
    state = zeros(optimizer, theta_N)
    for round, average_N in enumerate(averages):
        state = after(optimizer, state, average_N, Position(round=round, samples=100 * round))
    digest = hashlib.sha256(b"".join(vector.numpy().tobytes() for vector in state))
    assert digest.hexdigest()[:16] == GOLDEN[kind]


@both
@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    [
        gradient_kernels._adamw,
        gradient_kernels._momentum,
        gradient_kernels._product,
        gradient_kernels._segment_squares,
        gradient_kernels._sgd,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_no_processor_is_allowed_to_fuse_or_reorder(kernel: kernels.Kernel[...]) -> None:
    """What LLVM may do with these operations on any processor, ARM as well."""
    numba = kernels._numba()
    signature = tuple(kernels._type(numba.types, name) for name in kernel._arguments)
    compiled = numba.njit(signature, nogil=True, error_model="numpy")(kernel._body)
    (code,) = compiled.inspect_llvm().values()
    assert re.search(r"= fmul (float|double|<)", code), "there is something to look at"
    assert not re.search(r"= f\w+ (fast|reassoc|contract|arcp|afn|nnan|ninf|nsz) ", code)
    assert "llvm.fma" not in code  # nor fmuladd


# -- laws ------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.integers(0, 1000), st.integers(0, 2000))
def test_the_schedule_is_the_one_of_local_steps(samples: int, warmup: int, end: int) -> None:
    factor = schedule(samples, warmup_samples=warmup, total_samples=end)
    theirs = inner_schedule(samples, warmup_samples=warmup, total_samples=end)
    assert factor == pytest.approx(theirs, rel=1e-14)
    assert 0 < factor <= 1
    if samples >= warmup:
        later = schedule(samples + 1, warmup_samples=warmup, total_samples=end)
        assert factor >= later >= FLOOR
    if samples >= end > warmup:
        assert factor == pytest.approx(FLOOR)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (30, 30), (20, 90), (90, 20)])
def test_orthogonalising_leaves_singular_values_of_about_one(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    left, values, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    found = orthogonalised(matrix.copy())
    assert found.shape == shape
    ours = np.diag(left.T @ found @ right.T)
    np.testing.assert_allclose((left * ours) @ right, found, atol=1e-4)
    assert ((ours > 0.6) & (ours < 1.3))[values > 0.05 * values[0]].all()
    assert not orthogonalised(np.zeros(shape, np.float32)).any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 6, 7, 100, 200, 300, NUMEL - 1])
def test_says_whether_all_is_finite(kind: Any, clip: float, wild: float, place: int) -> None:
    optimizer = GradientOptimizer(GradientConfig(kind=kind, grad_clip=clip), TENSORS)
    theta_N, average_N = gradients(2)
    before = zeros(optimizer, theta_N)
    out = [torch.empty_like(vector) for vector in before]
    assert optimizer.advance(before, average_N, out, START) is True
    for which in range(1 + len(before)):
        vectors = [vector.clone() for vector in (average_N, *before)]
        if place < len(vectors[which]):
            vectors[which][place] = wild
            assert optimizer.advance(vectors[1:], vectors[0], out, START) is False


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GradientConfig(kind="adamw"), (NUMEL, NUMEL, NUMEL)),
        (GradientConfig(kind="muon"), (NUMEL, NUMEL, 15)),
        (GradientConfig(kind="sgd"), (NUMEL, NUMEL)),
        (GradientConfig(kind="sgd", momentum=0.0), (NUMEL,)),
    ],
    ids=["adamw", "muon", "momentum", "sgd"],
)
def test_how_long_the_vectors_of_a_state_are(
    config: GradientConfig, expected: tuple[int, ...]
) -> None:
    optimizer = GradientOptimizer(config, TENSORS)
    assert optimizer.elementwise is False
    assert optimizer.lengths(NUMEL) == expected
    with pytest.raises(ValueError, match="a state's vectors"):
        optimizer.lengths(NUMEL + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_that_do_not_fit_are_refused_and_nothing_is_written(kind: Any) -> None:
    optimizer = GradientOptimizer(GradientConfig(kind=kind), TENSORS)
    count = len(optimizer.lengths(NUMEL))
    fits = [torch.ones(n) for n in (NUMEL, *optimizer.lengths(NUMEL) * 2)]
    for place, vector in enumerate(fits):
        n = len(vector)
        for wrong in (
            torch.ones(n + 1),
            torch.ones(n, dtype=torch.float64),
            torch.ones(2 * n)[::2],
            torch.ones(n, 1),
            torch.tensor(1.0),
        ):
            vectors = [*fits[:place], wrong, *fits[place + 1 :]]
            with pytest.raises(ValueError, match="a state's vectors"):
                optimizer.advance(vectors[1 : 1 + count], vectors[0], vectors[1 + count :], START)
    assert all(torch.equal(vector, torch.ones_like(vector)) for vector in fits)


@pytest.mark.parametrize("kind", KINDS)
def test_preparing_leaves_nothing_to_compile(kind: Any) -> None:
    GradientOptimizer(GradientConfig(kind=kind), TENSORS).prepare()


def test_tensors_must_fill_the_vector_and_muons_be_matrices() -> None:
    first, second = layout((3,), (4, 5))
    with pytest.raises(ValueError, match="begins at 3, not at 0"):
        GradientOptimizer(GradientConfig(), [second])
    with pytest.raises(ValueError, match="begins at 3, not at 23"):
        GradientOptimizer(GradientConfig(), [first, second, second])
    with pytest.raises(ValueError, match="no matrix"):
        GradientOptimizer(GradientConfig(), [dataclasses.replace(first, matrix=True)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "lion"),
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("adamw_lr", 0.0),
        ("adamw_lr", math.nan),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("momentum", 1.0),
        ("momentum", math.nan),
        ("weight_decay", -0.1),
        ("grad_clip", math.inf),
        ("eps", 0.0),
        ("eps", math.nan),
        ("warmup_samples", -1),
        ("total_samples", -1),
        ("lr", 1e308),
        ("lr", "3"),
        ("lr", None),
        ("lr", True),
        ("adamw_lr", 101.0),
        ("betas", None),
        ("betas", ("a", 0.9)),
        ("betas", (0.9, 10**400)),
        ("momentum", "0.9"),
        ("warmup_samples", 10**400),
        ("warmup_samples", 10**5000),
        ("step_samples", 2**41),
    ],
    ids=lambda value: shown(value)[:20],
)
def test_impossible_constants_are_one_line_config_errors(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"gradient.{field}") as caught:
        GradientConfig(**{field: value})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("total", [1, 10])
def test_a_schedule_that_ends_in_the_warm_up_is_refused(total: int) -> None:
    for kind, error in ((GradientConfig, ConfigError), (OptimizerConfig, ValueError)):
        with pytest.raises(error, match="warmup_samples = 10"):
            kind(warmup_samples=10, total_samples=total)
        kind(warmup_samples=10, total_samples=11)
        kind(warmup_samples=10, total_samples=0)


def test_both_have_the_same_bounds() -> None:
    common = gradient._BOUNDS.keys() & optimizers._BOUNDS.keys()
    assert "lr" in common
    assert all(gradient._BOUNDS[name] == optimizers._BOUNDS[name] for name in common)
