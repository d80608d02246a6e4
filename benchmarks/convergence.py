"""What is learnt from so many bytes, and in so many seconds: Shoal beside what else there is.

    python benchmarks/convergence.py --mbit 0 --seeds 1,2,3 --settings shoal,ddp-adamw,ddp-muon
    python benchmarks/convergence.py --mbit 20,100,1000 --json FILE --plot FILE.png

Real processes, each on a machine of its own (`lines`), the same model, text, shards, number of
sequences and seeds for all, the same held-out blocks for the validation loss, one thread of torch
in each process. The settings:

    ddp-adamw, ddp-muon       torch's DistributedDataParallel over gloo: gradients, every step
    hivemind, hivemind-fp16   hivemind.Optimizer with its defaults; its target batch is what all
                              peers see in `--local-steps` steps, or `--hivemind-target`
    hivemind-fast             the same with 3 s for matchmaking and a quarter of the target batch
    opendiloco                H steps of AdamW, then Nesterov (0.7, 0.9) over fp16 differences
    shoal                     our default: a run file that says nothing but model, length and the
                              30 steps between two averagings
    shoal-...                 ours with other settings: see `OURS`

Each peer takes `--steps` steps of `--batch` sequences. Learning rates were chosen for each kind at
this size, and are in `LEARNING_RATES`; warm-up and cosine go by sequences, for all alike.

Columns: loss, nats a byte on the held-out blocks, of the final model, the mean over the peers;
MB, sent by a peer, all headers included, as its network interface counted it, the mean over the
peers; fewer, how many times less that is than `ddp-adamw` (where it was not run: than 6 bytes for
each parameter and step); seconds, from everybody being ready until the last result, in ours with
those of the validation losses, in the others without; waiting, the share of these seconds in which
the training thread stood still for the swarm; seen, sequences beside those planned. A setting that
takes longer than `--limit-s` is broken off, and its seconds and bytes are projected.

`--lost 0.25` loses the contribution of a random quarter of the peers in each of our rounds: their
streams to the other reducers break before the first chunk (`coordinator_free.failpoints`). What a
peer reduces itself still has its part in it. The JSON says how many streams broke (`broken`).

Then means over the seeds, and what the aims say: our default against synchronous AdamW and Muon,
against the loss that hivemind ends with, and with and without lost peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import random
import statistics
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import lockstep
from benchmarks.arguments import Parser, at_least, one_of, several, writable
from benchmarks.daemons import Daemons
from benchmarks.learning import Task
from benchmarks.lines import Lines, Link, complaint, transmitted
from benchmarks.lockstep import Failed, Peers
from benchmarks.meter import machine
from dht.errors import ConfigError, innermost
from model.builders import ModelConfig, build
from peer import runfile
from peer.config import RunConfig, load

SIZES: dict[str, dict[str, Any]] = {
    # 2.18 M parameters: with 4 peers on 2 cores, AdamW 0.15 s a step, Muon 0.4 s.
    "cpu": {
        "model": {"layers": 4, "width": 208, "heads": 4, "context": 64},
        "batch": 4,
        "steps": 900,
        "device": "cpu",
    },
    # 121 M parameters; peers share the GPUs that there are.
    "gpu": {
        "model": {"layers": 17, "width": 768, "heads": 12, "context": 512},
        "batch": 16,
        "steps": 3000,
        "device": "cuda",
    },
}

# How they were found: benchmarks/README.md.
LEARNING_RATES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "adamw": {"kind": "adamw", "lr": 4e-3},
        "muon": {"kind": "muon", "lr": 0.015},
        "hivemind": {"kind": "adamw", "lr": 8e-3},
        "local": {"kind": "adamw", "lr": 4e-3},
    },
    "gpu": {  # by the usual scaling with the width; not tuned
        "adamw": {"kind": "adamw", "lr": 1e-3},
        "muon": {"kind": "muon", "lr": 0.015, "adamw_lr": 1e-3},
        "hivemind": {"kind": "adamw", "lr": 1e-3},
        "local": {"kind": "adamw", "lr": 1e-3},
    },
}

WAITED_FOR = {"fragments": 1, "delay_steps": 0}
ADAMW_INSIDE = {"kind": "adamw", "lr": 4e-3}

OURS: dict[str, dict[str, dict[str, Any]]] = {
    "shoal": {},
    "shoal-h60": {"round": {"local_steps": 60}},
    "shoal-int4": {"round": {"codec": "int4"}},
    "shoal-int1": {"round": {"codec": "int1"}},
    "shoal-wait": {"round": {**WAITED_FOR}},
    "shoal-wait-int4": {"round": {**WAITED_FOR, "codec": "int4"}},
    "shoal-wait-top64": {"round": {**WAITED_FOR, "codec": "top64"}},
    "shoal-adamw": {"optimizer": ADAMW_INSIDE},
    "shoal-gradient": {"round": {"mode": "gradient", "codec": "int8", **WAITED_FOR}},
}
"""What each run file adds to model, data, length and schedule. Local steps are 30 and not each
peer's own choice, or the length in sequences would not be known before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """Somebody else's.

    Attributes:
        script: of one peer.
        rates: its entry in `LEARNING_RATES`.
        introduced: whether the first peer has to say where it is.
        options: for the script.
    """

    script: str
    rates: str
    introduced: bool = True
    options: dict[str, Any] = field(default_factory=dict)


_HIVEMIND = {"script": "rivals/hivemind_trainer.py", "rates": "hivemind"}
_QUICK = {"matchmaking_time": 3.0}
RIVALS = {
    "ddp-adamw": Rival(script="rivals/ddp_peer.py", rates="adamw", introduced=False),
    "ddp-muon": Rival(script="rivals/ddp_peer.py", rates="muon", introduced=False),
    "hivemind": Rival(**_HIVEMIND, options={"compression": "fp32", "more": {}}),
    "hivemind-fp16": Rival(**_HIVEMIND, options={"compression": "fp16", "more": {}}),
    "hivemind-fast": Rival(
        **_HIVEMIND, options={"compression": "fp16", "more": _QUICK, "quarter": True}
    ),
    "opendiloco": Rival(script="rivals/opendiloco_peer.py", rates="local"),
}

COLUMNS = {
    "setting": 18,
    "mbit": 6,
    "seed": 5,
    "lost": 5,
    "loss": 7,
    "MB": 9,
    "fewer": 7,
    "seconds": 8,
    "waiting": 8,
    "seen": 6,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row.

    Attributes:
        setting: of `RIVALS` or `OURS`.
        mbit: of each peer's link, each way; 0: as fast as the machine can.
        seed: of weights, shards and of who is lost.
        lost: share of the peers whose contribution is lost in each round.
    """

    setting: str
    mbit: float
    seed: int
    lost: float


