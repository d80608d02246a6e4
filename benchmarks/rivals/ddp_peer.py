"""One peer of `convergence.py` that trains with torch's `DistributedDataParallel` over gloo.

Every step averages all gradients, in buckets that travel while backpropagation goes on; what cannot
be hidden is counted as waiting: from the moment when the last bucket is ready until `backward`
returns. All else is torch's default.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks import learning, lockstep


def main() -> None:
    """One peer, until its last step."""
    pipe = lockstep.Pipe()
    arguments: Any = learning.peer_arguments()
    learner = learning.Learner(pipe, arguments)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.folder / 'gloo-store'}",
        rank=arguments.number,
        world_size=learner.task.peers,
    )
    parallel = DistributedDataParallel(learner.model, broadcast_buffers=False)
    last_ready = 0.0

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch would compare annotations
        nonlocal last_ready
        last_ready = time.monotonic()
        return allreduce_hook(None, bucket)

    parallel.register_comm_hook(None, hook)
    learner.begin()
    steps, every = learner.task.steps, learner.task.every
    for step in range(steps):
        learner.backward(step, parallel)
        learner.wait_s += time.monotonic() - last_ready
        learner.update(step)
        if (step + 1) % every == 0 or step + 1 == steps:
            learner.look(step + 1, last=step + 1 == steps)
    learner.end()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
