"""What a recipe learns, played in one process: for choosing what `convergence.py` then proves.

    python benchmarks/recipes.py --steps 900 shoal shoal,local_steps=60 shoal,outer.lr=0.9
    python benchmarks/recipes.py --steps 900 --lost 0.25 shoal

Peers are threads in lockstep, with the shipped trainer, local loop, codecs, residuals on both sides
and outer optimizer, and without a network: what is handed in is encoded, averaged, encoded again
and taken up as in a swarm in which nobody is slow. Model, text, batch and learning rates are those
of `convergence.py`. A recipe is one of its settings of ours, and what is changed in it: fields of
[round], or of another table with its name before the dot. `sync-adamw` and `sync-muon` are
one process that steps on the batches of all peers.

`--lost 0.25` leaves a random quarter of the contributions of each round out, whole. Printed are the
loss of the swarm's parameters, nats a byte on the held-out blocks, and the bytes that a peer sends
for each parameter and step, without headers, both ways of the butterfly.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
import tomllib
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import Parser, at_least, several
from benchmarks.convergence import LEARNING_RATES, OURS, SIZES, run_file, share
from benchmarks.learning import Task
from benchmarks.lockstep import Failed
from coordinator_free.codecs import codec, mean_of_sent, sparse_codec
from coordinator_free.handoff import Assignment, Handoff, RoundResult, SessionClosed
from coordinator_free.local import LocalLoop
from coordinator_free.memory import empty_vector
from coordinator_free.optimizer import Position
from coordinator_free.outer import OuterOptimizer
from coordinator_free.recipe import feeds_back
from coordinator_free.state import Fragment, Shape, State
from model.builders import ModelConfig
from model.optimizers import OptimizerConfig
from model.trainer import Trainer, TrainerConfig
from peer.config import RunConfig

SYNCHRONOUS = {"sync-adamw": "adamw", "sync-muon": "muon"}


class Table:
    """The swarm: ends a round when everybody has handed in.

    Args:
        config: of the run.
        theta_N: (N,) float32 initial parameters.
        lost: whose work is left out of a round.
    """

    def __init__(
        self, config: RunConfig, peers: int, theta_N: Tensor, lost: Callable[[], set[int]]
    ) -> None:
        self._config = config
        self._optimizer = OuterOptimizer(config.outer)
        shape = Shape.of("recipes", len(theta_N), config.round.parts, self._optimizer)
        self.state = State.begin(shape, theta_N)
        self.seats = [Seat(self, number) for number in range(peers)]
        self.sent_bytes = 0.0  # by one peer
        self._lost = lost
        self._codec = codec(config.round.codec)
        self._keeps = feeds_back(config.local, config.round.codec)
        self._residuals: dict[int, Tensor] = {}  # the reducers', by fragment
        self._work: dict[int, tuple[Tensor, int]] = {}
        self._lock = threading.Lock()
        self._round = self._samples = 0

    def hand_in(self, number: int, update_E: Tensor, samples: int) -> None:
        """The last one ends the round."""
        with self._lock:
            self._work[number] = update_E, samples
            if len(self._work) == len(self.seats):
                self._end_round()

    def assign(self) -> None:
        """Deal the next round's work."""
        for number, seat in enumerate(self.seats):
            seat.handoff.assign(
                Assignment(
                    round=self._round,
                    seat=number,
                    seats=len(self.seats),
                    samples=self._samples,
                    state=self.state,
                    closing=threading.Event(),
                )
            )

    def _end_round(self) -> None:
        lost = self._lost()
        number = self.state.shape.fragment(self._round)
        before = self.state.fragments[number]
        numel = len(before.theta_E)
        weights = {seat: samples for seat, (_, samples) in self._work.items() if seat not in lost}
        average_E = self._average(number, numel, weights)
        out = tuple(torch.empty_like(vector) for vector in before.vectors)
        at = Position(round=self._round, samples=self._samples)
        if not self._optimizer.advance(before.vectors, average_E, out, at):
            raise Failed("the average is not finite")
        self.state = self.state.then(number, Fragment(out, ()))
        total = sum(weights.values())  # who is lost does not move the schedule on in a swarm either
        ended, self._round = self._round, self._round + 1
        self._samples += total
        self._work.clear()
        for seat in self.seats:
            seat.handoff.resolve(
                RoundResult(
                    round=ended,
                    spans=((0, numel),) if seat.number in weights else (),
                    members=len(weights),
                    digest="",
                    samples=0,
                    total_samples=total,
                    bytes_sent=0,
                    bytes_received=0,
                    allreduce_s=0.0,
                    commit_s=0.0,
                    round_s=0.0,
                )
            )
        if self._round == self._config.round.rounds:
            for seat in self.seats:
                seat.handoff.close()
        else:
            self.assign()

    def _average(self, number: int, numel: int, weights: dict[int, int]) -> Tensor:
        """(E,) what all take up: the encoded mean of what was sent, decoded."""
        total = sum(weights.values())
        sum_E = torch.zeros(numel)
        sparse = sparse_codec(self._config.round.codec)
        sent_E = torch.zeros(numel) if sparse is not None else None
        others = (len(self.seats) - 1) / len(self.seats)
        for seat in sorted(weights):
            payload = self._codec.encode(self._work[seat][0])
            self.sent_bytes += len(payload) * others / len(self.seats)
            if sparse is not None and sent_E is not None:
                sparse.decode_add_sent(payload, numel, weights[seat] / total, sum_E, sent_E)
            else:
                self._codec.decode_add(payload, numel, weights[seat] / total, sum_E)
        if sent_E is not None:
            mean_of_sent(sum_E, sent_E)
        if number in self._residuals:
            sum_E += self._residuals[number]
        encoding = codec(self._codec.average)
        payload = encoding.encode(sum_E)
        self.sent_bytes += len(payload) * others
        average_E = empty_vector(numel)
        encoding.decode(payload, numel, average_E)
        if self._keeps:
            self._residuals[number] = sum_E - average_E
        return average_E