@dataclass(slots=True)
class Curve:
    """What became of a run: points of the first peer, ends of all."""

    points: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    samples: int = 0
    broken: int = 0  # streams to a reducer that ended before the first chunk, as it saw them


# -- one run --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def machines(case: Case, peers: int) -> AsyncIterator[dict[str, Any]]:
    """Addresses and prefixes of as many machines, on links as the case says, from the start."""
    net = Lines()
    try:
        net.open()
        added = [net.add() for _ in range(peers)]
        if case.mbit:
            for number in range(peers):
                net.shape(number, Link(case.mbit, case.mbit))
        yield {
            "hosts": [address for _, address in added],
            "prefixes": [["ip", "netns", "exec", name] for name, _ in added],
        }
    finally:
        net.close()


async def rivals_curve(case: Case, task: Task, folder: Path, curve: Curve) -> None:
    """Run somebody else's peers to their end.

    Raises:
        Failed: a peer broke off.
    """
    rival = RIVALS[case.setting]
    async with machines(case, task.peers) as where:
        peers = Peers(rival.script, task, folder, introduced=rival.introduced, **where)
        async with peers.running():
            await peers.hear("ready")
            before = list(map(transmitted, peers.pids))

            async def follow(number: int) -> None:
                async for mark in peers.follow(number, "done"):
                    if number == 0:
                        sent = statistics.mean(map(transmitted, peers.pids))
                        sent -= statistics.mean(before)
                        curve.points.append({**mark, "bytes": sent})
                curve.losses.append(mark["val_loss"])
                curve.waits.append(mark["wait_s"] / max(mark["wall_s"], 1e-9))
                # hivemind's peers go at their own speeds; each has seen what it has.
                curve.samples += mark["step"] * task.batch

            peers.tell("go")
            await _all(follow(number) for number in range(task.peers))
            peers.tell("end")


