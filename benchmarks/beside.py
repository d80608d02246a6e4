"""How fast training goes on while an exchange runs beside it in the same process.

    python benchmarks/beside.py --mb 64 --limits 10,50,0 --rounds 5

Two peers, each a process: one trains a small GPT in one thread with one processor thread and never
stops, while another of its threads takes part in rounds; its partner only averages. Every round is
preceded by as long a stretch without one. Prints, for each limit on both peers' links in megabytes
per second (0: none), the median seconds of an exchange, training steps per second without and
during exchanges, and the second as a share of the first. Needs a core that training does not use.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.arguments import Parser, at_least, megabytes, quantity, several

ROOT = Path(__file__).parents[1]
RUN = "be" * 20


class Steps:
    """A training loop in a thread of its own, and how far it got."""

    def __init__(self) -> None:
        import torch

        from model.builders import ModelConfig, build

        torch.set_num_threads(1)
        self._model = build(ModelConfig(layers=4, width=128, heads=4, context=128), seed=0)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._tokens = torch.randint(256, (8, 129))
        self._loss = torch.nn.functional.cross_entropy
        self.done = 0
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        while True:
            self._optimizer.zero_grad()
            logits = self._model(self._tokens[:, :-1])
            self._loss(logits.flatten(0, 1), self._tokens[:, 1:].flatten()).backward()
            self._optimizer.step()
            self.done += 1


def peer(arguments: argparse.Namespace) -> None:
    """One of the two."""
    import torch

    from coordinator_free.config import RoundConfig
    from coordinator_free.memory import empty_vector
    from coordinator_free.outer import OuterConfig, OuterOptimizer
    from coordinator_free.session import Session, SessionConfig
    from dht.identity import Identity
    from dht.kademlia import KademliaConfig, KademliaDirectory

    identity = Identity.load_or_create(arguments.identity)
    numel = int(arguments.mb * 1e6 / 4)
    steps = Steps() if arguments.trains else None

    def work(session: Session) -> None:
        last_s = 2.0
        while session.next_assignment() is not None:
            began, before = time.monotonic(), steps.done if steps else 0
            if steps:
                time.sleep(last_s)
            alone = time.monotonic(), steps.done if steps else 0
            session.hand_in(empty_vector(numel).fill_(1e-6), 1)
            result = session.result()
            until = time.monotonic(), steps.done if steps else 0
            last_s = until[0] - alone[0]
            if steps:
                line = {
                    "exchange_s": result.allreduce_s,
                    "alone": (alone[1] - before) / (alone[0] - began),
                    "beside": (until[1] - alone[1]) / last_s,
                }
                print(json.dumps(line), flush=True)

    async def network() -> None:
        config = KademliaConfig(
            identity_path=Path(arguments.identity),
            host="127.0.0.1",
            initial_peers=tuple(filter(None, [arguments.known])),
        )
        async with KademliaDirectory.open(config) as directory:
            if not arguments.known:
                print(directory.maddrs[0], flush=True)
            limit = arguments.limit * 1e6
            session = Session(
                SessionConfig(
                    run_id=RUN,
                    creator=arguments.creator or identity.peer_id,
                    layout="beside",
                    numel=numel,
                    round=RoundConfig(
                        start_peers=2, rounds=arguments.rounds, codec="fp32", exchange_s=600.0
                    ),
                    optimizer=OuterOptimizer(OuterConfig()),
                    upload_bps=limit,
                    download_bps=limit,
                    workers=1,
                ),
                identity=identity,
                directory=directory,
            )
            thread = threading.Thread(target=work, args=(session,), daemon=True)
            thread.start()
            initial_N = None if arguments.known else torch.zeros(numel)
            await session.run(initial_N, lambda: directory.maddrs)
            thread.join()

    asyncio.run(network())
    sys.stdout.flush()
    os._exit(0)  # the training thread never stops, and torch aborts at its end under it


def measure(limit: float, arguments: argparse.Namespace) -> dict[str, float]:
    """Medians over the rounds after the first."""
    with tempfile.TemporaryDirectory() as folder:
        common = [sys.executable, __file__, "--mb", str(arguments.mb), "--limit", str(limit)]
        common += ["--rounds", str(arguments.rounds + 1)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

        def start(*more: str) -> subprocess.Popen[str]:
            identity = f"{folder}/{len(more)}"
            return subprocess.Popen(
                [*common, "--identity", identity, *more],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )

        trainer = start("--trains")
        assert trainer.stdout is not None
        maddr = trainer.stdout.readline().strip()
        partner = start("--known", maddr, "--creator", maddr.rsplit("/", 1)[1])
        lines = [json.loads(line) for line in trainer.communicate(timeout=3600)[0].splitlines()]
        partner.communicate(timeout=60)
    return {
        name: statistics.median(line[name] for line in lines[1:])
        for name in ("exchange_s", "alone", "beside")
    }


def main() -> None:
    """Parse the command line and print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=megabytes, default=64)
    limits = several(quantity(0, "a number of MB/s"))
    parser.add_argument("--limits", type=limits, default=[10.0, 50.0, 0.0])
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--identity", help=argparse.SUPPRESS)
    parser.add_argument("--known", default="", help=argparse.SUPPRESS)
    parser.add_argument("--creator", default="", help=argparse.SUPPRESS)
    parser.add_argument("--trains", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.identity:
        peer(arguments)
        return
    print("| MB/s | exchange, s | steps/s alone | steps/s beside it | share |")
    print("|---|---|---|---|---|")
    for limit in arguments.limits:
        row = measure(limit, arguments)
        share = row["beside"] / row["alone"]
        numbers = f"{row['exchange_s']:.2f} | {row['alone']:.1f} | {row['beside']:.1f}"
        print(f"| {limit:g} | {numbers} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
