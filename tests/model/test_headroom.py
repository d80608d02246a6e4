from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import headroom
from model.headroom import available_bytes, fitting, held_bytes


def test_this_machine_says_what_it_has():
    free = available_bytes()
    assert free is not None
    assert 2**20 < free < 2**50


@pytest.mark.parametrize(
    ("limit", "used", "wanted"),
    [("max", "5", None), ("3000", "1000", 2000), ("1000", "3000", 0), ("nonsense", "1", None)],
)
def test_a_container_may_have_less(tmp_path, monkeypatch, limit, used, wanted):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(headroom, "_CGROUP", tmp_path)
    assert headroom._of_container() == wanted
    if wanted is not None:
        assert available_bytes() == wanted


@given(batch=st.integers(1, 5000), each=st.integers(0, 10**9), free=st.integers(0, 10**12))
def test_the_largest_halving_that_fits(batch, each, free):
    micro = fitting(batch, each, free)
    halvings = [batch]
    while halvings[-1] > 1:
        halvings.append(-(-halvings[-1] // 2))
    fit = [size for size in halvings if 8 * size * each <= free]
    assert micro == max(fit, default=1)
    assert fitting(batch, each, None) == batch


def test_what_a_graph_holds_is_counted_once_and_without_parameters():
    x = torch.ones(100, 10)
    weight = torch.ones(10, 10, requires_grad=True)

    def forward():
        y = x @ weight  # holds x (and weight)
        return (y.exp() * y.exp().view(-1).view(100, 10)).sum()

    # x, and two results of exp, each held by itself and by the product.
    assert held_bytes(forward, [weight]) == 3 * 4000
