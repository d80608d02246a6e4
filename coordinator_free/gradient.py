"""The optimizers of gradient mode: how an averaged gradient moves the state all peers share.

Guarantees that equal inputs give equal bits everywhere (`optimizer`): only correctly rounded
IEEE-754 operations, each its own, in a fixed order (`gradient_kernels`); constants of a step are
computed from the configuration in float64 by +, -, *, / and sqrt alone, no `pow` and no `cos` of
the C library, and rounded to float32 once. Not the processor, its vector width, the number of
threads, nor whether numba or numpy computed it shows in the result. What it does not do is refuse a
NaN or an overflow: it says whether everything it wrote is finite.

With g the average, clipped to a global norm, and t the rounds including this one:

    adamw:  m     <- beta1 * m + (1 - beta1) * g
            v     <- beta2 * v + (1 - beta2) * g^2
            theta <- (1 - lr * decay) * theta
                     - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    muon:   m     <- momentum * m + (1 - momentum) * g
            theta <- (1 - lr * decay) * theta - lr * sqrt(max(1, rows / columns))
                     * orthogonalised((1 - momentum) * g + momentum * m)
            for matrices; everything else by adamw
    sgd:    m     <- momentum * m + g
            theta <- (1 - lr * decay) * theta - lr * (m, or with nesterov: g + momentum * m)

These are the rules by which `model.optimizers` takes a peer's local steps, and torch's own, but for
the order of roundings. The learning rate follows what the swarm was trained on, not the rounds: how
many samples a round has depends on who is there.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101; Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from coordinator_free.bounds import check_bounds, is_number, shown
from coordinator_free.gradient_kernels import (
    SEGMENT,
    AdamW,
    Floats,
    Sgd,
    adamw_step,
    all_finite,
    momentum_step,
    product,
    segment_squares,
    sgd_step,
    total,
)
from coordinator_free.optimizer import Position, checked
from dht.errors import ConfigError

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")

FLOOR: Final = 0.1
"""The smallest factor on the learning rate after the warm-up."""

PIECE: Final = 256 * SEGMENT
"""Elements that one thread moves or sums before it looks for the next: a millisecond."""

_DEFAULT_LR: Final = {"adamw": 4e-3, "muon": 0.015, "sgd": 0.1}

_BOUNDS: Final = {
    "lr": (0.0, 100.0),
    "adamw_lr": (0.0, 100.0),
    "weight_decay": (0.0, 100.0),
    "grad_clip": (0.0, 1e9),
    "eps": (1e-30, 1.0),
    "warmup_samples": (0, 1e12),
    "total_samples": (0, 1e15),
    "step_samples": (0, 2**40),
}

# Rates, bounds, the quintic and `schedule` below are in `model.optimizers` once more: `model`
# stands alone, and nothing here imports it. Tests compare what both make of them.
#
# The quintic's coefficients: Jordan et al. 2024. They trade exactness for speed: singular values
# end up in about [0.7, 1.2], which costs no loss.
_NEWTON_SCHULZ: Final = tuple(np.float32(x) for x in (3.4445, -4.7750, 2.0315))
_NEWTON_SCHULZ_STEPS: Final = 5

# Of cos(x) in powers of x^2: beyond the twelfth they are below 2^-60 for x up to pi / 2.
_COSINE: Final = tuple((-1) ** n / math.factorial(2 * n) for n in range(13))


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientConfig:
    """Constants of the step; part of the run file, as all peers must use the same.

    Attributes:
        kind: "adamw", "muon" (hidden matrices by Muon, everything else by AdamW) or "sgd".
        lr: peak learning rate of that kind; 0 means the kind's default (0.004, 0.015, 0.1).
        adamw_lr: with Muon, the peak learning rate of embeddings, head and norms.
        betas: AdamW's.
        momentum: Muon's and SGD's; SGD with 0 keeps no moments.
        nesterov: whether SGD looks ahead. Muon always does.
        weight_decay: decoupled, times the learning rate, on tensors that say so.
        grad_clip: largest norm of the averaged gradient; 0 does not clip.
        eps: AdamW's, at least 1e-30 so that a float32 holds it.
        warmup_samples: linear warm-up, in samples of the whole swarm.
        total_samples: where the cosine ends, after the warm-up; 0 when nobody knows: constant then.
        step_samples: about how many there are in one step: the schedule is that of its end.

    Raises:
        ConfigError: a value of a wrong type or outside its range.
    """

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 0.0
    adamw_lr: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.99)
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    eps: float = 1e-8
    warmup_samples: int = 0
    total_samples: int = 0
    step_samples: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _DEFAULT_LR:
            raise ConfigError(f"gradient.kind = {self.kind!r}: use 'adamw', 'muon' or 'sgd'")
        check_bounds("gradient", self, _BOUNDS)
        if not self.adamw_lr:
            raise ConfigError(
                f"gradient.adamw_lr = {self.adamw_lr}: give a number above 0, such as 0.004"
            )
        betas = self.betas if isinstance(self.betas, tuple) else ()
        if len(betas) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"gradient.betas = {shown(self.betas)}: give two numbers of at least 0 and below 1"
            )
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise ConfigError(
                f"gradient.momentum = {shown(self.momentum)}: give a number of at least 0 and below"
                " 1"
            )
        if 0 < self.total_samples <= self.warmup_samples:
            raise ConfigError(
                f"gradient.total_samples = {self.total_samples} is not more than warmup_samples ="
                f" {self.warmup_samples}: use more, or 0 for a constant rate after the warm-up"
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate of `kind` after warm-up."""
        return self.lr or _DEFAULT_LR[self.kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor in the flat vector.

    Attributes:
        name: as the model calls it.
        start: of its first element.
        shape: its elements lie in rows. A matrix's rows are its outputs, as in `nn.Linear`.
        matrix: Muon may take it.
        decay: weight decay applies to it.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    matrix: bool
    decay: bool

    @property
    def stop(self) -> int:
        """After its last element."""
        return self.start + math.prod(self.shape)


def schedule(samples: int, *, warmup_samples: int, total_samples: int) -> float:
    """The factor on the peak learning rate.

    Args:
        samples: what the swarm has been trained on once this step is done, from 1.
        warmup_samples: linear rise to 1 over this many.
        total_samples: where the cosine reaches `FLOOR`, which it keeps; 0: constant after warm-up.

    Returns:
        A factor in (0, 1], the same float64 on every machine.
    """
    if samples < warmup_samples:
        return max(1, samples) / warmup_samples
    if total_samples <= warmup_samples:
        return 1.0
    progress = min(1.0, (samples - warmup_samples) / (total_samples - warmup_samples))
    half = _cosine(math.pi / 2 * progress)
    return FLOOR + (1.0 - FLOOR) * (half * half)  # cos^2 of x is (1 + cos 2x) / 2


def _cosine(x: float) -> float:
    """For 0 <= x <= pi / 2. Not the C library's, of which some differ in the last place."""
    square, result = x * x, 0.0
    for coefficient in reversed(_COSINE):
        result = result * square + coefficient
    return result


def _power(base: float, exponent: int) -> float:
    """By squaring. Not `**`, which is the C library's, too."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


class _Step(NamedTuple):
    """One step of all tensors."""

    before: list[Floats]
    gradient_N: Floats
    out: list[Floats]
    scale: float  # of the gradient
    factor: float  # of the learning rates
    number: int  # t, from 1


class _Piece(NamedTuple):
    """Neighbours that take the same elementwise step; at `second` their second moments begin."""

    start: int
    stop: int
    second: int
    decay: bool


class GradientOptimizer:
    """A `StateOptimizer` for gradients.

    The moments are: for AdamW the means and the mean squares; for Muon the means, and the mean
    squares of what Muon does not take, in the order of the vector; for SGD the momentum if any.

    Args:
        config: rule, rates and schedule.
        tensors: they fill the flat vector from 0 on without a gap, in order.
        threads: how many may compute at once; the result does not depend on it.

    Raises:
        ValueError: `tensors` do not, or Muon shall take what is no matrix.
    """

    elementwise: Final = False

    def __init__(
        self, config: GradientConfig, tensors: Sequence[TensorSpec], *, threads: int = 1
    ) -> None:
        self.config = config
        self._threads = threads
        self._numel = 0
        for tensor in tensors:
            if tensor.start != self._numel or tensor.stop < tensor.start:
                raise ValueError(f"{tensor.name} begins at {tensor.start}, not at {self._numel}")
            if tensor.matrix and len(tensor.shape) != 2:
                raise ValueError(f"{tensor.name} is no matrix, but {tensor.shape}")
            self._numel = tensor.stop
        muon = config.kind == "muon"
        matrices = [t for t in tensors if muon and t.matrix and t.stop > t.start]
        self._pieces = _pieces([t for t in tensors if not (muon and t.matrix)])
        self._seconds = sum(piece.stop - piece.start for piece in self._pieces)
        # The longest first, so that threads end together.
        self._matrices = sorted(matrices, key=lambda tensor: tensor.start - tensor.stop)

    def lengths(self, numel: int) -> tuple[int, ...]:
        """See `StateOptimizer`.

        Raises:
            ValueError: the tensors have another number of elements.
        """
        if numel != self._numel:
            raise ValueError(f"a state's vectors must have {self._numel} elements, not {numel}")
        if self.config.kind == "sgd":
            return (numel, numel) if self.config.momentum else (numel,)
        return (numel, numel, self._seconds)

    def advance(
        self, before: Sequence[Tensor], average_N: Tensor, out: Sequence[Tensor], at: Position
    ) -> bool:
        """See `StateOptimizer`."""
        before, average_N, out = checked(before, average_N, out, self.lengths)
        config, gradient_N = self.config, average_N.numpy()
        step = _Step(
            before=[vector.numpy() for vector in before],
            gradient_N=gradient_N,
            out=[vector.numpy() for vector in out],
            scale=self._clipping(gradient_N),
            factor=schedule(
                at.samples + self.config.step_samples,
                warmup_samples=config.warmup_samples,
                total_samples=config.total_samples,
            ),
            number=at.round + 1,
        )

        def move(part: TensorSpec | _Piece) -> bool:
            with np.errstate(all="ignore"):  # a thread's own
                if isinstance(part, TensorSpec):
                    return self._by_muon(part, step)
                return (
                    self._by_sgd(part, step) if config.kind == "sgd" else self._by_adamw(part, step)
                )

        parts: list[TensorSpec | _Piece] = [*self._matrices, *self._pieces]
        return all(self._each(move, parts))

    def prepare(self) -> None:
        """See `StateOptimizer`: all kernels of this kind, by a step of a state of two tensors."""
        vector = TensorSpec(name="vector", start=0, shape=(1,), matrix=False, decay=False)
        matrix = TensorSpec(name="matrix", start=1, shape=(1, 1), matrix=True, decay=False)
        small = GradientOptimizer(self.config, [vector, matrix])
        before = [torch.zeros(length) for length in small.lengths(2)]
        out = [torch.empty_like(vector) for vector in before]
        small.advance(before, torch.ones(2), out, Position(round=0, samples=0))

    def _each(self, work: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[_Result]:
        """In threads, if any; the results are in the order of the parts."""
        if self._threads == 1 or len(parts) < 2:
            return [work(part) for part in parts]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(work, parts))

    def _clipping(self, gradient_N: Floats) -> float:
        """What to scale the gradient by; `torch.nn.utils.clip_grad_norm_` computes the same."""
        if not self.config.grad_clip:
            return 1.0
        parts = [gradient_N[start : start + PIECE] for start in range(0, len(gradient_N), PIECE)]
        squares = [part for parts_S in self._each(segment_squares, parts) for part in parts_S]
        norm = math.sqrt(total(squares))
        return min(1.0, self.config.grad_clip / (norm + 1e-6))

    def _by_adamw(self, piece: _Piece, step: _Step) -> bool:
        config = self.config
        beta1, beta2 = config.betas
        lr = (config.adamw_lr if config.kind == "muon" else config.peak_lr) * step.factor
        here = slice(piece.start, piece.stop)
        second = slice(piece.second, piece.second + piece.stop - piece.start)
        return adamw_step(
            (step.before[0][here], step.before[1][here], step.before[2][second]),
            step.gradient_N[here],
            (step.out[0][here], step.out[1][here], step.out[2][second]),
            AdamW(
                scale=np.float32(step.scale),
                beta1=np.float32(beta1),
                rest1=np.float32(1.0 - beta1),
                beta2=np.float32(beta2),
                rest2=np.float32(1.0 - beta2),
                unbias=np.float32(1.0 / math.sqrt(1.0 - _power(beta2, step.number))),
                eps=np.float32(config.eps),
                keep=self._keep(lr, piece.decay),
                lr=np.float32(lr / (1.0 - _power(beta1, step.number))),
            ),
        )

    def _by_sgd(self, piece: _Piece, step: _Step) -> bool:
        config = self.config
        lr = config.peak_lr * step.factor
        here = slice(piece.start, piece.stop)
        before, out = ([vector[here] for vector in vectors] for vectors in (step.before, step.out))
        constants = Sgd(
            scale=np.float32(step.scale),
            momentum=np.float32(config.momentum),
            keep=self._keep(lr, piece.decay),
            lr=np.float32(lr),
        )
        if not config.momentum:
            return sgd_step(before[0], step.gradient_N[here], out[0], constants)
        return momentum_step(
            (before[0], before[1]),
            step.gradient_N[here],
            (out[0], out[1]),
            constants,
            config.nesterov,
        )

    def _by_muon(self, tensor: TensorSpec, step: _Step) -> bool:
        """Passes over memory are numpy's here: they are little beside the products."""
        momentum = self.config.momentum
        lr = self.config.peak_lr * step.factor
        here = slice(tensor.start, tensor.stop)
        theta, mean = step.out[0][here], step.out[1][here]
        ahead = step.gradient_N[here] * np.float32(step.scale)
        ahead *= np.float32(1.0 - momentum)
        np.multiply(step.before[1][here], np.float32(momentum), out=mean)
        mean += ahead
        ahead += mean * np.float32(momentum)  # Nesterov's look-ahead
        direction = orthogonalised(ahead.reshape(tensor.shape))
        # A matrix that widens its input needs a larger step to change the output as much.
        rows, columns = tensor.shape
        direction *= np.float32(lr * math.sqrt(max(1.0, rows / columns)))
        np.multiply(step.before[0][here], self._keep(lr, tensor.decay), out=theta)
        theta -= direction.reshape(-1)
        return all_finite((theta, mean))

    def _keep(self, lr: float, decay: bool) -> np.float32:
        return np.float32(1.0 - lr * self.config.weight_decay if decay else 1.0)


def orthogonalised(matrix_MN: Floats) -> Floats:
    """Replace all singular values by about one, keeping the singular vectors.

    Args:
        matrix_MN: contiguous; all zeros stay zeros. Its memory may be used.

    Returns:
        (M, N); singular values roughly in [0.7, 1.2].

    Source: Jordan et al. 2024 (Muon), five Newton-Schulz steps.
    """
    a, b, c = _NEWTON_SCHULZ
    norm = math.sqrt(total(segment_squares(matrix_MN.reshape(-1))))
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x = np.ascontiguousarray(matrix_MN.T if tall else matrix_MN)  # the Gram matrix: the short side
    x /= np.float32(max(norm, 1e-7))  # Frobenius norm: all singular values at most 1
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = product(x, np.ascontiguousarray(x.T), symmetric=True)
        quintic = product(gram, gram, symmetric=True)
        quintic *= c
        gram *= b
        quintic += gram
        moved = product(quintic, x)
        x *= a
        x += moved
    return np.ascontiguousarray(x.T if tall else x)


def _pieces(tensors: Sequence[TensorSpec]) -> list[_Piece]:
    """Tensors as few and long pieces, but none so long that threads would wait for it."""
    runs: list[_Piece] = []
    for tensor in tensors:
        last = runs[-1] if runs else _Piece(0, 0, 0, tensor.decay)
        if (tensor.start, tensor.decay) == (last.stop, last.decay):
            runs[-1:] = [last._replace(stop=tensor.stop)]
        else:
            second = last.second + last.stop - last.start
            runs.append(_Piece(tensor.start, tensor.stop, second, tensor.decay))
    return [
        _Piece(start, min(start + PIECE, run.stop), run.second + start - run.start, run.decay)
        for run in runs
        for start in range(run.start, run.stop, PIECE)
    ]
