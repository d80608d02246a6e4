from __future__ import annotations

import pytest
import torch
from torch import nn

from model.vector import FlatParameters


def test_write_then_read_gives_the_same_bits():
    flat = FlatParameters(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    theta = torch.randn(flat.numel) * 1e-30
    flat.write(theta)
    out = torch.empty(flat.numel)
    assert flat.read(out) is out
    assert out.numpy().tobytes() == theta.numpy().tobytes()


def test_elements_follow_the_modules_order_and_reading_copies():
    module = nn.Linear(2, 1)
    flat = FlatParameters(module)
    flat.write(torch.tensor([1.0, 2.0, 3.0]))
    assert module.weight.tolist() == [[1.0, 2.0]]
    assert module.bias.tolist() == [3.0]
    flat.read().zero_()
    assert module.bias.tolist() == [3.0]


def test_tied_parameters_count_once():
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    module[1].weight = module[0].weight
    flat = FlatParameters(module)
    assert flat.numel == 15
    flat.write(torch.arange(15.0))
    assert module[1].weight[4, 2].item() == 14.0


def test_the_layout_tells_shapes_and_names_apart():
    layouts = [
        FlatParameters(module).layout
        for module in (
            nn.Linear(2, 6, bias=False),
            nn.Linear(6, 2, bias=False),
            nn.Sequential(nn.Linear(2, 6, bias=False)),
        )
    ]
    assert len(set(layouts)) == 3
    assert FlatParameters(nn.Linear(2, 6, bias=False)).layout == layouts[0]


@pytest.mark.parametrize(
    "bad", [torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.zeros(3, 1)]
)
def test_a_vector_that_does_not_fit_changes_nothing(bad):
    flat = FlatParameters(nn.Linear(2, 1))
    before = flat.read()
    with pytest.raises(ValueError, match="is needed"):
        flat.write(bad)
    with pytest.raises(ValueError, match="is needed"):
        flat.read(bad)
    assert torch.equal(flat.read(), before)


def test_what_is_not_float32_is_refused():
    module = nn.Linear(2, 1)
    module.register_parameter("count", nn.Parameter(torch.zeros(1, dtype=torch.long), False))
    with pytest.raises(ValueError, match="count"):
        FlatParameters(module)
    with pytest.raises(ValueError, match="bfloat16"):
        FlatParameters(nn.Linear(2, 1).to(torch.bfloat16))
    with pytest.raises(ValueError, match="no parameters"):
        FlatParameters(nn.ReLU())