async def our_curve(case: Case, task: Task, folder: Path, curve: Curve) -> None:
    """Run Shoal's peers to their end.

    Raises:
        Failed: a peer broke off, or refuses the run file.
    """
    text, config = run_file(case.setting, task)
    steps_a_round = task.steps / config.round.rounds
    async with machines(case, task.peers) as where:
        daemons = Daemons(
            text,
            folder,
            **where,
            failpoints=broken_streams(case, task.peers, config.round.rounds),
            device=task.device,
        )
        async with daemons.running():
            began: list[float] = []
            before: list[int] = []
            latest: list[int] = []
            lasts: list[float] = []

            async def follow(number: int) -> None:
                at, sent, wait_s = 0.0, 0.0, 0.0
                async for event in daemons.follow(number, "done"):
                    kind = event["event"]
                    if kind == "joined":
                        began.append(event["at"])
                        if len(began) == task.peers:
                            before.extend(map(transmitted, daemons.pids))
                            latest.extend(before)
                        at = event["at"]
                    elif kind == "round":
                        with contextlib.suppress(OSError):  # done and gone: what it had sent before
                            latest[number] = transmitted(daemons.pids[number])
                        # Its loss is of what the round began with: what was there at the last one.
                        if number == 0:
                            step = round(event["round"] * steps_a_round)
                            point = {"step": step, "val_loss": event["val_loss"], "bytes": sent}
                            point["wait_s"] = wait_s
                            curve.points.append({**point, "wall_s": max(0.0, at - max(began))})
                            sent = statistics.mean(latest) - statistics.mean(before)
                        at = event["at"]
                        wait_s += event.get("wait_s", event["allreduce_s"])
                        curve.samples += event["samples"]
                    elif kind == "done":
                        wall_s = at - max(began)
                        lasts.append(wall_s)
                        curve.losses.append(event["val_loss"])
                        curve.waits.append(wait_s / max(wall_s, 1e-9))
                        if number == 0:
                            point = {"step": task.steps, "val_loss": event["val_loss"]}
                            point |= {"bytes": sent, "wall_s": wall_s, "wait_s": wait_s}
                            curve.points.append(point)

            await _all(follow(number) for number in range(task.peers))
        curve.broken = sum(log.count("butterfly.contributor_lost") for log in daemons.logs())


async def _all(followers: Any) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            for follower in followers:
                tasks.create_task(follower)
    except BaseExceptionGroup as group:
        raise innermost(group) from group


def run_file(setting: str, task: Task) -> tuple[str, RunConfig]:
    """TOML of one of our settings, and what it means.

    Raises:
        Failed: it is refused.
    """
    ours = OURS[setting]
    tables: dict[str, Any] = {
        "name": setting,
        "seed": task.seed,
        "model": {**task.model},
        "optimizer": {
            **task.optimizer,
            **ours.get("optimizer", {}),
            **task.options,
            **task.schedule(),
        },
        "training": {"batch_size": task.batch, "eval_blocks": task.eval_blocks},
        "round": {"start_peers": task.peers, "local_steps": 30, **ours.get("round", {})},
        "outer": {**ours.get("outer", {})},
    }
    in_step = tables["round"].get("mode") == "gradient"
    if in_step:
        tables["round"]["target_batch"] = task.peers * task.batch
    try:
        config = load(runfile.dump(tables), setting)
        # A round is one step of all peers, or one fragment's exchange.
        round_steps = 1.0 if in_step else config.local.local_steps / config.round.fragments
        if task.steps % round_steps:
            raise Failed(f"--steps {task.steps} are no multiple of a round's {round_steps:g}")
        tables["round"]["rounds"] = round(task.steps / round_steps)
        text = runfile.dump(tables)
        return text, load(text, setting)
    except ConfigError as error:
        raise Failed(str(error)) from error


