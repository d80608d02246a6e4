"""One peer of a benchmark that averages with gloo, torch's all-reduce for CPUs.

Gloo has no weights: a peer multiplies its vector by its share before the sum. bf16 vectors are
converted, summed and converted back, which is what a user of gloo would do to halve the bytes. It
serves as the yardstick of what this machine can do: gloo has no encryption, no membership, and a
peer that dies ends the others.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import lockstep, vectors


class Ring:
    """See `lockstep.Averaging`."""

    def __init__(self, arguments: Any) -> None:
        numbers = arguments.seed, arguments.number, arguments.numel
        self._delta_N = torch.from_numpy(vectors.vector(*numbers))
        self._result_N = self._delta_N.clone()
        weights = [vectors.weight(number) for number in range(arguments.peers)]
        self._share = weights[arguments.number] / sum(weights)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.codec]

    def prepare(self) -> None:
        """The last sum is replaced by the vector."""
        self._result_N.copy_(self._delta_N)

    def exchange(self) -> dict[str, Any]:
        """The weight, then the sum."""
        self._result_N.mul_(self._share)
        began = time.monotonic()
        sum_N = self._result_N.to(self._dtype)  # the same memory, for float32
        dist.all_reduce(sum_N)
        self._result_N.copy_(sum_N)
        return {"exchange_began": began, "exchange_ended": time.monotonic()}

    def result(self) -> tuple[Any, dict[str, Any]]:
        """In the memory where the vector was."""
        return self._result_N.numpy(), {}


def main() -> None:
    """One peer, until its last round."""
    pipe = lockstep.Pipe()
    arguments = lockstep.peer_arguments()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{arguments.folder / 'gloo-store'}",
        rank=arguments.number,
        world_size=arguments.peers,
    )
    lockstep.take_part(pipe, arguments, Ring(arguments))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
