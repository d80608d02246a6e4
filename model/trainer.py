"""The inner loop: one peer's local steps on its own shard.

Reads top to bottom: configure, deal a round's blocks, step, evaluate. What the swarm needs of it is
`read` and `write` (one flat vector), `begin_round` (whose blocks) and `set_progress` (where the run
is); it knows nothing of peers, rounds' outcomes or the network.

Guaranteed: a step either changes the parameters by a finite update or raises `TrainingDiverged` and
leaves them as they were; the blocks of a round depend on seed, round, seat and roster size alone;
`evaluate` uses the same blocks in every peer with the same data and changes nothing. Not
guaranteed: that two peers compute the same bits (different devices round differently), and safety
under concurrent use: read, write and step from one thread, or one after the other.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.builders import ModelConfig, ModelError, build
from model.data import DataConfig, DataError, TokenData, load
from model.optimizers import InnerOptimizer, OptimizerConfig
from model.shards import Blocks, blocks_of
from model.tokens import tokenizer_for
from model.vector import FlatParameters


class TrainingDiverged(ArithmeticError):
    """Loss or gradient is not finite; the parameters are those before the step.

    Args:
        step: position in the run, in local steps.
        loss: of the batch, in nats a token.
    """

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"step {step}: loss {loss} or its gradient is not finite")
        self.step = step
        self.loss = loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """One peer's training.

    Args:
        model: what is trained.
        data: on what.
        optimizer: how.
        batch_size: sequences in a step.
        micro_batch: sequences in memory at once; 0 for the whole batch.
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
    seed: int = 0
    device: str = "auto"
    eval_blocks: int = 32

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_blocks"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"trainer {name} = {value} must be at least 1")
        if self.micro_batch < 0:
            raise ValueError(f"trainer micro_batch = {self.micro_batch} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one step did.

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

    Args:
        config: all of it.
        data: the corpus, if the caller has loaded it before; else `config.data` is loaded.

    Raises:
        ModelError: the model cannot be built, or its vocabulary is smaller than the data's.
        DataError: the data cannot be read, or is too short for one block.
        ValueError: no such device.
    """

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
        self.model.to(self.device)
        self._flat = FlatParameters(self.model)
        self._optimizer = InnerOptimizer(
            (p for p in self.model.parameters() if p.requires_grad),
            self.model.hidden_matrices(),
            config.optimizer,
        )
        self._position = 0
        self._blocks: Blocks | None = None
        self._next_block = 0

    @property
    def numel(self) -> int:
        """N, the length of the flat vector."""
        return self._flat.numel

    @property
    def layout(self) -> str:
        """Hex digest of the vector's meaning; equal in all peers of a run."""
        return self._flat.layout

    def read(self, out: Tensor | None = None) -> Tensor:
        """The parameters as (N,) float32 on the CPU, written into `out` if given."""
        return self._flat.read(out)

    def write(self, theta_N: Tensor) -> None:
        """Replace the parameters by (N,) float32 on the CPU; optimizer moments are kept.

        Raises:
            ValueError: another shape, dtype or device; nothing was written.
        """
        self._flat.write(theta_N)

    def set_progress(self, step: int) -> None:
        """Say how many local steps the run has behind it: the position in the schedule."""
        self._position = step

    def begin_round(self, round: int, seat: int, seats: int) -> None:
        """Take this seat's blocks of a round; call once a round, before its first step.

        Raises:
            ValueError: no such seat.
            DataError: more seats than blocks, so that this one has none.
        """
        blocks = blocks_of(self.config.seed, round, seat, seats, self.n_blocks)
        if not len(blocks):
            raise DataError(f"{self.n_blocks} training blocks are too few for {seats} peers")
        self._blocks, self._next_block = blocks, 0

    def step(self) -> StepReport:
        """Take one optimizer step on the next batch of this seat's blocks.

        A seat that has used all its blocks starts over with them.

        Returns:
            Loss before the update, and what it was measured on.

        Raises:
            TrainingDiverged: loss or gradient is not finite; parameters and moments are untouched.
        """
        assert self._blocks is not None, "begin_round comes before step"
        size, micro = self.config.batch_size, self.config.micro_batch or self.config.batch_size
        batch = [self._blocks[(self._next_block + i) % len(self._blocks)] for i in range(size)]
        self.model.train()
        self._optimizer.zero_grad()
        loss = 0.0
        for start in range(0, size, micro):
            rows = batch[start : start + micro]
            part = self._loss(self.data.train, rows) * (len(rows) / size)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        # One sum over all: a NaN anywhere in the gradients is a NaN in their norm.
        if not math.isfinite(loss) or not math.isfinite(self._optimizer.clip()):
            raise TrainingDiverged(self._position, loss)
        self._optimizer.step(self._position)
        self._position += 1
        self._next_block += size
        return StepReport(loss=loss, samples=size, tokens=size * self.context)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on the fixed validation blocks, in nats a token (a byte, with byte tokens)."""
        self.model.eval()
        micro = self.config.micro_batch or self.config.batch_size
        total = 0.0
        for start in range(0, len(self._eval_blocks), micro):
            rows = self._eval_blocks[start : start + micro]
            total += self._loss(self.data.validation, rows).item() * len(rows)
        return total / len(self._eval_blocks)

    def describe(self) -> str:
        """One line: model, parameters, device, tokens."""
        model = self.config.model
        return (
            f"{model.name or model.kind}, {self.numel / 1e6:.2f} M parameters on {self.device},"
            f" {self.data.train.numel() / 1e6:.2f} M training tokens of"
            f" {self.config.data.path or 'the Python standard library'}"
        )

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
        """The bf16 of tensor cores on CUDA; needs no loss scaling, unlike fp16."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: this machine has"
            f" {torch.cuda.device_count()} CUDA devices"
        )
    return device