def broken_streams(case: Case, peers: int, rounds: int) -> list[str]:
    """For each peer, which of its streams to a reducer break before the first chunk.

    In each round the same number of peers lose all of theirs; one sends to each of the others.
    """
    chosen = random.Random(case.seed)
    count = round(case.lost * peers)
    faults: list[list[str]] = [[] for _ in range(peers)]
    for number in range(rounds):
        for peer in chosen.sample(range(peers), count):
            passes = range(number * (peers - 1) + 1, (number + 1) * (peers - 1) + 1)
            faults[peer] += [f"send.begin@{nth}=disconnect" for nth in passes]
    return [",".join(each) for each in faults]


# -- rows -----------------------------------------------------------------------------------------


def task_of(case: Case, arguments: Namespace) -> Task:
    """What a row's peers are to do."""
    ours = case.setting in OURS
    rates = LEARNING_RATES[arguments.size]["muon" if ours else RIVALS[case.setting].rates]
    optimizer = {**rates, **OURS.get(case.setting, {}).get("optimizer", {})}
    override = _override(arguments, optimizer["kind"])
    return Task(
        peers=arguments.peers,
        seed=case.seed,
        model=arguments.model,
        batch=arguments.batch,
        steps=arguments.steps,
        every=arguments.local_steps,
        eval_blocks=arguments.eval_blocks,
        warmup_steps=10,
        device=arguments.device,
        optimizer={**optimizer, **override},
        # For ours, fields of [optimizer] that are stronger than the setting's.
        options=override if ours else _options(case.setting, arguments),
    )


async def measure(case: Case, arguments: Namespace) -> dict[str, Any]:
    """One row."""
    ours, task = case.setting in OURS, task_of(case, arguments)
    row: dict[str, Any] = dataclasses.asdict(case)
    curve, began = Curve(), time.monotonic()
    with lockstep.scratch() as folder:
        try:
            async with asyncio.timeout(arguments.limit_s):
                await (our_curve if ours else rivals_curve)(case, task, folder, curve)
        except TimeoutError:
            row["unfinished"] = True
        except Failed as error:
            row["failed"] = str(error)
        if arguments.logs is not None:
            _keep_logs(folder, arguments.logs / f"{case.setting}-{case.mbit:g}-{case.seed}")
    row |= {"optimizer": task.optimizer, "options": task.options, "points": curve.points}
    row["whole_s"] = time.monotonic() - began
    if "failed" not in row:
        row |= _figures(task, curve, unfinished="unfinished" in row)
    return row


def _override(arguments: Namespace, kind: str) -> dict[str, float]:
    return {"lr": arguments.lr} if arguments.lr and kind == "adamw" else {}


def _options(setting: str, arguments: Namespace) -> dict[str, Any]:
    options = {**RIVALS[setting].options, "local_steps": arguments.local_steps}
    target = arguments.hivemind_target or (
        arguments.local_steps * arguments.peers * arguments.batch
    )
    options["target_batch"] = target // 4 if options.pop("quarter", False) else target
    return options


