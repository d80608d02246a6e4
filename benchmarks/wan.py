"""How near an averaging over thin lines comes to what the lines allow.

    python benchmarks/wan.py --codec fp32,int4 --congestion cubic --json FILE
    python benchmarks/wan.py --cases 20,100 --delay-ms 0,100,300 --against tcp --seconds 8

Real peers (`shoal_peer`), each on a machine of its own: network namespaces on one bridge, whose
links are throttled in both directions by `tc tbf` once everybody has joined. Needs root and
iproute2 (`ip`, `tc`); nothing of it touches the machine's own network, and nothing is left of it.
The cases, for each peer:

    10, 20, 100, 1000   so many Mbit/s in both directions
    asymmetric          20 Mbit/s up, 100 down
    mixed               one of the peers at a tenth of the others; together as many as in `100`

`--delay-ms` are round trips between any two peers; half of each passes every way, in a process that
holds the frames (`delay`). A row fails if that process lost a frame that the links had not: then it
was what was measured. TCP needs a round trip for every doubling of its speed, and after a pause
begins anew, which no bound below knows of. So `--against tcp` moves the same bytes over the same
links by plain TCP (`tcp_peer`), right after each of our rows; `--no-idle-restart` has TCP keep its
speed over pauses (`net.ipv4.tcp_slow_start_after_idle`), for both.

**The bound.** With n peers, V bytes of an encoded vector, and for each peer i the share s_i of the
vector that it reduces and the fraction f_i of its own vector that it contributes (1, unless a plan
asks slow peers for less), F = sum f,

    up_i   = V (f_i (1 - s_i) + s_i (n - 1))         contributions out, reduced slices out
    down_i = V ((1 - s_i) + s_i (F - f_i))           reduced slices in, contributions in
    bound  = max over i of  max(up_i / uplink_i, down_i / downlink_i)

in bytes and bytes per second. What a peer tells itself crosses no line. f_i is read from the
average, whose chunks name who is in them, and s_i from what each peer says it has sent. `best_s` is
the least that bound can be when everything is contributed: of all s_i with sum 1, the best, found
by linear programming. Headers are in no bound: TCP's, IP's, TLS's and Ethernet's take some 4 %.

Columns: rtt_ms, the round trip that was added; exchange_s, the longest `RoundResult.allreduce_s` of
all peers (the whole round, where a peer had to fetch the average afterwards); whole_s, from the
last peer's `hand_in` to the last commit; bound_s with the shares there were, and its ratio to
exchange_s; best_s and its ratio; the shares and fractions of the last round; whether every average
was right, that is, the mean of what it says it is the mean of, and the same for all (`-`: plain TCP
averages nothing). Medians of all rounds but the first.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import lockstep, vectors
from benchmarks.arguments import Parser, at_least, megabytes, one_of, quantity, several, writable
from benchmarks.lines import MBIT, Lines, Link, complaint, transmitted
from benchmarks.lockstep import Failed, Peers, Task
from benchmarks.meter import machine

CODECS = ("fp32", "bf16", "int8", "int4")
COLUMNS = {
    "system": 6,
    "case": 11,
    "rtt_ms": 6,
    "codec": 6,
    "MB": 7,
    "exchange_s": 10,
    "whole_s": 8,
    "bound_s": 8,
    "ratio": 6,
    "best_s": 8,
    "of_best": 8,
    "right": 6,
}


def cases(peers: int) -> dict[str, list[Link]]:
    """The links of all peers in each case."""
    slow = 100 * peers / (10 * (peers - 1) + 1)
    return {
        "10": [Link(10, 10)] * peers,
        "20": [Link(20, 20)] * peers,
        "100": [Link(100, 100)] * peers,
        "1000": [Link(1000, 1000)] * peers,
        "asymmetric": [Link(20, 100)] * peers,
        "mixed": [Link(10 * slow, 10 * slow)] * (peers - 1) + [Link(slow, slow)],
    }


# -- what the lines allow -------------------------------------------------------------------------


def bound(links: Sequence[Link], shares: Sequence[float], fractions: Sequence[float]) -> float:
    """Seconds for each byte of the encoded vector: see above."""
    others, contributed = len(links) - 1, sum(fractions)
    return max(
        max(
            (fraction * (1 - share) + share * others) / (link.up * MBIT),
            ((1 - share) + share * (contributed - fraction)) / (link.down * MBIT),
        )
        for link, share, fraction in zip(links, shares, fractions, strict=True)
    )


def best(links: Sequence[Link]) -> float:
    """The bound with the best shares and all contributions."""
    from scipy.optimize import linprog

    # Minimise T over (s_1 .. s_n, T):  1 + (n - 2) s_i <= T * link, both ways, and the s sum to 1.
    count = len(links)
    rows, limits = [], []
    for number, link in enumerate(links):
        row = [0.0] * (count + 1)
        row[number] = count - 2
        row[count] = -min(link.up, link.down)
        rows.append(row)
        limits.append(-1.0)
    found = linprog(
        c=[0.0] * count + [1.0],
        A_ub=rows,
        b_ub=limits,
        A_eq=[[1.0] * count + [0.0]],
        b_eq=[1.0],
    )
    assert found.success, found.message
    return float(found.fun) / MBIT


def shares_of(sent: Sequence[int], fractions: Sequence[float], nbytes: int) -> list[float]:
    """What each peer reduced, from what it sent: the formula of `up_i`, solved for s_i."""
    others = len(sent) - 1
    raw = []
    for count, fraction in zip(sent, fractions, strict=True):
        per_share = others - fraction
        raw.append(max(0.0, count / nbytes - fraction) / per_share if per_share > 0.5 else 0.0)
    total = sum(raw)
    # With two peers everybody sends the same whatever it reduces, and no bound depends on it.
    return [share / total for share in raw] if total else [1 / len(sent)] * len(sent)


# -- what happens ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """What is between the peers.

    Attributes:
        links: of each of them.
        delay_s: a round trip between any two.
        settings: of TCP (`net.ipv4.tcp_...`), on each machine.
    """

    links: Sequence[Link]
    delay_s: float
    settings: dict[str, str]


async def measure(system: str, way: Way, task: Task, nbytes: int, folder: Path) -> dict[str, Any]:
    """All rounds of a system over these links.

    Raises:
        Failed: a peer broke off, or what makes the delay lost frames.
    """
    links = way.links
    largest = vectors.write_mean(folder / lockstep.MEAN, task.seed, task.peers, task.numel)
    net = Lines()
    try:
        net.open()
        machines = [net.add() for _ in links]
        for name, _ in machines:
            for setting, value in way.settings.items():
                _set_tcp(name, setting, value)
        if way.delay_s:
            net.delay(way.delay_s)
        peers = Peers(
            f"{system}_peer.py",
            task,
            folder,
            hosts=[address for _, address in machines],
            prefixes=[["ip", "netns", "exec", name] for name, _ in machines],
            introduced=system == "shoal",
        )
        rounds = []
        async with peers.running():
            for number in range(task.rounds):
                await peers.hear("ready")
                if number == 0:
                    for machine_number, link in enumerate(links):
                        net.shape(machine_number, link)
                before = list(map(transmitted, peers.pids))
                peers.tell("go")
                done = await peers.hear("done")
                after = map(transmitted, peers.pids)
                wires = [b - a for a, b in zip(before, after, strict=True)]
                peers.tell("look")
                looked = await peers.hear("looked")
                each = [{**a, **b} for a, b in zip(done, looked, strict=True)]
                rounds.append(_together(links, task, nbytes, largest, each, wires))
        delayer = net.end_delay()
    finally:
        net.close()
    if lost := delayer.get("overflowed", 0) + delayer.get("missed", 0):
        raise Failed(f"the process that makes the delay lost {lost} frames: it was too slow")
    return {**_row(links, nbytes, rounds), "delayer": delayer}


def _together(
    links: Sequence[Link],
    task: Task,
    nbytes: int,
    largest: float,
    each: list[dict[str, Any]],
    wires: list[int],
) -> dict[str, Any]:
    """A round of all peers; of plain TCP, which averages nothing, in equal shares."""
    averaged = "digest" in each[0]
    whole_s = max(peer["ended"] for peer in each) - max(peer["began"] for peer in each)
    exchanges = [peer["exchange_s"] for peer in each]
    exchange_s = max(exchanges) if all(exchanges) else whole_s
    fractions = [peer.get("fraction", 1.0) for peer in each]
    shares = [1 / len(each)] * len(each)
    if averaged:
        shares = shares_of([peer["bytes_sent"] for peer in each], fractions, nbytes)
    bound_s = bound(links, shares, fractions) * nbytes
    right = averaged and all(
        vectors.verified(task.codec, largest, peer["max_error"], peer["rms_error"]) for peer in each
    )
    return {
        "exchange_s": exchange_s,
        "whole_s": whole_s,
        "bound_s": bound_s,
        "ratio": exchange_s / bound_s,
        "shares": shares,
        "fractions": fractions,
        "wire_bytes": wires,
        "right": right if averaged else None,
        "identical": len({peer.get("digest") for peer in each}) == 1,
        "peers": each,
    }


def _row(links: Sequence[Link], nbytes: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    warm = rounds[1:]
    best_s = best(links) * nbytes
    row: dict[str, Any] = {
        name: statistics.median(each[name] for each in warm)
        for name in ("exchange_s", "whole_s", "bound_s", "ratio")
    }
    rights = {each["right"] and each["identical"] for each in rounds}
    return {
        **row,
        "best_s": best_s,
        "of_best": row["exchange_s"] / best_s,
        "shares": rounds[-1]["shares"],
        "fractions": rounds[-1]["fractions"],
        "identical": all(each["identical"] for each in rounds),
        "right": "no" if False in rights else "-" if None in rights else "yes",
        "rounds": rounds,
    }


async def compare(arguments: Namespace) -> int:
    """All cases with all codecs; the exit status."""
    from coordinator_free.codecs import codec

    settings = {"congestion_control": arguments.congestion}
    if arguments.no_idle_restart:
        settings["slow_start_after_idle"] = "0"
    report = {**machine(), "tcp": settings, "rows": []}
    rows: list[dict[str, Any]] = report["rows"]
    print(f"{arguments.peers} peers, {arguments.congestion}; for each: Mbit/s up and down")
    print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()), "shares; fractions")
    everything = cases(arguments.peers)
    for delay_ms, case, name in itertools.product(
        arguments.delay_ms, arguments.cases, arguments.codec
    ):
        way = Way(links=everything[case], delay_s=delay_ms / 1e3, settings=settings)
        per_element = codec(name).encoded_bytes(1 << 20) / (1 << 20)
        numel = arguments.seconds / best(way.links) / per_element
        numel = int(min(numel, arguments.max_mb * 1e6 / 4)) // 4096 * 4096
        task = Task(
            peers=arguments.peers, numel=max(4096, numel), rounds=arguments.rounds, codec=name
        )
        nbytes = codec(name).encoded_bytes(task.numel)
        for system in ("shoal", *arguments.against):
            row: dict[str, Any] = {"system": system, "case": case, "rtt_ms": delay_ms}
            row |= {"codec": name, "MB": 4 * task.numel / 1e6}
            row["links"] = [(link.up, link.down) for link in way.links]
            rows.append(row)
            with lockstep.scratch() as folder:
                try:
                    row.update(await measure(system, way, task, nbytes, folder))
                except Failed as error:
                    row["failed"] = str(error)
            _print(row)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row.get("right", "no") != "no" for row in rows) else 1


def _of_tcp(name: str) -> str:
    """A setting of this machine's TCP."""
    return Path(f"/proc/sys/net/ipv4/tcp_{name}").read_text().strip()


