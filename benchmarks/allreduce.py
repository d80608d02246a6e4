"""How fast we average, side by side with hivemind and gloo: real processes, real sockets, one run.

    python benchmarks/allreduce.py --peers 4 --mb 64 --against hivemind,gloo --json FILE
    python benchmarks/allreduce.py --sweep --codec fp32,int4

Each system in turn gets one process per peer on this machine, the same seeded vectors and the same
weights (1, 2, 3, 1, ...). All peers begin a round together and look at nothing until all are done
(`lockstep`). Every result is held against the exact weighted mean, computed in float64. The first
round is for warming up and counts for nothing. What a row shows is

- exchange_s: the averaging alone, until everybody has it; the median of the rounds. shoal: the
  longest `RoundResult.allreduce_s` of all peers, from the plan's arrival at a peer until the
  average and the state it leads to are there, thus with the outer step and a hash of the state.
  hivemind: from a group having been found to the averages being in the shared tensor. gloo:
  `all_reduce`, with the conversion to bf16 and back. The last two count from the moment when the
  last peer began, which leaves out what the first ones did or waited until then.
- whole_s: all that a training loop waits for, from the last peer's call to the last peer's return.
  shoal: `Session.hand_in` to `result`, thus readiness, plan, exchange, outer step, hash of the
  state, agreement and commit. hivemind: `step`, thus matchmaking, exchange and the way between two
  processes. gloo: a multiplication by the weight and the exchange; it agrees on nothing.
- GB/s: 4 N * 2 (n - 1) / n / exchange_s, with N elements and n peers: what a butterfly or a ring of
  float32 moves per peer, whatever the codec made of it.
- cpu_s: per peer and round, of all its processes (`meter`), from the start of a round to the moment
  when all have their result. It has a resolution of 10 ms.
- memory: how far a peer's resident memory rose above what it was just before the round, in
  multiples of the vector; of the peers and rounds the largest. shoal: the next parameters and
  momentum are in it.
- peak_MB: that rise, and what was held before it, the interpreter, torch, the peer's own vector and
  whatever is kept from round to round; of the peers and rounds the largest.
- wire_MB: sent through TCP by each peer, per round, as the kernel counted it for its sockets
  (`ss`); `-` where that is missing. TLS and framing are in it, the headers of TCP are not.
- max_error: the largest deviation from the exact mean, of all elements, peers and rounds.
- identical: whether all peers ended each round with the same bits.
- right: whether max_error, and the root mean square that is in the JSON, are what the format's
  rounding explains (`vectors.TOLERANCES`), and all of every vector went into shoal's averages.

Our codecs stand beside the nearest of the others: bf16 beside hivemind's fp16 and gloo's bf16, int8
beside hivemind's Uniform8BitQuantization (`uniform8`); nobody else has int4. Every process gets one
thread of torch. shoal's rows, and hivemind's, are encrypted; gloo's are not.

Exit status 1 if a system failed, or a result was not right.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import lockstep, vectors
from benchmarks.arguments import Parser, at_least, megabytes, one_of, several, writable
from benchmarks.lockstep import Failed, Peers, Task
from benchmarks.meter import Meter, machine
from model.headroom import available_bytes

MEMORY_SHARE = 0.8  # of what is free, for all peers together; what would need more is left out
SWEEP_PEERS = (2, 4, 8, 16)
SWEEP_MB = (1.0, 8.0, 64.0, 512.0)
COLUMNS = {
    "system": 8,
    "codec": 8,
    "exchange_s": 10,
    "whole_s": 8,
    "GB/s": 7,
    "cpu_s": 7,
    "memory": 7,
    "peak_MB": 8,
    "wire_MB": 9,
    "max_error": 9,
    "identical": 9,
    "right": 5,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One of those that are compared.

    Attributes:
        script: of one peer.
        codecs: what it calls the nearest it has to each of ours.
        introduced: whether the first peer has to say where it is.
        ring: whether sums go from peer to peer, rounded each time.
        base_bytes: of one peer without a vector, about; all its processes.
        vectors: that one peer holds at its peak, about; for leaving out what does not fit.
    """

    script: str
    codecs: dict[str, str]
    introduced: bool
    ring: bool = False
    base_bytes: float
    vectors: float


