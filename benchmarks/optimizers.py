"""How long gradient mode's optimizers take for one step of a GPT, and how fast products are.

    python benchmarks/optimizers.py --millions 10,100 --threads 1,2 --json optimizers.json

The best of several steps after one, in seconds and in seconds of CPU, which other load on the
machine changes less. `product` is one thread and by CPU time, beside torch's of the same two
matrices, which fuses and sums in an order of its own. With `--numpy`, also without numba.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.arguments import Parser, at_least, one_of, several, writable
from coordinator_free import kernels
from coordinator_free.gradient import GradientConfig, GradientOptimizer, TensorSpec
from coordinator_free.gradient_kernels import product
from coordinator_free.optimizer import Position

KINDS = ("sgd", "adamw", "muon")
# Parameters: width, layers, vocabulary.
MODELS = {1: (128, 4, 1024), 10: (256, 8, 8192), 100: (768, 12, 10_240)}


def gpt(width: int, layers: int, vocabulary: int) -> list[TensorSpec]:
    """Embedding, layers of six matrices, head."""
    shapes = [(vocabulary, width)]
    for _ in range(layers):
        shapes += [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    shapes += [(vocabulary, width)]
    tensors: list[TensorSpec] = []
    for number, shape in enumerate(shapes):
        tensors.append(
            TensorSpec(
                name=f"{number}",
                start=tensors[-1].stop if tensors else 0,
                shape=shape,
                matrix=0 < number < len(shapes) - 1,
                decay=True,
            )
        )
    return tensors


def best_s(work: Callable[[], object], runs: int) -> tuple[float, float]:
    """Seconds, and seconds of CPU in all threads."""
    work()
    wall, cpu = [], []
    for _ in range(runs):
        began, cpu_began = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    return min(wall), min(cpu)


def step_s(millions: int, kind: Any, threads: int, runs: int) -> tuple[float, float]:
    """One step of all parameters."""
    tensors = gpt(*MODELS[millions])
    numel = tensors[-1].stop
    optimizer = GradientOptimizer(GradientConfig(kind=kind), tensors, threads=threads)
    average_N = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    before = [torch.zeros(length) for length in optimizer.lengths(numel)]
    out = [torch.zeros(length) for length in optimizer.lengths(numel)]
    at = Position(round=0, samples=0)
    return best_s(lambda: optimizer.advance(before, average_N, out, at), runs)


def product_gflops(rows: int, inner: int, runs: int) -> dict[str, float]:
    """Of (rows, inner) by (inner, rows), by ours and by torch."""
    left, right = torch.randn(rows, inner), torch.randn(inner, rows)
    flop = 2 * rows * rows * inner
    _, ours = best_s(lambda: product(left.numpy(), right.numpy()), runs)
    _, theirs = best_s(lambda: left @ right, runs)
    return {"ours": flop / ours / 1e9, "torch": flop / theirs / 1e9}


def main() -> None:
    """Parse the command line, measure and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    sizes = several(one_of(*map(str, MODELS)))
    parser.add_argument("--millions", type=sizes, default=["10"], help="of parameters")
    parser.add_argument("--kinds", type=several(one_of(*KINDS)), default=list(KINDS))
    parser.add_argument("--threads", type=several(at_least(1)), default=[1, 2])
    parser.add_argument("--runs", type=at_least(1), default=5)
    parser.add_argument("--numpy", action="store_true", help="without numba, too")
    parser.add_argument("--json", type=writable, help="write the numbers there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    products = {
        f"{rows}x{inner}": product_gflops(rows, inner, arguments.runs)
        for rows, inner in ((256, 256), (768, 768), (768, 3072))
    }
    for shape, speeds in products.items():
        print(
            f"product {shape:>9}: ours {speeds['ours']:6.1f} GFLOP/s, torch {speeds['torch']:6.1f}"
        )
    rows = []
    for backend in ("numba", "numpy") if arguments.numpy else ("numba",):
        with kernels.torch_only() if backend == "numpy" else contextlib.nullcontext():
            for millions in map(int, arguments.millions):
                for kind in arguments.kinds:
                    for threads in arguments.threads:
                        wall, cpu = step_s(millions, kind, threads, arguments.runs)
                        rows.append(
                            {
                                "backend": backend,
                                "millions": millions,
                                "kind": kind,
                                "threads": threads,
                                "seconds": wall,
                                "cpu_seconds": cpu,
                            }
                        )
                        print(
                            f"{backend} {millions:4} M {kind:>5}, threads {threads}: "
                            f"{wall:8.4f} s a step, {cpu:8.4f} of CPU",
                            flush=True,
                        )
    if arguments.json:
        report = {"products": products, "steps": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
