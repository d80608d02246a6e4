"""Faults on demand at named points of a round, for tests with real processes.

Inert unless armed: an unarmed point costs one look at an empty dictionary, and nothing but `arm`
fills that. Only `peer.cli` calls it, with what the environment says; nothing that comes from the
network can. A specification is a list, separated by commas, of

    point[@n]=action        send.half@2=kill,results.half=sleep:0.5

where `n` counts the passes of that point in this process from 1, and without it every pass counts.
Actions are `kill` (SIGKILL to this process), `stop` (SIGSTOP, until somebody continues it), and, at
points where waiting holds up nothing else, `sleep:SECONDS`; at those that lie on a stream
`disconnect` breaks it as a broken connection does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
from collections import Counter
from dataclasses import dataclass

from dht.errors import ConfigError, Unreachable

logger = logging.getLogger(__name__)

STREAMS = {
    "send.begin": "before a member's first chunk to a reducer; a pass for each stream",
    "send.half": "half of a member's chunks went to a reducer; a pass for each stream",
    "results.half": "half of the reduced chunks went out to one reader; a pass for each reader",
    "donor.half": "before a donor sends the leaf in the middle of a state; a pass for each request",
}
WAITS = {
    "reduce.begin": "before a reducer reduces its first chunk",
    "reduce.half": "a reducer has reduced half of its chunks",
}
MARKS = {
    "ready.before": "before a member tells its leader that its work is done; a pass for each round",
    "accept.before": "before a member signs its acceptance towards the leader",
    "accept.after": "a member's acceptance was delivered, or given up",
    "leader.plan.before": "before a leader's plan leaves it",
    "leader.plan.after": "a leader's plan was delivered to everybody, or given up",
    "leader.commit.before": "a leader has its majority, and nobody else knows",
    "leader.commit.after": "a leader's commit was delivered to everybody, or given up",
    "checkpoint.write": "in the middle of writing a checkpoint",
}
POINTS = STREAMS | WAITS | MARKS
MAX_SLEEP_S = 3600.0


class Disconnected(Unreachable):
    """A stream was broken on purpose: whoever has it open must not go on with it."""


@dataclass(frozen=True, slots=True)
class _Fault:
    nth: int  # 0: every pass
    action: str
    sleep_s: float = 0.0


_armed: dict[str, list[_Fault]] = {}
_passes: Counter[str] = Counter()


def arm(spec: str) -> None:
    """Make the points of this process fail as `spec` says, in place of an earlier one.

    Args:
        spec: see above; empty disarms.

    Raises:
        ConfigError: an unknown point or action, or an action that the point cannot take.
    """
    faults: dict[str, list[_Fault]] = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, fault = _parse(part)
        faults.setdefault(name, []).append(fault)
    _armed.clear()
    _passes.clear()
    _armed.update(faults)


def armed(name: str) -> bool:
    """Whether anything is to happen at this point."""
    return name in _armed


def reach(name: str) -> None:
    """This process is at this point now; `name` is one of `MARKS`."""
    if name in _armed:
        for fault in _due(name):
            _signal_self(name, fault)


async def reach_async(name: str) -> None:
    """This process is at this point now; `name` is one of `STREAMS` or `WAITS`.

    Raises:
        Disconnected: the stream that the point lies on is to break; at one of `STREAMS` only.
    """
    if name in _armed:
        for fault in _due(name):
            if fault.action == "sleep":
                logger.warning("failpoint.sleep point=%s seconds=%g", name, fault.sleep_s)
                await asyncio.sleep(fault.sleep_s)
            elif fault.action == "disconnect":
                raise Disconnected("", f"the stream was broken on purpose at {name}")
            else:
                _signal_self(name, fault)


def _due(name: str) -> list[_Fault]:
    assert name in POINTS
    _passes[name] += 1
    return [fault for fault in _armed[name] if fault.nth in (0, _passes[name])]


def _signal_self(name: str, fault: _Fault) -> None:
    logger.warning("failpoint.%s point=%s pass=%d", fault.action, name, _passes[name])
    os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)


def _parse(part: str) -> tuple[str, _Fault]:
    point, _, what = part.partition("=")
    name, at, number = point.partition("@")
    if name not in POINTS:
        raise ConfigError(
            f"failpoint {part[:60]!r}: there is no point {name[:40]!r}, known are "
            + ", ".join(sorted(POINTS))
        )
    if at and not (number.isascii() and number.isdigit() and int(number[:9]) > 0):
        raise ConfigError(f"failpoint {part[:60]!r}: write the pass as in {name}@2=kill, from 1")
    nth = int(number[:9]) if at else 0
    action, colon, seconds = what.partition(":")
    if action in ("kill", "stop") and not colon:
        return name, _Fault(nth, action)
    if name in STREAMS and action == "disconnect" and not colon:
        return name, _Fault(nth, action)
    if name not in MARKS and action == "sleep" and _is_pause(seconds):
        return name, _Fault(nth, action, float(seconds))
    possible = "kill, stop" if name in MARKS else "kill, stop, sleep:0.5"
    possible += ", disconnect" if name in STREAMS else ""
    raise ConfigError(f"failpoint {part[:60]!r}: what can happen at {name} is {possible}")


def _is_pause(text: str) -> bool:
    try:
        seconds = float(text)
    except ValueError:
        return False
    return math.isfinite(seconds) and 0 <= seconds <= MAX_SLEEP_S
