from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from model import optimizers
from model.optimizers import (
    SGD,
    AdamW,
    InnerOptimizer,
    Muon,
    OptimizerConfig,
    ScheduleFree,
    orthogonalise,
    schedule,
)


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("products_in", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_orthogonalise_keeps_directions_and_evens_out_singular_values(
    shape, products_in, bound, monkeypatch
):
    monkeypatch.setattr(optimizers, "_products_in", lambda device_type: products_in)
    matrix = gradients(shape, 1)[0] * 1e-3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    assert result.dtype == matrix.dtype
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    assert values.median() > 0.6
    # In the basis of the original's singular vectors the result is diagonal.
    core = u.mT @ result @ v.mT
    assert (core - torch.diag(core.diagonal())).abs().max() < bound


def test_orthogonalise_of_nothing_is_nothing():
    assert torch.equal(orthogonalise(torch.zeros(4, 8)), torch.zeros(4, 8))


def test_adamw_is_torchs():
    ours = nn.Parameter(gradients((6, 5), 1)[0])
    theirs = nn.Parameter(ours.detach().clone())
    rule = AdamW([ours], betas=(0.9, 0.99), weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient in gradients((6, 5), 20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        rule.step(1e-2)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muon_is_torchs(shape):
    start = gradients(shape, 1)[0]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    rule = Muon([ours], momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for gradient in gradients(shape, 10):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        rule.step(0.02)
        reference.step()
    moved = (theirs - start).norm()
    # Theirs orthogonalises in bf16 (three digits), ours as the machine does it fast.
    assert (ours - theirs).norm() < 0.03 * moved


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs(momentum, nesterov):
    if nesterov and not momentum:
        pytest.skip("torch refuses it")
    ours = nn.Parameter(gradients((6, 5), 1)[0])
    theirs = nn.Parameter(ours.detach().clone())
    rule = SGD([ours], momentum=momentum, nesterov=nesterov, weight_decay=0.0)
    reference = torch.optim.SGD([theirs], lr=1e-2, momentum=momentum, nesterov=nesterov)
    for gradient in gradients((6, 5), 20):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        rule.step(1e-2)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_sgds_decay_is_decoupled():
    ours = nn.Parameter(torch.ones(2, 2))
    rule = SGD([ours], momentum=0.9, nesterov=True, weight_decay=0.5)
    for _ in range(2):
        ours.grad = torch.zeros(2, 2)
        rule.step(0.1)
    assert ours.tolist() == [[pytest.approx(0.95**2)] * 2] * 2


def test_schedulefree_is_the_authors():
    """Six steps on f(p) = sum(p^4) / 4, with a warm-up of three.

    The numbers are those of `schedulefree` 1.4.1, AdamWScheduleFree(lr=0.1, betas=(0.9, 0.99),
    weight_decay=0.1, warmup_steps=3), on float64: x after each step.
    """
    golden = [
        [0.9633333336667, -1.9600000000417, 0.4650000026667, 2.9566666666790],
        [0.9079121512115, -1.8978449074797, 0.4152211026824, 2.8887349409353],
        [0.8390636408450, -1.8169147376271, 0.3594459255291, 2.7989612374525],
        [0.7929859996635, -1.7594589720779, 0.3263084387488, 2.7340100617645],
        [0.7527250061132, -1.7071781811465, 0.2995329522411, 2.6741323522376],
        [0.7159434287817, -1.6577215745106, 0.2765599312581, 2.6168389713872],
    ]
    ours = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    rule = ScheduleFree([ours], betas=(0.9, 0.99), weight_decay=0.1)
    for step, wanted in enumerate(golden):
        with rule.gradient_point():
            ours.grad = ours.detach() ** 3
        rule.step(0.1 * min(1.0, (step + 1) / 3))
        assert ours.flatten().tolist() == pytest.approx(wanted, rel=1e-12)


def test_schedulefree_takes_gradients_ahead_of_the_average_and_comes_back_bit_for_bit():
    p = nn.Parameter(torch.randn(3, 4))
    rule = ScheduleFree([p], betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        p.grad = torch.randn(3, 4)
        rule.step(0.1)
    x = p.detach().clone()
    with rule.gradient_point():
        y = p.detach().clone()
    assert not torch.equal(x, y)
    assert torch.equal(p, x)
    # Whoever overwrites the average moves the point for gradients along.
    with torch.no_grad():
        p += 1.0
    with rule.gradient_point():
        torch.testing.assert_close(p.detach(), y + 1.0)


def test_decay_spares_vectors_and_parameters_without_gradient_stay():
    matrix, vector, idle = (nn.Parameter(torch.ones(s)) for s in [(2, 2), (2,), (2, 2)])
    rule = AdamW([matrix, vector, idle], betas=(0.9, 0.99), weight_decay=0.5)
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    rule.step(0.1)
    assert matrix.tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert vector.tolist() == [1.0, 1.0]
    assert idle.tolist() == [[1.0, 1.0]] * 2


def test_muon_takes_the_hidden_matrices_alone():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False))
    hidden = [model[1].weight]
    twin = copy.deepcopy(model)
    config = OptimizerConfig(kind="muon", warmup_samples=0, joiner_warmup_steps=0, weight_decay=0.0)
    optimizer = InnerOptimizer(model.parameters(), hidden, config)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(0)
    # Adam's first step moves every element by its rate; Muon's by lr times a rank-one matrix of
    # norm about one, here 1/4 in each element.
    moved_embedding = (twin[0].weight - model[0].weight).abs()
    moved_matrix = (twin[1].weight - model[1].weight).abs()
    assert moved_embedding.max().item() == pytest.approx(config.adamw_lr, rel=1e-3)
    assert moved_matrix.max() < 0.015 / 4 * 1.3


def test_clipping():
    p = nn.Parameter(torch.zeros(4))
    for limit, left in [(1.0, 1.0), (100.0, 6.0), (0.0, 6.0)]:
        p.grad = torch.full((4,), 3.0)
        optimizer = InnerOptimizer([p], [], OptimizerConfig(kind="adamw", grad_clip=limit))
        assert optimizer.clip() == pytest.approx(6.0)
        assert p.grad.norm().item() == pytest.approx(left, rel=1e-5)
    p.grad = torch.full((4,), math.nan)
    assert math.isnan(optimizer.clip())


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd", "schedulefree"])
def test_after_a_reset_nothing_is_left_of_earlier_steps(kind):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    twin = copy.deepcopy(model)
    config = OptimizerConfig(kind=kind)
    used, fresh = (
        InnerOptimizer(module.parameters(), [module[1].weight], config) for module in (model, twin)
    )
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        used.step(1000)
    used.reset()
    twin.load_state_dict(model.state_dict())
    for _ in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        used.step(1000)
        fresh.step(1000)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("samples", "wanted"), [(1000, [0.25, 0.5, 0.75, 1.0, 1.0]), (30, [0.25, 0.3])]
)
def test_a_joiner_warms_up_by_its_own_steps_and_never_beyond_the_swarm(samples, wanted):
    p = nn.Parameter(torch.zeros(1))
    config = OptimizerConfig(
        kind="sgd", lr=1.0, momentum=0.0, nesterov=False, warmup_samples=100, joiner_warmup_steps=4
    )
    optimizer = InnerOptimizer([p], [], config)
    for _ in range(2):
        for factor in wanted:
            before = p.item()
            p.grad = -torch.ones(1)
            optimizer.step(samples)
            assert p.item() - before == pytest.approx(factor)
        optimizer.reset()


def test_schedule_warms_up_then_follows_the_cosine_to_a_tenth():
    def at(samples: int) -> float:
        return schedule(samples, warmup_samples=10, total_samples=110)

    assert at(1) == pytest.approx(0.1)
    assert at(9) == pytest.approx(0.9)
    assert at(10) == 1.0
    assert at(60) == pytest.approx(0.55)
    assert at(110) == at(10**12) == pytest.approx(0.1)


@given(
    samples=st.integers(0, 10**12),
    more=st.integers(0, 10**9),
    warmup=st.integers(0, 10**9),
    total=st.integers(0, 10**12),
    floor=st.floats(0.001, 1),
)
def test_schedule_stays_in_bounds_and_turns_once(samples, more, warmup, total, floor):
    def at(place: int) -> float:
        return schedule(place, warmup_samples=warmup, total_samples=total, floor=floor)

    now, later = at(samples), at(samples + more)
    assert 0 < now <= 1
    if samples + more <= warmup:
        assert now <= later
    if samples >= warmup:
        assert now >= later >= floor * (1 - 1e-9)
        if not total:
            assert now == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "rmsprop"},
        {"warmup_samples": -1},
        {"joiner_warmup_steps": -1},
        {"lr": -1.0},
        {"lr": math.nan},
        {"adamw_lr": 0.0},
        {"momentum": 1.0},
        {"betas": (0.9, 2.0)},
        {"grad_clip": -1.0},
        {"lr": 1e308},
        {"lr": 10**400},
        {"lr": "3"},
        {"betas": None},
        {"betas": (0.9, "x")},
        {"weight_decay": 101},
        {"total_samples": 128},
    ],
)
def test_a_wrong_field_is_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OptimizerConfig(**fields)
