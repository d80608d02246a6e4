"""Writing small files so that a reader sees the whole of them or nothing.

Guarantees: also after a power cut, and what was written stays written. Not guaranteed: that a disk
keeps what it said it had written.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put a file in place of what may be there; nothing is done where that is the same.

    Args:
        path: in a folder that exists.
        data: all of it.
        mode: who may read it, whatever the umask.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    if _is_there(path, data, mode):
        return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            # Before it gets its name: a power cut may keep the name and lose the contents.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the disk keep the names in a folder; nothing where a file system cannot do that."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _is_there(path: Path, data: bytes, mode: int) -> bool:
    try:
        found = path.lstat()
        alike = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == mode
        return alike and found.st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False
