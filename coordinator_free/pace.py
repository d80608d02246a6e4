"""How many steps a round has, and how many of them hide the exchange: as configured, or by measure.

Chosen by measure, a round is as short as the link allows, since few steps between two averagings
learn more: with a delay, the exchange just fits into the round's steps; without one, it takes no
more than its share of the time. Every peer chooses for itself. As all take part in the same
exchanges, they choose about the same time, and the faster one more steps in it.

No clock of its own: who steps says how long it took.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

LEAST_STEPS = 30  # between two averagings of a parameter: fewer learn little more (recipes, H = 10)
MOST_STEPS = 500  # more learn much less, whatever the link
# The median of so many is taken: an exchange that was mended takes minutes, and a step within which
# somebody evaluates or saves takes as long as that does.
REMEMBERED_EXCHANGES = 5
REMEMBERED_STEPS = 9
MARGIN = 1.25  # exchanges vary


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalConfig:
    """What a peer does between two averagings; the same for all peers of a run.

    Attributes:
        local_steps: H, steps between two averagings of the same parameter: a round has H divided by
            the number of fragments. 0: each peer chooses by what steps and exchanges take.
        communication: with `local_steps` 0, the share of the time that may be spent waiting.
        work_s: a round's work ends after so many seconds, whatever was done; 0: by steps alone.
        delay_steps: so many steps, and no more than the next round has, are trained on while an
            exchange runs; 0 waits for it. Where `local_steps` is 0, any other number leaves the
            choice to the peer.
        mixing: how much of what was trained meanwhile is kept in the parameters, in [0, 1].
        feedback: whether what a codec cuts off is made up for in the next round; "auto" does so
            for codecs that need it.
    """

    local_steps: int = 30
    communication: float = 0.05
    work_s: float = 0.0
    delay_steps: int = 0
    mixing: float = 0.5
    feedback: Literal["auto", "on", "off"] = "auto"


class Pace:
    """What one peer measures, and what follows.

    Args:
        config: of the run.
        fragments: of the run.
    """

    def __init__(self, config: LocalConfig, fragments: int) -> None:
        self._config = config
        self._fragments = fragments
        self._steps: deque[float] = deque(maxlen=REMEMBERED_STEPS)
        self._exchanges: deque[float] = deque(maxlen=REMEMBERED_EXCHANGES)
        self._first = True

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)

    def exchanged(self, seconds: float) -> None:
        """An exchange took so long.

        The first one is left out: it compiles kernels and opens connections.
        """
        if self._first:
            self._first = False
        elif seconds > 0:
            self._exchanges.append(seconds)

    def steps(self, round: int) -> int:
        """How many steps this round has."""
        part, fragments = round % self._fragments, self._fragments
        whole = self._config.local_steps or self._chosen
        return max(1, whole * (part + 1) // fragments - whole * part // fragments)

    def delay(self, round: int) -> int:
        """How many of the steps of this round are taken before the exchange must have ended."""
        wanted = self._config.delay_steps
        if wanted and not self._config.local_steps:
            wanted = self._hiding or wanted
        return min(self.steps(round), wanted)

    @property
    def reason(self) -> str:
        """One line for people: what was chosen, and why."""
        whole = self._config.local_steps
        if whole:
            return f"{whole}: as configured"
        if not self.measured:
            return f"{self._chosen}: nothing is measured yet"
        chosen = self._chosen
        steps = max(1, chosen // self._fragments)
        hidden_s = self.delay(0) * self._step_s if self._config.delay_steps else 0.0
        wait_s = max(0.0, self._exchange_s - hidden_s)
        share = wait_s / (steps * self._step_s + wait_s)
        most = ", the most there may be" if chosen == MOST_STEPS else ""
        return (
            f"{chosen}{most}: a step takes {self._step_s:.2g} s and an exchange"
            f" {self._exchange_s:.2g} s, so {share:.1%} of the time is spent waiting"
        )

    @property
    def measured(self) -> bool:
        """Whether what is chosen rests on more than a guess."""
        return bool(self._config.local_steps or (self._step_s and self._exchanges))

    @property
    def _step_s(self) -> float:
        return statistics.median(self._steps) if self._steps else 0.0

    @property
    def _exchange_s(self) -> float:
        return statistics.median(self._exchanges) if self._exchanges else 0.0

    @property
    def _hiding(self) -> int:
        """Steps that take as long as an exchange; 0 while that is unknown."""
        if not (self._step_s and self._exchange_s):
            return 0
        return math.ceil(MARGIN * self._exchange_s / self._step_s)

    @property
    def _chosen(self) -> int:
        """H by measure."""
        a_round = self._hiding
        if not self._config.delay_steps:
            a_round = math.ceil(a_round * (1 / self._config.communication - 1))
        return max(LEAST_STEPS, min(MOST_STEPS, a_round * self._fragments))
