"""What a peer remembers of its run beside its key, so that a restart finds the way back.

    run      the run that this peer created, signed
    runs/    by run id: that run again, whoever created it, beside its checkpoints
    peers    addresses of others in the run it was last in
    port     where it listened for the DHT: with the same one again, old links stay good and the
             others find it back by themselves

Guarantees: written whole or not at all, and there after a power cut; what is read back is checked
like anything from a stranger. Not guaranteed: that those peers still live. Checkpoints are
`coordinator_free.checkpoints`' own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from pathlib import Path

from dht.errors import ConfigError, RecordError
from dht.link import check_multiaddr
from dht.records import MAX_ADDRESSES, SignedRun
from peer.files import sync_folder, write_whole
from peer.homes import RUNS

logger = logging.getLogger(__name__)

_MAX_PEERS = 4 * MAX_ADDRESSES
_MAX_BYTES = 64 * 1024


class Memory:
    """The files of one peer's folder.

    Args:
        folder: claimed by this process (`peer.homes`).
    """

    def __init__(self, folder: Path) -> None:
        self._run = folder / "run"
        self._runs = folder / RUNS
        self._peers = folder / "peers"
        self._port = folder / "port"

    def run(self) -> SignedRun | None:
        """The run that this peer created last; None for none, or an unreadable one."""
        try:
            return SignedRun.from_bytes(_read(self._run))
        except (OSError, RecordError) as error:
            logger.debug("memory.no_run %s", error)
            return None

    def keep_run(self, run: SignedRun) -> None:
        """Remember a run that this peer creates."""
        _write(self._run, run.to_bytes())

    def run_folder(self, run_id: str) -> Path:
        """Where the checkpoints of a run are, or will be."""
        return self._runs / run_id

    def resumable(self, run_id: str) -> SignedRun | None:
        """A run of which there is a checkpoint, so that it needs nobody else to be gone on with."""
        folder = self.run_folder(run_id)
        if not any(folder.glob("*.checkpoint")):
            return None
        try:
            run = SignedRun.from_bytes(_read(folder / "run"))
        except (OSError, RecordError) as error:
            logger.warning("memory.run_unreadable file=%s reason=%s", folder / "run", error)
            return None
        return run if run.run_id == run_id else None

    def keep_resumable(self, run: SignedRun) -> None:
        """Remember a run that this peer takes part in, for the time when it has a checkpoint."""
        folder = self.run_folder(run.run_id)
        if not folder.is_dir():
            with contextlib.suppress(OSError):  # told by what cannot be written into it
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for parent in list(folder.parents)[:2]:  # `runs` and the peer's own folder
                sync_folder(parent)
        _write(folder / "run", run.to_bytes())

    def peers(self, run_id: str) -> tuple[str, ...]:
        """Addresses of others in that run, as multiaddrs with a peer id."""
        try:
            kept = json.loads(_read(self._peers))
            addresses = kept["peers"] if kept["run"] == run_id else []
            return tuple(a for a in addresses if isinstance(a, str) and _usable(a))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.debug("memory.no_peers %s", error)
            return ()

    def keep_peers(self, run_id: str, addresses: tuple[str, ...]) -> None:
        """Remember who else is in a run, in place of whoever was remembered before.

        What strangers wrote into their records and nobody can dial takes nobody's place.
        """
        usable = [address for address in addresses if _usable(address)][:_MAX_PEERS]
        if usable:
            _write(self._peers, json.dumps({"run": run_id, "peers": usable}).encode())

    def port(self, host: str) -> int:
        """The port of last time if it is free on this address; 0, which is any, if not."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            port = int(_read(self._port))
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except (OSError, ValueError, OverflowError) as error:
            logger.debug("memory.no_port %s", error)
            return 0
        return port

    def keep_port(self, port: int) -> None:
        """Remember where this peer listens."""
        _write(self._port, str(port).encode())


def _usable(address: str) -> bool:
    try:
        check_multiaddr(address)
    except ConfigError:
        return False
    return True


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)


def _write(path: Path, data: bytes) -> None:
    """Losing this costs a restart its shortcut, never the training: a full disk is only logged."""
    try:
        write_whole(path, data)
    except OSError as error:
        logger.warning("memory.not_written path=%s reason=%r", path, error.strerror)
