"""A corpus and a model small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.builders import ModelConfig
from model.data import DataConfig
from model.trainer import Trainer, TrainerConfig


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    lines = [f"the {i % 7} quick brown foxes jump over {i % 11} lazy dogs\n" for i in range(800)]
    file.write_text("".join(lines))
    return file


@pytest.fixture
def tiny(corpus: Path) -> TrainerConfig:
    return TrainerConfig(
        model=ModelConfig(layers=2, width=32, heads=2, context=32),
        data=DataConfig(path=str(corpus)),
        batch_size=4,
        eval_blocks=8,
        device="cpu",
    )


@pytest.fixture
def trainer(tiny: TrainerConfig) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        made = Trainer(replace(tiny, **changes))
        made.begin_round(0, 0, 1)
        return made

    return make
