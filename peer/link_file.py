"""A join link in a file, for whoever starts several peers on one machine or a shared volume."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from dht.errors import ConfigError
from dht.link import MAX_LINK_CHARS, Link
from peer.files import write_whole


def write_link_file(path: Path, link: Link) -> None:
    """Write the link so that a reader sees the whole of it or nothing.

    Raises:
        ConfigError: the place cannot be written to.
    """
    try:
        # Readable by others: the link is meant for them (on a shared volume, say).
        write_whole(path, f"{link}\n".encode(), 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot write the link file {path}: {error.strerror}; choose another --link-file"
        ) from error


def remove_link_file(path: Path) -> None:
    """Remove what an earlier run left.

    Raises:
        ConfigError: it is there and cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot replace the link file {path}: {error.strerror}; choose another --link-file"
        ) from error


def wait_for_link_file(
    path: Path, timeout_s: float, *, should_stop: Callable[[], bool], poll_s: float = 0.1
) -> Link | None:
    """Read a link file, waiting for it to appear.

    Args:
        path: written by `write_link_file`, perhaps not yet.
        timeout_s: how long it may take to appear.
        should_stop: asked while waiting.
        poll_s: pause between two looks.

    Returns:
        The link, or None when asked to stop while waiting.

    Raises:
        ConfigError: it did not appear in time, cannot be read or holds no link.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_LINK_CHARS + 2)
        except FileNotFoundError:
            if should_stop():
                return None
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"the link file {path} did not appear within {timeout_s:g} s: "
                    "is 'shoal create --link-file' running with the same path?"
                ) from None
            time.sleep(poll_s)
            continue
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"cannot read the link file {path}: {reason}") from error
        try:
            return Link.parse(text)
        except ConfigError as error:
            raise ConfigError(f"the link file {path} holds no link: {error}") from error