class Seat:
    """The `local.Swarm` of one peer."""

    hurried = False

    def __init__(self, table: Table, number: int) -> None:
        self.handoff = Handoff()
        self.number = number
        self._table = table
        self.next_assignment = self.handoff.next
        self.result = self.handoff.result

    def hand_in(self, update_E: Tensor, samples: int) -> bool:
        """See `local.Swarm`."""
        finite = self.handoff.hand_in(update_E, samples, lambda round, samples: None)
        self._table.hand_in(self.number, update_E, samples)
        return finite

    def progress(self, samples: int) -> None:
        """Only in gradient mode, which `sync-` stands for here."""
        raise NotImplementedError

    @property
    def state(self) -> State:
        """See `local.Swarm`."""
        return self._table.state

    def leave(self) -> None:
        """There will be no more rounds."""
        for seat in self._table.seats:
            seat.handoff.close()


def take_part(seat: Seat, trainer: Trainer, config: RunConfig) -> None:
    """One peer's whole run; where it fails, nobody waits for it."""
    loop = LocalLoop(seat, trainer, config.round, config.local)
    try:
        work = loop.begin()
        while work is not None:
            if not loop.steps:
                trainer.begin_round(loop.round, work.seat, work.seats)
                trainer.set_progress(loop.swarm_samples(), work.seats)
            turn = loop.stepped(trainer.step().samples)
            if turn is not None:
                work = turn.work
    finally:
        seat.leave()


def play(table: Table, trainers: Sequence[Trainer], config: RunConfig) -> None:
    """All peers' whole runs, side by side; raises what the first of them failed with."""
    table.assign()
    with ThreadPoolExecutor(len(trainers)) as threads:
        runs = [
            threads.submit(take_part, seat, trainer, config)
            for seat, trainer in zip(table.seats, trainers, strict=True)
        ]
        wait(runs)
    for run in sorted(runs, key=lambda run: isinstance(run.exception(), SessionClosed)):
        run.result()


