"""Who is killed, frozen and brought back when, in `shoal demo --chaos`.

Decides only; `peer.demo` does it to the processes. The clock is the caller's, so the whole is a
function of the seed and of what the caller says about who is back.

Guarantees: never more than (n - 1) // 2 of n peers are in trouble at a time, so that a majority is
always there to go on; a peer counts as in trouble from the deed until it has completed a round
again; every frozen peer is thawed and every killed one revived, at the latest by `calm`. The same
seed draws the same faults and pauses, but which peer is free to be hit depends on how fast the
others recover.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from dht.errors import ConfigError

MIN_PEERS = 3
GAP_S = (3.0, 10.0)  # between two faults
TROUBLE_S = (2.0, 8.0)  # until a frozen peer is thawed, or a killed one revived


class Action(StrEnum):
    """What is done to a peer."""

    KILL = "kill"
    FREEZE = "freeze"
    THAW = "thaw"
    REVIVE = "revive"


@dataclass(frozen=True, slots=True)
class Deed:
    """One thing to be done to one peer."""

    action: Action
    number: int


_REMEDY = {Action.KILL: Action.REVIVE, Action.FREEZE: Action.THAW}


class Chaos:
    """The plan of faults for peers 0 to `peers` - 1.

    Args:
        peers: how many there are.
        seed: of the faults.
        now: seconds on the clock that all later calls use.

    Raises:
        ConfigError: too few peers for one of them to fail.
    """

    def __init__(self, peers: int, seed: int, now: float) -> None:
        if peers < MIN_PEERS:
            raise ConfigError(
                f"--chaos needs at least {MIN_PEERS} peers, as a majority must be left: "
                f"use --peers {MIN_PEERS} or more"
            )
        self._peers = peers
        self._random = random.Random(f"shoal chaos {seed}")
        self._remedies: dict[int, tuple[float, Action]] = {}  # when, what
        self._recovering: set[int] = set()
        self._calm = False
        self._next = now + self._random.uniform(*GAP_S)

    @property
    def troubled(self) -> frozenset[int]:
        """Peers that have not completed a round since something was done to them."""
        return frozenset(self._remedies) | self._recovering

    def due(self, now: float) -> list[Deed]:
        """What is to be done now, in order."""
        deeds = []
        for number, (when, action) in sorted(self._remedies.items()):
            if self._calm or now >= when:
                del self._remedies[number]
                self._recovering.add(number)
                deeds.append(Deed(action, number))
        if not self._calm and now >= self._next:
            fault = self._fault(now)
            if fault is not None:
                deeds.append(fault)
                self._next = now + self._random.uniform(*GAP_S)
        return deeds

    def recovered(self, number: int) -> None:
        """This peer has completed a round after it was thawed or revived."""
        self._recovering.discard(number)

    def calm(self) -> None:
        """No more faults; what is broken is mended at the next `due`."""
        self._calm = True

    def _fault(self, now: float) -> Deed | None:
        troubled = self.troubled
        if len(troubled) >= (self._peers - 1) // 2:
            return None
        free = [number for number in range(self._peers) if number not in troubled]
        deed = Deed(self._random.choice(list(_REMEDY)), self._random.choice(free))
        when = now + self._random.uniform(*TROUBLE_S)
        self._remedies[deed.number] = (when, _REMEDY[deed.action])
        return deed
