"""Where a peer keeps what is its own: one folder each, locked while its daemon runs.

    ~/.shoal/peer-0/      the first daemon of this machine (~/.shoal/peer-1 the second, ...)
        identity.key      Ed25519 key, made at first start
        lock              held (flock) by the daemon as long as it lives
        run, peers, port  to find the way back after a restart (`peer.memory`)
        daemon.json       0600: how `shoal status` and `shoal stop` reach it; gone when it has ended

Guarantees: two daemons never share a folder, hence never an identity, not even when started in the
same instant, since the kernel hands out the lock; and the lock ends with its holder, however that
ended, so that a `daemon.json` beside a free lock is known to be a dead daemon's. The kernel
decides, not a process id, which may have been given to somebody else. Not guaranteed: any of this
on a network file system whose server does not lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from dht.errors import ConfigError

MAX_SLOTS = 256
_DAEMON_FILE_BYTES = 16 * 1024


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
            who = f" (process {owner.pid})" if owner else ""
            raise ConfigError(
                f"another daemon{who} is using {path}: stop it with 'shoal stop --home {path}', "
                "or give this one another --home"
            )
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
        """Tell `shoal status` and `shoal stop` how to reach this daemon."""
        temporary = self.path / f".daemon.{os.getpid()}"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(daemon), file)
        os.replace(temporary, self.path / "daemon.json")

    def release(self) -> None:
        """Give the folder back. May be called twice."""
        if self._lock < 0:
            return
        # First the file, then the lock: the next owner's file must not be the one we remove.
        with contextlib.suppress(OSError):
            (self.path / "daemon.json").unlink(missing_ok=True)
        lock, self._lock = self._lock, -1
        os.close(lock)

    def __enter__(self) -> Home:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def claim_slot(root: Path) -> Home:
    """Claim the first free `peer-N` below `root`.

    Raises:
        ConfigError: `root` cannot be written to, or all slots are taken.
    """
    for slot in range(MAX_SLOTS):
        home = Home._try(root / f"peer-{slot}")
        if home is not None:
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
        return DaemonFile(
            pid=int(fields["pid"]),
            port=int(fields["port"]),
            token=str(fields["token"]),
            run=str(fields["run"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_running(home: Path) -> bool:
    """Whether a living process holds this folder."""
    try:
        lock = os.open(home / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def forget_dead(home: Path) -> None:
    """Remove the `daemon.json` of a daemon that was killed, unless a new one has the folder."""
    with contextlib.suppress(ConfigError):
        dead = Home._try(home)
        if dead is not None:
            dead.release()
