"""How fast peers talk directly, through libp2p's daemons, and through a third peer's daemon.

    python benchmarks/carrier.py --mb 256 --repeats 5

Starts two callees, one of which cannot be dialled, a relay and a caller, each a process with a
libp2p daemon, all on this machine's loopback. The caller measures, in turns:

    exchange   frames to the callee and as many back at the same time, as in the butterfly; payload
               one way, in GB/s
    fetch      frames from the callee alone, as in a download
    latency    of a small message and its reply, on a connection that is there
    open       seconds until a connection that was not there carried the first message

and the seconds of CPU that all processes, libp2p's daemons included, used for one GB exchanged (one
way; as much went the other). Every number is a median. `--chunk-kb` says how much a tunnel reads at
once; several of them are compared in one run.
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
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import Parser, at_least, several

RUN = "5b" * 20
FRAME_BYTES = 1 << 20
DEADLINE_S = 120.0
LATENCIES = 200


class Callee:
    """Sends back what it gets, or what was asked for."""

    async def deliver(self, sender: str, message: bytes) -> bytes:
        """The message."""
        return message

    async def exchange(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The frames."""
        async for frame in frames:
            yield frame

    async def fetch(self, sender: str, request: bytes) -> AsyncIterator[bytes]:
        """So many frames."""
        frame = bytes(FRAME_BYTES)
        for _ in range(int(request)):
            yield frame


