"""What a fault costs: one of several real peers is killed or stopped at a random moment of a round.

    python benchmarks/faults.py --peers 5 --mb 64 --trials 50 --seed 0

Each trial starts one process per peer, with real sockets and TLS; a folder takes the place of the
DHT. Peers hand in known vectors at once instead of training. After two rounds without a fault, one
peer (reducers all of them, every fifth also the leader) gets SIGKILL or SIGSTOP at a random moment
of the third. Every survivor checks every round by itself: that the state is the weighted mean of
those whom the outcome names, chunk by chunk, applied to the state before, bit for bit.

A line per trial: what was done to whom, seconds from the fault to the end of its round at the
slowest survivor, a fault-free round's seconds in the same trial, the deadline that the exchange
had, and whether all survivors agree. Links are slowed so that an exchange takes seconds. Exit
status 1 if any trial broke a promise: digests differ, a mean is wrong, a round was lost, or a
survivor took longer than one deadline and two rounds without a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import Parser, at_least, megabytes, one_of, quantity

RUN = "5b" * 20
WARM_ROUNDS = 2
ROUNDS = 4
DEADLINE_S = 30.0


def peer(arguments: argparse.Namespace) -> None:
    """One peer; prints a JSON line per round that it ended and checked."""
    import torch

    from coordinator_free.average import contributors
    from coordinator_free.codecs import codec
    from coordinator_free.config import RoundConfig
    from coordinator_free.handoff import SessionClosed
    from coordinator_free.messages import Kind
    from coordinator_free.optimizer import Position
    from coordinator_free.outer import OuterConfig, OuterOptimizer
    from coordinator_free.session import Session, SessionConfig
    from dht.directory import Directory, believable, poll
    from dht.errors import RunNotFound
    from dht.identity import Identity
    from dht.records import PeerRecord, SignedRun, seal

    class Folder(Directory):
        """Everybody's sealed records, as files."""

        def __init__(self, identity: Identity, path: Path) -> None:
            self.identity = identity
            self.path = path

        async def announce(self, record: PeerRecord) -> None:
            part = self.path / f".{record.peer_id}"
            part.write_bytes(seal(record, self.identity))
            part.rename(self.path / record.peer_id)

        async def peers(self, run_id: str) -> list[PeerRecord]:
            files = [path for path in self.path.iterdir() if path.name[0] != "."]
            return believable([path.read_bytes() for path in files], run_id, time.time())

        async def publish(self, run: SignedRun) -> None:
            raise RunNotFound(run.run_id)

        async def find_run(self, run_id: str) -> SignedRun:
            raise RunNotFound(run_id)

        def watch(self, run_id: str, interval_s: float) -> AsyncIterator[list[PeerRecord]]:
            return poll(self, run_id, interval_s)

    torch.set_num_threads(1)
    identities = [
        Identity.load_or_create(Path(arguments.folder) / f"identity-{number}")
        for number in range(arguments.peers)
    ]
    identity = identities[arguments.number]
    numbers = {each.peer_id: number for number, each in enumerate(identities)}
    numel = int(arguments.mb * 1e6 / 4)
    outer = OuterOptimizer(OuterConfig())
    coding = codec(arguments.codec)

    def vector(number: int) -> torch.Tensor:
        return torch.randn(numel, generator=torch.Generator().manual_seed(number)) * 1e-3

    vectors = [vector(number) for number in range(arguments.peers)]
    session = Session(
        SessionConfig(
            run_id=RUN,
            creator=identities[0].peer_id,
            layout="benchmark",
            numel=numel,
            round=RoundConfig(
                start_peers=arguments.peers,
                rounds=ROUNDS,
                codec=arguments.codec,
                exchange_s=DEADLINE_S,
                weight_cap=0.0,  # what is expected is the mean by samples
            ),
            optimizer=outer,
            upload_bps=arguments.link_mb * 1e6,
            download_bps=arguments.link_mb * 1e6,
        ),
        identity=identity,
        directory=Folder(identity, Path(arguments.folder) / "records"),
    )

    def expected_N() -> tuple[torch.Tensor, int]:
        """What the newest outcome says was averaged, computed here; and the fewest in a chunk."""
        certificate, average = session.newest
        assert certificate.outcome.kind == Kind.AVERAGE
        assert average is not None
        who = certificate.outcome.contributions
        mean_N = torch.zeros(numel)
        start, fewest = 0, len(who)
        for chunk, there in zip(average.chunks, contributors(average, who), strict=True):
            stop = start + chunk.elements
            total = sum(c.samples for c in there)
            fewest = min(fewest, len(there))
            sum_E = torch.zeros(chunk.elements)
            for c in there:
                sent = coding.encode(vectors[numbers[c.peer_id]][start:stop])
                coding.decode_add(sent, chunk.elements, c.samples / total, sum_E)
            mean_N[start:stop] = coding.decode(coding.encode(sum_E), chunk.elements)
            start = stop
        return mean_N, fewest

    def train() -> None:
        momentum_N = torch.zeros(numel)
        held_N = torch.zeros(numel)
        while (work := session.next_assignment()) is not None:
            print(json.dumps({"begins": work.round, "leader": session.status().leader}), flush=True)
            theta_N = work.theta_N
            same = bool(torch.equal(theta_N, held_N))
            try:
                session.hand_in(vectors[arguments.number], arguments.number + 1)
                result = session.result()
            except SessionClosed:
                return
            ended = time.monotonic()
            mean_N, fewest = expected_N()
            after = torch.empty_like(theta_N), torch.empty_like(momentum_N)
            outer.advance((theta_N, momentum_N), mean_N, after, Position(round=0, samples=0))
            held_N, momentum_N = after
            line = {
                "ends": result.round,
                "at": ended,
                "digest": result.digest,
                "began_as_expected": same,
                "contributors": result.members,
                "fewest": fewest,
                "final": bool(torch.equal(session.state.theta_N, held_N)),
            }
            print(json.dumps(line), flush=True)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    asyncio.run(session.run(torch.zeros(numel) if arguments.number == 0 else None, tuple))
    thread.join()


