"""The outer optimizer: how an averaged pseudo-gradient moves the parameters all peers share.

Guarantees that equal inputs give equal bits everywhere: only IEEE-754 float32 multiplies and adds,
each its own operation on the CPU, in a fixed order, elementwise. Nothing is fused, interpolated or
summed, so neither the processor, its vector width, the number of threads nor where the vector was
cut into slices shows in the result. What it does not do is look for NaNs: the codecs have.

    m     <- momentum * m + delta
    theta <- theta - lr * (delta + momentum * m)

with delta = anchor - local parameters, averaged: it points uphill, like a gradient. This is
`torch.optim.SGD(nesterov=True)` with a zero first momentum, which uses fused operations instead.

Source: DiLoCo, arXiv:2311.08105; lr 0.7 and momentum 0.6 from our own runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dht.errors import ConfigError

SEGMENT: Final = 32_768
"""Elements at once: the scratch stays in the cache, and torch starts no OpenMP threads for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterConfig:
    """Constants of the outer step; part of the run file, as all peers must use the same.

    Attributes:
        lr: outer learning rate, > 0. Rounded to float32.
        momentum: in [0, 1). Rounded to float32.

    Raises:
        ConfigError: a value outside its range.
    """

    lr: float = 0.7
    momentum: float = 0.6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"outer.lr = {self.lr}: give a number above 0, such as 0.7")
        if not 0 <= self.momentum < 1:
            raise ConfigError(
                f"outer.momentum = {self.momentum}: give a number of at least 0 and below 1"
            )


class NesterovOuter:
    """Nesterov momentum over slices of the flat vector. Holds no state but its constants."""

    def __init__(self, config: OuterConfig) -> None:
        self.config = config

    def step(self, theta_N: Tensor, m_N: Tensor, delta_N: Tensor) -> None:
        """Move a slice, in place.

        Args:
            theta_N: (N,) float32, CPU, contiguous: parameters. Changed.
            m_N: the same shape: momentum, zeros at the start of a run. Changed.
            delta_N: the same shape: averaged pseudo-gradient. Not changed.

        The three must not overlap in memory.

        Raises:
            ValueError: dtype, device or shapes differ from the above; nothing was changed.
        """
        theta_N, m_N, delta_N = _checked(theta_N, m_N, delta_N)
        lr, momentum = self.config.lr, self.config.momentum
        scratch = torch.empty(min(len(theta_N), SEGMENT), dtype=torch.float32)
        for start in range(0, len(theta_N), SEGMENT):
            theta, m = theta_N[start : start + SEGMENT], m_N[start : start + SEGMENT]
            delta = delta_N[start : start + SEGMENT]
            look_ahead = scratch[: len(theta)]
            # Never add_(alpha=...) or lerp: those fuse where the processor can.
            m.mul_(momentum)
            m.add_(delta)
            torch.mul(m, momentum, out=look_ahead)
            look_ahead.add_(delta)
            look_ahead.mul_(lr)
            theta.sub_(look_ahead)

    def preview(self, theta_N: Tensor, m_N: Tensor, delta_N: Tensor) -> tuple[Tensor, Tensor]:
        """What `step` would make of the slice, in fresh memory; the inputs stay as they are.

        Returns:
            (parameters, momentum), both (N,) float32, CPU.

        Raises:
            ValueError: as `step`.
        """
        theta_N, m_N, delta_N = _checked(theta_N, m_N, delta_N)
        after_theta_N, after_m_N = theta_N.clone(), m_N.clone()
        self.step(after_theta_N, after_m_N, delta_N)
        return after_theta_N, after_m_N


def _checked(*vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for vector in vectors:
        if vector.dtype != torch.float32 or vector.device.type != "cpu":
            raise ValueError(f"outer vectors must be float32 on the CPU, not {vector.dtype}")
        if vector.ndim != 1 or not vector.is_contiguous() or len(vector) != len(vectors[0]):
            raise ValueError(
                f"outer vectors must be contiguous rows of one length: "
                f"{[tuple(v.shape) for v in vectors]}"
            )
    theta_N, m_N, delta_N = (vector.detach() for vector in vectors)
    return theta_N, m_N, delta_N
