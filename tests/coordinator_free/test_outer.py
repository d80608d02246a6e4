from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free import kernels
from coordinator_free.outer import SEGMENT, NesterovOuter, OuterConfig
from dht.errors import ConfigError


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
    theta_t, m_t, delta_t = (torch.from_numpy(v.copy()) for v in (theta, m, delta))
    for _ in range(3):
        NesterovOuter(config).step(theta_t, m_t, delta_t)
        theta, m = numpy_step(theta, m, delta, config)
    assert theta_t.numpy().tobytes() == theta.tobytes()
    assert m_t.numpy().tobytes() == m.tobytes()
    assert delta_t.numpy().tobytes() == delta.tobytes()


def test_where_the_vector_is_cut_does_not_show() -> None:
    n = 2 * SEGMENT + 1001
    generator = torch.Generator().manual_seed(1)
    theta, m, delta = (torch.randn(n, generator=generator) for _ in range(3))
    outer = NesterovOuter(OuterConfig())
    whole_theta, whole_m = theta.clone(), m.clone()
    outer.step(whole_theta, whole_m, delta)
    for start in range(0, n, 12_345):
        part = slice(start, start + 12_345)
        outer.step(theta[part], m[part], delta[part])
    assert torch.equal(theta, whole_theta)
    assert torch.equal(m, whole_m)


def test_nothing_is_fused() -> None:
    """In any lane of a vector unit, nor after the last whole one."""
    n = 10 * SEGMENT + 77
    generator = torch.Generator().manual_seed(4)
    theta, m, delta = (torch.randn(n, generator=generator) for _ in range(3))
    after_theta, after_m = (
        v.numpy() for v in NesterovOuter(OuterConfig()).preview(theta, m, delta)
    )
    expected_theta, expected_m = numpy_step(theta.numpy(), m.numpy(), delta.numpy(), OuterConfig())
    assert after_theta.tobytes() == expected_theta.tobytes()
    assert after_m.tobytes() == expected_m.tobytes()
    # A product of two float32 is exact in float64, so this is what a fused multiply-add gives.
    momentum = np.float64(np.float32(OuterConfig().momentum))
    fused_m = (momentum * m.numpy() + delta.numpy()).astype(np.float32)
    for lane in range(64):
        assert (fused_m != expected_m)[lane::64].any(), "the test cannot tell"


def test_follows_torchs_own_nesterov_sgd() -> None:
    generator = torch.Generator().manual_seed(2)
    theta = torch.randn(1000, generator=generator)
    m = torch.zeros(1000)
    parameter = torch.nn.Parameter(theta.clone())
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.6, nesterov=True)
    outer = NesterovOuter(OuterConfig())
    for _ in range(20):
        delta = torch.randn(1000, generator=generator)
        outer.step(theta, m, delta)
        parameter.grad = delta.clone()
        reference.step()
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-5, atol=1e-5)


def test_preview_is_the_step_and_touches_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(SEGMENT + 3, generator=generator) for _ in range(3)]
    before = [v.clone() for v in vectors]
    outer = NesterovOuter(OuterConfig(lr=0.3, momentum=0.9))
    theta_after, m_after = outer.preview(*vectors)
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))
    outer.step(*vectors)
    assert torch.equal(vectors[0], theta_after)
    assert torch.equal(vectors[1], m_after)


def test_preview_into_slices_of_given_memory() -> None:
    generator = torch.Generator().manual_seed(5)
    n = SEGMENT + 3
    vectors = [torch.randn(n, generator=generator) for _ in range(3)]
    before = [v.clone() for v in vectors]
    outer = NesterovOuter(OuterConfig())
    theta_after, m_after = outer.preview(*vectors)
    memory = torch.full((2, n + 2), 7.0)
    out = memory[0, 1:-1], memory[1, 1:-1]
    for start, stop in ((0, 0), (0, 1), (1, 1000), (1000, SEGMENT), (SEGMENT, n)):
        parts = [v[start:stop] for v in vectors]
        part_out = out[0][start:stop], out[1][start:stop]
        written = outer.preview(*parts, out=part_out)
        assert written[0] is part_out[0]
        assert written[1] is part_out[1]
    assert torch.equal(out[0], theta_after)
    assert torch.equal(out[1], m_after)
    assert (memory[:, [0, -1]] == 7).all()
    assert all(torch.equal(a, b) for a, b in zip(vectors, before, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["theta", "m", "delta"])
@pytest.mark.parametrize("wild", [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38])
@pytest.mark.parametrize("place", [0, 15, 16, 70, SEGMENT - 1, SEGMENT, SEGMENT + 2])
def test_says_whether_all_is_finite(which: int, wild: float, place: int) -> None:
    outer = NesterovOuter(OuterConfig(lr=2.0, momentum=0.9))
    vectors = [torch.full((SEGMENT + 3,), 0.5) for _ in range(3)]
    assert outer.advance(*vectors, out=(torch.empty_like(vectors[0]), vectors[1].clone())) is True
    vectors[which][place] = wild
    if which == 0 and math.isfinite(wild):
        vectors[2][place] = -wild  # alone, so large a parameter stays one
    out = torch.empty_like(vectors[0]), torch.empty_like(vectors[1])
    finite = all(bool(torch.isfinite(v).all()) for v in outer.preview(*vectors))
    assert outer.advance(*vectors, out=out) is finite
    assert outer.step(*vectors) is finite
    assert finite is False  # all of these overflow in the end


def test_preparing_leaves_nothing_to_compile() -> None:
    NesterovOuter(OuterConfig()).prepare()


def test_a_slice_that_does_not_fit_changes_nothing() -> None:
    theta, m = torch.ones(4), torch.ones(4)
    outer = NesterovOuter(OuterConfig())
    for delta in (torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(8)[::2]):
        with pytest.raises(ValueError, match="outer vectors"):
            outer.step(theta, m, delta)
        with pytest.raises(ValueError, match="outer vectors"):
            outer.advance(theta, m, torch.ones(4), out=(theta.clone(), delta))
    assert torch.equal(theta, torch.ones(4))
    assert torch.equal(m, torch.ones(4))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", math.nan),
    ],
)
def test_impossible_constants_are_one_line_config_errors(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"outer.{field}"):
        OuterConfig(**{field: value})
