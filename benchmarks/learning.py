"""Training as the rivals do it in `convergence.py`: a peer's end of the pipe, and what they share.

    peer                              the benchmark
    {"say": "at", "rendezvous": ...}            of the first peer, where the others need it
    {"say": "ready"}                  go        the model is there, and the partners are
    {"say": "mark", ...}                        now and then: validation loss, seconds, samples
    {"say": "done", ...}              end       the last mark

Model, text, shards, update rules, schedule and validation loss are ours, the same code that a peer
of Shoal runs; only who averages what, and when, is the rival's. Seconds count from `go`, without
those in which the validation loss is computed. `wait_s` are the seconds in which this peer could
not compute because it talked to the others, or waited for them to be ready.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.arguments import Parser
from benchmarks.lockstep import Pipe
from model.builders import ModelConfig
from model.optimizers import InnerOptimizer, OptimizerConfig
from model.shards import blocks_of
from model.trainer import Trainer, TrainerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all peers of all systems are to do.

    Attributes:
        peers: how many.
        seed: of initial weights and shards.
        model: fields of `ModelConfig`.
        batch: sequences of one peer in one step.
        steps: of one peer in the whole run.
        every: steps between two looks at the validation loss.
        eval_blocks: validation sequences.
        warmup_steps: linear rise of the learning rate; a cosine follows, down to a tenth.
        device: of the model.
        optimizer: fields of `OptimizerConfig`, without the schedule.
        options: of this system alone.
    """

    peers: int
    seed: int
    model: dict[str, int]
    batch: int
    steps: int
    every: int
    eval_blocks: int
    warmup_steps: int
    device: str
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Sequences that all peers together are to see."""
        return self.peers * self.steps * self.batch

    def arguments(self) -> list[str]:
        """As `peer_arguments` reads them."""
        return ["--task", json.dumps(dataclasses.asdict(self))]

    def schedule(self) -> dict[str, int]:
        """The optimizer's fields for it."""
        # Short trials end before: a schedule that ends in its warm-up is refused.
        warmup = min(self.warmup_steps, self.steps - 1) * self.peers * self.batch
        return {"warmup_samples": warmup, "total_samples": self.samples}


def peer_arguments() -> argparse.Namespace:
    """What every peer is told; `task` is a `Task`."""
    parser = Parser()
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--task", type=lambda text: Task(**json.loads(text)), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--rendezvous", default="")
    return parser.parse_args()


class Learner:
    """One peer's model: gradients, updates, marks."""

    def __init__(self, pipe: Pipe, arguments: argparse.Namespace) -> None:
        task: Task = arguments.task
        torch.set_num_threads(1)
        self._trainer = Trainer(
            TrainerConfig(
                model=ModelConfig(**task.model),
                batch_size=task.batch,
                seed=task.seed,
                device=task.device,
                eval_blocks=task.eval_blocks,
            )
        )
        self.task = task
        self.model = self._trainer.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.wait_s = 0.0
        self._number = arguments.number
        self._pipe = pipe
        self._began = self._evaluating_s = 0.0
        self._optimizer = InnerOptimizer(
            self.parameters,
            self.model.hidden_matrices(),
            OptimizerConfig(**task.optimizer, **task.schedule()),
        )

    def begin(self) -> None:
        """Together with all others."""
        self._trainer.evaluate()  # the first time is slow
        self._pipe.say("ready")
        self._pipe.hear("go")
        self._began = time.monotonic()
        self.look(0)

    def backward(self, step: int, forward: Callable[..., torch.Tensor] | None = None) -> None:
        """Gradients of this peer's batch of a step.

        Args:
            step: from 0.
            forward: in place of the model.
        """
        task, trainer = self.task, self._trainer
        round_, first = divmod(step, task.every)
        seat = task.seed, round_, self._number, task.peers, trainer.n_blocks
        blocks = blocks_of(*seat)
        starts = [
            blocks[(first * task.batch + i) % len(blocks)] * trainer.context
            for i in range(task.batch)
        ]
        rows = [trainer.data.train[start : start + trainer.context + 1] for start in starts]
        rows_BT = torch.stack(rows).to(trainer.device, torch.int64)
        self.model.train()
        for parameter in self.parameters:
            parameter.grad = None
        with torch.autocast("cuda", torch.bfloat16, enabled=trainer.device.type == "cuda"):
            logits_BTV = (forward or self.model)(rows_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self, step: int) -> None:
        """Clip the gradients and apply them."""
        self._optimizer.clip()
        self._optimizer.step((step + 1) * self.task.peers * self.task.batch)

    def look(self, step: int, samples: int | None = None, *, last: bool = False) -> None:
        """Compute the validation loss and tell it.

        Args:
            step: how many this peer has behind it.
            samples: that all peers have seen; by default those of so many steps.
            last: whether that was the last.
        """
        now = time.monotonic()
        wall_s = now - self._began - self._evaluating_s
        loss = self._trainer.evaluate()
        self._evaluating_s += time.monotonic() - now
        self._pipe.say(
            "done" if last else "mark",
            step=step,
            samples=step * self.task.peers * self.task.batch if samples is None else samples,
            val_loss=loss if math.isfinite(loss) else None,
            wall_s=wall_s,
            wait_s=self.wait_s,
        )

    def end(self) -> None:
        """Wait until all are done."""
        self._pipe.hear("end")
