from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dht.errors import ConfigError
from dht.identity import Identity
from dht.records import SignedRun
from peer.homes import (
    DaemonFile,
    Home,
    claim_slot,
    forget_dead,
    holder,
    is_running,
    known_homes,
    read_daemon_file,
    terminate,
)
from peer.memory import Memory

DAEMON = DaemonFile(pid=1234, port=5678, token="secret", run="ab" * 20)
HOLDER = """
import sys
from pathlib import Path
from peer.homes import DaemonFile, claim_slot
home = claim_slot(Path(sys.argv[1]))
home.publish(DaemonFile(pid=1, port=2, token="t", run="r"))
print(home.path.name, flush=True)
sys.stdin.read()
"""


def test_daemons_of_one_machine_get_different_folders(tmp_path: Path) -> None:
    with claim_slot(tmp_path) as first, claim_slot(tmp_path) as second:
        assert [first.path.name, second.path.name] == ["peer-0", "peer-1"]
        first.release()
        with claim_slot(tmp_path) as third:
            assert third.path.name == "peer-0"
        assert stat.S_IMODE(second.path.stat().st_mode) == 0o700


def test_a_folder_that_remembers_a_run_is_left_to_its_creator(tmp_path: Path) -> None:
    for slot, text in enumerate((b"a = 1", b"b = 1", b"b = 1")):
        with Home.claim(tmp_path / f"peer-{slot}") as home:
            identity = Identity.load_or_create(home.identity_path)
            Memory(home.path).keep_run(SignedRun.sign(identity, text, 1.0))

    def taken(run_file: bytes | None) -> list[str]:
        with claim_slot(tmp_path, run_file) as first, claim_slot(tmp_path, run_file) as second:
            return [first.path.name, second.path.name]

    assert taken(None) == ["peer-3", "peer-4"]
    assert taken(b"a = 1") == ["peer-0", "peer-3"]
    assert taken(b"b = 1") == ["peer-1", "peer-2"]
    assert taken(b"c = 1") == ["peer-3", "peer-4"]
    (tmp_path / "peer-0" / "run").write_bytes(b"damaged")
    assert taken(b"a = 1") == ["peer-3", "peer-4"]


def test_a_folder_goes_to_who_comes_back_to_its_run(tmp_path: Path) -> None:
    runs = "ab" * 20, "cd" * 20
    for slot, run_id in enumerate(runs):
        (tmp_path / f"peer-{slot}" / "runs" / run_id).mkdir(parents=True)

    def taken(run_id: str) -> list[str]:
        with claim_slot(tmp_path, run_id=run_id) as a, claim_slot(tmp_path, run_id=run_id) as b:
            return [a.path.name, b.path.name]

    assert taken(runs[0]) == ["peer-0", "peer-2"]
    assert taken(runs[1]) == ["peer-1", "peer-2"]
    assert taken("ef" * 20) == ["peer-2", "peer-3"]
    assert taken("") == ["peer-2", "peer-3"]


def test_a_creator_that_joins_its_run_again_gets_the_folder_with_its_checkpoints(
    tmp_path: Path,
) -> None:
    with Home.claim(tmp_path / "peer-1") as home:
        identity = Identity.load_or_create(home.identity_path)
        run = SignedRun.sign(identity, b"a = 1", 1.0)
        Memory(home.path).keep_run(run)
        Memory(home.path).keep_resumable(run)
    with claim_slot(tmp_path, run_id=run.run_id) as own:
        assert own.path.name == "peer-1"
        with claim_slot(tmp_path, run_id=run.run_id) as other:
            assert other.path.name == "peer-0"
    assert Memory(tmp_path / "peer-1").run() == run
    # One that joined it comes first: the creator may be on its way to create it again.
    (tmp_path / "peer-2" / "runs" / run.run_id).mkdir(parents=True)
    with claim_slot(tmp_path, run_id=run.run_id) as joiner:
        assert joiner.path.name == "peer-2"
        with claim_slot(tmp_path, b"a = 1") as creator:
            assert creator.path.name == "peer-1"


def test_a_remembered_run_is_given_up_before_a_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.homes.MAX_SLOTS", 2)
    (tmp_path / "peer-0").mkdir()
    (tmp_path / "peer-0" / "run").touch()
    with claim_slot(tmp_path) as first, claim_slot(tmp_path) as second:
        assert [first.path.name, second.path.name] == ["peer-1", "peer-0"]
        with pytest.raises(ConfigError, match="all 2 places"):
            claim_slot(tmp_path)


def test_the_holder_is_known_before_it_has_published_anything(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with Home.claim(tmp_path) as home:
        assert holder(tmp_path) == os.getpid()
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            Home.claim(tmp_path)
        home.release()
    assert holder(tmp_path) is None
    assert (tmp_path / "lock").read_bytes() == b""


def test_only_the_holder_of_the_lock_is_terminated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr("os.kill", lambda *given: killed.append(given))
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")  # what a killed one left; since given away
    assert terminate(tmp_path) is None
    assert killed == []
    with Home.claim(tmp_path):
        assert terminate(tmp_path) == os.getpid()
    assert killed == [(os.getpid(), signal.SIGTERM)]


def test_a_folder_in_use_is_refused_by_name(tmp_path: Path) -> None:
    with Home.claim(tmp_path / "x") as home:
        home.publish(DAEMON)
        with pytest.raises(ConfigError, match=r"process 1234.*shoal stop --home") as caught:
            Home.claim(tmp_path / "x")
    assert "\n" not in str(caught.value)
    Home.claim(tmp_path / "x").release()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--home"):
        Home.claim(tmp_path / "file" / "below")


def test_daemon_file_is_private_and_goes_with_the_daemon(home: Home) -> None:
    home.publish(DAEMON)
    path = home.path / "daemon.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_daemon_file(home.path) == DAEMON
    assert is_running(home.path)
    home.release()
    assert not path.exists()
    assert not is_running(home.path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "7",
        '{"pid": "x"}',
        "\xff",
        "[" * 16_000,
        '{"pid": 1e999, "port": 1, "token": "t", "run": ""}',
        '{"pid": 0, "port": 1, "token": "t", "run": ""}',
        '{"pid": 1, "port": 65536, "token": "t", "run": ""}',
        '{"pid": 1, "port": 1, "token": "a\\nb", "run": ""}',
        '{"pid": 1, "port": 1, "token": "\\u20ac", "run": ""}',
    ],
)
def test_a_damaged_daemon_file_is_no_daemon(home: Home, content: str) -> None:
    (home.path / "daemon.json").write_text(content, encoding="latin-1")
    assert read_daemon_file(home.path) is None


def test_a_killed_daemon_is_recognised_and_forgotten(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        home = tmp_path / process.stdout.readline().strip()
        assert is_running(home)
        forget_dead(home)  # it is not: nothing happens
        assert read_daemon_file(home) is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not is_running(home)
        assert read_daemon_file(home) is not None  # what it could not remove
        forget_dead(home)
        assert read_daemon_file(home) is None
    with claim_slot(tmp_path) as again:
        assert again.path == home


def test_known_homes_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("peer-10", "peer-2", "peer-x", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in known_homes(tmp_path)] == ["peer-2", "peer-10"]
    Home.claim(tmp_path / "peer-2").release()
    assert known_homes(tmp_path / "peer-2") == [tmp_path / "peer-2"]
    assert known_homes(tmp_path / "none") == []
