from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordinator_free.tensors import FlatTensors
from dht.errors import ConfigError


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def loss_of(net: nn.Module, inputs: Tensor) -> Tensor:
    return F.mse_loss(net(inputs), inputs[:, :4].cumsum(1))


class Talker(nn.Module):
    """As `transformers` builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def whole(flat: FlatTensors) -> Tensor:
    return flat.read(torch.empty(flat.numel), start=0, stop=flat.numel)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("half", torch.zeros(3, dtype=torch.bfloat16))], "half is torch.bfloat16: keep"),
        ([], "no parameters"),
        ([("nothing", torch.zeros(0))], "no parameters"),
        ([("a", torch.zeros(3)), ("a", torch.zeros(4))], "there twice"),
        ([("a", same := torch.zeros(3)), ("b", same)], "there twice"),
        (list(model().parameters()), "named_parameters"),
    ],
)
def test_what_cannot_be_averaged_is_refused(tensors: list[object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FlatTensors(tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (10, 11), (31, 290), (256, 300)])
def test_a_span_is_read_and_written_alone(start: int, stop: int) -> None:
    flat = FlatTensors([("a", torch.randn(32, 8)), ("b", torch.randn(60))])
    before_N = whole(flat)
    flat.write(torch.arange(float(stop - start)), start=start, stop=stop)
    after_N = whole(flat)
    assert torch.equal(after_N[start:stop], torch.arange(float(stop - start)))
    assert torch.equal(after_N[:start], before_N[:start])
    assert torch.equal(after_N[stop:], before_N[stop:])


@pytest.mark.parametrize(("start", "stop"), [(0, 384), (0, 100), (17, 250)])
def test_the_order_in_memory_makes_no_difference(start: int, stop: int) -> None:
    net = nn.Conv2d(4, 32, (3, 1))
    flat = FlatTensors([("weight", net.weight)])
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not net.weight.is_contiguous()
    expected_N = net.weight.detach().reshape(-1).clone()
    assert torch.equal(whole(flat), expected_N)
    expected_N[start:stop] = torch.arange(float(stop - start))
    flat.write(expected_N[start:stop].clone(), start=start, stop=stop)
    assert torch.equal(net.weight.detach().reshape(-1), expected_N)


def test_gradients_are_means_over_all_samples() -> None:
    net = model()
    flat = FlatTensors(net)
    batches = torch.randn(2, 4, 8)
    for inputs in batches:
        loss_of(net, inputs).backward()
        flat.accumulate(4)
    assert all(p.grad is None for p in net.parameters())
    mean_N = flat.gradient(torch.empty(flat.numel))
    loss_of(net, batches.view(8, 8)).backward()
    expected_N = torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])
    assert torch.allclose(mean_N, expected_N, atol=1e-6)


def test_sparse_gradients_and_none_are_added_up_as_others() -> None:
    net = nn.ModuleList([nn.Embedding(6, 2, sparse=True), nn.Linear(2, 2)])
    flat = FlatTensors(net)
    net[0](torch.tensor([1, 1, 4])).sum().backward()
    flat.accumulate(2)
    mean_N = flat.gradient(torch.empty(flat.numel))
    assert mean_N.tolist() == [0, 0, 2, 2, 0, 0, 0, 0, 1, 1, 0, 0] + [0] * 6


def test_muon_takes_hidden_matrices_alone() -> None:
    net = Talker()
    assert [s.name for s in FlatTensors(net).specs() if s.matrix] == ["hidden.weight"]
    named = list(net.named_parameters())
    chosen = FlatTensors(named, [net.hidden.weight, net.head.weight])
    assert [s.name for s in chosen.specs() if s.matrix] == ["hidden.weight", "head.weight"]
    assert len([s for s in FlatTensors(named).specs() if s.matrix]) == 3
    with pytest.raises(ConfigError, match="no matrix of this model"):
        FlatTensors(net, [net.hidden.bias])


def test_what_is_frozen_is_left_alone_and_all_have_to_agree_on_it_in_one_step() -> None:
    net, frozen = model(), model()
    frozen[0].weight.requires_grad_(False)
    (weight, *others) = FlatTensors(frozen).specs()
    assert (weight.matrix, weight.decay) == (False, False)
    assert [spec.decay for spec in others] == [False, True, False]
    one, two = FlatTensors(net), FlatTensors(frozen)
    assert one.layout(in_step=False) == two.layout(in_step=False)
    assert one.layout(in_step=True) != two.layout(in_step=True)
