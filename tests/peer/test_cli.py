from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dht.identity import Identity
from peer import cli
from peer.homes import DaemonFile, Home
from peer.link import Link, write_link_file

RUN = "0123456789abcdef0123456789abcdef01234567"
COMMANDS = ["init", "create", "join", "demo", "status", "stop"]


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "shoal"))
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line of a command that must fail."""
    assert cli.run(list(arguments)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.strip()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["join"], "shoal join: missing LINK; see 'shoal join --help'"),
        (["create"], "shoal create: missing RUN.toml; see 'shoal create --help'"),
        (["jion"], "shoal: unknown command 'jion': did you mean 'join'?; see 'shoal --help'"),
        (["--bogus"], "shoal: no such option '--bogus'; see 'shoal --help'"),
        (
            ["demo", "--rounds", "1", "--minutes", "1"],
            "shoal demo: give --rounds or --minutes, not both; see 'shoal demo --help'",
        ),
        (
            ["create", "none.toml"],
            "shoal create: there is no run file none.toml: 'shoal init none.toml' writes one to "
            "start from",
        ),
    ],
)
def test_a_slip_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert refused(capsys, *arguments) == line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["join", "shoal://abc"], "not 40 hex digits"),
        (["join", f"shoal://{RUN}?peer=/ip4/1.2.3.4"], "not the address of a peer"),
        (["join", f"shoal://{RUN}", "--link-file", "x"], "both LINK and --link-file"),
        (["ping", "/ip4/1.2.3.4"], "not the address of a peer"),
        (["ping"], "missing LINK_OR_ADDRESS"),
        (["ping", "/ip4/1.2.3.4", "--link-file", "link"], "both LINK_OR_ADDRESS and --link-file"),
        (["ping", "--link-file", "link", "--timeout", "0.1"], "link did not appear within 0.1 s"),
        (["demo", "--codec", "int3"], "--codec"),
        (["demo", "--peers", "0"], "--peers"),
        (["demo", "--data", "none.txt"], "none.txt"),
        (["status", "--home"], "--home"),
    ],
)
def test_a_wrong_argument_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert says in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--announce-host", "a b", "--port", "1"], "neither an IP address nor a host name"),
        (["--announce-host", "example.org"], "--announce-host needs --port"),
        (["--host", "localhost"], "not an IP address"),
    ],
)
def test_wrong_addresses_of_this_machine_are_named(
    capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert cli.run(["init", "run.toml"]) == 0
    capsys.readouterr()
    assert says in refused(capsys, "create", "run.toml", *options)


def test_init_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init"]) == 0
    assert "shoal create run.toml" in capsys.readouterr().out
    assert "run.toml exists" in refused(capsys, "init")


def test_a_home_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["init"])
    capsys.readouterr()
    with Home.claim(tmp_path / "mine"):
        line = refused(capsys, "create", "run.toml", "--home", str(tmp_path / "mine"))
    assert "another daemon" in line


@pytest.mark.parametrize("command", [*COMMANDS, "ping"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"shoal {command}" in out
    assert "\\b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_ping_asks_whom_a_link_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    maddr = f"/dns4/bootstrap/tcp/4001/p2p/{Identity.generate().peer_id}"
    write_link_file(tmp_path / "link", Link(RUN, (maddr,)))
    asked: list[tuple[str, float]] = []

    def answer(address: str, timeout_s: float) -> float:
        asked.append((address, timeout_s))
        return 0.25

    monkeypatch.setattr("peer.ping.ping_once", answer)
    assert cli.run(["ping", "--link-file", "link", "--timeout", "3"]) == 0
    assert asked == [(maddr, 3.0)]
    assert "answered in 250.0 ms" in capsys.readouterr().out


def test_help_lists_the_commands_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n  {command} ") for command in COMMANDS]
    assert places == sorted(places)
    assert "ping" not in out


def test_status_and_stop_without_a_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["status"]) == 1
    assert f"no daemon is running in {tmp_path / 'shoal'}" in capsys.readouterr().err
    assert cli.run(["stop"]) == 0
    assert "no daemon is running" in capsys.readouterr().err
    assert "no daemon with peer id abc" in refused(capsys, "stop", "--peer", "abc")


def test_a_killed_daemon_is_said_and_cleaned_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home.claim(tmp_path / "shoal" / "peer-0")
    home.publish(DaemonFile(pid=4242, port=1, token="t", run=RUN))
    stale = (home.path / "daemon.json").read_text()
    home.release()
    (home.path / "daemon.json").write_text(stale)
    assert cli.run(["status"]) == 1
    assert "(process 4242) was killed; cleaned up" in capsys.readouterr().err
    assert not (home.path / "daemon.json").exists()


def test_a_daemon_that_does_not_answer_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Home.claim(tmp_path / "shoal" / "peer-0") as home:
        home.publish(DaemonFile(pid=4242, port=1, token="t", run=RUN))
        assert cli.run(["status", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["phase"], row["pid"], row["run"]) == ("no answer", 4242, RUN)


def test_a_bug_of_ours_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("peer.runfile.write_starter", broken)
    line = refused(capsys, "init", status=1)
    assert line == (
        "shoal init: unexpected ZeroDivisionError: one two; run with -v for the traceback"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["init", "quick.toml"],
        ["status"],
        ["stop"],
        ["join", "shoal://abc"],
        ["create", "none.toml"],
    ],
)
def test_what_does_not_train_loads_neither_torch_nor_hivemind(arguments: list[str]) -> None:
    script = (
        "import sys, contextlib, io\n"
        "from peer import cli\n"
        f"cli.run({arguments!r})\n"
        "slow = {'torch', 'hivemind', 'grpc', 'aiohttp', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {slow}' if slow else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
