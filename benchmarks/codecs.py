"""How fast the codecs are on one core: GB of float32 per second.

    python benchmarks/codecs.py --mb 16

Encode, decode, and decode-accumulate of one vector on one thread; the median of several runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from coordinator_free.codecs import codec


def gigabytes_per_second(work: Callable[[], object], size: float, runs: int) -> float:
    """Median speed of `work`, which handles `size` bytes of float32."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return size / statistics.median(seconds) / 1e9


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=16, help="fp32 megabytes of the vector")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    numel = int(arguments.mb * 1e6 / 4)
    values_N = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    into_N = torch.zeros(numel)
    print(f"{'codec':>6} {'bytes/el':>9} {'encode':>8} {'decode':>8} {'add':>8}   GB/s of fp32")
    for name in ("fp32", "bf16", "int8", "int4"):
        each = codec(name)
        payload = bytes(each.encode(values_N))
        works: list[Callable[[], object]] = [
            lambda each=each: each.encode(values_N),
            lambda each=each, payload=payload: each.decode(payload, numel),
            lambda each=each, payload=payload: each.decode_add(payload, numel, 0.25, into_N),
        ]
        speeds = [gigabytes_per_second(work, 4 * numel, arguments.runs) for work in works]
        columns = " ".join(f"{speed:8.2f}" for speed in speeds)
        print(f"{name:>6} {len(payload) / numel:9.4f} {columns}")


if __name__ == "__main__":
    main()
