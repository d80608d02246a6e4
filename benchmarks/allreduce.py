"""How long one averaging takes: real processes, real sockets, TLS, real rounds.

    python benchmarks/allreduce.py --peers 4 --mb 64 --codec fp32,int8 --rounds 5

Starts one process per peer for each codec in turn. Peers find each other through the DHT, hand in a
random vector at once instead of training, and average it `--rounds` times. Prints medians over the
rounds after the first: seconds from the plan to the complete average (`allreduce_s`), seconds from
one commit to the next, bytes sent per peer and round, CPU seconds per round, peak memory; and
checks that all peers ended every round with one digest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

RUN = "5b" * 20


def peer(arguments: argparse.Namespace) -> None:
    """One peer of the benchmark; prints a JSON line per round."""
    import torch

    from coordinator_free.config import RoundConfig
    from coordinator_free.handoff import SessionClosed
    from coordinator_free.outer import OuterConfig
    from coordinator_free.session import Session, SessionConfig
    from dht.identity import Identity
    from dht.kademlia import KademliaConfig, KademliaDirectory

    torch.set_num_threads(1)
    identity = Identity.load_or_create(arguments.identity)
    numel = int(arguments.mb * 1e6 / 4)
    generator = torch.Generator().manual_seed(arguments.number)
    delta_N = torch.randn(numel, generator=generator) * 1e-3

    def train(session: Session) -> None:
        while (work := session.next_assignment()) is not None:
            try:
                result = session.submit(work.theta_N - delta_N, 1)
            except SessionClosed:
                return
            usage = resource.getrusage(resource.RUSAGE_SELF)
            line = {
                "round": result.round,
                "digest": result.digest,
                "allreduce_s": result.allreduce_s,
                "round_s": result.round_s,
                "bytes_sent": result.bytes_sent,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "peak_mb": usage.ru_maxrss / 1e3,
            }
            print(json.dumps(line), flush=True)

    async def network() -> None:
        config = KademliaConfig(
            identity_path=Path(arguments.identity),
            host="127.0.0.1",
            initial_peers=tuple(arguments.bootstrap),
        )
        async with KademliaDirectory.open(config) as directory:
            if not arguments.bootstrap:
                print(json.dumps({"maddr": directory.maddrs[0]}), flush=True)
            session = Session(
                SessionConfig(
                    run_id=RUN,
                    creator=arguments.creator or identity.peer_id,
                    layout="benchmark",
                    numel=numel,
                    round=RoundConfig(
                        start_peers=arguments.peers, rounds=arguments.rounds, codec=arguments.codec
                    ),
                    outer=OuterConfig(),
                ),
                identity=identity,
                directory=directory,
            )
            trainer = threading.Thread(target=train, args=(session,), daemon=True)
            trainer.start()
            initial_N = None if arguments.bootstrap else torch.zeros(numel)
            await session.run(initial_N, lambda: directory.maddrs)
            trainer.join()

    asyncio.run(network())


def swarm(codec: str, arguments: argparse.Namespace) -> dict[str, float | str | bool]:
    """Run all peers with one codec; the medians."""
    with tempfile.TemporaryDirectory() as directory:
        common = [
            *(sys.executable, __file__, "--codec", codec, "--peers", str(arguments.peers)),
            *("--mb", str(arguments.mb), "--rounds", str(arguments.rounds)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}

        def start(number: int, *more: str) -> subprocess.Popen[str]:
            identity = f"{directory}/identity-{number}"
            command = [*common, "--identity", identity, "--number", str(number), *more]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

        first = start(0)
        assert first.stdout is not None
        maddr = json.loads(first.stdout.readline())["maddr"]
        creator = maddr.rsplit("/", 1)[1]
        peers = [first]
        for number in range(1, arguments.peers):
            peers.append(start(number, "--bootstrap", maddr, "--creator", creator))
        lines = [
            [json.loads(line) for line in process.communicate(timeout=600)[0].splitlines()]
            for process in peers
        ]
    rounds = [line for lines_of_peer in lines for line in lines_of_peer if line["round"] > 0]
    digests = {(line["round"], line["digest"]) for line in rounds}
    spent = [of_peer[-1]["cpu_s"] - of_peer[0]["cpu_s"] for of_peer in lines]
    return {
        "codec": codec,
        "allreduce_s": statistics.median(line["allreduce_s"] for line in rounds),
        "round_s": statistics.median(line["round_s"] for line in rounds),
        "sent_mb": statistics.median(line["bytes_sent"] for line in rounds) / 1e6,
        "cpu_s": sum(spent) / len(spent) / (arguments.rounds - 1),
        "peak_mb": max(line["peak_mb"] for line in rounds),
        "identical": len(digests) == arguments.rounds - 1,
    }


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--mb", type=float, default=64, help="fp32 megabytes of each peer's vector")
    parser.add_argument("--codec", default="fp32,bf16,int8,int4", help="one or several, by commas")
    parser.add_argument("--rounds", type=int, default=6, help="at least 2; the first is warm-up")
    parser.add_argument("--identity", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bootstrap", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--creator", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.identity:
        peer(arguments)
        return
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    names = ("codec", "allreduce_s", "round_s", "sent_mb", "cpu_s", "peak_mb", "identical")
    print(f"{arguments.peers} peers x {arguments.mb:g} MB")
    print(" ".join(f"{name:>11}" for name in names))
    for codec in arguments.codec.split(","):
        row = swarm(codec, arguments)
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print(" ".join(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
