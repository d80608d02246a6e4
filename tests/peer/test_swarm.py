"""The command as a person uses it: real processes, a real DHT, real training, on 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SMALL = """
name = "small"
[model]
layers = 1
width = 32
heads = 2
context = 32
[training]
batch_size = 4
eval_blocks = 8
[round]
local_steps = {local_steps}
fragments = 1
delay_steps = 0
rounds = {rounds}
start_peers = {start_peers}
"""


class Shoal:
    """Starts `shoal` commands in a private world, and knows what they leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.environment = {
            **os.environ,
            "SHOAL_HOME": str(folder / "shoal"),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "peer.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.environment,
        )
        self.processes.append(process)
        return process

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=250)
        return process.returncode, out, err

    def pids(self) -> list[int]:
        """Living processes that belong here."""
        return list(self._world())

    def world(self) -> list[str]:
        """Their command lines."""
        return list(self._world().values())

    def _world(self) -> dict[int, str]:
        mine = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if str(self.temporary) in command:
                        mine[int(entry.name)] = command[:200]
        return mine

    def leftovers(self) -> list[str]:
        """Processes, folders and sockets that are still here."""
        return self.world() + [str(path) for path in self.temporary.iterdir()]

    def gone_within(self, seconds: float) -> None:
        """Wait until nothing is left, or say what is."""
        deadline = time.monotonic() + seconds
        while self.leftovers() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.leftovers() == []

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shoal]:
    made = Shoal(tmp_path_factory.mktemp("s"))
    yield made
    made.close()


def events(stream: IO[str] | None) -> Iterator[dict[str, Any]]:
    assert stream is not None
    for line in stream:
        yield json.loads(line)


def until(stream: Iterator[dict[str, Any]], enough: Callable[[dict[str, Any]], bool]) -> Any:
    for event in stream:
        if enough(event):
            return event
    raise AssertionError("the output ended first")


def test_a_demo_trains_and_agrees_and_leaves_nothing(shoal: Shoal) -> None:
    status, out, err = shoal.run(
        *("demo", "--peers", "3", "--rounds", "2", "--local-steps", "8", "--json")
    )
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    rounds = [line for line in lines if line["event"] == "round"]
    assert len({line["peer"] for line in rounds}) == 3
    for number in range(2):
        of_round = [line for line in rounds if line["round"] == number]
        assert len(of_round) == 3
        assert len({line["digest"] for line in of_round}) == 1
        assert {line["members"] for line in of_round} == {3}
        assert len({line["val_loss"] for line in of_round}) == 1
    assert sum(line["event"] == "done" for line in lines) == 3
    summary = lines[-1]
    assert summary["event"] == "summary"
    assert (summary["rounds"], summary["peers"], summary["digests_agree"]) == (2, 3, True)
    assert summary["first_val_loss"] == rounds[0]["val_loss"] or rounds[0]["round"]
    assert summary["last_val_loss"] < summary["first_val_loss"] - 0.8
    shoal.gone_within(2)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_a_demo_ends_nothing_is_left(shoal: Shoal, ending: signal.Signals) -> None:
    demo = shoal.start("demo", "--peers", "2", "--rounds", "1000", "--local-steps", "2", "--json")
    until(events(demo.stdout), lambda event: event["event"] == "round")
    assert shoal.leftovers()
    demo.send_signal(ending)
    out, _ = demo.communicate(timeout=30)
    if ending != signal.SIGKILL:
        assert demo.returncode == 130
        assert json.loads(out.splitlines()[-1])["event"] == "summary"
    shoal.gone_within(10)


