from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

import pytest
import torch

from benchmarks import convergence, recipes
from benchmarks.convergence import run_file
from benchmarks.learning import Task
from benchmarks.lockstep import Failed
from coordinator_free.local import LocalLoop
from model.trainer import Trainer

TASK = Task(
    peers=3,
    seed=1,
    model={"layers": 1, "width": 16, "heads": 1, "context": 16},
    batch=2,
    steps=12,
    every=6,
    eval_blocks=2,
    warmup_steps=2,
    device="cpu",
    optimizer={"kind": "adamw", "lr": 1e-2},
)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dict(convergence.OURS)
    for module in (recipes, convergence):
        monkeypatch.setattr(module, "OURS", known)


def test_a_recipe_is_a_setting_and_what_is_changed_in_it() -> None:
    name = recipes.recipe("shoal-wait,local_steps=6,codec=int4,outer.lr=0.9")
    # `run_file` says 30 steps unless the setting says otherwise.
    assert recipes.OURS[name]["outer"] == {"lr": 0.9}
    assert recipes.OURS[name]["round"]["codec"] == "int4"
    assert recipes.OURS[name]["round"]["fragments"] == 1
    with pytest.raises(ArgumentTypeError, match="none of"):
        recipes.recipe("soal")
    with pytest.raises(ArgumentTypeError, match="only"):
        recipes.recipe("shoal,model.layers=9")


def test_all_peers_work_goes_into_the_average_but_that_of_the_lost() -> None:
    setting = recipes.recipe("shoal-wait,codec=fp32,local_steps=6,outer.kind=sgd,outer.lr=1.0")
    _, config = run_file(setting, TASK)
    handed_in: dict[int, list[torch.Tensor]] = {number: [] for number in range(TASK.peers)}

    class Watched(recipes.Seat):
        def hand_in(self, update_E: torch.Tensor, samples: int) -> bool:
            handed_in[self.number].append(update_E.clone())
            return super().hand_in(update_E, samples)

    first = Trainer(config.trainer)
    trainers = [first, *(Trainer(config.trainer, first.data) for _ in range(TASK.peers - 1))]
    before = first.read()
    table = recipes.Table(config, TASK.peers, before.clone(), lambda: {1})
    table.seats = [Watched(table, number) for number in range(TASK.peers)]
    recipes.play(table, trainers, config)
    assert all(len(each) == 2 for each in handed_in.values())
    assert table._samples == TASK.samples * 2 // 3, "a swarm counts what went into the average"
    for number in range(2):
        before = before - (handed_in[0][number] + handed_in[2][number]) / 2
    torch.testing.assert_close(table.state.theta_N, before, rtol=1e-5, atol=1e-6)


def test_bytes_are_those_of_the_butterfly() -> None:
    setting = recipes.recipe("shoal-wait,codec=fp32,local_steps=6")
    loss, sent = recipes.ours(setting, TASK, lost=0.0)
    assert sent == pytest.approx(2 * 4 * (2 / 3) / 6)
    assert 0 < loss < 6


def test_a_peer_that_fails_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = LocalLoop.stepped

    def fail(self: LocalLoop, samples: int) -> Any:
        if self.round == 1:
            raise ZeroDivisionError
        return stepped(self, samples)

    monkeypatch.setattr(LocalLoop, "stepped", fail)
    with pytest.raises(ZeroDivisionError):
        recipes.ours(recipes.recipe("shoal-wait,local_steps=6"), TASK, lost=0.0)


def test_gradient_mode_is_not_played() -> None:
    with pytest.raises(Failed, match="sync-muon"):
        recipes.ours("shoal-gradient", TASK, lost=0.0)


def test_one_process_stands_for_synchronous_peers() -> None:
    loss, sent = recipes.synchronous(TASK)
    assert sent == pytest.approx(8 * 2 / 3)
    assert 0 < loss < 6
