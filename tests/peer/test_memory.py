"""What a peer remembers for its next start."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from dht.identity import Identity
from dht.records import SignedRun
from peer.memory import Memory

RUN_ID = "ab" * 20


def address(port: int, identity: Identity) -> str:
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{identity.peer_id}"


@pytest.fixture
def identity() -> Identity:
    return Identity.generate()


def test_a_created_run_is_remembered_whole(tmp_path: Path, identity: Identity) -> None:
    run = SignedRun.sign(identity, b'name = "x"', 1.0)
    assert Memory(tmp_path).run() is None
    Memory(tmp_path).keep_run(run)
    assert Memory(tmp_path).run() == run


@pytest.mark.parametrize("broken", [b"", b"nonsense", bytes(100_000)])
def test_a_broken_run_file_is_no_run(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "run").write_bytes(broken)
    assert Memory(tmp_path).run() is None


def test_a_run_that_somebody_changed_is_no_run(tmp_path: Path, identity: Identity) -> None:
    Memory(tmp_path).keep_run(SignedRun.sign(identity, b'name = "x"', 1.0))
    raw = (tmp_path / "run").read_bytes()
    (tmp_path / "run").write_bytes(raw.replace(b'"x"', b'"y"'))
    assert Memory(tmp_path).run() is None


def test_addresses_are_remembered_for_their_run_only(tmp_path: Path, identity: Identity) -> None:
    memory = Memory(tmp_path)
    known = (address(1, identity), address(2, identity))
    memory.keep_peers(RUN_ID, known)
    assert memory.peers(RUN_ID) == known
    assert memory.peers("cd" * 20) == ()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"run": 1}', json.dumps({"run": RUN_ID, "peers": 5})],
)
def test_a_broken_address_list_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "peers").write_text(content)
    assert Memory(tmp_path).peers(RUN_ID) == ()


def test_what_is_no_address_is_left_out(tmp_path: Path, identity: Identity) -> None:
    good = address(1, identity)
    kept = {"run": RUN_ID, "peers": [good, 7, "/ip4/127.0.0.1", "; rm -rf"]}
    (tmp_path / "peers").write_text(json.dumps(kept))
    assert Memory(tmp_path).peers(RUN_ID) == (good,)


def test_what_a_stranger_made_up_takes_nobodys_place(tmp_path: Path, identity: Identity) -> None:
    memory = Memory(tmp_path)
    made_up = tuple(f"/foo/{n}/p2p/{identity.peer_id}" for n in range(100))
    memory.keep_peers(RUN_ID, (*made_up, address(1, identity)))
    assert memory.peers(RUN_ID) == (address(1, identity),)
    # What an earlier version has kept.
    (tmp_path / "peers").write_text(json.dumps({"run": RUN_ID, "peers": [*made_up]}))
    assert memory.peers(RUN_ID) == ()


def test_the_list_is_bounded(tmp_path: Path, identity: Identity) -> None:
    memory = Memory(tmp_path)
    memory.keep_peers(RUN_ID, tuple(address(1 + n, identity) for n in range(5000)))
    assert 0 < len(memory.peers(RUN_ID)) <= 64


def test_a_port_is_taken_again_unless_somebody_else_has_it(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert memory.port("127.0.0.1") == 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        memory.keep_port(port)
        assert memory.port("127.0.0.1") == 0
    assert memory.port("127.0.0.1") == port


@pytest.mark.parametrize("content", ["", "x", "-1", "70000"])
def test_a_broken_port_file_is_no_port(tmp_path: Path, content: str) -> None:
    (tmp_path / "port").write_text(content)
    assert Memory(tmp_path).port("127.0.0.1") == 0


def test_a_run_is_resumable_once_there_is_a_checkpoint_of_it(
    tmp_path: Path, identity: Identity
) -> None:
    memory = Memory(tmp_path)
    run = SignedRun.sign(Identity.generate(), b'name = "x"', 1.0)
    memory.keep_resumable(run)
    assert memory.resumable(run.run_id) is None
    (memory.run_folder(run.run_id) / "000000000001.checkpoint").touch()
    assert memory.resumable(run.run_id) == run
    assert memory.resumable(RUN_ID) is None
    assert memory.run() is None  # it was created by somebody else
    other = SignedRun.sign(identity, b"x", 1.0)
    (memory.run_folder(run.run_id) / "run").write_bytes(other.to_bytes())
    assert memory.resumable(run.run_id) is None
    (memory.run_folder(run.run_id) / "run").write_bytes(b"nonsense")
    assert memory.resumable(run.run_id) is None


def test_a_run_is_on_the_disk_once_and_for_all(
    tmp_path: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint without its run is worth nothing after a power cut."""
    synced: list[str] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    memory = Memory(tmp_path)
    run = SignedRun.sign(identity, b"x", 1.0)
    memory.keep_resumable(run)
    folders = [name for name in synced if "/.run." not in name]
    assert folders == ["/runs", "", f"/runs/{run.run_id}"]
    assert len(synced) == 4
    memory.keep_resumable(run)
    assert len(synced) == 4


def test_a_place_that_cannot_be_written_costs_only_the_memory(
    tmp_path: Path, identity: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Memory(tmp_path / "gone")
    gone.keep_run(SignedRun.sign(identity, b"x", 1.0))
    assert "memory.not_written" in caplog.text
    assert gone.run() is None