def _set_tcp(namespace: str, name: str, value: str) -> None:
    setting = f"net.ipv4.tcp_{name}={value}"
    subprocess.run(["ip", "netns", "exec", namespace, "sysctl", "-qw", setting], check=True)


def _print(row: dict[str, Any]) -> None:
    if "failed" in row:
        what = f"{row['system']:>6} {row['case']:>11} {row['rtt_ms']:>6g} {row['codec']:>6}"
        print(f"{what} failed: {row['failed']}", flush=True)
        return
    cells = []
    for name, width in COLUMNS.items():
        value = int(row[name]) if name == "rtt_ms" else row[name]
        cells.append(f"{f'{value:.3f}' if isinstance(value, float) else value:>{width}}")
    shares = " ".join(f"{share:.3f}" for share in row["shares"])
    fractions = " ".join(f"{fraction:.2f}" for fraction in row["fractions"])
    print(*cells, f"{shares}; {fractions}", flush=True)


def main() -> None:
    """Parse the command line and print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=at_least(2), default=4)
    parser.add_argument("--cases", type=several(one_of(*cases(4))), default=list(cases(4)))
    parser.add_argument("--codec", type=several(one_of(*CODECS)), default=["fp32", "int4"])
    parser.add_argument("--rounds", type=at_least(2), default=4, help="the first is for warming up")
    parser.add_argument(
        "--seconds", type=at_least(1), default=4, help="that a round would take at the best"
    )
    parser.add_argument(
        "--max-mb", type=megabytes, default=128.0, help="no longer vectors than this, as float32"
    )
    parser.add_argument(
        "--delay-ms",
        type=several(quantity(0, "a round trip in ms")),
        default=[0.0],
        help="round trips between any two peers, by commas; 0: none is added",
    )
    parser.add_argument(
        "--against", type=several(one_of("tcp")), default=[], help="the same bytes by plain TCP"
    )
    parser.add_argument(
        "--no-idle-restart", action="store_true", help="TCP keeps its speed over pauses"
    )
    parser.add_argument("--congestion", help="TCP's congestion control; by default the machine's")
    parser.add_argument("--json", type=writable, help="every round's figures")
    arguments = parser.parse_args()
    if missing := complaint():
        parser.error(missing)
    known = _of_tcp("available_congestion_control").split()
    arguments.congestion = arguments.congestion or _of_tcp("congestion_control")
    if arguments.congestion not in known:
        parser.error(f"--congestion {arguments.congestion}: this machine has {', '.join(known)}")
    lockstep.run(lambda: compare(arguments))


if __name__ == "__main__":
    main()
