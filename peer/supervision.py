"""The child's side of `shoal demo`: orders come in on stdin, and its end means that the demo died.

    finish N    end the run when round N is committed
    stop        leave politely

All peers of a demo live in one private folder, of which each holds a shared lock while it lives.
The demo removes the folder at its end; when it was killed and cannot, the last of the orphans does:
each gives up its shared lock first and then tries for the exclusive one, which only the last gets.

Guarantees: an orphan ends within `ORPHAN_POLITE_S` of its parent's death, also while it is still
loading libraries or (on Linux) frozen, and the last one removes the folder. Not guaranteed: that
anybody does when parent and children are all killed at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from dht.errors import SwarmError
from peer.events import Event, ProgressEvent
from peer.status import Status

ORPHAN_POLITE_S = 4.0
PROGRESS_S = 0.5
REMOVE_S = 2.0
LOCK_NAME = "demo.lock"  # also the proof that a folder is a demo's, and may be removed
_MAX_LINE = 256
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Supervised(Protocol):
    """What can be told to a daemon."""

    def status(self) -> Status:
        """A snapshot."""
        ...

    def stop(self) -> None:
        """Leave politely."""
        ...

    def finish_after(self, round: int) -> None:
        """End when that round is committed."""
        ...

    def report(self, event: Event) -> None:
        """Tell the demo."""
        ...

    def abandon(self, status: int) -> None:
        """End the process at once."""
        ...


class Supervision:
    """Does what the demo says. `start` it before anything slow, `attach` the daemon when it exists.

    From its construction on, the last orphan waits for this process; what is put into the folder
    before that may come back after the folder was removed.

    Args:
        folder: the demo's; holds `LOCK_NAME`.
        orders: file descriptor to read from.

    Raises:
        SwarmError: the demo is gone, and its folder with it.
    """

    def __init__(self, folder: Path, orders: int = 0) -> None:
        self._folder = folder
        self._orders = orders
        try:
            self._lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SwarmError("the demo that started this peer is gone") from error
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self._node: Supervised | None = None
        self._early: list[str] = []
        self._attaching = threading.Lock()
        self.orphaned = False

    def start(self) -> None:
        """Begin to listen."""
        _thaw_with_parent()
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def attach(self, node: Supervised) -> None:
        """From now on orders go to this daemon; those that came before it, now."""
        with self._attaching:
            self._node = node
            for line in self._early:
                self._obey(node, line)
        threading.Thread(target=self._report, args=(node,), name="progress", daemon=True).start()

    def clean_up(self) -> None:
        """At the process's end: remove the folder if the demo is gone and nobody else lives."""
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        fcntl.flock(lock, fcntl.LOCK_UN)
        if self.orphaned:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(self._folder)
        os.close(lock)

    def _listen(self) -> None:
        pending = b""
        # os.read: a thread that sits in sys.stdin's lock would abort the interpreter's end.
        while chunk := _read(self._orders):
            *lines, pending = (pending + chunk).split(b"\n")
            pending = pending[:_MAX_LINE]
            for line in lines:
                self._order(line.decode(errors="replace"))
        self.orphaned = True
        node = self._node
        if node is None:  # still importing: there is nobody to say goodbye to
            self.clean_up()
            os._exit(1)
        node.stop()
        time.sleep(ORPHAN_POLITE_S)
        node.abandon(1)

    def _order(self, line: str) -> None:
        with self._attaching:
            if self._node is None:
                self._early.append(line)
            else:
                self._obey(self._node, line)

    @staticmethod
    def _obey(node: Supervised, line: str) -> None:
        match line.split():
            case ["stop"]:
                node.stop()
            case ["finish", number] if number.isdigit():
                node.finish_after(int(number))
            case _:
                pass

    @staticmethod
    def _report(node: Supervised) -> None:
        while True:
            status = node.status()
            node.report(ProgressEvent(peer=status.peer, status=status.to_dict()))
            time.sleep(PROGRESS_S)


def _remove(folder: Path) -> None:
    """Remove a folder into which this process's other threads may still be putting something."""
    until = time.monotonic() + REMOVE_S
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)


def _thaw_with_parent() -> None:
    """Have the kernel continue this process when its parent dies: frozen, it could not end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
