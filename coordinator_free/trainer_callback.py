"""A `transformers.Trainer` that trains with a swarm: one callback more.

    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[SwarmCallback()])
    trainer.train()

Every optimizer step of the Trainer is a local step; its samples are those of all devices and
accumulated batches of this process (a shorter batch at an epoch's end counts as a whole one). The
state of the swarm replaces the model's parameters when training begins, and the model ends as that
of the last round that ended; if none did, as the Trainer left it. If `train` raises, `close` leaves
the swarm.

The Trainer's own schedule goes by its own steps, so a peer that joins late is behind the others. To
be where they are:

    SwarmCallback(schedule=cosine(warmup_samples=1000, total_samples=100_000))
    TrainingArguments(..., lr_scheduler_type="constant")

Only process 0 of a distributed Trainer may speak for it, which is not built here:
use one process, or the daemon.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coordinator_free.swarm import Step, SwarmOptimizer
from dht.errors import ConfigError

logger = logging.getLogger(__name__)


class SwarmCallback(TrainerCallback):
    """Joins a swarm, or creates one, for as long as the Trainer trains.

    Args:
        options: of `SwarmOptimizer`, without parameters, optimizer and batch size, which the
            Trainer has: `link`, `recipe`, `schedule`, `home`, ...

    Attributes:
        swarm: while training; its `link` is what others need.
        last: what the last step did.
        rounds: how many have ended in this training.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.swarm: SwarmOptimizer | None = None
        self.last: Step | None = None
        self.rounds = 0
        self._step = contextlib.ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Enter the swarm, whose parameters the model has from here on."""
        self.close()  # of a training that was broken off
        self.rounds = 0
        if args.world_size > 1:
            raise ConfigError("a Trainer of several processes cannot be one peer: use one process")
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        assert isinstance(optimizer, torch.optim.Optimizer)
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        self.swarm = SwarmOptimizer(
            kwargs["model"], optimizer, batch_size=batch_size, **self._options
        )
        self.swarm.enter()
        logger.info("swarm.entered link=%s", self.swarm.link)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The learning rates become those of the swarm's schedule."""
        assert self.swarm is not None
        self._step.enter_context(self.swarm.scheduled())

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """And are the Trainer's again."""
        self._step.close()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Hand in and take up what is due."""
        assert self.swarm is not None
        self.last = self.swarm.stepped()
        self.rounds += self.last.ended is not None
        if self.last.over:
            control.should_training_stop = True

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave with the swarm's model; what was trained since the last round is not in it."""
        if self.swarm is not None and self.rounds:
            self.swarm.adopt()
        self.close()

    def close(self) -> None:
        """Leave the swarm, as the end of training does; the model stays as it is."""
        self._step.close()
        swarm, self.swarm = self.swarm, None
        if swarm is not None:
            swarm.close()
