"""Where a peer keeps what is its own: one folder each, locked while its daemon runs.

    ~/.shoal/peer-0/      the first daemon of this machine (~/.shoal/peer-1 the second, ...)
        identity.key      Ed25519 key, made at first start
        lock              held (flock) by the daemon as long as it lives; holds its process id
        run, peers, port  to find the way back after a restart (`peer.memory`)
        runs/RUN_ID/      the run and its checkpoints, of each run that was taken part in
        daemon.json       0600: how `shoal status` and `shoal stop` reach it; gone when it has ended

Guarantees: two daemons never share a folder, hence never an identity, not even when started in the
same instant, since the kernel hands out the lock; and the lock ends with its holder, however that
ended, so that a `daemon.json` beside a free lock is known to be a dead daemon's. The kernel
decides, not a process id, which may have been given to somebody else. Not guaranteed: any of this
on a network file system whose server does not lock.

A peer finds its run again by its folder, hence `claim_slot` gives a folder that remembers a run to
those who come back to it, and leaves it to them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from dht.errors import ConfigError
from peer.files import write_whole

logger = logging.getLogger(__name__)

MAX_SLOTS = 256
RUNS = "runs"
_DAEMON_FILE_BYTES = 16 * 1024
_SETTLED_S = 0.05  # far longer than a new holder of a lock takes to write its process id


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonFile:
    """How to reach a daemon of this machine.

    Attributes:
        pid: its process.
        port: of its control server, on 127.0.0.1.
        token: what the control server wants to see; whoever can read this file may stop the daemon.
        run: run id, empty while it is not yet known.
    """

    pid: int
    port: int
    token: str
    run: str


class Home:
    """A peer's folder, claimed for this process. Use `Home.claim` or `claim_slot`.

    As a context manager it gives the folder back at the end: `daemon.json` vanishes, the lock is
    freed, the identity stays.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @property
    def identity_path(self) -> Path:
        """Where the peer's Ed25519 key is, or will be."""
        return self.path / "identity.key"

    @classmethod
    def claim(cls, path: Path) -> Home:
        """Claim exactly this folder, making it where needed.

        Raises:
            ConfigError: it cannot be made, or another daemon works in it.
        """
        home = cls._try(path)
        if home is None:
            owner = read_daemon_file(path)
            pid = owner.pid if owner else _written_pid(path)
            who = f" (process {pid})" if pid else ""
            raise ConfigError(
                f"another daemon{who} is using {path}: stop it with 'shoal stop --home {path}', "
                "or give this one another --home"
            )
        home._write_pid()
        return home

    @classmethod
    def _try(cls, path: Path) -> Home | None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"cannot keep the peer's state in {path}: {error.strerror}; choose a folder that "
                "you may write to with --home DIR"
            ) from error
        # `is_running` holds the lock for an instant when it looks whether a daemon is dead.
        for attempt in range(5):
            if attempt:
                time.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # What a killed daemon left must not be taken for ours while we start.
                (path / "daemon.json").unlink(missing_ok=True)
                return cls(path, lock)
        os.close(lock)
        return None

    def publish(self, daemon: DaemonFile) -> None:
        """Tell `shoal status` and `shoal stop` how to reach this daemon.

        Where there is no room for that, they see no more than that it runs, and it does.
        """
        path = self.path / "daemon.json"
        try:
            write_whole(path, json.dumps(asdict(daemon)).encode())
        except OSError as error:
            logger.warning("homes.not_published path=%s reason=%r", path, error.strerror)

    def release(self) -> None:
        """Give the folder back. May be called twice."""
        if self._lock < 0:
            return
        # First the file, then the lock: the next owner's file must not be the one we remove.
        with contextlib.suppress(OSError):
            (self.path / "daemon.json").unlink(missing_ok=True)
        lock, self._lock = self._lock, -1
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
        os.close(lock)

    def _write_pid(self) -> None:
        """For those who want to see or stop this daemon before it has published how."""
        with contextlib.suppress(OSError):  # a full disk: it only cannot be seen that early
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def __enter__(self) -> Home:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def claim_slot(root: Path, run_file: bytes | None = None, run_id: str = "") -> Home:
    """Claim the best free `peer-N` below `root`, the first of several as good.

    Best is the one that created a run from this very run file, or took part in the run to join, for
    it can go back to it; of those, whoever created that run comes last, as it may be created again.
    Then one that remembers no run; then one that took part in others; last, one whose own run is
    forgotten thereby.

    Args:
        root: made where needed.
        run_file: of the run to create, as it is published; None to join one.
        run_id: of the run to join, where it is known.

    Raises:
        ConfigError: `root` cannot be written to, or all slots are taken.
    """

    def rank(path: Path) -> int:
        created = (path / "run").exists()
        if run_id and (path / RUNS / run_id).is_dir():
            return 1 if created else 0
        if not created:
            return 3 if any((path / RUNS).glob("*")) else 2
        if run_file is None:
            return 4
        from peer.memory import Memory  # not for `shoal status`, which shall answer at once

        run = Memory(path).run()
        return 0 if run is not None and run.run_file == run_file else 4

    # Looked at without a lock, as a lock for a look would drive others that start now elsewhere.
    for path in sorted((root / f"peer-{slot}" for slot in range(MAX_SLOTS)), key=rank):
        home = Home._try(path)
        if home is not None:
            home._write_pid()
            return home
    raise ConfigError(f"all {MAX_SLOTS} places in {root} are in use: stop some with 'shoal stop'")


def known_homes(root: Path) -> list[Path]:
    """Folders in or at `root` that a daemon may be working in, in the order of their numbers."""
    slots = [path for path in root.glob("peer-*") if path.name[5:].isdigit() and path.is_dir()]
    slots.sort(key=lambda path: int(path.name[5:]))
    return ([root] if (root / "lock").exists() else []) + slots


def read_daemon_file(home: Path) -> DaemonFile | None:
    """What the daemon in this folder published; None when there is nothing (readable)."""
    try:
        with (home / "daemon.json").open("rb") as file:
            fields = json.loads(file.read(_DAEMON_FILE_BYTES))
        found = DaemonFile(
            pid=int(fields["pid"]),
            port=int(fields["port"]),
            token=str(fields["token"]),
            run=str(fields["run"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # The token becomes a header; the process id may be given to `kill`, which takes 0 for a group.
    fits = found.token.isascii() and found.token.isprintable()
    return found if fits and found.pid > 0 and 0 < found.port < 65536 else None


def is_running(home: Path) -> bool:
    """Whether a living process holds this folder."""
    try:
        lock = os.open(home / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared, so that two who look at once do not take each other for a daemon.
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def holder(home: Path) -> int | None:
    """The process that holds this folder, published or not; None when none does."""
    pid = _written_pid(home)
    if pid is None or not is_running(home):
        return None
    # A killed holder leaves its number behind: one that has only just got the lock overwrites it.
    time.sleep(_SETTLED_S)
    return pid if is_running(home) and _written_pid(home) == pid else None


def terminate(home: Path) -> int | None:
    """Send SIGTERM to the process that holds this folder, if any; returns its id."""
    pid = holder(home)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)
    return pid


def _written_pid(home: Path) -> int | None:
    try:
        with (home / "lock").open("rb") as file:
            pid = int(file.read(20))
    except (OSError, ValueError):
        return None
    return pid if 0 < pid < 1 << 31 else None


def forget_dead(home: Path) -> None:
    """Remove the `daemon.json` of a daemon that was killed, unless a new one has the folder."""
    with contextlib.suppress(ConfigError):
        dead = Home._try(home)
        if dead is not None:
            dead.release()
