from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    transposed=st.booleans(),
    data=st.data(),
)
def test_a_span_is_a_piece_of_the_whole_and_touches_nothing_else(shapes, transposed, data):
    module = nn.Module()
    for index, shape in enumerate(shapes):
        p = torch.randn(shape)
        p = p.mT.contiguous().mT if transposed and p.ndim >= 2 else p
        module.register_parameter(f"p{index}", nn.Parameter(p))
    flat = FlatParameters(module)
    start = data.draw(st.integers(0, flat.numel))
    stop = data.draw(st.integers(start, flat.numel))
    whole = flat.read()
    assert torch.equal(flat.read(start=start, stop=stop), whole[start:stop])
    whole[start:stop] = torch.randn(stop - start)
    out = torch.empty(stop - start)
    flat.write(whole[start:stop], start=start, stop=stop)
    assert flat.read(out, start=start, stop=stop) is out
    assert torch.equal(out, whole[start:stop])
    assert torch.equal(flat.read(), whole)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4), (4, None)])
def test_a_span_that_does_not_exist_is_refused(start, stop):
    flat = FlatParameters(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="no span of a vector of 3"):
        flat.read(start=start, stop=stop)
    with pytest.raises(ValueError, match="no span of a vector of 3"):
        flat.write(torch.zeros(2), start=start, stop=stop)