def test_a_demo_killed_while_its_peers_are_starting_leaves_nothing(shoal: Shoal) -> None:
    demo = shoal.start("demo", "--peers", "2", "--json")
    deadline = time.monotonic() + 30
    while not any(" peer.cli create " in line for line in shoal.world()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    demo.kill()
    demo.communicate()
    shoal.gone_within(20)


def test_a_demo_goes_on_when_a_peer_is_killed(shoal: Shoal) -> None:
    demo = shoal.start("demo", "--peers", "3", "--rounds", "6", "--local-steps", "4", "--json")
    stream = events(demo.stdout)
    until(stream, lambda event: event["event"] == "round")
    killed = False
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                home = [part for part in command if part.endswith(b"/peer-2")]
                if home and str(shoal.temporary).encode() in home[0] and b"peer.cli" in command:
                    os.kill(int(entry.name), signal.SIGKILL)
                    killed = True
    assert killed
    assert until(stream, lambda event: event["event"] == "died")["status"] == -signal.SIGKILL
    summary = until(stream, lambda event: event["event"] == "summary")
    assert summary["rounds"] == 6
    assert summary["digests_agree"]
    assert demo.wait(20) == 0
    shoal.gone_within(5)


def test_a_demo_that_ends_by_the_clock_ends_on_one_round(shoal: Shoal) -> None:
    status, out, err = shoal.run(
        *("demo", "--peers", "2", "--minutes", "0.2", "--local-steps", "4", "--json")
    )
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    done = [line for line in lines if line["event"] == "done"]
    assert len(done) == 2
    assert {line["rounds"] for line in done} == {lines[-1]["rounds"]}
    assert lines[-1]["digests_agree"]


def test_a_reader_that_goes_away_ends_a_demo(shoal: Shoal) -> None:
    demo = shoal.start("demo", "--peers", "2", "--rounds", "1000", "--local-steps", "2", "--json")
    until(events(demo.stdout), lambda event: event["event"] == "joined")
    assert demo.stdout is not None
    assert demo.stderr is not None
    demo.stdout.close()
    demo.wait(60)
    assert "Traceback" not in demo.stderr.read()
    shoal.gone_within(10)


def test_create_and_join_in_two_terminals(shoal: Shoal) -> None:
    (shoal.folder / "run.toml").write_text(SMALL.format(rounds=0, start_peers=1, local_steps=100))
    first = shoal.start("create", "run.toml", "--host", "127.0.0.1", "--json")
    of_first = events(first.stdout)
    link = until(of_first, lambda event: event["event"] == "link")["link"]
    second = shoal.start("join", link, "--host", "127.0.0.1", "--json")
    of_second = events(second.stdout)
    together = until(of_second, lambda e: e["event"] == "round" and e["members"] == 2)
    same = until(of_first, lambda e: e["event"] == "round" and e["round"] == together["round"])
    assert same["digest"] == together["digest"]
    assert same["peer"] != together["peer"]

    status, out, _ = shoal.run("status", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert {row["pid"] for row in rows} == {first.pid, second.pid}
    assert {row["peers"] for row in rows} == {2}
    assert {Path(row["home"]).name for row in rows} == {"peer-0", "peer-1"}

    status, out, _ = shoal.run("link")
    assert status == 0
    assert out.count("\n") == 1  # one run
    assert {row["peer"] for row in rows} == {part[-52:] for part in out.strip().split("&")}

    maddr = link.split("peer=")[1]
    assert shoal.run("ping", maddr)[0] == 0
    head, _, tail = maddr.partition("/tcp/")
    status, _, err = shoal.run("ping", f"{head}/tcp/9/{tail.partition('/')[2]}")
    assert status == 1
    assert err.count("\n") == 1

    seen: list[dict[str, Any]] = []
    # The first leaves politely; the second goes on alone.
    first.send_signal(signal.SIGINT)
    assert until(of_first, lambda event: event["event"] == "left")["rounds"] >= 1
    assert first.wait(20) == 0
    after = until(of_second, lambda e: e["event"] == "round" and e["members"] == 1)
    assert after["round"] > together["round"]

    rest = threading.Thread(target=lambda: seen.extend(of_second), daemon=True)
    rest.start()  # a full pipe would hold it up
    status, out, err = shoal.run("stop")
    assert status == 0
    assert f"stopped process {second.pid}" in out
    assert second.wait(20) == 0
    rest.join()
    assert seen[-1]["event"] == "left"
    assert list((shoal.folder / "shoal").glob("*/daemon.json")) == []
    shoal.gone_within(5)


def test_a_creator_that_was_killed_goes_back_to_its_run(shoal: Shoal) -> None:
    (shoal.folder / "run.toml").write_text(SMALL.format(rounds=0, start_peers=1, local_steps=100))
    home = shoal.folder / "creator"
    create = ("create", "run.toml", "--host", "127.0.0.1", "--json", "--home", str(home))
    first = shoal.start(*create)
    link = until(events(first.stdout), lambda event: event["event"] == "link")["link"]
    second = shoal.start("join", link, "--host", "127.0.0.1", "--json")
    of_second = events(second.stdout)
    until(of_second, lambda e: e["event"] == "round" and e["members"] == 2)
    until(of_second, lambda _: (home / "peers").exists())
    first.kill()
    before = until(of_second, lambda e: e["event"] == "round" and e["members"] == 1)["round"]

    again = shoal.start(*create)
    of_again = events(again.stdout)
    assert until(of_again, lambda e: e["event"] == "link")["run"] == link[8:48]
    back = until(of_again, lambda e: e["event"] == "round" and e["members"] == 2)
    assert back["round"] > before
    same = until(of_second, lambda e: e["event"] == "round" and e["round"] == back["round"])
    assert same["digest"] == back["digest"]


# FAULTS=all adds the cases that take a minute and differ little from another one.
EVERYTHING = os.environ.get("FAULTS") == "all"


@pytest.mark.parametrize("first_back", ["joiner", *(["creator"] if EVERYTHING else [])])
def test_when_all_were_killed_the_run_goes_on_where_it_was(shoal: Shoal, first_back: str) -> None:
    (shoal.folder / "run.toml").write_text(SMALL.format(rounds=0, start_peers=2, local_steps=100))
    common = ("--host", "127.0.0.1", "--json")
    creator = shoal.start("create", "run.toml", *common)
    of_creator = events(creator.stdout)
    link = until(of_creator, lambda event: event["event"] == "link")["link"]
    joiner = shoal.start("join", link, *common)
    of_joiner = events(joiner.stdout)
    begun = until(of_creator, lambda e: e["event"] == "round")
    until(of_joiner, lambda e: e["event"] == "round" and e["round"] == 4)
    until(of_creator, lambda e: e["event"] == "round" and e["round"] == 4)
    before = {of["peer"] for of in (begun, until(of_joiner, lambda e: e["event"] == "round"))}
    for process in (creator, joiner):
        process.kill()
        process.communicate()

    starts = {
        "creator": lambda: shoal.start("create", "run.toml", *common),
        "joiner": lambda: shoal.start("join", link, *common),
    }
    one = events(starts.pop(first_back)().stdout)
    assert until(one, lambda e: e["event"] == "link")["run"] == link[8:48]
    if first_back == "joiner":  # with nobody to ask, not even for the run
        alone = until(one, lambda e: e["event"] == "round")
        assert alone["members"] == 1
        assert alone["round"] >= 4
    (start_other,) = starts.values()
    other = events(start_other().stdout)
    together = until(one, lambda e: e["event"] == "round" and e["members"] == 2)
    same = until(other, lambda e: e["event"] == "round" and e["round"] == together["round"])
    assert together["round"] >= 4
    assert same["digest"] == together["digest"]
    assert {same["peer"], together["peer"]} == before
    assert together["val_loss"] < begun["val_loss"] - 1.0
    status, out, _ = shoal.run("status", "--json")
    assert status == 0
    assert all(json.loads(line)["checkpoint"] >= 4 for line in out.splitlines())


def test_joining_nobody_is_one_line(shoal: Shoal, peer_id: str) -> None:
    link = f"shoal://{'ab' * 20}?peer=/ip4/127.0.0.1/tcp/9/p2p/{peer_id}"
    status, out, err = shoal.run("join", link, "--host", "127.0.0.1")
    assert status == 2
    assert out == ""
    assert err.startswith("shoal join: no run behind this link")
    assert err.count("\n") == 1
    shoal.gone_within(5)


def test_a_port_that_is_taken_is_one_line(shoal: Shoal) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (shoal.folder / "run.toml").write_text(SMALL.format(rounds=1, start_peers=1, local_steps=1))
        status, _, err = shoal.run("create", "run.toml", "--host", "127.0.0.1", "--port", port)
    assert status == 2
    assert port in err
    assert err.count("\n") == 1


def test_a_demo_of_chaos_trains_agrees_and_brings_everybody_back(shoal: Shoal) -> None:
    status, out, err = shoal.run(
        *("demo", "--chaos", "--peers", "4", "--minutes", "0.7", "--local-steps", "4"),
        *("--seed", "2", "--json"),
    )
    assert status == 0, err
    assert "--seed 2" in err
    lines = [json.loads(line) for line in out.splitlines()]
    deeds = [line for line in lines if line["event"] == "chaos"]
    assert deeds
    for number in {deed["number"] for deed in deeds}:
        actions = [deed["action"] for deed in deeds if deed["number"] == number]
        mended = {"kill": "revive", "freeze": "thaw"}
        assert actions[1::2] == [mended[action] for action in actions[::2]]
    summary = lines[-1]
    assert summary["digests_agree"]
    assert summary["chaos_seed"] == 2
    assert summary["faults"] == len(deeds) / 2
    assert summary["last_val_loss"] < summary["first_val_loss"]
    assert sum(line["event"] == "done" for line in lines) == 4
    for use in summary["memory"]:
        assert use["last_quarter_mb"] > 50
    shoal.gone_within(5)


@pytest.mark.parametrize("ending", [signal.SIGKILL, *([signal.SIGINT] if EVERYTHING else [])])
def test_frozen_peers_do_not_outlive_a_demo(shoal: Shoal, ending: signal.Signals) -> None:
    demo = shoal.start(
        *("demo", "--chaos", "--peers", "3", "--rounds", "1000", "--local-steps", "2"),
        *("--seed", "1", "--json"),
    )
    of_demo = events(demo.stdout)
    until(of_demo, lambda event: event["event"] == "round")
    # A demo that nobody reads stands still when the pipe is full.
    reading = threading.Thread(target=lambda: [None for _ in of_demo], daemon=True)
    reading.start()
    frozen = 0
    deadline = time.monotonic() + 60
    while not frozen and time.monotonic() < deadline:
        frozen = sum(_is_frozen(pid) for pid in shoal.pids())
        time.sleep(0.02)
    assert frozen
    demo.send_signal(ending)
    demo.wait(30)
    reading.join(30)
    shoal.gone_within(10)


def _is_frozen(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")
    return False


def test_an_assistant_helps_slow_links_and_is_a_daemon_like_others(shoal: Shoal) -> None:
    text = SMALL.format(rounds=0, start_peers=2, local_steps=2)
    text = text.replace("width = 32", "width = 256") + 'codec = "fp32"\n'
    (shoal.folder / "run.toml").write_text(text)
    slow = ("--host", "127.0.0.1", "--upload-limit", "16", "--download-limit", "16", "--json")
    first = shoal.start("create", "run.toml", *slow)
    link = until(events(first.stdout), lambda event: event["event"] == "link")["link"]
    second = shoal.start("join", link, *slow)
    of_second = events(second.stdout)
    until(of_second, lambda event: event["event"] == "round")
    helper = shoal.start("assist", link, "--host", "127.0.0.1", "--json")
    helped = until(events(helper.stdout), lambda event: event["event"] == "assisted")
    assert helped["bytes_received"] > 0
    together = until(of_second, lambda e: e["event"] == "round" and e["round"] > helped["round"])
    assert together["members"] == 2  # it has no seat

    status, out, _ = shoal.run("status", "--json")
    assert status == 0
    rows = {row["pid"]: row for row in map(json.loads, out.splitlines())}
    assert rows[helper.pid]["phase"] == "assisting"
    assert rows[helper.pid]["peers"] == 2
    status, out, _ = shoal.run("stop", "--peer", rows[helper.pid]["peer"])
    assert status == 0
    assert helper.wait(20) == 0
    until(of_second, lambda e: e["event"] == "round" and e["round"] > together["round"] + 1)
