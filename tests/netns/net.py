"""Machines of our own: network namespaces on one bridge, with faults on their links.

    namespace 0            namespace 1            ...
     10.83.7.1              10.83.7.2
        | eth0                 | eth0
    ----+----------------------+-----------  a bridge, in a namespace of its own

A machine can be behind a router instead, which translates its address, 10.84.<n>.2, to its own on
the bridge, and lets nobody in who was not called.

Nothing of it is reachable from the machine's own network, nor the other way round. All names begin
with a prefix that holds this process's id; `close` removes them whatever happened before.
"""

from __future__ import annotations

import os
import subprocess

NETWORK = "10.83.7"
HIDDEN = "10.84"


class Net:
    """A bridge, and namespaces that are added to it one by one."""

    def __init__(self) -> None:
        self._prefix = f"shoal{os.getpid()}-"
        self._count = 0
        self._on_bridge: list[str] = []  # namespaces
        self._behind: list[int] = []  # machines

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
        name = f"{self._prefix}{number}"
        self._plug_in(name, number)
        return name, self.address(number)

    def add_behind_router(self) -> tuple[str, str]:
        """One more machine, behind a router of its own."""
        number, self._count = self._count, self._count + 1
        name, router = f"{self._prefix}{number}", f"{self._prefix}router{number}"
        address, inside = f"{HIDDEN}.{number}.2", f"{HIDDEN}.{number}.1"
        self._plug_in(router, number)
        _call("ip", "netns", "add", name)
        self._in(router, *_words(f"ip link add eth1 type veth peer name eth0 netns {name}"))
        for namespace, device, own in ((router, "eth1", inside), (name, "eth0", address)):
            self._in(namespace, *_words(f"ip address add {own}/24 dev {device}"))
            self._in(namespace, *_words(f"ip link set {device} up"))
        self._in(name, *_words("ip link set lo up"))
        self._in(name, *_words(f"ip route add default via {inside}"))
        self._in(router, *_words("sysctl -q -w net.ipv4.ip_forward=1"))
        self._in(router, *_words("iptables -P FORWARD DROP"))
        self._in(router, *_words("iptables -A FORWARD -i eth1 -j ACCEPT"))
        answers = "iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
        self._in(router, *_words(answers))
        self._in(router, *_words("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE"))
        self._behind.append(number)
        for other in self._on_bridge:
            self._route(other, number)
        return name, address

    def _plug_in(self, name: str, number: int) -> None:
        _call("ip", "netns", "add", name)
        self._in(
            self._hub, *_words(f"ip link add port{number} type veth peer name eth0 netns {name}")
        )
        self._in(self._hub, *_words(f"ip link set port{number} master br0 up"))
        self._in(name, *_words(f"ip address add {self.address(number)}/24 dev eth0"))
        self._in(name, *_words("ip link set eth0 up"))
        self._in(name, *_words("ip link set lo up"))
        self._on_bridge.append(name)
        for behind in self._behind:
            self._route(name, behind)

    def _route(self, name: str, behind: int) -> None:
        """Have packets to a hidden machine arrive at its router, which drops them in silence."""
        if name != f"{self._prefix}router{behind}":
            way = f"ip route add {HIDDEN}.{behind}.0/24 via {self.address(behind)}"
            self._in(name, *_words(way))

    @staticmethod
    def address(number: int) -> str:
        """Of the machine with this number, or of its router, on the bridge."""
        return f"{NETWORK}.{number + 1}"

    def cut(self, one_side: list[int], other_side: list[int]) -> None:
        """Drop whatever these machines send to each other, without a word to anybody."""
        for here, there in ((one_side, other_side), (other_side, one_side)):
            for number in here:
                for other in there:
                    rule = f"iptables -A INPUT -s {self.address(other)} -j DROP"
                    self._in(f"{self._prefix}{number}", *_words(rule))

    def close_port(self, number: int, other: int, port: int) -> None:
        """Drop what a machine receives from another one on a TCP port."""
        rule = f"iptables -A INPUT -s {self.address(other)} -p tcp --dport {port} -j DROP"
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
        machines = [f"{self._prefix}{number}" for number in range(self._count)]
        routers = [f"{self._prefix}router{number}" for number in self._behind]
        for name in [*machines, *routers, self._hub]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @staticmethod
    def _in(name: str, *command: str) -> None:
        _call("ip", "netns", "exec", name, *command)


def _words(command: str) -> list[str]:
    return command.split()


def _call(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
