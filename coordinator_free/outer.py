"""The outer optimizer: how an averaged pseudo-gradient moves the parameters all peers share.

Guarantees that equal inputs give equal bits everywhere: only IEEE-754 float32 multiplies and adds,
each its own operation on the CPU, in a fixed order, elementwise. Nothing is fused, interpolated or
summed, so neither the processor, its vector width, the number of threads, where the vector was cut
into slices, nor whether numba or torch computed it shows in the result. What it does not do is
refuse a NaN or an overflow: it says whether everything it wrote is finite.

    nesterov:  m     <- momentum * m + delta
               theta <- theta - lr * (delta + momentum * m)
    sgd:       theta <- theta - lr * delta

with delta = anchor - local parameters, averaged: it points uphill, like a gradient. The first is
`torch.optim.SGD(nesterov=True)` with a zero first momentum, which uses fused operations instead.

Source: DiLoCo, arXiv:2311.08105; lr 0.7 and momentum 0.6 from our own runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from coordinator_free import kernels
from coordinator_free.bounds import check_bounds
from coordinator_free.optimizer import Position, checked
from dht.errors import ConfigError

SEGMENT: Final = 32_768
"""Elements at once: the scratch stays in the cache, and torch starts no OpenMP threads for it."""


_INFINITY: Final = 0x7F80_0000
"""Its bits. NaNs have larger ones, all else smaller."""

_BOUNDS: Final = {"lr": (0.0, 10.0), "momentum": (0.0, 0.999)}


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig:
    """Constants of the outer step; part of the run file, as all peers must use the same.

    Attributes:
        kind: "nesterov", or "sgd" that has no momentum: half the state to hold and to download.
        lr: outer learning rate, above 0 and at most 10. Rounded to float32.
        momentum: of "nesterov", in [0, 0.999]. Rounded to float32.

    Raises:
        ConfigError: a value outside its range.
    """

    kind: Literal["nesterov", "sgd"] = "nesterov"
    lr: float = 0.7
    momentum: float = 0.6

    def __post_init__(self) -> None:
        if self.kind not in ("nesterov", "sgd"):
            raise ConfigError(f"outer.kind = {self.kind!r}: use 'nesterov' or 'sgd'")
        check_bounds("outer", self, _BOUNDS)
        if not self.lr:
            raise ConfigError(f"outer.lr = {self.lr}: give a number above 0, such as 0.7")


class OuterOptimizer:
    """A `StateOptimizer` for pseudo-gradients, over any slices of the flat vectors."""

    elementwise: Final = True

    def __init__(self, config: OuterConfig) -> None:
        self.config = config

    def lengths(self, numel: int) -> tuple[int, ...]:
        """Parameters, and with Nesterov the momentum: zeros at the start of a run."""
        return (numel, numel) if self.config.kind == "nesterov" else (numel,)

    def advance(
        self, before: Sequence[Tensor], average_N: Tensor, out: Sequence[Tensor], at: Position
    ) -> bool:
        """See `StateOptimizer`. Where the run stands changes nothing here."""
        before, average_N, out = checked(before, average_N, out, self.lengths)
        if not kernels.compiled():
            return self._advance_by_torch(before, average_N, out)
        lr, momentum = np.float32(self.config.lr), np.float32(self.config.momentum)
        delta, theta, out_theta = average_N.numpy(), before[0].numpy(), out[0].numpy()
        if self.config.kind == "sgd":
            return kernels.sgd_step(theta, delta, out_theta, lr) < _INFINITY
        m, out_m = before[1].numpy(), out[1].numpy()
        return kernels.nesterov_step(theta, m, delta, out_theta, out_m, lr, momentum) < _INFINITY

    def prepare(self) -> None:
        """Compile the kernel, or load it; without a call, its first use pays."""
        count = len(self.lengths(1))
        before, average_N, out = torch.zeros(count, 1), torch.zeros(1), torch.empty(count, 1)
        self.advance(list(before), average_N, list(out), Position(round=0, samples=0))

    def _advance_by_torch(
        self, before: Sequence[Tensor], average_N: Tensor, out: Sequence[Tensor]
    ) -> bool:
        lr, momentum = self.config.lr, self.config.momentum
        scratch = torch.empty(min(len(average_N), SEGMENT), dtype=torch.float32)
        finite = True
        for start in range(0, len(average_N), SEGMENT):
            span = slice(start, start + SEGMENT)
            delta = average_N[span]
            move = scratch[: len(delta)]
            # Never add_(alpha=...) or lerp: those fuse where the processor can.
            if self.config.kind == "nesterov":
                m = out[1][span]
                torch.mul(before[1][span], momentum, out=m)
                m.add_(delta)
                torch.mul(m, momentum, out=move)
                move.add_(delta)
                move.mul_(lr)
            else:
                torch.mul(delta, lr, out=move)
            torch.sub(before[0][span], move, out=out[0][span])
            finite = finite and all(_all_finite(vector[span]) for vector in out)
        return finite


def _all_finite(part_N: Tensor) -> bool:
    low, high = torch.aminmax(part_N)  # both are NaN if any element is
    return math.isfinite(low.item()) and math.isfinite(high.item())
