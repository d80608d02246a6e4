"""The recipe that a run has unless it says otherwise, and what cannot be combined.

2 bits with error feedback, six fragments, each averaged behind the training of five steps: of what
was measured (benchmarks/README.md, convergence) it learns most for its bytes, and waits for nobody
on links of 20 Mbit/s and more. `RoundConfig` and `LocalConfig` by themselves average all at once,
and wait for it.
"""

from __future__ import annotations

from typing import Final

from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.pace import LocalConfig
from dht.errors import ConfigError

ROUND: Final = RoundConfig(codec="int2", fragments=6)
LOCAL: Final = LocalConfig(local_steps=0, delay_steps=5)


def feeds_back(local: LocalConfig, codec_name: str) -> bool:
    """Whether residuals are kept, on both sides."""
    return local.feedback == "on" or (local.feedback == "auto" and codec(codec_name).needs_feedback)


def check(round: RoundConfig, local: LocalConfig) -> None:
    """Refuse what cannot work together.

    Raises:
        ConfigError: one line, what is wrong and how to mend it.
    """
    if codec(round.codec).needs_feedback and local.feedback == "off":
        raise ConfigError(
            f'codec = "{round.codec}" needs what it cuts off fed back: leave feedback = "auto", or '
            'use "int4"'
        )
    if not 0 <= local.mixing <= 1:
        raise ConfigError(f"mixing = {local.mixing}: use 0 to 1")
    if not 0 < local.communication < 1:
        raise ConfigError(f"communication = {local.communication}: use a share, such as 0.05")
    if round.mode == "gradient":
        if round.target_batch < 1:
            raise ConfigError(
                'mode = "gradient" needs a target_batch: the samples of all peers in one step'
            )
        return
    if round.target_batch:
        raise ConfigError('target_batch is for mode = "gradient": leave it out')
    if not local.local_steps:
        return
    if local.local_steps < round.fragments:
        raise ConfigError(
            f"local_steps = {local.local_steps} is less than fragments = {round.fragments}: every "
            "fragment's round needs a step"
        )
    shortest = local.local_steps // round.fragments
    if local.delay_steps > shortest:
        raise ConfigError(
            f"delay_steps = {local.delay_steps} is more than the {shortest} steps of a round "
            f"(local_steps / fragments): use {shortest} at most"
        )
