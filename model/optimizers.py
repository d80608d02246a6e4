"""The inner optimizers: AdamW and Muon, written out.

Written out, and not taken from `torch.optim`, because constructing any `torch.optim` optimizer
imports `torch._dynamo`: 2 s of CPU in every peer's start, for two updates of five lines each. Tests
hold both to torch's own (`torch.optim.AdamW`, `torch.optim.Muon`).

Guaranteed: the update depends on parameters, gradients, own moments and the given learning rate
alone; nothing is drawn at random. Not guaranteed: the same bits on another device or torch version
(peers agree on the averaged model, not on each other's local steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

# The quintic's coefficients: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. They
# trade exactness for speed: singular values end up in about [0.7, 1.2], which costs no loss.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5

# What `lr=0` stands for: best of a few on a GPT of 2 layers and width 64; not tuned for others.
# Fine-tuning a checkpoint wants a hundredth of it.
_DEFAULT_LR = {"adamw": 4e-3, "muon": 0.015}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How a peer takes its local steps.

    Args:
        kind: "muon" (hidden matrices by Muon, everything else by AdamW) or "adamw".
        lr: peak learning rate of that kind; 0 means the kind's default (0.015 or 0.004).
        adamw_lr: with Muon, the peak learning rate of embeddings, head and norms.
        momentum: Muon's.
        betas: AdamW's.
        weight_decay: decoupled, on matrices only, times the learning rate.
        grad_clip: largest gradient norm; 0 does not clip.
        warmup_steps: local steps of linear warm-up.
        total_steps: local steps until the cosine ends; 0 when nobody knows: constant after warm-up.

    Raises:
        ValueError: one line naming the field, its value and the remedy.
    """

    kind: Literal["muon", "adamw"] = "muon"
    lr: float = 0.0
    adamw_lr: float = 4e-3
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_steps: int = 10
    total_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULT_LR:
            raise ValueError(f"optimizer kind {self.kind!r} is unknown: use 'muon' or 'adamw'")
        for name in ("lr", "weight_decay", "grad_clip", "warmup_steps", "total_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optimizer {name} = {value} must be a number of at least 0")
        if not (math.isfinite(self.adamw_lr) and self.adamw_lr > 0):
            raise ValueError(f"optimizer adamw_lr = {self.adamw_lr} must be more than 0")
        for name, fraction in (("momentum", self.momentum), *(("betas", b) for b in self.betas)):
            if not 0 <= fraction < 1:
                raise ValueError(f"optimizer {name}: {fraction} must be at least 0 and below 1")

    @property
    def peak_lr(self) -> float:
        """The learning rate of `kind` after warm-up."""
        return self.lr or _DEFAULT_LR[self.kind]


def schedule(step: int, *, warmup_steps: int, total_steps: int, floor: float = 0.1) -> float:
    """The factor on the peak learning rate at a step of the run.

    A pure function of the step, so a peer that joins late is where the swarm is.

    Args:
        step: local steps since the run began, from 0.
        warmup_steps: linear rise to 1 over this many steps.
        total_steps: where the cosine reaches `floor`, which it keeps; 0: constant after warm-up.
        floor: the smallest factor after warm-up.

    Returns:
        A factor in (0, 1].
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if total_steps <= warmup_steps:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def orthogonalise(matrix_MN: Tensor) -> Tensor:
    """Replace all singular values by about one, keeping the singular vectors.

    Args:
        matrix_MN: a float matrix; all zeros stays all zeros.

    Returns:
        (M, N) of the same dtype; singular values roughly in [0.7, 1.2].

    Source: Jordan et al. 2024 (Muon), five Newton-Schulz steps.
    """
    a, b, c = _NEWTON_SCHULZ
    # bf16 halves the time on CUDA; most CPUs only emulate it, so they stay in fp32.
    x: Tensor = matrix_MN.bfloat16() if matrix_MN.is_cuda else matrix_MN.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # the Gram matrix is of the short side
    x = x / x.norm().clamp(min=1e-7)  # Frobenius norm: all singular values at most 1
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    result: Tensor = (x.mT if tall else x).to(matrix_MN.dtype)
    return result


class Rule(Protocol):
    """One update rule over its own parameters."""

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place."""


class AdamW:
    """Adam with decoupled weight decay: Loshchilov and Hutter 2019, arXiv:1711.05101."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = 1e-8,
    ) -> None:
        self._moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        self._betas = betas
        self._weight_decay = weight_decay
        self._eps = eps
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place."""
        self._steps += 1
        beta1, beta2 = self._betas
        unbias1 = 1 - beta1**self._steps
        unbias2 = 1 - beta2**self._steps
        for p, mean, square in self._moments:
            if p.grad is None:
                continue
            mean.lerp_(p.grad, 1 - beta1)
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            if p.ndim >= 2:
                p.mul_(1 - lr * self._weight_decay)
            denominator = square.sqrt().div_(math.sqrt(unbias2)).add_(self._eps)
            p.addcdiv_(mean, denominator, value=-lr / unbias1)


class Muon:
    """Momentum, orthogonalised: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Takes 2-D matrices stored (out, in), as `nn.Linear` does.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, momentum: float, weight_decay: float
    ) -> None:
        self._moments = [(p, torch.zeros_like(p)) for p in parameters]
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place."""
        for p, mean in self._moments:
            if p.grad is None:
                continue
            mean.lerp_(p.grad, 1 - self._momentum)
            direction = orthogonalise(p.grad.lerp(mean, self._momentum))  # Nesterov's look-ahead
            p.mul_(1 - lr * self._weight_decay)
            # A matrix that widens its input needs a larger step to change the output as much.
            p.add_(direction, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


class InnerOptimizer:
    """The rules of one `OptimizerConfig` over one module, clipped and scheduled together.

    Args:
        parameters: all trainable ones, each once.
        hidden_matrices: those of them that Muon may take.
        config: rule, rates and schedule.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        hidden_matrices: Iterable[nn.Parameter],
        config: OptimizerConfig,
    ) -> None:
        self._config = config
        self._parameters = list(parameters)
        by_muon = {id(p) for p in hidden_matrices} if config.kind == "muon" else set()
        matrices = [p for p in self._parameters if id(p) in by_muon]
        others = [p for p in self._parameters if id(p) not in by_muon]
        adamw_lr = config.adamw_lr if config.kind == "muon" else config.peak_lr
        self._rules: list[tuple[Rule, float]] = [
            (AdamW(others, betas=config.betas, weight_decay=config.weight_decay), adamw_lr),
            (
                Muon(matrices, momentum=config.momentum, weight_decay=config.weight_decay),
                config.peak_lr,
            ),
        ]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self._parameters:
            p.grad = None

    def clip(self) -> float:
        """Scale the gradients down to the configured norm.

        Returns:
            The norm before; NaN or infinity when a gradient is not finite, and then nothing is
            worth applying.
        """
        limit = self._config.grad_clip or math.inf
        return float(nn.utils.clip_grad_norm_(self._parameters, limit))

    def step(self, position: int) -> None:
        """Take one step with the learning rate that belongs to this step of the run."""
        factor = schedule(
            position,
            warmup_steps=self._config.warmup_steps,
            total_steps=self._config.total_steps,
        )
        for rule, lr in self._rules:
            rule.step(lr * factor)
