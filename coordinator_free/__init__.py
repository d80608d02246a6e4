"""Agree on an average without a boss.

What a training loop of one's own needs is here by its name; everything else is in the modules.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator_free.swarm import Recipe, Step, SwarmOptimizer, cosine
    from coordinator_free.trainer_callback import SwarmCallback

__all__ = ["Recipe", "Step", "SwarmCallback", "SwarmOptimizer", "cosine"]

_HOMES = {
    "Recipe": "coordinator_free.swarm",
    "Step": "coordinator_free.swarm",
    "SwarmOptimizer": "coordinator_free.swarm",
    "cosine": "coordinator_free.swarm",
    "SwarmCallback": "coordinator_free.trainer_callback",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: every module here would else import torch, gRPC and the DHT, and the
    # command line has to answer in a moment.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
