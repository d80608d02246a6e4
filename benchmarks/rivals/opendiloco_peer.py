"""One peer of `convergence.py` that trains by the recipe of OpenDiLoCo.

As in PrimeIntellect's implementation on hivemind (arXiv:2407.07852): each peer takes H steps of
AdamW, puts the difference to where it began into a `DecentralizedAverager` as if it were a
gradient, in fp16, and steps with the average by Nesterov's SGD (0.7, 0.9) from where it began.

Two things are left out to its advantage: the averaging of all parameters that hivemind's optimizer
adds in each epoch, which costs as many bytes again, and the fixed wait of matchmaking: everybody is
there and the group is full at once. All of `step` counts as waiting.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from hivemind.averaging.averager import DecentralizedAverager
from hivemind.compression import Float16Compression
from hivemind.dht import DHT

from benchmarks import learning, lockstep

STEP_S = 300.0


def main() -> None:
    """One peer, until its last step."""
    pipe = lockstep.Pipe()
    arguments: Any = learning.peer_arguments()
    task: learning.Task = arguments.task
    torch.set_num_threads(1)
    dht = DHT(
        host_maddrs=[f"/ip4/{arguments.host}/tcp/0"],
        initial_peers=[arguments.rendezvous] if arguments.rendezvous else [],
        start=True,
    )
    if not arguments.rendezvous:
        pipe.say("at", rendezvous=str(dht.get_visible_maddrs()[0]))
    learner = learning.Learner(pipe, arguments)
    anchors = [torch.nn.Parameter(p.detach().cpu().clone()) for p in learner.parameters]
    outer = torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)
    averager = DecentralizedAverager(
        [torch.zeros_like(anchor) for anchor in anchors],
        dht,
        start=True,
        prefix="convergence",
        target_group_size=task.peers,
        min_group_size=task.peers,
        compression=Float16Compression(),
    )
    learner.begin()
    for step in range(task.steps):
        learner.backward(step)
        learner.update(step)
        if (step + 1) % task.options["local_steps"] and step + 1 < task.steps:
            continue
        began = time.monotonic()
        _average(learner, averager, anchors)
        learner.wait_s += time.monotonic() - began
        with torch.no_grad():
            outer.step()
            for parameter, anchor in zip(learner.parameters, anchors, strict=True):
                parameter.copy_(anchor)
        learner.look(step + 1, last=step + 1 == task.steps)
    learner.end()
    averager.shutdown()
    dht.shutdown()


@torch.no_grad()
def _average(
    learner: learning.Learner, averager: DecentralizedAverager, anchors: list[torch.nn.Parameter]
) -> None:
    """Leave the averaged pseudo-gradients in the anchors."""
    with averager.get_tensors() as tensors:
        for tensor, anchor, parameter in zip(tensors, anchors, learner.parameters, strict=True):
            torch.sub(anchor, parameter.to(anchor.device), out=tensor)
    gathered = averager.step(timeout=STEP_S)
    if gathered is None or len(gathered) != learner.task.peers:
        raise lockstep.Failed(f"a group of {len(gathered or ())}, not {learner.task.peers}")
    with averager.get_tensors() as tensors:
        for tensor, anchor in zip(tensors, anchors, strict=True):
            anchor.grad = tensor.clone()


if __name__ == "__main__":
    main()
