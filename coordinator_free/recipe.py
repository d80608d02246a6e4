"""The recipe that a run has unless it says otherwise, and what no run may have.

2 bits with error feedback, six fragments, each averaged behind the training of up to five steps. In
300 steps of four peers it learnt more than synchronous AdamW from a 400th of the bytes, and waited
for nothing at 20 Mbit/s (benchmarks/README.md, convergence). `RoundConfig` and `LocalConfig` by
themselves average all at once, and wait for it.
"""

from __future__ import annotations

from typing import Final

from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.pace import LocalConfig
from dht.errors import ConfigError

ROUND: Final = RoundConfig(codec="int2", fragments=6)
LOCAL: Final = LocalConfig(local_steps=0, delay_steps=5)
_DEFAULTS: Final = (ROUND, LOCAL, RoundConfig(), LocalConfig())

BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "fragments": (1, 4096),
    "target_batch": (0, 2**40),
    "weight_cap": (0, 1e9),
    "start_peers": (1, 10_000),
    "rounds": (0, 1e9),
    "quorum": (0.01, 1),
    "grace_s": (0, 3600),
    "close_s": (0, 3600),
    "exchange_s": (1, 86_400),
    "suspect_s": (0.5, 3600),
    "provisional_s": (1, 86_400),
    "local_steps": (0, 100_000),
    "communication": (0.001, 0.9),
    "work_s": (0, 86_400),
    "delay_steps": (0, 100_000),
    "mixing": (0, 1),
}
"""What the numbers of both must keep to; a creator is a stranger to those who join."""


_LOCAL_ALONE: Final = (
    "fragments",
    "weight_cap",
    "local_steps",
    "communication",
    "work_s",
    "delay_steps",
    "mixing",
)
"""Fields that mean nothing in gradient mode."""


def feeds_back(local: LocalConfig, codec_name: str) -> bool:
    """Whether residuals are kept, on both sides."""
    return local.feedback == "on" or (local.feedback == "auto" and codec(codec_name).needs_feedback)


def check(round: RoundConfig, local: LocalConfig) -> None:
    """Refuse numbers out of bounds, and what cannot work together.

    Raises:
        ConfigError: one line, what is wrong and how to mend it.
    """
    for name, (low, high) in BOUNDS.items():
        value = getattr(round if hasattr(round, name) else local, name)
        if not low <= value <= high:  # refuses NaN too
            raise ConfigError(f"{name} = {value}: use {low:g} to {high:g}")
    if codec(round.codec).needs_feedback and local.feedback == "off":
        raise ConfigError(
            f'codec = "{round.codec}" needs what it cuts off fed back: leave feedback = "auto", or '
            'use "int4"'
        )
    if round.mode == "gradient":
        if round.target_batch < 1:
            raise ConfigError(
                'mode = "gradient" needs a target_batch: the samples of all peers in one step'
            )
        for name in _LOCAL_ALONE:
            defaults = [getattr(each, name) for each in _DEFAULTS if hasattr(each, name)]
            value = getattr(round if hasattr(round, name) else local, name)
            if value not in defaults:
                raise ConfigError(
                    f'{name} = {value} means nothing in mode = "gradient", where all take one step '
                    "together: leave it out"
                )
        return
    if round.target_batch:
        raise ConfigError('target_batch is for mode = "gradient": leave it out')
    if 0 < round.rounds < round.fragments:
        raise ConfigError(
            f"rounds = {round.rounds} is less than fragments = {round.fragments}: a part of the"
            f" model would never be averaged; set fragments = {round.rounds} or less"
        )
    if 0 < local.local_steps < round.fragments:
        raise ConfigError(
            f"local_steps = {local.local_steps} is less than fragments = {round.fragments}: every "
            f"fragment's round needs a step; set fragments = {local.local_steps} or less"
        )
