"""Writing small files so that a reader sees the whole of them or nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put a file in place of what may be there.

    Args:
        path: in a folder that exists.
        data: all of it.
        mode: who may read it, whatever the umask.

    Raises:
        OSError: it cannot be written; what was there is untouched.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