SYSTEMS = {
    "shoal": System(
        script="shoal_peer.py",
        codecs={name: name for name in ("fp32", "bf16", "int8", "int4")},
        introduced=True,
        base_bytes=0.45e9,
        vectors=12,
    ),
    "hivemind": System(
        script="rivals/hivemind_peer.py",
        codecs={"fp32": "fp32", "bf16": "fp16", "int8": "uniform8"},
        introduced=True,
        base_bytes=0.95e9,
        vectors=6,
    ),
    "gloo": System(
        script="rivals/gloo_peer.py",
        codecs={"fp32": "fp32", "bf16": "bf16"},
        introduced=False,
        ring=True,
        base_bytes=0.25e9,
        vectors=3,
    ),
}


async def measure(name: str, task: Task, folder: Path, largest: float) -> dict[str, Any]:
    """One row: a system with a codec.

    Args:
        name: of the system.
        task: with the codec as the system calls it.
        folder: the mean is there.
        largest: magnitude of any element.

    Raises:
        Failed: it did not get to the end.
    """
    system = SYSTEMS[name]
    rounds = []
    began = time.monotonic()
    peers = Peers(
        system.script,
        task,
        folder,
        hosts=["127.0.0.1"] * task.peers,
        prefixes=[[]] * task.peers,
        introduced=system.introduced,
    )
    async with peers.running():
        meter, start_s = Meter(peers.pids), 0.0
        for number in range(task.rounds):
            await peers.hear("ready")
            start_s = time.monotonic() - began if number == 0 else start_s
            meter.start()
            peers.tell("go")
            done = await peers.hear("done")
            usages = meter.stop()
            peers.tell("look")
            looked = await peers.hear("looked")
            each = [
                {**asdict(usage), **a, **b}
                for usage, a, b in zip(usages, done, looked, strict=True)
            ]
            rounds.append({"round": number, **_together(name, task, largest, each), "peers": each})
    return {**_row(name, task, rounds), "start_s": start_s, "rounds": rounds}


def _together(name: str, task: Task, largest: float, each: list[dict[str, Any]]) -> dict[str, Any]:
    """A round of all peers."""
    roundings = task.peers if SYSTEMS[name].ring else 2
    vector_bytes = 4 * task.numel
    wires = [peer["wire_bytes"] for peer in each]
    max_error = max(peer["max_error"] for peer in each)
    rms_error = max(peer["rms_error"] for peer in each)
    return {
        "exchange_s": _exchange_s(each),
        "whole_s": max(peer["ended"] for peer in each) - max(peer["began"] for peer in each),
        "cpu_s": statistics.mean(peer["cpu_s"] for peer in each),
        "memory": max(peer["extra_bytes"] for peer in each) / vector_bytes,
        "peak_MB": max(peer["held_bytes"] + peer["extra_bytes"] for peer in each) / 1e6,
        "wire_bytes": None if None in wires else statistics.mean(wires),
        "max_error": max_error,
        "rms_error": rms_error,
        "identical": len({(peer["digest"], peer.get("state")) for peer in each}) == 1,
        "right": vectors.verified(task.codec, largest, max_error, rms_error, roundings)
        and all(peer.get("fraction", 1.0) == 1.0 for peer in each),
    }


def _exchange_s(each: list[dict[str, Any]]) -> float:
    """How long the averaging alone took: see `exchange_s` at the top."""
    if "exchange_s" in each[0]:
        return float(max(peer["exchange_s"] for peer in each))
    last = max(peer["exchange_ended"] for peer in each)
    return float(last - max(peer["exchange_began"] for peer in each))


