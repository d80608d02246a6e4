from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dht.identity import Identity
from dht.link import Link
from dht.records import SignedRun
from peer import cli
from peer.homes import DaemonFile, Home
from peer.link_file import write_link_file
from peer.memory import Memory

RUN = "0123456789abcdef0123456789abcdef01234567"
MADDR = f"/ip4/127.0.0.1/tcp/4001/p2p/{Identity.generate().peer_id}"
STARTING = """
import sys, time
from pathlib import Path
from peer.homes import Home
home = Home.claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""
COMMANDS = ["init", "create", "join", "demo", "status", "link", "stop"]


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "shoal"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def starting() -> Iterator[Callable[[Path], int]]:
    """Starts a process that has a home, and nothing published; returns its id."""
    processes: list[subprocess.Popen[str]] = []

    def start(home: Path) -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", STARTING, str(home)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.communicate()


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
        (["ping", "/ip4/1.2.3.4", "--timeout", "nan"], "not a finite number"),
        (["demo", "--minutes", "nan"], "'--minutes': 'nan' is not a finite number"),
        (["demo", "--minutes", "inf"], "'--minutes': 'inf' is not a finite number"),
        (["demo", "--data", "/dev/null"], "/dev/null is neither a file nor a folder"),
        (["create", "."], "cannot read the run file .: it is a folder; name a file"),
        (["init", "none/run.toml"], "there is no folder none; make it first"),
        (["stop", "--peer", ".."], "--peer needs a peer id"),
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
        (
            [f"--announce-host=a{n}" for n in range(17)] + ["--port", "1"],
            "--announce-host is given 17 times, at most 16 are possible",
        ),
        (
            [f"--announce-host={n}{'.long' * 40}" for n in range(3)] + ["--port", "1"],
            "have 603 characters in all, at most 512",
        ),
        (["--host", "localhost"], "not an IP address"),
        (["--device", ""], "--device is empty: use auto"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "/dev/null"], "/dev/null is neither a file nor a folder"),
        (["--link-file", "none/link"], "there is no folder none; make it first"),
        (["--home", "damaged"], "damaged/identity.key is damaged"),
    ],
)
def test_wrong_options_of_this_machine_show_before_torch_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "peer.node", None)  # what needs torch cannot be imported
    (tmp_path / "empty.txt").touch()
    (tmp_path / "damaged").mkdir(mode=0o700)
    (tmp_path / "damaged" / "identity.key").touch(mode=0o600)
    assert cli.run(["init", "run.toml"]) == 0
    capsys.readouterr()
    assert says in refused(capsys, "create", "run.toml", *options)


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_run_file_is_named_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "run.toml").write_text(content)
    line = refused(capsys, "create", "run.toml")
    assert "the run file run.toml is empty: remove it, and 'shoal init run.toml'" in line


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    whole = capsys.readouterr().out
    assert cli.run([]) == 2
    assert capsys.readouterr() == ("", whole)


@pytest.mark.parametrize(
    ("arguments", "data", "same"),
    [([], "", True), (["--data", "text"], "text", True), ([], "mine.txt", True), ([], "", False)],
)
def test_create_goes_back_to_the_folder_that_created_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], data: str, same: bool
) -> None:
    text = 'name = "x" # why\n'
    if data == "mine.txt":
        text += '[data]\npath = "below/mine.txt"\n'
    (tmp_path / "text").write_text("a text")
    (tmp_path / "run.toml").write_text(text)
    public = text if not data else f'name = "x"\n\n[data]\npath = "{data}"\n'
    for slot in range(3):
        with Home.claim(tmp_path / "shoal" / f"peer-{slot}") as home:
            identity = Identity.load_or_create(home.identity_path)
            run_file = public if slot == 1 and same else f'name = "{slot}"'
            Memory(home.path).keep_run(SignedRun.sign(identity, run_file.encode(), 1.0))
    taken: list[str] = []

    def run(options: dict[str, Any], **_: object) -> int:
        taken.append(options["claimed"].path.name)
        return 0

    monkeypatch.setattr(cli, "_run_node", run)
    assert cli.run(["create", "run.toml", *arguments]) == 0
    assert cli.run(["join", f"shoal://{RUN}?peer={MADDR}"]) == 0
    assert taken == ["peer-1" if same else "peer-3", "peer-3"]


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
    nothing = f"no daemon is running in {tmp_path / 'shoal'}\n"
    assert capsys.readouterr().err == f"shoal status: {nothing}"
    assert cli.run(["stop"]) == 0
    assert capsys.readouterr().err == f"shoal stop: {nothing}"
    assert cli.run(["link"]) == 1
    nobody = f"no daemon that can be joined is running in {tmp_path / 'shoal'}\n"
    assert capsys.readouterr().err == f"shoal link: {nobody}"
    line = refused(capsys, "stop", "--peer", "abc")
    assert line.startswith("shoal stop: no daemon with peer id abc")


def test_a_daemon_that_starts_is_shown_and_can_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], starting: Callable[[Path], int]
) -> None:
    pid = starting(tmp_path / "shoal" / "peer-0")
    assert cli.run(["status", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["phase"], row["pid"]) == ("starting", pid)
    refused(capsys, "stop", "--peer", "zzz")
    assert cli.run(["stop"]) == 0
    assert capsys.readouterr().out == f"stopped process {pid}\n"
    assert cli.run(["status"]) == 1


@pytest.mark.parametrize("token", ["a\nb", "\udcff", "\u20ac"])
def test_a_daemon_with_a_damaged_file_can_still_be_stopped(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    starting: Callable[[Path], int],
    token: str,
) -> None:
    home = tmp_path / "shoal" / "peer-0"
    pid = starting(home)
    damaged = {"pid": pid, "port": 1, "token": token, "run": RUN}
    (home / "daemon.json").write_text(json.dumps(damaged))
    assert cli.run(["status"]) == 0
    assert cli.run(["stop"]) == 0
    assert f"stopped process {pid}\n" in capsys.readouterr().out


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
        ["link"],
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


def test_failpoints_come_from_the_environment_and_a_slip_in_them_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_file: Path
) -> None:
    monkeypatch.setenv("SHOAL_FAILPOINTS", "leader.comit=kill")
    assert "there is no point 'leader.comit'" in refused(capsys, "create", str(run_file))


@pytest.mark.parametrize(
    ("up", "down", "relays"), [(0.0, 0.0, True), (20.0, 0.0, False), (0.0, 5.0, False)]
)
def test_a_peer_with_a_limit_carries_nothing_for_others(
    up: float, down: float, relays: bool
) -> None:
    assert cli._relays({"upload_mbps": up, "download_mbps": down}) is relays
