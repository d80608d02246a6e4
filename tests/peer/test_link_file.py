from __future__ import annotations

import threading
from pathlib import Path

import pytest

from dht.errors import ConfigError
from dht.link import Link
from peer.link_file import wait_for_link_file, write_link_file

RUN = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def maddr(peer_id: str) -> str:
    return f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id}"


def test_link_file_appears_whole(tmp_path: Path, maddr: str) -> None:
    path, link = tmp_path / "link", Link(RUN, (maddr,))
    writer = threading.Timer(0.05, write_link_file, (path, link))
    writer.start()
    found = wait_for_link_file(path, 10, should_stop=lambda: False, poll_s=0.001)
    writer.join()
    assert found == link
    assert list(tmp_path.iterdir()) == [path]


def test_waiting_for_a_link_file_ends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did not appear"):
        wait_for_link_file(tmp_path / "none", 0.01, should_stop=lambda: False, poll_s=0.001)
    assert wait_for_link_file(tmp_path / "none", 60, should_stop=lambda: True) is None


def test_a_link_file_with_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.write_text("hello")
    with pytest.raises(ConfigError, match=r"holds no link.*must start with shoal://"):
        wait_for_link_file(path, 1, should_stop=lambda: False)


def test_link_file_in_a_missing_folder(tmp_path: Path, maddr: str) -> None:
    with pytest.raises(ConfigError, match="choose another --link-file"):
        write_link_file(tmp_path / "no" / "such", Link(RUN, (maddr,)))