class Trial:
    """Peers, and what they have said so far."""

    def __init__(self, arguments: argparse.Namespace, folder: str) -> None:
        (Path(folder) / "records").mkdir()
        from dht.identity import Identity

        for number in range(arguments.peers):
            Identity.load_or_create(Path(folder) / f"identity-{number}")
        self.heard = threading.Condition()
        self.said: list[list[dict[str, Any]]] = [[] for _ in range(arguments.peers)]
        self.processes = []
        for number in range(arguments.peers):
            command = [
                *(sys.executable, __file__, "--number", str(number), "--folder", folder),
                *("--peers", str(arguments.peers), "--mb", str(arguments.mb)),
                *("--codec", arguments.codec),
                *("--link-mb", str(arguments.link_mb)),
            ]
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self.processes.append(process)
            threading.Thread(target=self._listen, args=(number,), daemon=True).start()

    def _listen(self, number: int) -> None:
        stdout = self.processes[number].stdout
        assert stdout is not None
        for line in stdout:
            with self.heard:
                self.said[number].append({**json.loads(line), "heard": time.monotonic()})
                self.heard.notify_all()

    def wait(self, peers: list[int], key: str, value: int, timeout_s: float) -> float:
        """Until all of these have said so; when the last one did."""

        def said() -> bool:
            return all(any(line.get(key) == value for line in self.said[n]) for n in peers)

        with self.heard:
            if not self.heard.wait_for(said, timeout_s):
                raise TimeoutError(f"no {key} {value} of all within {timeout_s:g} s")
            return max(
                next(line["heard"] for line in self.said[n] if line.get(key) == value)
                for n in peers
            )

    def close(self) -> None:
        """End what is left of them."""
        for process in self.processes:
            process.kill()
            process.wait()


