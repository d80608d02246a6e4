"""The outer optimizer: how an averaged pseudo-gradient moves the parameters all peers share.

Guarantees that equal inputs give equal bits everywhere: only IEEE-754 float32 multiplies and adds,
each its own operation on the CPU, in a fixed order, elementwise. Nothing is fused, interpolated or
summed, so neither the processor, its vector width, the number of threads, where the vector was cut
into slices, nor whether numba or torch computed it shows in the result. What it does not do is
refuse a NaN or an overflow: it says whether everything it wrote is finite.

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

import numpy as np
import torch
from torch import Tensor

from coordinator_free import kernels
from dht.errors import ConfigError

SEGMENT: Final = 32_768
"""Elements at once: the scratch stays in the cache, and torch starts no OpenMP threads for it."""


_INFINITY: Final = 0x7F80_0000
"""Its bits. NaNs have larger ones, all else smaller."""


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

    def step(self, theta_N: Tensor, m_N: Tensor, delta_N: Tensor) -> bool:
        """Move a slice, in place.

        Args:
            theta_N: (N,) float32, CPU, contiguous: parameters. Changed.
            m_N: the same shape: momentum, zeros at the start of a run. Changed.
            delta_N: the same shape: averaged pseudo-gradient. Not changed.

        The three must not overlap in memory.

        Returns:
            Whether all new parameters and momenta are finite.

        Raises:
            ValueError: dtype, device or shapes differ from the above; nothing was changed.
        """
        theta_N, m_N, delta_N = _checked(theta_N, m_N, delta_N)
        if not kernels.compiled():
            return self._step_by_torch(theta_N, m_N, delta_N)
        vectors = (theta_N.numpy(), m_N.numpy(), delta_N.numpy())
        return kernels.nesterov_step(*vectors, *self._constants()) < _INFINITY

    def advance(
        self, theta_N: Tensor, m_N: Tensor, delta_N: Tensor, out: tuple[Tensor, Tensor]
    ) -> bool:
        """Write what `step` would make of a slice into other memory; the inputs stay as they are.

        Args:
            theta_N: as `step`'s, but not changed.
            m_N: the same.
            delta_N: the same.
            out: new parameters and new momentum, each (N,) float32, CPU, contiguous. They must
                overlap neither the inputs nor each other.

        Returns:
            Whether all of `out` is finite.

        Raises:
            ValueError: as `step`.
        """
        theta_N, m_N, delta_N, after_theta_N, after_m_N = _checked(theta_N, m_N, delta_N, *out)
        if not kernels.compiled():
            after_theta_N.copy_(theta_N)
            after_m_N.copy_(m_N)
            return self._step_by_torch(after_theta_N, after_m_N, delta_N)
        inputs = (theta_N.numpy(), m_N.numpy(), delta_N.numpy())
        outputs = (after_theta_N.numpy(), after_m_N.numpy())
        return kernels.nesterov_preview(*inputs, *outputs, *self._constants()) < _INFINITY

    def preview(
        self,
        theta_N: Tensor,
        m_N: Tensor,
        delta_N: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `step` would make of the slice; the inputs stay as they are. `advance` says more.

        Returns:
            (parameters, momentum), both (N,) float32, CPU: `out`, or fresh memory.

        Raises:
            ValueError: as `step`.
        """
        if out is None:
            out = (torch.empty_like(theta_N), torch.empty_like(m_N))
        self.advance(theta_N, m_N, delta_N, out)
        return out

    def prepare(self) -> None:
        """Compile both kernels, or load them; without a call, the first use of each pays."""
        theta, m, delta = torch.zeros(3, 1)
        self.step(theta, m, delta)
        self.preview(theta, m, delta)

    def _constants(self) -> tuple[np.float32, np.float32]:
        return np.float32(self.config.lr), np.float32(self.config.momentum)

    def _step_by_torch(self, theta_N: Tensor, m_N: Tensor, delta_N: Tensor) -> bool:
        lr, momentum = self.config.lr, self.config.momentum
        scratch = torch.empty(min(len(theta_N), SEGMENT), dtype=torch.float32)
        finite = True
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
            finite = finite and _all_finite(theta) and _all_finite(m)
        return finite


def _all_finite(part_N: Tensor) -> bool:
    low, high = torch.aminmax(part_N)  # both are NaN if any element is
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _checked(*vectors: Tensor) -> tuple[Tensor, ...]:
    for vector in vectors:
        if vector.dtype != torch.float32 or vector.device.type != "cpu":
            raise ValueError(f"outer vectors must be float32 on the CPU, not {vector.dtype}")
        if vector.ndim != 1 or not vector.is_contiguous() or len(vector) != len(vectors[0]):
            raise ValueError(
                f"outer vectors must be contiguous rows of one length: "
                f"{[tuple(v.shape) for v in vectors]}"
            )
    return tuple(vector.detach() for vector in vectors)