def ours(setting: str, task: Task, lost: float) -> tuple[float, float]:
    """Loss, and bytes per parameter and step.

    Raises:
        Failed: the settings do not fit together, or the average is not finite.
    """
    _, config = run_file(setting, task)
    if config.round.mode == "gradient":
        raise Failed(f"{setting}: gradient mode is what {' and '.join(SYNCHRONOUS)} stand for")
    first = Trainer(config.trainer)
    trainers = [first, *(Trainer(config.trainer, first.data) for _ in range(task.peers - 1))]
    chosen, count = random.Random(task.seed), round(lost * task.peers)
    table = Table(
        config, task.peers, first.read(), lambda: set(chosen.sample(range(task.peers), count))
    )
    play(table, trainers, config)
    return first.evaluate(table.state.theta_N), table.sent_bytes / first.numel / task.steps


def synchronous(task: Task) -> tuple[float, float]:
    """The same of one optimizer over all peers' batches."""
    fields: dict[str, Any] = {**task.optimizer, **task.schedule()}
    trainer = Trainer(
        TrainerConfig(
            model=ModelConfig(**task.model),
            batch_size=task.batch * task.peers,
            seed=task.seed,
            device=task.device,
            eval_blocks=task.eval_blocks,
            optimizer=OptimizerConfig(**fields),
        )
    )
    for step in range(task.steps):
        if step % task.every == 0:
            trainer.begin_round(step // task.every, 0, 1)
            trainer.set_progress(step * task.batch * task.peers)
        trainer.step()
    return trainer.evaluate(), 8 * (task.peers - 1) / task.peers


def recipe(text: str) -> str:
    """Register "shoal,codec=int4,outer.lr=0.9" as a setting of ours."""
    base, *changes = text.split(",")
    if text in SYNCHRONOUS:
        return text
    if base not in OURS:
        raise ArgumentTypeError(f"{base!r} is none of {', '.join([*OURS, *SYNCHRONOUS])}")
    tables: dict[str, dict[str, Any]] = {name: {**table} for name, table in OURS[base].items()}
    for change in changes:
        name, _, value = change.partition("=")
        table, _, key = name.rpartition(".")
        if table not in ("", "round", "optimizer", "outer"):
            raise ArgumentTypeError(f"{change!r}: only [round], [optimizer] and [outer] change")
        try:
            read = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            read = value
        tables.setdefault(table or "round", {})[key] = read
    OURS[text] = tables
    return text


def main() -> None:
    """Parse the command line and print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=recipe)
    parser.add_argument("--peers", type=at_least(2), default=4)
    parser.add_argument("--steps", type=at_least(1), default=900)
    parser.add_argument("--seeds", type=several(at_least(0)), default=[1])
    parser.add_argument("--lost", type=share, default=0.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.recipes:
        began = time.monotonic()
        try:
            found = [_play(name, seed, arguments) for seed in arguments.seeds]
        except Failed as error:
            parser.error(str(error))
        losses = [loss for loss, _ in found]
        print(
            f"{statistics.mean(losses):.4f}  {found[0][1]:8.5f} B/p/s  {name}  "
            f"({' '.join(f'{loss:.4f}' for loss in losses)})  {time.monotonic() - began:.0f} s",
            flush=True,
        )


def _play(name: str, seed: int, arguments: Namespace) -> tuple[float, float]:
    size = SIZES["cpu"]
    kind = SYNCHRONOUS.get(name, "muon")
    task = Task(
        peers=arguments.peers,
        seed=seed,
        model=size["model"],
        batch=size["batch"],
        steps=arguments.steps,
        every=30,
        eval_blocks=64,
        warmup_steps=10,
        device="cpu",
        optimizer=LEARNING_RATES["cpu"][kind],
    )
    return synchronous(task) if name in SYNCHRONOUS else ours(name, task, arguments.lost)


if __name__ == "__main__":
    main()