def _row(name: str, task: Task, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds after the first; every one is in the JSON."""
    warm = rounds[1:]

    def median(field: str) -> float:
        return statistics.median(each[field] for each in warm)

    moved = 4 * task.numel * 2 * (task.peers - 1) / task.peers
    wire_bytes = None if warm[0]["wire_bytes"] is None else median("wire_bytes")
    return {
        "system": name,
        "codec": task.codec,
        "peers": task.peers,
        "mb": 4 * task.numel / 1e6,
        "exchange_s": median("exchange_s"),
        "whole_s": median("whole_s"),
        "GB/s": moved / median("exchange_s") / 1e9,
        "cpu_s": median("cpu_s"),
        "memory": max(each["memory"] for each in warm),
        "peak_MB": max(each["peak_MB"] for each in warm),
        "wire_MB": None if wire_bytes is None else wire_bytes / 1e6,
        "max_error": max(each["max_error"] for each in rounds),
        "rms_error": max(each["rms_error"] for each in rounds),
        "identical": all(each["identical"] for each in rounds),
        "right": all(each["right"] for each in rounds),
    }


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    if "failed" in row:
        print(f"{row['system']:>8} {row['codec']:>8} failed: {row['failed']}", flush=True)
        return
    cells = {name: _cell(row[name]) for name in COLUMNS}
    cells |= {"max_error": f"{row['max_error']:.1e}", "peak_MB": f"{row['peak_MB']:.0f}"}
    print(" ".join(f"{cells[name]:>{width}}" for name, width in COLUMNS.items()), flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


async def compare(arguments: Namespace) -> int:
    """Everything that was asked for; the exit status."""
    report = {**machine(), "rows": []}
    rows: list[dict[str, Any]] = report["rows"]
    for peers in arguments.peers:
        for mb in arguments.mb:
            numel = int(mb * 1e6 / 4)
            print(f"\n{peers} peers x {mb:g} MB")
            fitting = [name for name in arguments.systems if _fits(name, peers, mb)]
            if not fitting:
                continue
            print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
            with lockstep.scratch() as folder:
                mean = folder / lockstep.MEAN
                largest = vectors.write_mean(mean, arguments.seed, peers, numel)
                for name, codec in _pairs(fitting, arguments.codec):
                    task = Task(
                        peers=peers,
                        numel=numel,
                        rounds=arguments.rounds,
                        codec=codec,
                        seed=arguments.seed,
                    )
                    of_run = folder / f"{name}-{codec}"
                    of_run.mkdir()
                    (of_run / lockstep.MEAN).symlink_to(mean)
                    try:
                        row = await measure(name, task, of_run, largest)
                    except Failed as error:
                        row = {"system": name, "codec": codec, "peers": peers, "mb": mb}
                        row["failed"] = str(error)
                    rows.append(row)
                    print_row(row)
                    if arguments.json is not None:
                        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.sweep:
        from benchmarks.plot import plot

        print(f"\n{plot(report, arguments.json.with_suffix('.png'))}")
    return 0 if rows and all(row.get("right") for row in rows) else 1


def _fits(name: str, peers: int, mb: float) -> bool:
    """Whether it may be tried; says so if not."""
    system = SYSTEMS[name]
    needed = peers * (system.base_bytes + system.vectors * mb * 1e6)
    free = available_bytes()
    fits = free is None or needed <= MEMORY_SHARE * free
    if not fits:
        print(f"{name:>8} left out: it would need about {needed / 1e9:.0f} GB")
    return fits


def _pairs(systems: list[str], codecs: list[str]) -> Iterator[tuple[str, str]]:
    """Systems with what they call the codecs, those side by side that are alike."""
    for codec in codecs:
        for name in systems:
            if codec in SYSTEMS[name].codecs:
                yield name, SYSTEMS[name].codecs[codec]


def main() -> None:
    """Parse the command line and print the tables."""
    parser = Parser(description=__doc__.splitlines()[0])
    codecs, rivals = tuple(SYSTEMS["shoal"].codecs), tuple(SYSTEMS)[1:]
    parser.add_argument("--peers", type=several(at_least(2)), help="one or several, by commas")
    parser.add_argument("--mb", type=several(megabytes), help="of each peer's vector as float32")
    parser.add_argument("--codec", type=several(one_of(*codecs)), default=list(codecs))
    parser.add_argument("--against", type=several(one_of(*rivals)), default=[])
    parser.add_argument("--rounds", type=at_least(2), default=6, help="the first is for warming up")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the vectors")
    parser.add_argument("--json", type=writable, help="every round's figures")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="many sizes, and a plot beside the JSON (build/allreduce-sweep.json)",
    )
    arguments = parser.parse_args()
    arguments.systems = ["shoal", *arguments.against]
    if arguments.sweep:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--sweep needs matplotlib: pip install 'shoal[bench]'")
        if arguments.json is None:
            Path("build").mkdir(exist_ok=True)
            arguments.json = writable("build/allreduce-sweep.json")
        if arguments.json.suffix == ".png":
            parser.error(f"{arguments.json} is where --sweep draws: give --json another name")
    arguments.peers = arguments.peers or (SWEEP_PEERS if arguments.sweep else [4])
    arguments.mb = arguments.mb or (SWEEP_MB if arguments.sweep else [64.0])
    if not sys.platform.startswith("linux"):
        parser.error("memory and CPU are read from Linux's /proc")
    lockstep.run(lambda: compare(arguments))


if __name__ == "__main__":
    main()
