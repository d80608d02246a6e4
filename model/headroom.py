"""How many sequences fit in this machine's memory at once.

A process that takes too much of a machine's main memory is killed, with no error to recover from;
so the amount is measured and compared before the first step. (A GPU says no instead, and then the
step is taken again in smaller pieces: `model/trainer.py`.)

Guaranteed: the answer divides the batch as halving does and is at least 1. Not guaranteed: that it
fits; other processes want memory too, which is why only a quarter of what is free is planned with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

# Of what is free, for activations. Peers share a machine in demos, each with this same thought.
_SHARE = 0.25
# Peak over what the graph holds after the forward pass: gradients of activations, copies of logits.
_PEAK = 2.0

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Free main memory that this process may take; None where the system does not say.

    The smaller of the machine's and the container's.
    """
    found = [amount for amount in (_of_machine(), _of_container()) if amount is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _of_container() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text()
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None


def held_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Memory that the graph of one forward pass holds for the backward pass.

    Args:
        forward: run once.
        parameters: not counted, they are there anyway.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Kept until the sum is made: what is freed could give its address to another.
        output = forward()
    total = sum(held.values())
    del output
    return total


def fitting(batch: int, sequence_bytes: int, available: int | None) -> int:
    """The batch, halved until it fits.

    Args:
        batch: sequences wanted at once.
        sequence_bytes: what the graph holds of one.
        available: free memory in bytes; None if unknown, and then everything fits.
    """
    while (
        available is not None and batch > 1 and _PEAK * batch * sequence_bytes > _SHARE * available
    ):
        batch = -(-batch // 2)
    return batch
