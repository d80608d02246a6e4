"""How fast the codecs and the outer step are on one core: GB of float32 per second.

    python benchmarks/codecs.py --mb 16 --json codecs.json

Both backends, one thread, the median of several runs that alternate between the two; `copy` is a
memory copy of the same vector, the yardstick. With `--jit`, also what compiling costs a fresh
process in CPU seconds and memory, with an empty cache and with a warm one (Linux).

Tried and rejected, on int4 with numba (AMD EPYC, 5th generation, some load on both cores):
- Scales beside their blocks rather than all in front, alternating in one run, 8 MB of float32: 17.3
  and 16.4 GB/s to encode, 10.5 and 10.6 to decode, no difference; but validating took three times
  as long, as it reads all of the payload's cache lines for two bytes in 130.
- Multiplying by 1 / scale rather than dividing by the scale, 16 MB: 20.0 and 19.1 GB/s to encode.
- Signed indices that are sums: numba looks whether they are negative, and what should be a load
  becomes a gather. 1 MB, before and after: 19 and 45 GB/s to encode, 11 and 97 to decode. Hence the
  np.uintp in `coordinator_free/kernels.py`.
Plain numpy was not measured: like torch, it would pass over the memory once for each operation.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.arguments import Parser, at_least, megabytes, writable
from coordinator_free import kernels
from coordinator_free.codecs import codec
from coordinator_free.optimizer import Position
from coordinator_free.outer import OuterConfig, OuterOptimizer

Work = Callable[[], object]

CODECS = ("fp32", "bf16", "int8", "int4", "int2", "int1", "top64", "top128")

PROCESS = """
import json, sys, time
import torch
from coordinator_free.codecs import prepare
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free import kernels
def resident(kind):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) * 1024 / 1e6
private, mapped, began = resident("RssAnon"), resident("RssFile"), time.process_time()
assert kernels.compiled()
imported = time.process_time() - began
if sys.argv[1] == "everything":
    for name in ("fp32", "bf16", "int8", "int4", "int2", "int1", "top64", "top128"):
        prepare(name)
    OuterOptimizer(OuterConfig()).prepare()
elif sys.argv[1] == "int4":
    prepare("int4")
    OuterOptimizer(OuterConfig()).prepare()
print(json.dumps({
    "import_s": imported,
    "kernels_s": time.process_time() - began - imported,
    "private_mb": resident("RssAnon") - private,
    "mapped_mb": resident("RssFile") - mapped,
}))
"""


def works(numel: int) -> dict[str, dict[str, Work]]:
    """What is timed, by codec and operation."""
    values_N = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    into_N, other_N, spare_N = torch.zeros(3, numel)
    outer, start = OuterOptimizer(OuterConfig()), Position(round=0, samples=0)

    def of(name: str) -> dict[str, Work]:
        each = codec(name)
        room = memoryview(bytearray(13 + each.encoded_bytes(numel)))[13:]  # after a frame's header
        payload = bytes(each.encode(values_N))
        return {
            "encode": lambda: each.encode(values_N, room),
            "decode": lambda: each.decode(payload, numel, into_N, 0.25),
            "decode_add": lambda: each.decode_add(payload, numel, 0.25, into_N),
            "validate": lambda: each.validate(payload, numel),
        }

    table = {name: of(name) for name in CODECS}
    table["outer"] = {
        "advance": lambda: outer.advance((values_N, other_N), values_N, (into_N, spare_N), start),
    }
    table["copy"] = {"copy": lambda: into_N.copy_(values_N)}
    return table


def measured(numel: int, runs: int) -> list[dict[str, Any]]:
    """One row for each backend, codec and operation."""
    rows = []
    for name, operations in works(numel).items():
        for operation, work in operations.items():
            seconds: dict[str, list[float]] = {"numba": [], "torch": []}
            for run in range(runs + 1):
                for backend, times in seconds.items():
                    if backend == "numba" and not kernels.compiled():
                        continue
                    with contextlib.ExitStack() as stack:
                        if backend == "torch":
                            stack.enter_context(kernels.torch_only())
                        began = time.perf_counter()
                        work()
                        if run:  # the first warms up
                            times.append(time.perf_counter() - began)
            rows += [
                {
                    "codec": name,
                    "operation": operation,
                    "backend": backend,
                    "gb_per_s": 4 * numel / statistics.median(times) / 1e9,
                }
                for backend, times in seconds.items()
                if times
            ]
    return rows


def jit_costs() -> list[dict[str, Any]]:
    """CPU seconds and memory of a fresh process that compiles everything, or only int4."""
    rows = []
    for what in ("int4", "everything"):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                done = subprocess.run(
                    [sys.executable, "-c", PROCESS, what],
                    env={**os.environ, "NUMBA_CACHE_DIR": cache},
                    check=True,
                    capture_output=True,
                    text=True,
                )
                rows.append({"what": what, "cache": state, **json.loads(done.stdout)})
    return rows


def print_speeds(rows: list[dict[str, Any]]) -> None:
    """One line for each backend and codec."""
    by_line: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        line = by_line.setdefault((row["codec"], row["backend"]), {})
        line[row["operation"]] = row["gb_per_s"]
    print("GB/s of fp32, one core")
    for (name, backend), speeds in by_line.items():
        columns = "  ".join(f"{operation} {speed:8.2f}" for operation, speed in speeds.items())
        print(f"{name:>6} {backend:>6}  {columns}")


def main() -> None:
    """Parse the command line, measure and print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=megabytes, default=16, help="fp32 megabytes of the vector")
    parser.add_argument("--runs", type=at_least(1), default=9)
    parser.add_argument("--jit", action="store_true", help="what compiling costs, too")
    parser.add_argument("--json", type=writable, help="write the numbers there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    speeds = measured(int(arguments.mb * 1e6 / 4), arguments.runs)
    print_speeds(speeds)
    costs = jit_costs() if arguments.jit and kernels.compiled() else []
    for cost in costs:
        print(
            f"{cost['what']:>10}, {cost['cache']} cache: import numba {cost['import_s']:.2f} s, "
            f"kernels {cost['kernels_s']:.2f} s (of CPU), memory +{cost['private_mb']:.0f} MB, "
            f"and {cost['mapped_mb']:.0f} MB of libraries, which processes share"
        )
    if arguments.json:
        report = {"mb": arguments.mb, "speeds": speeds, "jit": costs}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
