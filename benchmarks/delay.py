"""A bridge in user space that holds every frame for a while: a long way between machines.

    python benchmarks/delay.py --one-way-ms 50 port0 port1 port2 port3

For kernels without `tc netem`; `lines.Lines.delay` starts it. The ports are network devices of this
process's namespace, with a machine behind each of them. A frame that comes in at one goes out at
the one behind which its destination was last heard of, after the delay; frames to nobody or to all
go out at all others. Sockets of AF_PACKET take and give what the kernel has not cut into packets
yet (PACKET_VNET_HDR), so that a frame holds up to 64 KB.

Guarantees: between two machines the order stays; nothing is dropped here unless `MAX_HELD_BYTES`
are waiting; what the port behind it will not take (its queue, `tc tbf`) is lost as on any router.
Not guaranteed: a delay to the millisecond. While anything waits this process looks every `TICK_S`,
and it may get no CPU for longer: `latest_ms`, at the end, is the worst that happened.

It says `ready` once it forwards. SIGTERM ends it, with a line of JSON: `frames` and `bytes` that it
forwarded; `overflowed` and `missed` frames, dropped here, or by the kernel as this process was
too slow (both should be 0); `refused` by the next port's queue; `latest_ms` behind time; `cpu_s` of
this process. Linux, and root in the namespace.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress

from benchmarks.arguments import Parser, quantity

TICK_S = 0.001  # what has arrived meanwhile is taken together: one wake-up for all of it
MAX_HELD_BYTES = 256 << 20  # four machines that send 1 Gbit/s each fill this in half a second
SOCKET_BYTES = 64 << 20  # of a port: what this process has not read yet, and what waits behind it
NICE = -15  # a wire would not have to wait for a core, either

ETH_P_ALL = 3
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # <asm-generic/socket.h>
SOL_PACKET = 263
PACKET_STATISTICS, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 6, 15, 23  # <linux/if_packet.h>
VNET_HEADER = 10  # bytes of `struct virtio_net_hdr`, in front of each frame
LARGEST = VNET_HEADER + 18 + (64 << 10)


class Bridge:
    """See above.

    Args:
        ports: names of devices.
        delay_s: one way.
    """

    def __init__(self, ports: list[str], delay_s: float) -> None:
        self._delay_s = delay_s
        self._ports = [_open(port) for port in ports]
        self._behind: dict[bytes, socket.socket] = {}  # by address, the port it was heard at
        self._waiting: deque[tuple[float, socket.socket, bytes]] = deque()
        self._held_bytes = 0
        self._frames = self._bytes = self._overflowed = self._refused = 0
        self._latest_s = 0.0

    def run(self) -> None:
        """Forward until an exception, such as SIGTERM's, ends it."""
        poll = select.epoll()
        for port in self._ports:
            poll.register(port, select.EPOLLIN)
        while True:
            if self._waiting:
                time.sleep(TICK_S)
            else:
                poll.poll()
            for port in self._ports:
                self._take(port)
            self._give()

    def report(self) -> dict[str, float]:
        """What passed so far."""
        missed = 0
        for port in self._ports:
            statistics = port.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
            missed += struct.unpack("II", statistics)[1]
        return {
            "frames": self._frames,
            "bytes": self._bytes,
            "overflowed": self._overflowed,
            "missed": missed,
            "refused": self._refused,
            "latest_ms": 1e3 * self._latest_s,
            "cpu_s": time.process_time(),
        }

    def _take(self, port: socket.socket) -> None:
        due = time.monotonic() + self._delay_s
        with suppress(BlockingIOError):
            while True:
                frame = port.recv(LARGEST)
                if self._held_bytes + len(frame) > MAX_HELD_BYTES:
                    self._overflowed += 1
                    continue
                self._held_bytes += len(frame)
                self._behind[frame[VNET_HEADER + 6 : VNET_HEADER + 12]] = port
                self._waiting.append((due, port, frame))

    def _give(self) -> None:
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            due, origin, frame = self._waiting.popleft()
            self._latest_s = max(self._latest_s, now - due)
            self._held_bytes -= len(frame)
            to = self._behind.get(frame[VNET_HEADER : VNET_HEADER + 6])
            for port in self._ports if to is None else (to,):
                if port is not origin:
                    self._forward(port, frame)

    def _forward(self, port: socket.socket, frame: bytes) -> None:
        try:
            port.send(frame)
        except OSError:  # ENOBUFS: the queue of the link behind it is full
            self._refused += 1
        else:
            self._frames += 1
            self._bytes += len(frame) - VNET_HEADER


def _open(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    # Its queue is to be the link's: frames that wait behind a port count here until they leave.
    port.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
    port.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BYTES)
    port.setblocking(False)
    port.bind((name, ETH_P_ALL))  # from here on it receives
    return port


def main() -> None:
    """Forward until SIGTERM."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--one-way-ms", type=quantity(0, "a delay in ms"), required=True)
    parser.add_argument("ports", nargs="+", help="network devices of this namespace")
    arguments = parser.parse_args()
    try:
        bridge = Bridge(arguments.ports, arguments.one_way_ms / 1e3)
    except OSError as error:
        parser.error(f"{', '.join(arguments.ports)}: {error.strerror}")
    with suppress(OSError):
        os.nice(NICE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("ready", flush=True)
    try:
        bridge.run()
    finally:
        print(json.dumps(bridge.report()), flush=True)


if __name__ == "__main__":
    main()
