"""One machine of a benchmark that moves an exchange's bytes over plain TCP and averages nothing.

The yardstick of what links of some length allow: of a vector of V bytes every peer streams V / n to
each of the others, on a connection of its own, and each sends back what it gets as it comes. Those
are the bytes and the connections of a butterfly among equals, without TLS, without frames, and
without having to wait for what the others contribute. Connections stay open from round to round, as
ours do.
"""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks import lockstep
from coordinator_free.codecs import codec
from tests.netns.net import Net

PORT = 7000
AT_ONCE = 1 << 18  # bytes
START_S = 60.0  # until all listen
SILENT_S = 60.0  # nobody says nothing for longer


def main() -> None:
    """One peer, until its last round."""
    pipe = lockstep.Pipe()
    arguments = lockstep.peer_arguments()
    listener = socket.create_server((arguments.host, PORT))
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    others = [number for number in range(arguments.peers) if number != arguments.number]
    connections = [_connect(Net.address(number)) for number in others]
    part_bytes = codec(arguments.codec).encoded_bytes(arguments.numel) // arguments.peers
    for _ in range(arguments.rounds):
        pipe.say("ready")
        pipe.hear("go")
        began = time.monotonic()
        _exchange(connections, part_bytes)
        ended = time.monotonic()
        pipe.say("done", began=began, ended=ended, exchange_s=ended - began)
        pipe.hear("look")
        pipe.say("looked")


def _connect(host: str) -> socket.socket:
    until = time.monotonic() + START_S
    while True:
        try:
            connection = socket.create_connection((host, PORT), timeout=SILENT_S)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def _exchange(connections: list[socket.socket], part_bytes: int) -> None:
    """To all at once, and back."""
    with ThreadPoolExecutor(2 * len(connections)) as pool:
        works = [
            pool.submit(work, connection, part_bytes)
            for connection in connections
            for work in (_send, _receive)
        ]
    for work in works:
        work.result()


def _send(connection: socket.socket, count: int) -> None:
    zeros = memoryview(bytes(AT_ONCE))
    while count:
        part = zeros[: min(count, AT_ONCE)]
        connection.sendall(part)
        count -= len(part)


def _receive(connection: socket.socket, count: int) -> None:
    buffer = memoryview(bytearray(AT_ONCE))
    while count:
        got = connection.recv_into(buffer[: min(count, AT_ONCE)])
        if not got:
            raise ConnectionError("a peer is gone")
        count -= got


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    """Everything goes back; between two rounds nothing comes for as long as it takes."""
    buffer = memoryview(bytearray(AT_ONCE))
    while got := connection.recv_into(buffer):
        connection.sendall(buffer[:got])


if __name__ == "__main__":
    main()
