"""What to do with work that came too late for its round: drop it, or fold it into the next one.

    python benchmarks/lost_work.py --peers 4 --rounds 12 --late 0.25 --seeds 3

Peers are played one after the other in one process, with the shipped trainer and outer optimizer.
In every round each peer is late with probability `--late`; it is never all of them. Dropped: its
pseudo-gradient is lost. Folded: it is averaged into the peer's next one, each weighted by its
samples. `none` is the same run without anybody late. Prints the validation loss after the last
round, in nats a byte, by seed. All ways see the same data and the same peers late.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from coordinator_free.optimizer import Position
from coordinator_free.outer import OuterConfig, OuterOptimizer
from model.builders import ModelConfig
from model.trainer import Trainer, TrainerConfig


def final_loss(way: str, seed: int, arguments: argparse.Namespace) -> float:
    """Validation loss after the last round."""
    chance = random.Random(seed)
    config = TrainerConfig(model=ModelConfig(layers=2, context=64), seed=seed)
    first = Trainer(config)
    trainers = [first, *(Trainer(config, first.data) for _ in range(arguments.peers - 1))]
    theta_N = first.read()
    momentum_N = torch.zeros_like(theta_N)
    outer = OuterOptimizer(OuterConfig())
    carried: dict[int, tuple[torch.Tensor, int]] = {}
    for round_ in range(arguments.rounds):
        late = {n for n in range(arguments.peers) if chance.random() < arguments.late}
        late -= {chance.randrange(arguments.peers)}
        if way == "none":
            late = set()
        handed_in = []
        for number, trainer in enumerate(trainers):
            trainer.write(theta_N)
            trainer.begin_round(round_, number, arguments.peers)
            a_step = config.batch_size * arguments.peers
            trainer.set_progress(round_ * arguments.local_steps * a_step, arguments.peers)
            samples = sum(trainer.step().samples for _ in range(arguments.local_steps))
            delta_N = theta_N - trainer.read()
            if number in carried:
                old_N, old = carried.pop(number)
                delta_N = (delta_N * samples + old_N * old) / (samples + old)
                samples += old
            if number not in late:
                handed_in.append((delta_N, samples))
            elif way == "fold":
                carried[number] = (delta_N, samples)
        total = sum(samples for _, samples in handed_in)
        mean_N = sum(
            (delta_N * (samples / total) for delta_N, samples in handed_in), torch.zeros(())
        )
        after = torch.empty_like(theta_N), torch.empty_like(momentum_N)
        outer.advance((theta_N, momentum_N), mean_N, after, Position(round=0, samples=0))
        theta_N, momentum_N = after
    first.write(theta_N)
    return first.evaluate()


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--local-steps", type=int, default=30)
    parser.add_argument("--late", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for way in ("none", "drop", "fold"):
        began = time.monotonic()
        losses = [final_loss(way, seed, arguments) for seed in range(arguments.seeds)]
        shown = " ".join(f"{loss:.4f}" for loss in losses)
        print(
            f"{way:5} {statistics.mean(losses):.4f}  ({shown})  {time.monotonic() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
