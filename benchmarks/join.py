"""How long a newcomer waits for its state: from four donors with capped uplinks, and from one.

    python benchmarks/join.py --donors 4,1 --mb 256 --serve-mb 25

One process with one session for each peer, real sockets, TLS and rounds. For each number of donors
a swarm of so many peers is built, which then stays in its first round; a newcomer joins, and its
seconds from start to a verified state are printed, with what each donor sent. The state is twice
the vector: parameters and momentum.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import torch

from benchmarks.arguments import Parser, at_least, megabytes, quantity, several
from coordinator_free.config import RoundConfig
from coordinator_free.handoff import SessionClosed
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.session import Session, SessionConfig
from dht.directory import InMemoryDirectory, InMemoryNetwork
from dht.identity import Identity

RUN = "5b" * 20


async def join(donors: int, numel: int, serve_bps: float) -> tuple[float, list[float]]:
    """Seconds that a newcomer took, and megabytes that each donor sent to it."""
    records, gate = InMemoryNetwork(), threading.Event()
    identities = [Identity.generate() for _ in range(donors + 1)]
    sessions: list[Session] = []
    networks: list[asyncio.Task[None]] = []
    trainers: list[threading.Thread] = []

    def train(session: Session) -> None:
        while session.next_assignment() is not None:
            gate.wait()
            try:
                session.hand_in(torch.zeros(numel), 1)
                session.result()
            except SessionClosed:
                return

    def start() -> Session:
        identity = identities[len(sessions)]
        session = Session(
            SessionConfig(
                run_id=RUN,
                creator=identities[0].peer_id,
                layout="benchmark",
                numel=numel,
                round=RoundConfig(start_peers=donors, codec="int4"),
                optimizer=OuterOptimizer(OuterConfig()),
                serve_bps=serve_bps,
            ),
            identity=identity,
            directory=InMemoryDirectory(identity, records),
        )
        initial_N = None if sessions else torch.randn(numel)
        sessions.append(session)
        networks.append(asyncio.create_task(session.run(initial_N, lambda: ())))
        trainers.append(threading.Thread(target=train, args=(session,), daemon=True))
        trainers[-1].start()
        return session

    async def until(condition: Callable[[], bool]) -> None:
        while True:
            for network in networks:
                if network.done():
                    network.result()
            if condition():
                return
            await asyncio.sleep(0.01)

    try:
        for _ in range(donors):
            donor = start()
            await until(lambda donor=donor: bool(donor.status().digest))
        await until(lambda: all(len(one.status().members) == donors for one in sessions))
        before = [session.status().bytes_sent for session in sessions]
        began = time.monotonic()
        newcomer = start()
        await until(lambda: newcomer.status().digest != "")
        seconds = time.monotonic() - began
        sent = [
            (session.status().bytes_sent - already) / 1e6
            for session, already in zip(sessions, before, strict=False)
        ]
        assert newcomer.status().digest == sessions[0].status().digest
    finally:
        gate.set()
        for network in networks:
            network.cancel()
        await asyncio.gather(*networks, return_exceptions=True)
        for trainer in trainers:
            trainer.join()
    return seconds, sent


def main() -> None:
    """Parse the command line and print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    donors = several(at_least(1))
    parser.add_argument("--donors", type=donors, default=[4, 1], help="numbers, by commas")
    parser.add_argument("--mb", type=megabytes, default=256, help="of the fp32 vector")
    cap = quantity(0, "a number of MB/s")
    parser.add_argument("--serve-mb", type=cap, default=25, help="MB/s of each donor; 0: no cap")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("donors  seconds  MB/s  MB from each")
    for donors in arguments.donors:
        numel = int(arguments.mb * 1e6 / 4)
        seconds, sent = asyncio.run(join(donors, numel, arguments.serve_mb * 1e6))
        each = " ".join(f"{one:.0f}" for one in sent)
        print(f"{donors:6}  {seconds:7.2f}  {sum(sent) / seconds:4.0f}  {each}", flush=True)


if __name__ == "__main__":
    main()
