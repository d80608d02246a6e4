"""`SwarmCallback` in a `transformers.Trainer`: a real session in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coordinator_free import Recipe, SwarmCallback
from coordinator_free.config import RoundConfig
from coordinator_free.pace import LocalConfig
from dht.errors import ConfigError

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
RATE = 0.1


class Line(nn.Module):
    """Learns a number."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": ((inputs * self.slope - labels) ** 2).mean()}


class Watched(torch.optim.SGD):
    """Remembers the learning rate of every step; fails at the one that it is told."""

    def __init__(self, model: nn.Module, fails_at: int = 0) -> None:
        super().__init__(model.parameters(), lr=RATE)
        self.rates: list[float] = []
        self.fails_at = fails_at

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        if len(self.rates) == self.fails_at:
            raise RuntimeError("out of luck")
        return super().step(closure)


def trainer_of(swarm: SwarmCallback, optimizer: Watched, model: Line, folder: Path) -> Any:
    rows = [{"inputs": torch.ones(1), "labels": torch.ones(1)} for _ in range(64)]
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=1000,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=[swarm], optimizers=(optimizer, constant)
    )


RECIPE = Recipe(round=RoundConfig(codec="fp32", rounds=5), local=LocalConfig(local_steps=3))


def test_the_run_ends_the_training_and_its_schedule_sets_the_rates(tmp_path: Path) -> None:
    asked: list[int] = []

    def half(samples: int) -> float:
        asked.append(samples)
        return 0.5

    model = Line()
    optimizer = Watched(model)
    swarm = SwarmCallback(recipe=RECIPE, schedule=half, host="127.0.0.1")
    trainer_of(swarm, optimizer, model, tmp_path).train()
    assert (swarm.rounds, swarm.swarm) == (5, None)
    assert asked == [4 * (n + 1) for n in range(15)], "alone, the swarm's samples are one's own"
    assert optimizer.rates == [RATE / 2] * 15
    assert optimizer.param_groups[0]["lr"] == RATE
    assert 0.5 < model.slope.item() < 1.5


def test_who_fails_in_the_middle_leaves_and_can_begin_anew(tmp_path: Path) -> None:
    model = Line()
    optimizer = Watched(model, fails_at=4)
    swarm = SwarmCallback(recipe=RECIPE, schedule=lambda samples: 0.5, host="127.0.0.1")
    trainer = trainer_of(swarm, optimizer, model, tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    first = swarm.swarm
    assert first is not None
    assert first.link
    swarm.close()
    assert optimizer.param_groups[0]["lr"] == RATE, "what a step had changed is as it was"
    assert first.step().over
    trainer.train()
    assert (swarm.rounds, swarm.swarm) == (5, None)


def test_a_trainer_of_several_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Line()
    swarm = SwarmCallback(host="127.0.0.1")
    trainer = trainer_of(swarm, Watched(model), model, tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ConfigError, match="use one process"):
        swarm.on_train_begin(trainer.args, trainer.state, trainer.control)
