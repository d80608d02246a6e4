"""The inner optimizers: AdamW, Muon, SGD and Schedule-Free AdamW, written out.

Written out, and not taken from `torch.optim`, because constructing any `torch.optim` optimizer
imports `torch._dynamo`: 2 s of CPU in every peer's start, for updates of five lines each. Tests
hold them to torch's own (`torch.optim.AdamW`, `Muon`, `SGD`) and to the authors' Schedule-Free.

Between two steps the parameters are always the point that a peer evaluates and hands in. Only
Schedule-Free takes its gradients elsewhere; `gradient_point` goes there and comes back.

Guaranteed: the update depends on parameters, gradients, own moments and the given learning rate
alone; nothing is drawn at random; after `reset` nothing of earlier steps is left. Not guaranteed:
the same bits on another device or torch version (peers agree on the averaged model, not on each
other's local steps).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

# Rates, bounds, the quintic and `schedule` below are in `coordinator_free.gradient` once more, for
# steps that are equal to the bit on every machine: `model` stands alone, and the network's layers
# never import it. Tests compare what both make of them.
#
# The quintic's coefficients: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. They
# trade exactness for speed: singular values end up in about [0.7, 1.2], which costs no loss.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5

# What `lr=0` stands for: best of a few on a GPT of 2 layers and width 64; not tuned for others.
# Fine-tuning a checkpoint wants a hundredth of it.
_DEFAULT_LR = {"adamw": 4e-3, "muon": 0.015, "sgd": 0.1, "schedulefree": 0.016}

_BOUNDS = {
    "lr": (0, 100),
    "adamw_lr": (0, 100),
    "weight_decay": (0, 100),
    "grad_clip": (0, 1e9),
    "warmup_samples": (0, 1e12),
    "total_samples": (0, 1e15),
    "joiner_warmup_steps": (0, 1e9),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How a peer takes its local steps.

    The schedule counts the sequences that the whole swarm has trained on, not one peer's steps, so
    that peers of any speed, and those which join late, are where the swarm is.

    Args:
        kind: "muon" (hidden matrices by Muon, everything else by AdamW), "adamw", "sgd", or
            "schedulefree" (AdamW with an average in place of a decaying rate).
        lr: peak learning rate of that kind; 0 means the kind's default (0.015, 0.004, 0.1, 0.016).
        adamw_lr: with Muon, the peak learning rate of embeddings, head and norms.
        momentum: Muon's and SGD's.
        nesterov: SGD's momentum looks ahead; Muon's always does.
        betas: AdamW's; with Schedule-Free the first is how near the average gradients are taken.
        weight_decay: decoupled, on matrices only, times the learning rate; SGD, whose rate is
            larger, wants a hundredth of the default.
        grad_clip: largest gradient norm; 0 does not clip.
        warmup_samples: the swarm's sequences of linear warm-up.
        total_samples: the swarm's sequences until the cosine ends, more than those of the warm-up;
            0 when nobody knows: constant after it. Schedule-Free does not look at it.
        joiner_warmup_steps: a peer's own steps of linear warm-up since it started, or since
            `reset`: its moments are still those of a few batches. The smaller factor holds.

    Raises:
        ValueError: one line naming the field, its value and the remedy.
    """

    kind: Literal["muon", "adamw", "sgd", "schedulefree"] = "muon"
    lr: float = 0.0
    adamw_lr: float = 4e-3
    momentum: float = 0.95
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_samples: int = 128
    total_samples: int = 0
    joiner_warmup_steps: int = 10

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULT_LR:
            raise ValueError(
                f"optimizer kind {self.kind!r} is unknown:"
                " use 'muon', 'adamw', 'sgd' or 'schedulefree'"
            )
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            # NaN is in no bounds, and whole numbers of any size compare with floats.
            if not _is_number(value) or not low <= value <= high:
                raise ValueError(
                    f"optimizer {name} = {_shown(value)} must be a number from {low:g} to {high:g}"
                )
        if not self.adamw_lr:
            raise ValueError(f"optimizer adamw_lr = {self.adamw_lr} must be more than 0")
        betas = self.betas if isinstance(self.betas, tuple) else ()
        if len(betas) != 2:
            raise ValueError(f"optimizer betas = {_shown(self.betas)} must be two numbers")
        for name, fraction in (("momentum", self.momentum), *(("betas", b) for b in betas)):
            if not _is_number(fraction) or not 0 <= fraction < 1:
                raise ValueError(
                    f"optimizer {name}: {_shown(fraction)} must be at least 0 and below 1"
                )
        if 0 < self.total_samples <= self.warmup_samples:
            raise ValueError(
                f"optimizer total_samples = {self.total_samples} must be more than warmup_samples ="
                f" {self.warmup_samples}, or 0 for a constant rate after the warm-up"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate of `kind` after warm-up."""
        return self.lr or _DEFAULT_LR[self.kind]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print the longest
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def schedule(samples: int, *, warmup_samples: int, total_samples: int, floor: float = 0.1) -> float:
    """The factor on the peak learning rate at a place in the run.

    A pure function of the place, so a peer that joins late is where the swarm is.

    Args:
        samples: sequences that the swarm has trained on once this step is done, from 1.
        warmup_samples: linear rise to 1 over this many.
        total_samples: where the cosine reaches `floor`, which it keeps; 0: constant after warm-up.
        floor: the smallest factor after warm-up.

    Returns:
        A factor in (0, 1].
    """
    if samples < warmup_samples:
        return max(1, samples) / warmup_samples
    if total_samples <= warmup_samples:
        return 1.0
    progress = min(1.0, (samples - warmup_samples) / (total_samples - warmup_samples))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@functools.cache
def _products_in(device_type: str) -> torch.dtype:
    """bf16 where the device multiplies in it: twice to four times as fast; elsewhere fp32."""
    if device_type == "cpu":
        can = torch.cpu.get_capabilities()
        native = bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    else:
        native = device_type == "cuda"
    return torch.bfloat16 if native else torch.float32


def orthogonalise(matrix_MN: Tensor) -> Tensor:
    """Replace all singular values by about one, keeping the singular vectors.

    Args:
        matrix_MN: a float matrix; all zeros stays all zeros.

    Returns:
        (M, N) of the same dtype; singular values roughly in [0.7, 1.2].

    Source: Jordan et al. 2024 (Muon), five Newton-Schulz steps.
    """
    a, b, c = _NEWTON_SCHULZ
    x: Tensor = matrix_MN.to(_products_in(matrix_MN.device.type))
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # the Gram matrix is of the short side
    x = x / x.norm().clamp(min=1e-7)  # Frobenius norm: all singular values at most 1
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: Tensor = (x.mT if tall else x).to(matrix_MN.dtype)
    return result


class Rule(Protocol):
    """One update rule over its own parameters."""

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place."""

    def reset(self) -> None:
        """Forget all steps."""


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

    def reset(self) -> None:
        """Forget all steps."""
        self._steps = 0
        for _, mean, square in self._moments:
            mean.zero_()
            square.zero_()


class Muon:
    """Momentum, orthogonalised: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    Takes 2-D matrices stored (out, in), as `nn.Linear` does.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        momentum: float,
        weight_decay: float,
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
            ahead = p.grad.lerp(mean, self._momentum)  # Nesterov's
            direction = orthogonalise(ahead)
            p.mul_(1 - lr * self._weight_decay)
            # A matrix that widens its input needs a larger step to change the output as much.
            p.add_(direction, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))

    def reset(self) -> None:
        """Forget all steps."""
        for _, mean in self._moments:
            mean.zero_()


class SGD:
    """Gradient descent with momentum, in torch's form; the decay is decoupled, as AdamW's is."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
    ) -> None:
        self._moments = [(p, torch.zeros_like(p)) for p in parameters]
        self._momentum = momentum
        self._nesterov = nesterov
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place."""
        for p, total in self._moments:
            if p.grad is None:
                continue
            total.mul_(self._momentum).add_(p.grad)
            direction = p.grad.add(total, alpha=self._momentum) if self._nesterov else total
            if p.ndim >= 2:
                p.mul_(1 - lr * self._weight_decay)
            p.add_(direction, alpha=-lr)

    def reset(self) -> None:
        """Forget all steps."""
        for _, total in self._moments:
            total.zero_()


class ScheduleFree:
    """Schedule-Free AdamW: Defazio et al. 2024, arXiv:2405.15682.

    AdamW walks at a constant rate (z); the model is the average of where it has been (x); gradients
    are taken in between (y = x + (1 - beta1)(z - x)). The parameters are x. The state holds how far
    z is ahead of x, and not z itself: whoever overwrites the parameters, all of them or a span,
    moves all three, and the walk goes on from there as any momentum does.
    """

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
        self._peak_lr = 0.0
        self._weights = 0.0

    @contextlib.contextmanager
    def gradient_point(self) -> Iterator[None]:
        """Within it the parameters are y; afterwards x again, bit for bit."""
        averages = [(p, p.data) for p, _, _ in self._moments]
        try:
            for p, ahead, _ in self._moments:
                p.data = torch.add(p.data, ahead, alpha=1 - self._betas[0])
            yield
        finally:
            for p, x in averages:
                p.data = x

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place."""
        self._steps += 1
        beta1, beta2 = self._betas
        unbias2 = 1 - beta2**self._steps
        # Steps of the warm-up count by the square of their rate, as in the authors' code.
        self._peak_lr = max(self._peak_lr, lr)
        self._weights += self._peak_lr**2
        share = self._peak_lr**2 / self._weights if self._weights else 0.0
        for p, ahead, square in self._moments:
            if p.grad is None:
                continue
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            update = p.grad / square.div(unbias2).sqrt_().add_(self._eps)
            if p.ndim >= 2:
                update.add_(torch.add(p, ahead, alpha=1 - beta1), alpha=self._weight_decay)
            ahead.sub_(update, alpha=lr)
            p.add_(ahead, alpha=share)
            ahead.mul_(1 - share)

    def reset(self) -> None:
        """Forget all steps."""
        self._steps, self._peak_lr, self._weights = 0, 0.0, 0.0
        for _, ahead, square in self._moments:
            ahead.zero_()
            square.zero_()


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
        self._steps = 0
        self._rules = _rules(self._parameters, hidden_matrices, config)

    def gradient_point(self) -> contextlib.AbstractContextManager[None]:
        """Where gradients are to be taken: within it the parameters may be others."""
        rule, _ = self._rules[0]
        return rule.gradient_point() if isinstance(rule, ScheduleFree) else contextlib.nullcontext()

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

    def step(self, samples: int) -> None:
        """Take one step with the learning rate that belongs to this place in the run.

        Args:
            samples: sequences that the swarm has trained on once this step is done.
        """
        config = self._config
        factor = schedule(
            samples,
            warmup_samples=config.warmup_samples,
            total_samples=0 if config.kind == "schedulefree" else config.total_samples,
        )
        self._steps += 1
        if self._steps < config.joiner_warmup_steps:
            factor = min(factor, self._steps / config.joiner_warmup_steps)
        for rule, lr in self._rules:
            rule.step(lr * factor)

    def reset(self) -> None:
        """Forget all moments and warm up anew; the parameters stay."""
        self._steps = 0
        for rule, _ in self._rules:
            rule.reset()


def _rules(
    parameters: list[nn.Parameter],
    hidden_matrices: Iterable[nn.Parameter],
    config: OptimizerConfig,
) -> list[tuple[Rule, float]]:
    """Each rule with its peak learning rate; every parameter has one."""
    betas, decay, lr = config.betas, config.weight_decay, config.peak_lr
    match config.kind:
        case "muon":
            by_muon = {id(p) for p in hidden_matrices}
            matrices = [p for p in parameters if id(p) in by_muon]
            others = [p for p in parameters if id(p) not in by_muon]
            return [
                (AdamW(others, betas=betas, weight_decay=decay), config.adamw_lr),
                (Muon(matrices, momentum=config.momentum, weight_decay=decay), lr),
            ]
        case "adamw":
            return [(AdamW(parameters, betas=betas, weight_decay=decay), lr)]
        case "sgd":
            momentum, nesterov = config.momentum, config.nesterov
            rule = SGD(parameters, momentum=momentum, nesterov=nesterov, weight_decay=decay)
            return [(rule, lr)]
        case "schedulefree":
            return [(ScheduleFree(parameters, betas=betas, weight_decay=decay), lr)]
