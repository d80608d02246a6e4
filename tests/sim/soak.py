"""As many seeds as you have time for: `make soak SEEDS=100000`.

    python -m tests.sim.soak --seeds 100000 --first 0
    python -m tests.sim.soak --seeds 1 --first 4711        one seed again

Prints each seed that fails, with the command that replays it, as soon as it fails. A seed always
plays the same way, whatever machine or process plays it. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from tests.sim.chaos import calm, trouble


def play(seed: int) -> tuple[int, str, str]:
    """One seed: (seed, digest of all that happened, what is wrong or nothing)."""
    try:
        world = trouble(seed)
        calm(world)
    except AssertionError as error:
        return seed, "", f"{type(error).__name__}: {error}"
    return seed, world.trace.hexdigest(8), ""


def main() -> None:
    """Parse the command line and play the seeds on all cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    failed = 0
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        for done, (seed, trace, problem) in enumerate(
            processes.map(play, seeds, chunksize=min(8, -(-len(seeds) // 2))), 1
        ):
            if problem:
                failed += 1
                print(f"seed {seed}: {problem}", flush=True)
                print(f"  again: python -m tests.sim.soak --seeds 1 --first {seed}", flush=True)
            elif arguments.seeds == 1:
                print(f"seed {seed}: trace {trace}")
            if done % 1000 == 0:
                print(
                    f"{done} seeds, {failed} failed, {time.monotonic() - began:.0f} s", flush=True
                )
    print(f"{len(seeds)} seeds, {failed} failed, {time.monotonic() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
