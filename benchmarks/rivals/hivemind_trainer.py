"""One peer of `convergence.py` that trains with `hivemind.Optimizer`.

Peers accumulate gradients until all of them together have a target batch, which hivemind calls an
epoch, average the gradients, take the same step of AdamW and average the parameters behind the next
epoch. All constants are hivemind's defaults but for those that have none (the target batch) and
what `--task` says. The learning rate follows the epoch, as hivemind's documentation asks for.

The number of epochs is fixed, so that everything accumulated is used; since an epoch may hold more
than its batch, the swarm sees some more text than it has to, to its advantage. Waiting is what
`step` takes beyond the update itself.

hivemind forks, so nothing that has threads may run before its processes do.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import hivemind
import torch
from hivemind.compression import Float16Compression, NoCompression

from benchmarks import learning, lockstep
from model.optimizers import schedule

COMPRESSION = {"fp32": NoCompression, "fp16": Float16Compression}


class AdamW(torch.optim.AdamW):
    """Clips before each step, and knows how long all steps took."""

    spent_s = 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        began = time.monotonic()
        for group in self.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        super().step(closure)
        AdamW.spent_s += time.monotonic() - began


def main() -> None:
    """One peer, until its last epoch."""
    pipe = lockstep.Pipe()
    arguments: Any = learning.peer_arguments()
    task: learning.Task = arguments.task
    torch.set_num_threads(1)
    dht = hivemind.DHT(
        host_maddrs=[f"/ip4/{arguments.host}/tcp/0"],
        initial_peers=[arguments.rendezvous] if arguments.rendezvous else [],
        start=True,
    )
    if not arguments.rendezvous:
        pipe.say("at", rendezvous=str(dht.get_visible_maddrs()[0]))
    learner = learning.Learner(pipe, arguments)
    target = task.options["target_batch"]
    epochs = max(1, round(task.samples / target))
    progress = partial(schedule, **task.schedule())
    compression = COMPRESSION[task.options["compression"]]
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="convergence",
        target_batch_size=target,
        batch_size_per_step=task.batch,
        params=learner.parameters,
        optimizer=lambda params: AdamW(
            params, lr=task.optimizer["lr"], betas=(0.9, 0.99), weight_decay=0.1
        ),
        scheduler=lambda inner: torch.optim.lr_scheduler.LambdaLR(
            inner, lambda epoch: progress(target * (epoch + 1))
        ),
        grad_compression=compression(),
        state_averaging_compression=compression(),
        **task.options["more"],
    )
    learner.begin()
    step = epoch = 0
    while epoch < epochs:
        learner.backward(step)
        step += 1
        began, updating_s = time.monotonic(), AdamW.spent_s
        optimizer.step()
        learner.wait_s += time.monotonic() - began - (AdamW.spent_s - updating_s)
        if optimizer.local_epoch > epoch:
            epoch = optimizer.local_epoch
            learner.look(step, last=epoch >= epochs)
    learner.end()
    optimizer.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    main()
