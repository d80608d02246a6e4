"""Small files that are there whole, also after a power cut."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from peer.files import write_whole


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the disk, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append("sync folder" if folder else f"sync {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def noting_replace(source: Any, target: Any) -> None:
        seen.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return seen


def test_contents_are_on_the_disk_before_their_name(tmp_path: Path, calls: list[str]) -> None:
    write_whole(tmp_path / "run", b"contents")
    assert calls == ["sync 8 bytes", "replace", "sync folder"]
    assert (tmp_path / "run").read_bytes() == b"contents"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_there_already_is_not_written_again(tmp_path: Path, calls: list[str]) -> None:
    path = tmp_path / "run"
    write_whole(path, b"contents")
    calls.clear()
    write_whole(path, b"contents")
    assert calls == []
    for data, mode in ((b"CONTENTS", 0o600), (b"CONTENTS", 0o644), (b"", 0o644)):
        write_whole(path, data, mode)
        assert calls.pop() == "sync folder"
        assert path.read_bytes() == data
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"contents")
    (tmp_path / "run").symlink_to("other")
    write_whole(tmp_path / "run", b"contents")
    assert not (tmp_path / "run").is_symlink()


def test_what_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "run", b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "run", b"after")
    assert (tmp_path / "run").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
