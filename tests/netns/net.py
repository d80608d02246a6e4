"""Machines of our own: network namespaces on one bridge, with faults on their links.

    namespace 0            namespace 1            ...
     10.83.7.1              10.83.7.2
        | eth0                 | eth0
    ----+----------------------+-----------  a bridge, in a namespace of its own

Nothing of it is reachable from the machine's own network, nor the other way round. All names begin
with a prefix that holds this process's id; `close` removes them whatever happened before.
"""

from __future__ import annotations

import os
import subprocess

NETWORK = "10.83.7"


class Net:
    """A bridge, and namespaces that are added to it one by one."""

    def __init__(self) -> None:
        self._prefix = f"shoal{os.getpid()}-"
        self._count = 0

    @property
    def _hub(self) -> str:
        return f"{self._prefix}hub"

    def open(self) -> None:
        """Make the bridge."""
        _call("ip", "netns", "add", self._hub)
        self._in(self._hub, "ip", "link", "add", "br0", "type", "bridge")
        self._in(self._hub, "ip", "link", "set", "br0", "up")

    def add(self) -> tuple[str, str]:
        """One more machine: the name of its namespace, and its address."""
        number, self._count = self._count, self._count + 1
        name, address, port = f"{self._prefix}{number}", self.address(number), f"port{number}"
        _call("ip", "netns", "add", name)
        self._in(self._hub, *_words(f"ip link add {port} type veth peer name eth0 netns {name}"))
        self._in(self._hub, *_words(f"ip link set {port} master br0 up"))
        self._in(name, *_words(f"ip address add {address}/24 dev eth0"))
        self._in(name, *_words("ip link set eth0 up"))
        self._in(name, *_words("ip link set lo up"))
        return name, address

    @staticmethod
    def address(number: int) -> str:
        """Of the machine with this number."""
        return f"{NETWORK}.{number + 1}"

    def cut(self, one_side: list[int], other_side: list[int]) -> None:
        """Drop whatever these machines send to each other, without a word to anybody."""
        for here, there in ((one_side, other_side), (other_side, one_side)):
            for number in here:
                for other in there:
                    rule = f"iptables -A INPUT -s {self.address(other)} -j DROP"
                    self._in(f"{self._prefix}{number}", *_words(rule))

    def lose(self, number: int, share: float) -> None:
        """Drop this share of the packets that a machine receives."""
        rule = f"iptables -A INPUT -i eth0 -m statistic --mode random --probability {share} -j DROP"
        self._in(f"{self._prefix}{number}", *_words(rule))

    def heal(self) -> None:
        """No packet is dropped any more."""
        for number in range(self._count):
            self._in(f"{self._prefix}{number}", "iptables", "-F", "INPUT")

    def throttle(self, number: int, kilobits_per_s: int) -> None:
        """Limit what a machine sends."""
        rule = f"tc qdisc add dev eth0 root tbf rate {kilobits_per_s}kbit burst 16kb latency 400ms"
        self._in(f"{self._prefix}{number}", *_words(rule))

    def close(self) -> None:
        """Remove everything."""
        for name in [*(f"{self._prefix}{number}" for number in range(self._count)), self._hub]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @staticmethod
    def _in(name: str, *command: str) -> None:
        _call("ip", "netns", "exec", name, *command)


def _words(command: str) -> list[str]:
    return command.split()


def _call(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