async def serve(arguments: argparse.Namespace) -> None:
    """A callee or a relay, until its standard input ends."""
    from coordinator_free.tls import ServerCertificate
    from coordinator_free.transport import Server
    from dht.kademlia import KademliaDirectory

    async with KademliaDirectory.open(config(arguments)) as directory:
        certificate = ServerCertificate.generate()
        server = Server(directory.identity, RUN, Callee(), "127.0.0.1", 0, certificate)
        port = await server.start()
        directory.offer("127.0.0.1", port)
        line = {
            "peer": directory.identity.peer_id,
            "port": port,
            "sha256": certificate.sha256.hex(),
            "maddrs": directory.maddrs,
        }
        print(json.dumps(line), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.close()


async def call(arguments: argparse.Namespace) -> None:
    """The caller; prints a JSON line with what it measured."""
    from coordinator_free.contact import Contact
    from coordinator_free.transport import Client
    from dht.kademlia import KademliaDirectory

    def contact(callee: dict[str, Any], port: int) -> Contact:
        return Contact(callee["peer"], ("127.0.0.1",), port, bytes.fromhex(callee["sha256"]))

    callee, hidden = json.loads(arguments.callees)
    pids = json.loads(arguments.pids)
    async with KademliaDirectory.open(config(arguments)) as directory:
        ways = {
            "direct": (contact(callee, callee["port"]), None),
            "tunnel": (contact(callee, 9), directory),  # nobody listens on port 9
            "relayed tunnel": (contact(hidden, 9), directory),
        }
        measured: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
        for _ in range(arguments.repeats):
            for way, (target, carrier) in ways.items():
                async with Client(directory.identity, RUN, carrier=carrier) as client:
                    numbers = await measure(client, target, arguments.mb, pids)
                    assert client.carried == (carrier is not None), (way, client.carried)
                for name, number in numbers.items():
                    measured[way].setdefault(name, []).append(number)
        assert directory.tunnels.counts["opened_by_relay"] >= arguments.repeats
        medians = {
            way: {name: statistics.median(numbers) for name, numbers in each.items()}
            for way, each in measured.items()
        }
        print(json.dumps(medians), flush=True)


async def measure(client: Any, target: Any, mb: int, pids: list[int]) -> dict[str, float]:
    """One of each measurement."""
    frames = max(1, mb * 1_000_000 // FRAME_BYTES)
    began = time.monotonic()
    await client.deliver(target, b"hello", 10)
    opened_s = time.monotonic() - began
    latencies = []
    for _ in range(LATENCIES):
        began = time.monotonic()
        await client.deliver(target, b"hello", 10)
        latencies.append(time.monotonic() - began)
    cpu_before = cpu_s(pids)
    exchange_s = await exchange(client, target, frames)
    used_s = cpu_s(pids) - cpu_before
    began = time.monotonic()
    async for frame in client.fetch(target, str(frames).encode(), DEADLINE_S):
        assert len(frame) == FRAME_BYTES
    fetch_s = time.monotonic() - began
    gigabytes = frames * FRAME_BYTES / 1e9
    return {
        "exchange": gigabytes / exchange_s,
        "fetch": gigabytes / fetch_s,
        "latency": statistics.median(latencies),
        "open": opened_s,
        "cpu": used_s / gigabytes,
    }


async def exchange(client: Any, target: Any, frames: int) -> float:
    """Seconds for so many frames there and as many back."""
    frame = os.urandom(FRAME_BYTES)
    async with client.exchange(target) as stream:
        began = time.monotonic()

        async def send() -> None:
            for _ in range(frames):
                await stream.send(frame, DEADLINE_S)
            await stream.done_sending(DEADLINE_S)

        async def receive() -> None:
            for _ in range(frames):
                assert len(await stream.receive(DEADLINE_S)) == FRAME_BYTES
            assert await stream.receive(DEADLINE_S) is None

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            tasks.create_task(receive())
        return time.monotonic() - began


def cpu_s(pids: list[int]) -> float:
    """Seconds of CPU of these processes, this one, and the libp2p daemons below them."""
    wanted = {*pids, os.getpid()}
    ticks = 0
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    for pid in parents:
        above, steps = pid, 0
        while above in parents and above not in wanted and steps < 4:
            above, steps = parents[above][0], steps + 1
        if above in wanted:
            ticks += parents[pid][1]
    return ticks / os.sysconf("SC_CLK_TCK")


def config(arguments: argparse.Namespace) -> Any:
    """How to take part in the DHT."""
    import dht.daemon
    import dht.tunnel
    from dht.kademlia import KademliaConfig

    dht.tunnel._CHUNK_BYTES = dht.daemon._READ_AHEAD_BYTES = arguments.chunk * 1024
    return KademliaConfig(
        identity_path=Path(arguments.identity),
        host="127.0.0.1",
        initial_peers=tuple(arguments.bootstrap),
        client=arguments.hidden,
    )


class Process:
    """One of the peers."""

    def __init__(self, role: str, folder: Path, chunk_kb: int, *more: str) -> None:
        command = [sys.executable, __file__, "--role", role, "--chunk", str(chunk_kb)]
        self._process = subprocess.Popen(
            [*command, "--identity", str(folder / f"{role}-{time.monotonic_ns()}"), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        self.pid = self._process.pid

    def line(self) -> Any:
        """The next thing it says."""
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            raise SystemExit(f"a peer ended with status {self._process.wait()}")
        return json.loads(said)

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


def compare(chunk_kb: int, mb: int, repeats: int) -> dict[str, dict[str, float]]:
    """Start the peers, and let the caller measure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        relay = Process("serve", folder, chunk_kb)
        bootstrap = ["--bootstrap", relay.line()["maddrs"][0]]
        callee = Process("serve", folder, chunk_kb, *bootstrap)
        hidden = Process("serve", folder, chunk_kb, *bootstrap, "--hidden")
        callees = [callee.line(), hidden.line()]
        peers = [relay, callee, hidden]
        caller = Process(
            "call",
            folder,
            chunk_kb,
            *bootstrap,
            *("--bootstrap", callees[0]["maddrs"][0], "--hidden"),
            *("--callees", json.dumps(callees), "--pids", json.dumps([p.pid for p in peers])),
            *("--mb", str(mb), "--repeats", str(repeats)),
        )
        try:
            measured: dict[str, dict[str, float]] = caller.line()
        finally:
            for process in (caller, *peers):
                process.close()
        return measured


def main() -> None:
    """Print a table."""
    parser = Parser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--mb", type=at_least(1), default=256, help="megabytes each way and time")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="of every measurement")
    chunks = several(at_least(1))
    parser.add_argument("--chunk-kb", type=chunks, help="such as 32,64,128; else as shipped")
    for internal in ("--role", "--identity", "--callees", "--pids"):
        parser.add_argument(internal, default="", help=argparse.SUPPRESS)
    parser.add_argument("--chunk", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--hidden", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bootstrap", action="append", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        asyncio.run((serve if arguments.role == "serve" else call)(arguments))
        return
    from dht.tunnel import _CHUNK_BYTES

    print("| way | chunk KiB | exchange GB/s | fetch GB/s | latency ms | open ms | cpu s/GB |")
    print("|---|---|---|---|---|---|---|")
    for chunk_kb in arguments.chunk_kb or [_CHUNK_BYTES // 1024]:
        for way, it in compare(chunk_kb, arguments.mb, arguments.repeats).items():
            cells = (
                way,
                "-" if way == "direct" else str(chunk_kb),
                f"{it['exchange']:.3f}",
                f"{it['fetch']:.3f}",
                f"{it['latency'] * 1e3:.1f}",
                f"{it['open'] * 1e3:.0f}",
                f"{it['cpu']:.1f}",
            )
            print("|", " | ".join(cells), "|", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
