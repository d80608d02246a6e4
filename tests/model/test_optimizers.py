from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from model.optimizers import AdamW, InnerOptimizer, Muon, OptimizerConfig, orthogonalise, schedule


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_orthogonalise_keeps_directions_and_evens_out_singular_values(shape):
    matrix = gradients(shape, 1)[0] * 1e-3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    assert values.median() > 0.6
    # In the basis of the original's singular vectors the result is diagonal.
    core = u.mT @ result @ v.mT
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-3


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
    # Theirs orthogonalises in bf16 (three digits), ours in fp32 on the CPU.
    assert (ours - theirs).norm() < 0.03 * moved


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
    config = OptimizerConfig(kind="muon", warmup_steps=0, weight_decay=0.0)
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


def test_schedule_warms_up_then_follows_the_cosine_to_a_tenth():
    def at(step: int) -> float:
        return schedule(step, warmup_steps=10, total_steps=110)

    assert at(0) == pytest.approx(0.1)
    assert at(9) == at(10) == 1.0
    assert at(60) == pytest.approx(0.55)
    assert at(110) == at(10**9) == pytest.approx(0.1)
    assert all(at(s) >= at(s + 1) for s in range(10, 120))


def test_schedule_of_an_endless_run_is_constant_after_warm_up():
    assert schedule(0, warmup_steps=0, total_steps=0) == 1.0
    assert schedule(10**9, warmup_steps=10, total_steps=0) == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "sgd"},
        {"lr": -1.0},
        {"lr": math.nan},
        {"adamw_lr": 0.0},
        {"momentum": 1.0},
        {"betas": (0.9, 2.0)},
        {"grad_clip": -1.0},
    ],
)
def test_a_wrong_field_is_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OptimizerConfig(**fields)
