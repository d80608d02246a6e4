from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free import kernels
from coordinator_free.optimizer import Position
from coordinator_free.outer import SEGMENT, OuterConfig, OuterOptimizer
from dht.errors import ConfigError

START = Position(round=0, samples=0)


@pytest.fixture(params=["numba", "torch"], scope="module", autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of this file runs on both."""
    with contextlib.ExitStack() as stack:
        if request.param == "torch":
            stack.enter_context(kernels.torch_only())
        elif not kernels.compiled():
            pytest.skip("numba is not installed")
        yield request.param


def numpy_step(
    theta: np.ndarray, m: np.ndarray, delta: np.ndarray, config: OuterConfig
) -> tuple[np.ndarray, np.ndarray]:
    lr, momentum = np.float32(config.lr), np.float32(config.momentum)
    m = momentum * m
    m = m + delta
    ahead = momentum * m
    ahead = ahead + delta
    ahead = lr * ahead
    return theta - ahead, m


def after(
    outer: OuterOptimizer, before: Sequence[torch.Tensor], delta: torch.Tensor
) -> list[torch.Tensor]:
    """Where one step leads, in fresh memory."""
    out = [torch.full_like(vector, 7.0) for vector in before]
    outer.advance(before, delta, out, START)
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 300),
    lr=st.floats(1e-3, 2.0),
    momentum=st.floats(0.0, 0.99),
    spread=st.integers(-20, 20),
)
@settings(deadline=None)
def test_bit_for_bit_the_same_as_numpy_operation_by_operation(
    seed: int, n: int, lr: float, momentum: float, spread: int
) -> None:
    config = OuterConfig(lr=lr, momentum=momentum)
    rng = np.random.default_rng(seed)
    theta, m, delta = (
        (rng.standard_normal(n) * 2.0**exponent).astype(np.float32)
        for exponent in (0, spread, spread)
    )
    *state, delta_t = (torch.from_numpy(v.copy()) for v in (theta, m, delta))
    for _ in range(3):
        state = after(OuterOptimizer(config), state, delta_t)
        theta, m = numpy_step(theta, m, delta, config)
    assert state[0].numpy().tobytes() == theta.tobytes()
    assert state[1].numpy().tobytes() == m.tobytes()
    assert delta_t.numpy().tobytes() == delta.tobytes()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 300), lr=st.floats(1e-3, 2.0))
@settings(deadline=None)
def test_without_momentum_bit_for_bit_the_same_as_numpy(seed: int, n: int, lr: float) -> None:
    theta, delta = np.random.default_rng(seed).standard_normal((2, n)).astype(np.float32)
    outer = OuterOptimizer(OuterConfig(kind="sgd", lr=lr))
    (moved,) = after(outer, [torch.from_numpy(theta)], torch.from_numpy(delta))
    assert moved.numpy().tobytes() == (theta - delta * np.float32(lr)).tobytes()


def test_how_long_the_vectors_of_a_state_are() -> None:
    assert OuterOptimizer(OuterConfig()).lengths(5) == (5, 5)
    assert OuterOptimizer(OuterConfig(kind="sgd")).lengths(5) == (5,)


@pytest.mark.parametrize("kind", ["nesterov", "sgd"])
def test_where_the_vector_is_cut_does_not_show(kind: Literal["nesterov", "sgd"]) -> None:
    """Nor anything outside the memory that is given; and what is given is not changed."""
    outer = OuterOptimizer(OuterConfig(kind=kind))
    n = 2 * SEGMENT + 1001
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(n, generator=generator) for _ in range(3)]
    copies = [vector.clone() for vector in vectors]
    delta, before = vectors[0], vectors[1 : 1 + len(outer.lengths(n))]
    whole = after(outer, before, delta)
    memory = torch.full((len(before), n + 2), 7.0)
    cuts = [0, 0, 1, 1000, SEGMENT, SEGMENT + 3, n]
    for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        out = [vector[1:-1][part] for vector in memory]
        assert outer.advance([v[part] for v in before], delta[part], out, START)
    assert torch.equal(memory[:, 1:-1], torch.stack(whole))
    assert (memory[:, [0, -1]] == 7).all()
    assert all(torch.equal(a, b) for a, b in zip(vectors, copies, strict=True))


def test_nothing_is_fused() -> None:
    """In any lane of a vector unit, nor after the last whole one."""
    n = 10 * SEGMENT + 77
    generator = torch.Generator().manual_seed(4)
    theta, m, delta = (torch.randn(n, generator=generator) for _ in range(3))
    after_theta, after_m = (
        v.numpy() for v in after(OuterOptimizer(OuterConfig()), (theta, m), delta)
    )
    expected_theta, expected_m = numpy_step(theta.numpy(), m.numpy(), delta.numpy(), OuterConfig())
    assert after_theta.tobytes() == expected_theta.tobytes()
    assert after_m.tobytes() == expected_m.tobytes()
    # A product of two float32 is exact in float64, so this is what a fused multiply-add gives.
    momentum = np.float64(np.float32(OuterConfig().momentum))
    fused_m = (momentum * m.numpy() + delta.numpy()).astype(np.float32)
    for lane in range(64):
        assert (fused_m != expected_m)[lane::64].any(), "the test cannot tell"


@pytest.mark.parametrize("kind", ["nesterov", "sgd"])
def test_follows_torchs_own_sgd(kind: Literal["nesterov", "sgd"]) -> None:
    nesterov = kind == "nesterov"
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(1000, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    reference = torch.optim.SGD(
        [parameter], lr=0.7, momentum=0.6 if nesterov else 0.0, nesterov=nesterov
    )
    state = [theta, torch.zeros(1000)] if nesterov else [theta]
    for _ in range(20):
        delta = torch.randn(1000, generator=generator)
        state = after(OuterOptimizer(OuterConfig(kind=kind)), state, delta)
        parameter.grad = delta.clone()
        reference.step()
    torch.testing.assert_close(state[0], parameter.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "which"),
    [("nesterov", 0), ("nesterov", 1), ("nesterov", 2), ("sgd", 0), ("sgd", 1)],
    ids=["nesterov-delta", "nesterov-theta", "nesterov-m", "sgd-delta", "sgd-theta"],
)
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
@pytest.mark.parametrize("place", [0, 15, 16, 70, SEGMENT - 1, SEGMENT, SEGMENT + 2])
def test_says_whether_all_is_finite(
    kind: Literal["nesterov", "sgd"], which: int, wild: float, place: int
) -> None:
    outer = OuterOptimizer(OuterConfig(kind=kind, lr=2.0, momentum=0.9))
    vectors = [torch.full((SEGMENT + 3,), 0.5) for _ in range(1 + len(outer.lengths(1)))]
    out = [torch.empty_like(vector) for vector in vectors[1:]]
    assert outer.advance(vectors[1:], vectors[0], out, START) is True
    vectors[which][place] = wild
    if which == 1 and math.isfinite(wild):
        vectors[0][place] = -wild  # alone, so large a parameter stays one
    assert outer.advance(vectors[1:], vectors[0], out, START) is False
    assert not all(bool(torch.isfinite(v).all()) for v in out)


@pytest.mark.parametrize("kind", ["nesterov", "sgd"])
def test_preparing_leaves_nothing_to_compile(kind: Literal["nesterov", "sgd"]) -> None:
    OuterOptimizer(OuterConfig(kind=kind)).prepare()


def test_a_slice_that_does_not_fit_changes_nothing() -> None:
    fits = [torch.ones(4) for _ in range(5)]
    outer = OuterOptimizer(OuterConfig())
    wrong = (
        torch.ones(3),
        torch.ones(4, dtype=torch.float64),
        torch.ones(8)[::2],
        torch.ones(2, 2),
        torch.tensor(1.0),
    )
    for place, vector in itertools.product(range(5), wrong):
        theta, m, delta, out_theta, out_m = [*fits[:place], vector, *fits[place + 1 :]]
        with pytest.raises(ValueError, match="a state's vectors"):
            outer.advance((theta, m), delta, (out_theta, out_m), START)
    for kind, count in (("nesterov", 1), ("sgd", 2)):
        with pytest.raises(ValueError, match="a state's vectors"):
            OuterOptimizer(OuterConfig(kind=kind)).advance(
                fits[:count], fits[2], fits[3 : 3 + count], START
            )
    assert all(torch.equal(vector, torch.ones(4)) for vector in fits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "adam"),
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", math.nan),
        ("momentum", 0.9999),
        ("momentum", None),
        ("lr", 1e308),
        ("lr", 10**400),
        ("lr", "3"),
    ],
)
def test_impossible_constants_are_one_line_config_errors(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"outer.{field}"):
        OuterConfig(**{field: value})