def trial(number: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One fault; what came of it."""
    chance = random.Random(f"{arguments.seed}-{number}")
    everybody = list(range(arguments.peers))
    victim = chance.choice(everybody)
    action = chance.choice(["kill", "stop"])
    with tempfile.TemporaryDirectory() as folder:
        swarm = Trial(arguments, folder)
        try:
            swarm.wait(everybody, "ends", 0, 120)
            ends = [swarm.wait(everybody, "ends", n, 120) for n in range(1, WARM_ROUNDS)]
            begins = swarm.wait(everybody, "begins", WARM_ROUNDS, 120)
            first = min(
                line["heard"]
                for n in everybody
                for line in swarm.said[n]
                if line.get("begins") == 1
            )
            normal_s = ends[-1] - first
            # Some of the fault-free round goes by before the last one has begun it.
            time.sleep(chance.uniform(0, max(0.0, normal_s - (time.monotonic() - begins))))
            os.kill(
                swarm.processes[victim].pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP
            )
            fault = time.monotonic()
            rest = [n for n in everybody if n != victim]
            under_way = max(
                line["begins"] for n in rest for line in swarm.said[n] if "begins" in line
            )
            ended = swarm.wait(rest, "ends", under_way, 180)
            swarm.wait(rest, "ends", ROUNDS - 1, 180)
        finally:
            swarm.close()
    lines = [line for n in rest for line in swarm.said[n] if "ends" in line]
    digests = {(line["ends"], line["digest"]) for line in lines}
    hit = next(line for line in swarm.said[rest[0]] if line.get("ends") == under_way)
    leaders = {
        line["leader"] for n in rest for line in swarm.said[n] if line.get("begins") == under_way
    }
    result = {
        "trial": number,
        "action": action,
        "victim": victim,
        "round": under_way,
        "leaders": len(leaders),
        "after_s": round(max(0.0, ended - fault), 2),
        "normal_s": round(normal_s, 2),
        "contributors": hit["contributors"],
        "fewest": hit["fewest"],
        "one_digest": len(digests) == len({number for number, _ in digests}),
        "means": all(line["final"] and line["began_as_expected"] for line in lines),
        "no_round_lost": all(
            [line["ends"] for line in swarm.said[n] if "ends" in line] == list(range(ROUNDS))
            for n in rest
        ),
    }
    result["in_time"] = result["after_s"] <= DEADLINE_S + 2 * result["normal_s"]
    return result


def main() -> None:
    """Parse the command line, run the trials, sum up."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=at_least(3), default=5)
    size = "fp32 megabytes of each peer's vector"
    parser.add_argument("--mb", type=megabytes, default=64, help=size)
    parser.add_argument(
        "--codec", type=one_of("fp32", "bf16", "int8", "int4", "int2"), default="fp32"
    )
    parser.add_argument(
        "--link-mb",
        type=quantity(0, "a number of MB/s"),
        default=25,
        help="megabytes per second that each peer sends and receives at most, so that an exchange "
        "takes seconds; 0: no limit",
    )
    parser.add_argument("--trials", type=at_least(1), default=50)
    parser.add_argument("--first", type=at_least(0), default=0, help="number of the first trial")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        peer(arguments)
        return
    broken = 0
    costs = []
    for number in range(arguments.first, arguments.first + arguments.trials):
        result = trial(number, arguments)
        good = all(
            result[promise] for promise in ("one_digest", "means", "no_round_lost", "in_time")
        )
        broken += not good
        costs.append(result["after_s"] - result["normal_s"])
        print(json.dumps(result), flush=True)
    print(
        f"{arguments.trials} trials, {broken} broke a promise; a fault cost"
        f" {statistics.median(costs):.1f} s in the median, {max(costs):.1f} s at most"
    )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
