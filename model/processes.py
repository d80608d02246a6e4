"""What torchrun says of this process. Without torch, which takes seconds to load.

The environment is torchrun's way of telling; torch.distributed itself reads more of it.
"""

from __future__ import annotations

import os


def processes() -> int:
    """In how many processes this peer is; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Which of them this one is; 0 is the one that speaks for all."""
    return int(os.environ.get("RANK", "0")) if processes() > 1 else 0
