from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model.builders import ModelConfig, build

CONFIG = ModelConfig(layers=2, width=32, heads=2, context=16)


def randomised() -> torch.nn.Module:
    """A model whose zero-initialised matrices are not zero, so that everything shows."""
    model = build(CONFIG, 0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


def test_first_loss_is_that_of_guessing():
    tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))
    logits = build(CONFIG, 0)(tokens[:, :-1])
    assert logits.shape == (2, 16, 256)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=1e-5)


def test_no_position_sees_a_later_one():
    model = randomised()
    a = torch.arange(16)[None]
    b = a.clone()
    b[0, 9:] = 200
    with torch.no_grad():
        same, other = model(a), model(b)
    assert torch.allclose(same[:, :9], other[:, :9], atol=1e-5)
    assert not torch.allclose(same[:, 9:], other[:, 9:], atol=1e-2)


def test_order_of_the_past_matters():
    model = randomised()
    with torch.no_grad():
        one = model(torch.tensor([[1, 2, 3, 4]]))[:, -1]
        two = model(torch.tensor([[2, 1, 3, 4]]))[:, -1]
    assert not torch.allclose(one, two, atol=1e-2)


def test_more_than_the_context_is_refused():
    with pytest.raises(ValueError, match="context of 16"):
        build(CONFIG, 0)(torch.zeros(1, 17, dtype=torch.long))


def test_every_hidden_matrix_is_two_dimensional_and_neither_end_is_among_them():
    model = build(CONFIG, 0)
    hidden = {id(p) for p in model.hidden_matrices()}
    assert all(p.ndim == 2 for p in model.hidden_matrices())
    rest = [name for name, p in model.named_parameters() if id(p) not in hidden]
    assert rest == ["embedding.weight", "head.weight"]
