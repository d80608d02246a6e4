"""The other processes of a peer that `torchrun` started in several: rank 1 and up.

Rank 0 is the daemon (`peer.node`); these only compute for it. Guarantees: no home, no network of
their own and nothing on standard output, whatever a library prints. Told to end, a follower stays
as long as rank 0's polite leave may need it, `GRACE_S` at most, even where it is deaf in a
library's wait. Not guaranteed: to hear of a rank 0 that died before the processes were connected;
then it is torchrun that ends them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from dht.errors import SwarmError
from model import box
from model.trainer import TrainerConfig
from peer.config import configured
from peer.signals import heeded

GRACE_S = 10.0  # longer than rank 0's, `peer.node.POLITE_S`


def follow(
    *,
    rank: int,
    run_file: Path | None,
    data: str,
    device: str,
    threads: int,
    allow_download: bool = False,
) -> None:
    """Compute for rank 0 until it says that this is over.

    Args:
        rank: of this process.
        run_file: of `shoal create`, None for `shoal join`.
        data: as given to this process; empty: as the run file says.
        device: as given to this process.
        threads: for torch; 0 = its own choice.
        allow_download: as given to this process.

    Raises:
        ConfigError: this process cannot make of the run file what rank 0 could.
        SwarmError: rank 0 is lost, or this process failed it.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if threads:
        torch.set_num_threads(threads)
    _heed_signals()

    def trained(text: str) -> TrainerConfig:
        return configured(
            text, run_file=run_file, data=data, device=device, allow_download=allow_download
        ).trainer

    try:
        box.follow(trained)
    except (box.BoxError, ValueError) as error:  # of model, data, a device that is not there
        raise SwarmError(f"process {rank}: {error}") from error


def _heed_signals() -> None:
    """Leave the leaving to rank 0, which is told the same."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    # Written to at once, while a Python handler would wait for a library's wait to end.
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in heeded():
        signal.signal(number, lambda number, frame: None)

    def end() -> None:
        os.read(told, 1)
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=end, name="grace", daemon=True).start()