def _keep_logs(folder: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        (place / log.name).write_bytes(log.read_bytes())


def _figures(task: Task, curve: Curve, *, unfinished: bool) -> dict[str, Any]:
    if not curve.points or curve.points[-1]["step"] == 0:
        return {"failed": "nothing came of it within --limit-s"}
    last = curve.points[-1]
    scale = task.steps / last["step"] if unfinished else 1.0
    waits = curve.waits or [last.get("wait_s", 0.0) / last["wall_s"]]
    losses = [loss for loss in curve.losses if loss is not None]
    return {
        "loss": statistics.mean(losses) if losses else None,
        "losses": curve.losses,
        "MB": last["bytes"] * scale / 1e6,
        "seconds": last["wall_s"] * scale,
        "waiting": statistics.mean(waits),
        "seen": curve.samples / task.samples if curve.samples else None,
        "broken": curve.broken,
    }


# -- what it comes to -----------------------------------------------------------------------------


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each setting on each link."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "failed" not in row:
            groups.setdefault((row["setting"], row["mbit"], row["lost"]), []).append(row)
    found = []
    for (setting, mbit, lost), mine in groups.items():
        summary: dict[str, Any] = {"setting": setting, "mbit": mbit, "lost": lost}
        summary["seeds"] = [row["seed"] for row in mine]
        for name in ("loss", "MB", "fewer", "seconds", "waiting", "seen"):
            values = [row[name] for row in mine if row.get(name) is not None]
            summary[name] = statistics.mean(values) if values else None
        found.append(summary)
    return found


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What the aims say of our default, wherever there is what to compare it with."""
    means = {(s["setting"], s["mbit"], s["lost"]): s for s in summaries(rows)}
    said = []
    for (setting, mbit, lost), ours in means.items():
        if setting != "shoal" or ours["loss"] is None:
            continue
        at = f"shoal at {_link(mbit)}"
        if lost:
            if (whole := means.get((setting, mbit, 0.0))) and whole["loss"]:
                worse = 100 * (ours["loss"] / whole["loss"] - 1)
                said.append(f"{at}: losing {lost:g} of the peers, loss {worse:+.2f} % (below +2)")
            continue
        for rival, aim in (("ddp-adamw", "at most 0"), ("ddp-muon", "at most +3")):
            if (other := means.get((rival, mbit, 0.0))) and other["loss"]:
                more = 100 * (ours["loss"] / other["loss"] - 1)
                fewer = other["MB"] / ours["MB"]
                said.append(f"{at}: loss {more:+.2f} % of {rival}'s ({aim}), {fewer:.0f}x fewer MB")
        for rival in ("hivemind", "hivemind-fp16"):
            if (other := means.get((rival, mbit, 0.0))) and other["loss"]:
                took = [_reached(row, other["loss"]) for row in rows if _is(row, ours)]
                if None in took:
                    said.append(f"{at}: never at {rival}'s loss")
                else:
                    share = statistics.mean(t for t in took if t is not None) / other["seconds"]
                    said.append(f"{at}: at {rival}'s loss in {share:.3f} of its time (0.25)")
        said.append(f"{at}: waits {100 * ours['waiting']:.1f} % of the time (below 5 at 20 Mbit/s)")
    return said


def _is(row: dict[str, Any], summary: dict[str, Any]) -> bool:
    keys = ("setting", "mbit", "lost")
    return "failed" not in row and all(row[key] == summary[key] for key in keys)


def _reached(row: dict[str, Any], loss: float) -> float | None:
    """Seconds until a run's validation loss was that low."""
    for point in row["points"]:
        if point["val_loss"] is not None and point["val_loss"] <= loss:
            return float(point["wall_s"])
    return None


def _link(mbit: float) -> str:
    return f"{mbit:g} Mbit/s" if mbit else "no limit"


def _compare_bytes(rows: list[dict[str, Any]], numel: int, steps: int) -> None:
    """How many times fewer bytes than a synchronous step of float32 each time."""
    measured = [row["MB"] for row in rows if row["setting"] == "ddp-adamw" and "MB" in row]
    synchronous = statistics.mean(measured) if measured else 6 * numel * steps / 1e6
    for row in rows:
        if row.get("MB"):
            row["fewer"] = synchronous / row["MB"]


async def compare(arguments: Namespace) -> int:
    """All cases; the exit status."""
    numel = sum(p.numel() for p in build(ModelConfig(**arguments.model), 0).parameters())
    keys = ("size", "peers", "steps", "batch", "local_steps", "eval_blocks", "model")
    report = {**machine(), "numel": numel, **{key: getattr(arguments, key) for key in keys}}
    rows: list[dict[str, Any]] = []
    if arguments.append and arguments.json.stat().st_size:
        before = json.loads(arguments.json.read_text())
        rows = [row for row in before["rows"] if "failed" not in row]
    report["rows"] = rows
    print(f"{arguments.peers} peers, {numel / 1e6:.2f} M parameters, {arguments.steps} steps each")
    print(*(f"{name:>{width}}" for name, width in COLUMNS.items()), flush=True)
    cases = [
        Case(setting=setting, mbit=mbit, seed=seed, lost=arguments.lost)
        for mbit in arguments.mbit
        for seed in arguments.seeds
        for setting in arguments.settings
    ]
    failures = 0
    for case in cases:
        if any(all(row[k] == v for k, v in dataclasses.asdict(case).items()) for row in rows):
            continue
        if case.lost and case.setting in RIVALS:
            continue
        rows.append(await measure(case, arguments))
        failures += "failed" in rows[-1]
        _compare_bytes(rows, numel, arguments.steps)
        _print(rows[-1])
        report["summaries"], report["verdicts"] = summaries(rows), verdicts(rows)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\nmeans over the seeds")
    for summary in summaries(rows):
        _print({**summary, "seed": len(summary["seeds"])})
    print("", *verdicts(rows), sep="\n")
    if arguments.plot is not None:
        from benchmarks.plot import plot_convergence

        print(plot_convergence(report, arguments.plot))
    return 1 if failures else 0


def _print(row: dict[str, Any]) -> None:
    cells = []
    for name, width in COLUMNS.items():
        value = row.get(name)
        if value is None:
            text = "-"
        elif name in ("loss", "waiting"):
            text = f"{value:.4f}"
        elif name in ("MB", "fewer", "seconds"):
            text = f"{value:.1f}"
        else:
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
        cells.append(f"{text:>{width}}")
    note = "broken off" if "unfinished" in row else ""
    print(*cells, f"failed: {row['failed']}" if "failed" in row else note, flush=True)


def _mbit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value == 0 or 0.1 <= value <= 1e5):
        raise ArgumentTypeError(f"{text!r} is not a number of Mbit/s, nor 0 for no limit")
    return value


