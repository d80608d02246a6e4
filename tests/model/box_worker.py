"""One process of a box, or a whole peer: run by test_box.py, by itself or under torchrun."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from model import box
from model.builders import ModelConfig
from model.data import DataConfig
from model.optimizers import OptimizerConfig
from model.trainer import Trainer, TrainerConfig, TrainingDiverged


def everything(peer: Trainer) -> dict[str, Any]:
    """Use the whole face of a trainer; what came of it."""
    results: dict[str, Any] = {"layout": peer.layout}
    generator = torch.Generator().manual_seed(3)
    peer.write(peer.read() + 0.05 * torch.randn(peer.numel, generator=generator))
    peer.begin_round(0, 1, 2)
    peer.set_progress(40, peers=2)
    results["losses"] = [peer.step().loss for _ in range(4)]
    results["stepped"] = peer.read()
    results["evaluated"] = peer.evaluate()

    peer.write(torch.full((1000,), 0.1), start=500, stop=1500)
    peer.begin_round(1, 0, 1)
    reports = []
    while sum(report.samples for report in reports) < 12:
        reports.append(peer.accumulate())
    results["accumulated"] = sum(report.loss * report.samples for report in reports) / 12
    results["gradient"] = peer.gradient()
    assert torch.equal(results["gradient"], peer.gradient()), "asking changes nothing"
    peer.reset()
    results["loss"] = peer.step().loss
    results["stepped again"] = peer.read()

    good = peer.read()
    bad = good.clone()
    bad[-1] = math.inf
    for go_wrong in (peer.step, peer.accumulate):
        peer.write(bad)
        try:
            go_wrong()
        except TrainingDiverged:
            results[f"diverged in {go_wrong.__name__}"] = torch.equal(peer.read(), bad)
    peer.write(good)
    results["last loss"] = peer.step().loss
    try:
        peer.begin_round(0, 5, 5)
    except ValueError as error:
        results["refused"] = str(error)
    results["evaluated again"] = peer.evaluate()
    return results


def configured(text: str) -> TrainerConfig:
    """What a task is about; in place of a run file, so that rank 0 hands it to the others."""
    task = json.loads(text)
    return TrainerConfig(
        model=ModelConfig(layers=2, width=32, heads=2, context=32),
        data=DataConfig(path=task["corpus"]),
        optimizer=OptimizerConfig(kind=task["kind"]),
        device="cpu",
        eval_blocks=7,
        batch_size=task["batch_size"],
        micro_batch=task["micro_batch"],
    )


def main() -> None:
    """Obey the task in the file that is named on the command line."""
    text = Path(sys.argv[1]).read_text()
    task = json.loads(text)
    torch.set_num_threads(1)
    box.BEAT_S = task.get("beat_s", box.BEAT_S)
    box.PATIENCE_S = task.get("patience_s", box.PATIENCE_S)
    if os.environ.get("RANK", "0") != "0":
        box.follow(configured)
        return
    crew = box.Crew()
    if task["do"] == "nothing":
        crew.close()
        return
    peer = crew.trainer(configured(text), text, lambda: False)
    assert peer is not None
    if task["do"] == "everything":
        torch.save(everything(peer), task["out"])
        crew.close()
        return
    peer.begin_round(0, 0, 1)
    peer.step()
    time.sleep(task["idle_s"])
    peer.step()
    Path(task["out"]).write_text("ready")
    while True:
        time.sleep(0.05)
        if task["do"] == "train":
            peer.step()


if __name__ == "__main__":
    main()
