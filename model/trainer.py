"""The inner loop: one peer's training on its own shard.

Reads top to bottom: configure, deal a round's blocks, step or accumulate, evaluate. What the swarm
needs of it is `read` and `write` (one flat vector, or a span of it), `begin_round` (whose blocks)
and `set_progress` (where the run is); it knows nothing of peers, rounds' outcomes or the network.

Two ways to train. `step` takes whole optimizer steps of this peer's own. `accumulate` only adds up
gradients, and `gradient` hands out their mean, for an optimizer that lives elsewhere.

Guaranteed: a step either changes the parameters by a finite update or raises `TrainingDiverged` and
leaves them as they were; the size of a micro-batch changes results by rounding alone, also when it
is cut down in the middle of a step because the GPU's memory is full; the blocks of a round depend
on seed, round, seat and roster size alone; `evaluate` uses the same blocks in every peer with the
same data and changes nothing. Not guaranteed: that two peers compute the same bits (different
devices round differently), and safety under concurrent use: read, write and step from one thread,
or one after the other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.builders import ModelConfig, ModelError, build
from model.data import DataConfig, DataError, TokenData, load
from model.headroom import available_bytes, fitting, held_bytes
from model.optimizers import InnerOptimizer, OptimizerConfig
from model.shards import Blocks, blocks_of
from model.tokens import tokenizer_for
from model.vector import FlatParameters, TensorSpan


class TrainingDiverged(ArithmeticError):
    """Loss or gradient is not finite; the parameters are those before the step.

    Args:
        samples: position in the run, in sequences of the whole swarm.
        loss: of the batch, in nats a token.
    """

    def __init__(self, samples: int, loss: float) -> None:
        super().__init__(f"after {samples} samples: loss {loss} or its gradient is not finite")
        self.samples = samples
        self.loss = loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """One peer's training.

    Args:
        model: what is trained.
        data: on what.
        optimizer: how.
        batch_size: sequences in a step.
        micro_batch: sequences in memory at once, at most `batch_size`; 0 for as many as fit.
        precision: of activations and matrix products: "bf16" is autocast, "auto" that where the GPU
            is made for it and fp32 elsewhere. Parameters, gradients and moments are always fp32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        seed: of initial weights and shards; the same for the whole run.
        device: "auto" (CUDA if there is one, else the CPU) or a torch device such as "cuda:1".
        eval_blocks: validation sequences behind `evaluate`, fewer if the data has fewer.

    Raises:
        ValueError: one line naming the field, its value and the remedy.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 8
    micro_batch: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    eval_blocks: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_blocks"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"trainer {name} = {value} must be at least 1")
        if self.micro_batch < 0:
            raise ValueError(f"trainer micro_batch = {self.micro_batch} must not be negative")
        if self.micro_batch > self.batch_size:
            raise ValueError(
                f"trainer micro_batch = {self.micro_batch} is more than batch_size ="
                f" {self.batch_size}: use at most that, or 0 for as many as fit"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(
                f"trainer precision {self.precision!r} is unknown: use 'auto', 'fp32' or 'bf16'"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step, or one micro-batch, did.

    Args:
        loss: mean of the batch before the update, in nats a token.
        samples: sequences.
        tokens: predicted tokens.
    """

    loss: float
    samples: int
    tokens: int


class Trainer:
    """A model, its data and its optimizer.

    `model/box.py` derives from it what several processes in one peer need; alone, this is rank 0 of
    one.

    Args:
        config: all of it.
        data: the corpus, if the caller has loaded it before; else `config.data` is loaded.

    Raises:
        ModelError: the model cannot be built, or its vocabulary is smaller than the data's.
        DataError: the data cannot be read, or is too short for one block.
        ValueError: no such device.
    """

    _rank = 0
    _ranks = 1

    def __init__(self, config: TrainerConfig, data: TokenData | None = None) -> None:
        self.config = config
        self.device = _device(config.device)
        self.data = data or load(config.data, tokenizer_for(config.model))
        self.model = build(config.model, config.seed)
        if self.data.vocabulary > self.model.vocabulary:
            raise ModelError(
                f"model vocabulary = {self.model.vocabulary} is smaller than the tokenizer's"
                f" {self.data.vocabulary}"
            )
        self.context = config.model.context
        self.n_blocks = self._count(self.data.train, "training")
        n_validation = self._count(self.data.validation, "validation")
        n_eval = min(config.eval_blocks, n_validation)
        # Spread over all held-out regions, not just the first.
        self._eval_blocks = [i * n_validation // n_eval for i in range(n_eval)]
        self._autocast, self._why_precision = _autocast(config.precision, self.device)
        if config.gradient_checkpointing:
            self.model.checkpoint_activations()
        self.model.to(self.device)
        self._flat = FlatParameters(self.model)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = InnerOptimizer(
            self._trained, self.model.hidden_matrices(), config.optimizer
        )
        self._position = 0
        self._peers = 1
        self._blocks: Blocks | None = None
        self._next_block = 0
        self._accumulated = 0  # sequences in the gradients since the round began
        self._micro, self._why_micro = self._micro_batch()

    @property
    def numel(self) -> int:
        """N, the length of the flat vector."""
        return self._flat.numel

    @property
    def layout(self) -> str:
        """Hex digest of the vector's meaning; equal in all peers of a run."""
        return self._flat.layout

    @property
    def chosen(self) -> dict[str, str]:
        """What "auto" has become and why, one line each."""
        precision = "bf16" if self._autocast else "fp32"
        return {
            "precision": f"{precision}: {self._why_precision}",
            "micro_batch": f"{self._micro}: {self._why_micro}",
        }

    def tensors(self) -> tuple[TensorSpan, ...]:
        """What is where in the flat vector, for an optimizer that lives elsewhere."""
        return self._flat.tensors(self.model.hidden_matrices())

    def read(self, out: Tensor | None = None, *, start: int = 0, stop: int | None = None) -> Tensor:
        """The parameters, or a span of them, as float32 on the CPU, written into `out` if given."""
        return self._flat.read(out, start=start, stop=stop)

    def write(self, theta_S: Tensor, *, start: int = 0, stop: int | None = None) -> None:
        """Replace the parameters, or a span of them, by as many float32 on the CPU.

        Optimizer moments are kept.

        Raises:
            ValueError: no such span, or another shape, dtype or device; nothing was written.
        """
        self._flat.write(theta_S, start=start, stop=stop)

    def reset(self) -> None:
        """Forget the optimizer's moments and warm up anew, as a joiner does; parameters stay."""
        self._optimizer.reset()

    def set_progress(self, samples: int, peers: int = 1) -> None:
        """Say where the swarm is: the position in the schedule.

        Args:
            samples: sequences that the swarm has behind it, before this peer's next step.
            peers: how many train at the same time; each step here stands for one of them all.
        """
        self._position, self._peers = samples, peers

    def begin_round(self, round: int, seat: int, seats: int) -> None:
        """Take this seat's blocks of a round; call once a round, before its first step.

        Gradients that were accumulated before are forgotten.

        Raises:
            ValueError: no such seat.
            DataError: more seats than blocks, so that this one has none.
        """
        blocks = blocks_of(self.config.seed, round, seat, seats, self.n_blocks)
        if not len(blocks):
            raise DataError(f"{self.n_blocks} training blocks are too few for {seats} peers")
        self._blocks, self._next_block = blocks, 0
        self._forget_gradients()

    def step(self) -> StepReport:
        """Take one optimizer step on the next batch of this seat's blocks.

        A seat that has used all its blocks starts over with them. Gradients that were accumulated
        before are forgotten.

        Returns:
            Loss before the update, and what it was measured on.

        Raises:
            TrainingDiverged: loss or gradient is not finite; parameters and moments are untouched.
            ModelError: the GPU's memory is too small for one sequence.
        """
        size = self.config.batch_size
        self._forget_gradients()
        loss = self._sum(self._add_gradients(self._mine(size), 1 / size))
        self._sum_gradients()
        # One sum over all: a NaN anywhere in the gradients is a NaN in their norm.
        if not math.isfinite(loss) or not math.isfinite(self._optimizer.clip()):
            raise TrainingDiverged(self._position, loss)
        self._optimizer.step(self._position + size * self._peers)
        return self._done(size, loss)

    def accumulate(self) -> StepReport:
        """Add the gradients of the next micro-batch of this seat's blocks to the round's.

        Returns:
            Mean loss of the micro-batch, and what it was measured on.

        Raises:
            TrainingDiverged: the loss is not finite; what was accumulated is forgotten.
            ModelError: the GPU's memory is too small for one sequence.
        """
        return self._accumulate(self._micro * self._ranks)

    def _accumulate(self, size: int) -> StepReport:
        if not self._accumulated:
            self._forget_gradients()
        loss = self._sum(self._add_gradients(self._mine(size), 1.0)) / size
        if not math.isfinite(loss):
            self._forget_gradients()
            raise TrainingDiverged(self._position, loss)
        self._accumulated += size
        return self._done(size, loss)

    def gradient(self, out: Tensor | None = None) -> Tensor:
        """The mean gradient over all samples that were accumulated since `begin_round`.

        Averages of it over peers, weighted by samples, are the gradient of all their samples.

        Args:
            out: (N,) float32 on the CPU, overwritten; a new one if None.

        Returns:
            (N,) float32 on the CPU: `out`; zero where a parameter is not trained.

        Raises:
            TrainingDiverged: it is not finite; what was accumulated is forgotten.
            ValueError: `out` has another shape, dtype or device.
        """
        assert self._accumulated, "accumulate comes before gradient"
        self._sum_gradients()
        gradient_N = self._flat.read_gradients(out).div_(self._accumulated)
        if not math.isfinite(gradient_N.norm()):
            self._forget_gradients()
            raise TrainingDiverged(self._position, math.nan)
        return gradient_N

    @torch.no_grad()
    def evaluate(self, theta_N: Tensor | None = None) -> float:
        """Mean loss on the fixed validation blocks, in nats a token (a byte, with byte tokens).

        Args:
            theta_N: (N,) float32 on the CPU, measured in place of the parameters, which stay.
        """
        if theta_N is None:
            return self._evaluate()
        held = [p.clone() for p in self.model.parameters()]
        try:
            self._flat.write(theta_N)
            return self._evaluate()
        finally:
            for p, before in zip(self.model.parameters(), held, strict=True):
                p.copy_(before)

    def _evaluate(self) -> float:
        self.model.eval()

        def measure(rows: list[int]) -> float:
            return self._loss(self.data.validation, rows).item() * len(rows)

        mine = self._eval_blocks[self._rank :: self._ranks]
        return self._sum(self._in_micro_batches(mine, measure)) / len(self._eval_blocks)

    def close(self) -> None:
        """Let go of what other processes wait for; here there are none."""

    def describe(self) -> str:
        """One line: model, parameters, device, tokens."""
        model = self.config.model
        return (
            f"{model.name or model.kind}, {self.numel / 1e6:.2f} M parameters on {self.device}"
            f" in {'bf16' if self._autocast else 'fp32'},"
            f" {self._micro} of {self.config.batch_size} sequences at once ({self._why_micro}),"
            f" {self.data.train.numel() / 1e6:.2f} M training tokens of"
            f" {self.config.data.path or 'the Python standard library'}"
        )

    def _mine(self, size: int) -> list[int]:
        """This process's share of the next `size` blocks."""
        assert self._blocks is not None, "begin_round comes before step"
        places = range(self._next_block + self._rank, self._next_block + size, self._ranks)
        return [self._blocks[place % len(self._blocks)] for place in places]

    def _done(self, size: int, loss: float) -> StepReport:
        self._position += size * self._peers
        self._next_block += size
        return StepReport(loss=loss, samples=size, tokens=size * self.context)

    def _sum(self, value: float) -> float:
        """The sum over all processes of this peer."""
        return value

    def _sum_gradients(self) -> None:
        """Sum the gradients over all processes of this peer, in place."""

    def _forget_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._accumulated = 0

    def _add_gradients(self, rows: list[int], scale: float) -> float:
        """Add the gradient of the sum of these blocks' losses, times `scale`; returns that sum."""
        self.model.train()

        def add(piece: list[int]) -> float:
            # All of a micro-batch's gradients before any is added: one that runs out of memory
            # leaves no trace.
            loss = self._loss(self.data.train, piece) * (len(piece) * scale)
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True)
            seen: set[int] = set()
            for p, gradient in zip(self._trained, gradients, strict=True):
                if gradient is None:
                    continue
                if p.grad is not None:
                    p.grad += gradient
                    continue
                # Two parameters may be given one tensor, or a view, but are scaled one by one.
                shared = gradient.data_ptr() in seen or not gradient.is_contiguous()
                seen.add(gradient.data_ptr())
                p.grad = gradient.clone().view_as(p) if shared else gradient
            return loss.item()

        with self._optimizer.gradient_point():
            return self._in_micro_batches(rows, add)

    def _in_micro_batches(self, rows: list[int], work: Callable[[list[int]], float]) -> float:
        """The sum of `work` over pieces of the rows, smaller ones from where memory runs out."""
        total, done = 0.0, 0
        while done < len(rows):
            piece = rows[done : done + self._micro]
            result = self._attempt(piece, work)
            if result is None:
                self._micro = -(-len(piece) // 2)
                self._why_micro = f"{len(piece)} did not fit in the memory of {self.device}"
            else:
                total += result
                done += len(piece)
        return total

    def _attempt(self, piece: list[int], work: Callable[[list[int]], float]) -> float | None:
        """Do the work; None, with the generators as before, if memory is short but may be saved."""
        before = torch.get_rng_state()
        cuda = self.device if self.device.type == "cuda" else None
        before_cuda = torch.cuda.get_rng_state(cuda) if cuda is not None else None
        try:
            return work(piece)
        except torch.cuda.OutOfMemoryError as error:
            if len(piece) == 1:
                raise ModelError(
                    f"the memory of {self.device} is too small for one sequence of {self.context}"
                    " tokens: switch gradient_checkpointing on or take a smaller model"
                ) from error
            if self.config.micro_batch:
                raise ModelError(
                    f"the memory of {self.device} is too small for micro_batch ="
                    f" {self.config.micro_batch}: use 0, which finds what fits"
                ) from error
        # Not before: up to here the error's traceback has held on to all activations.
        torch.set_rng_state(before)
        if cuda is not None and before_cuda is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_rng_state(before_cuda, cuda)
        return None

    def _micro_batch(self) -> tuple[int, str]:
        """Sequences at once, and why so many."""
        share = -(-self.config.batch_size // self._ranks)
        if self.config.micro_batch:
            return self.config.micro_batch, "as configured"
        whole = "the whole batch" if self._ranks == 1 else "each process's share"
        if self.device.type != "cpu" or share == 1:
            return share, whole
        # Twice the same block: the difference is one sequence, without what all have in common.
        before = torch.get_rng_state()
        one, two = (
            held_bytes(lambda n=n: self._loss(self.data.train, [0] * n), self.model.parameters())  # type: ignore[misc]
            for n in (1, 2)
        )
        torch.set_rng_state(before)
        free = available_bytes()
        micro = fitting(share, two - one, free)
        need = f"a sequence needs {(two - one) / 1e6:.1f} MB"
        if micro == share:
            return micro, f"{whole}, {need}"
        return micro, f"{need}, {(free or 0) / 1e9:.1f} GB are free"

    def _loss(self, tokens_N: Tensor, blocks: list[int]) -> Tensor:
        """Mean cross-entropy of these blocks, a scalar with gradient."""
        starts = [block * self.context for block in blocks]
        rows_BT = torch.stack([tokens_N[s : s + self.context + 1] for s in starts])
        rows_BT = rows_BT.to(self.device, torch.int64)
        with self._precision():
            logits_BTV = self.model(rows_BT[:, :-1])
        # In fp32 whatever autocast did: a sum over the vocabulary loses too much in bf16.
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in bf16 if so chosen; needs no loss scaling, unlike fp16."""
        if self._autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _count(self, tokens_N: Tensor, part: str) -> int:
        """Whole blocks in a part; each needs one token more, the last one's target."""
        count = (tokens_N.numel() - 1) // self.context
        if count < 1:
            raise DataError(
                f"the {part} part has {tokens_N.numel()} tokens, one block needs"
                f" {self.context + 1}: use more text or a shorter context"
            )
        return count


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):  # nobody has trained on others, and peers must agree
        raise ValueError(f"device {name!r} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: this machine has"
            f" {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _autocast(precision: str, device: torch.device) -> tuple[bool, str]:
    """Is bf16 used, and why."""
    if precision != "auto":
        return precision == "bf16", "as configured"
    if device.type != "cuda":
        return False, f"the safe choice on {device.type}"
    # Older ones only emulate it (Ampere has compute capability 8.0).
    native = torch.cuda.get_device_capability(device) >= (8, 0)
    return native, f"{device} {'has' if native else 'lacks'} tensor cores for bf16"