def share(text: str) -> float:
    """Reads a part of the whole, less than all of it."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ArgumentTypeError(f"{text!r} is not a share of the peers, such as 0.25")
    return value


def main() -> None:
    """Parse the command line and print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    names = (*RIVALS, *OURS)
    default = ["ddp-adamw", "ddp-muon", "hivemind", "hivemind-fp16", "opendiloco", "shoal"]
    parser.add_argument("--settings", type=several(one_of(*names)), default=default)
    parser.add_argument("--mbit", type=several(_mbit), default=[20.0, 100.0, 1000.0])
    parser.add_argument("--seeds", type=several(at_least(0)), default=[1])
    parser.add_argument("--peers", type=at_least(2), default=4)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=at_least(1), help="of each peer")
    parser.add_argument("--batch", type=at_least(1), help="sequences of a peer in a step")
    parser.add_argument("--local-steps", type=at_least(1), default=30, help="of opendiloco")
    parser.add_argument("--hivemind-target", type=at_least(1), help="sequences in its epoch")
    parser.add_argument("--eval-blocks", type=at_least(1), default=64)
    parser.add_argument("--lost", type=share, default=0.0, help="of the peers, in each round")
    parser.add_argument("--lr", type=float, help="of AdamW, for finding a good one")
    parser.add_argument("--limit-s", type=at_least(1), default=3600, help="for one row")
    parser.add_argument("--json", type=writable, help="all rows with their curves")
    parser.add_argument("--append", action="store_true", help="keep the rows in the JSON")
    parser.add_argument("--plot", type=writable, help="a PNG; needs matplotlib")
    parser.add_argument("--logs", type=Path, help="keep the peers' logs in this folder")
    arguments = parser.parse_args()
    if arguments.append and arguments.json is None:
        parser.error("--append needs --json")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'shoal[bench]'")
    size = SIZES[arguments.size]
    arguments.model, arguments.device = size["model"], size["device"]
    arguments.steps = arguments.steps or size["steps"]
    arguments.batch = arguments.batch or size["batch"]
    if missing := complaint():
        parser.error(missing)
    lockstep.run(lambda: compare(arguments))


if __name__ == "__main__":
    main()
