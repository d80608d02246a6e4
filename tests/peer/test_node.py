"""A daemon over a fake swarm: what it trains, says and leaves behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator_free.network import NetworkConfig, shown_addresses
from dht.errors import ConfigError, SwarmError, Unreachable
from dht.identity import Identity
from dht.link import Link
from dht.records import SignedRun
from model.box import BoxError
from model.builders import ModelError
from model.trainer import TrainerConfig, TrainingDiverged
from peer import output as outputs
from peer.control import ask_status, ask_stop
from peer.events import Event, LineWriter, RoundEvent, to_json
from peer.homes import Home, read_daemon_file
from peer.node import Node, NodeConfig


class Recorder:
    """An output that keeps the events, and may react to them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.react: Callable[[str], None] = lambda kind: None

    def write(self, text: str) -> int:
        event = json.loads(text)
        self.events.append(event)
        self.react(event["event"])
        return len(text)

    def flush(self) -> None:
        pass

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def make(swarm: Any, home: Home, recorder: Recorder) -> Callable[..., Node]:
    def made(link: Link | None = None, **settings: Any) -> Node:
        network = NetworkConfig(identity_path=home.identity_path, host="127.0.0.1", link=link)
        return Node(
            NodeConfig(network=network, device="cpu", **settings),
            home,
            outputs.JsonOutput(LineWriter(recorder)),
            open_directory=swarm.open_directory,
            make_session=swarm.make_session,
        )

    return made


def test_a_run_is_created_trained_and_finished(
    make: Callable[..., Node], swarm: Any, recorder: Recorder, run_file: Path, tmp_path: Path
) -> None:
    assert make(run_file=run_file, link_file=tmp_path / "link").run() == 0
    kinds = [event["event"] for event in recorder.events]
    assert kinds == ["link", "joined", "round", "chosen", "round", "done"]
    first, second = recorder.of("round")
    (done,) = recorder.of("done")
    assert (first["round"], second["round"], done["rounds"]) == (0, 1, 2)
    # The initial model of 256 tokens knows nothing: ln 256.
    assert first["val_loss"] == pytest.approx(5.545, abs=0.05)
    assert second["val_loss"] < first["val_loss"]
    assert done["val_loss"] < second["val_loss"]
    assert done["digest"] == second["digest"]
    (session,) = swarm.sessions
    assert session.samples == [6, 6]  # three steps of two
    assert first["samples"] == 6
    (link,) = recorder.of("link")
    assert (tmp_path / "link").read_text().strip() == link["link"]
    assert Link.parse(link["link"]).run_id == session.config.run_id == link["run"]


def test_with_fragments_what_the_swarm_has_is_evaluated_once_a_cycle(
    make: Callable[..., Node], swarm: Any, recorder: Recorder, run_file: Path
) -> None:
    text = run_file.read_text()
    for old, new in (
        ("fragments = 1", "fragments = 2"),
        ("local_steps = 3", "local_steps = 6"),
        ("rounds = 2", "rounds = 4"),
    ):
        assert old in text
        text = text.replace(old, new)
    run_file.write_text(text)
    assert make(run_file=run_file).run() == 0
    (session,) = swarm.sessions
    assert len(session.state.shape.bounds) == 2
    assert session.samples == [6] * 4  # three steps of two in each round
    rounds = recorder.of("round")
    assert [event["round"] for event in rounds] == [0, 1, 2, 3]
    assert [event["val_loss"] is None for event in rounds] == [False, True, False, True]
    (done,) = recorder.of("done")
    assert done["val_loss"] < rounds[2]["val_loss"] < rounds[0]["val_loss"]
    assert done["digest"] == rounds[3]["digest"]


def test_the_run_is_published_signed_and_without_private_paths(
    make: Callable[..., Node], swarm: Any, recorder: Recorder, run_file: Path, home: Home
) -> None:
    make(run_file=run_file, data=str(run_file.parent / "text.txt")).run()
    (raw,) = swarm.network.runs.values()
    run = SignedRun.from_bytes(raw)
    assert run.creator == Identity.load(home.identity_path).peer_id
    assert str(run_file.parent) not in run.run_file.decode()
    assert 'path = "text.txt"' in run.run_file.decode()


def published(swarm: Any, text: str) -> Link:
    """A run that somebody else has created."""
    creator = Identity.generate()
    run = SignedRun.sign(creator, text.encode(), time.time())
    swarm.network.runs[run.run_id] = run.to_bytes()
    return Link(run.run_id, (f"/ip4/127.0.0.1/tcp/4001/p2p/{creator.peer_id}",))


def test_a_run_is_joined_with_its_own_settings(
    make: Callable[..., Node], swarm: Any, recorder: Recorder, run_file: Path, corpus: Path
) -> None:
    link = published(swarm, run_file.read_text())
    assert make(link=link, data=str(corpus)).run() == 0
    assert [event["round"] for event in recorder.of("round")] == [0, 1]
    assert swarm.configs[0].initial_peers == link.peers
    assert swarm.sessions[0].config.run_id == link.run_id


def test_a_run_with_a_checkpoint_is_joined_though_nobody_answers(
    make: Callable[..., Node], swarm: Any, home: Home, run_file: Path, corpus: Path
) -> None:
    link = published(swarm, run_file.read_text())
    make(link=link, data=str(corpus)).run()
    assert swarm.sessions[0].config.checkpoints == home.path / "runs" / link.run_id
    (home.path / "runs" / link.run_id / "000000000001.checkpoint").touch()
    swarm.network.runs.clear()  # the DHT went with the peers
    assert make(link=link, data=str(corpus)).run() == 0
    assert swarm.configs[1].initial_peers == ()
    assert swarm.configs[1].hints == link.peers
    assert link.run_id in swarm.network.runs


def test_without_checkpoints_nothing_is_remembered(
    make: Callable[..., Node], swarm: Any, home: Home, run_file: Path, corpus: Path
) -> None:
    link = published(swarm, run_file.read_text())
    make(link=link, data=str(corpus), checkpoint_every=0, keep_checkpoints=7).run()
    config = swarm.sessions[0].config
    assert (config.checkpoint_every, config.keep_checkpoints) == (0, 7)
    assert not (home.path / "runs").exists()


def test_a_strangers_run_file_opens_no_file_of_ours(
    make: Callable[..., Node], swarm: Any, recorder: Recorder
) -> None:
    link = published(swarm, "[data]\npath = '/etc/passwd'\n")
    with pytest.raises(ConfigError, match="--data PATH"):
        make(link=link).run()
    assert recorder.of("joined") == []


@pytest.mark.parametrize("switch", [False, True])
def test_a_strangers_run_file_downloads_nothing_without_a_word_of_ours(
    make: Callable[..., Node], swarm: Any, monkeypatch: pytest.MonkeyPatch, switch: bool
) -> None:
    asked = model_asked_for(monkeypatch)
    link = published(swarm, HUB_MODEL)
    with pytest.raises(ConfigError, match="not trained here"):
        make(link=link, allow_download=switch).run()
    assert asked == [switch]


def test_a_run_file_of_ones_own_may_say_that_a_model_is_fetched(
    make: Callable[..., Node], run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = model_asked_for(monkeypatch)
    run_file.write_text(HUB_MODEL)
    with pytest.raises(ConfigError, match="not trained here"):
        make(run_file=run_file).run()
    assert asked == [True]


GPT2 = '[model]\nkind = "transformers"\nname = "gpt2"\n'
HUB_MODEL = '[model]\nkind = "transformers"\nname = "some/model"\nallow_download = true\n'


def model_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a model may be fetched, each time one is built."""
    asked = []

    def trainer(crew: object, config: TrainerConfig, *_: object) -> None:
        asked.append(config.model.allow_download)
        raise ModelError("not trained here")

    monkeypatch.setattr("peer.node.Crew.trainer", trainer)
    return asked


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model]\nlayers = 1000000000\n", "layers = 1000000000"),
        (f"seed = {'9' * 5000}", "too many digits"),
        (f"seed = 0x{'f' * 5000}", "'seed' has more than 64 bits"),
        (f"[optimizer]\nlr = 1{'0' * 400}", "'lr' has more than 64 bits"),
        (f"{GPT2}overrides = {{ n_layer = 'x' }}", "n_layer"),
        (f"{GPT2}overrides = {{ attn_implementation = 'evil/repo' }}", "is not for a run file"),
    ],
)
def test_a_strangers_broken_run_file_is_one_line(
    make: Callable[..., Node], swarm: Any, text: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        make(link=published(swarm, text)).run()
    assert len(str(caught.value)) < 400


def test_a_run_that_nobody_knows(
    make: Callable[..., Node], peer_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator_free.network._FIND_PAUSE_S", 0.0)
    link = Link("ab" * 20, (f"/ip4/127.0.0.1/tcp/4001/p2p/{peer_id}",))
    with pytest.raises(ConfigError, match=r"no run behind this link.*ask for a new link"):
        make(link=link).run()


def test_missing_data_keep_a_run_from_being_published(
    make: Callable[..., Node], swarm: Any, run_file: Path, corpus: Path
) -> None:
    corpus.unlink()
    with pytest.raises(ConfigError, match=r"text\.txt"):
        make(run_file=run_file).run()
    assert swarm.network.runs == {}


@pytest.mark.parametrize("created", [True, False])
def test_a_deadline_that_no_step_here_keeps_is_refused(
    make: Callable[..., Node], swarm: Any, run_file: Path, corpus: Path, created: bool
) -> None:
    """By its creator before it is published, and by who joins it with a slower machine."""
    run_file.write_text(run_file.read_text().replace("[round]", "[round]\nwork_s = 1e-6"))
    settings: dict[str, Any] = {"run_file": run_file}
    if not created:
        settings = {"link": published(swarm, run_file.read_text()), "data": str(corpus)}
    with pytest.raises(ConfigError, match="work_s = 1e-06 is shorter than one step") as caught:
        make(**settings).run()
    assert "\n" not in str(caught.value)
    assert bool(swarm.network.runs) is not created
    assert not swarm.sessions


@contextlib.contextmanager
def inherited(number: signal.Signals, handler: signal.Handlers) -> Iterator[None]:
    """As if this process had been started like this."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_makes_it_leave_politely(
    make: Callable[..., Node],
    swarm: Any,
    recorder: Recorder,
    run_file: Path,
    number: signal.Signals,
) -> None:
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 0"))
    recorder.react = lambda kind: os.kill(os.getpid(), number) if kind == "round" else None
    with inherited(number, signal.SIG_DFL):
        assert make(run_file=run_file).run() == 0
        assert signal.getsignal(number) == signal.SIG_DFL
    assert swarm.sessions[0].politely
    assert recorder.events[-1]["event"] == "left"
    assert recorder.events[-1]["rounds"] >= 1
    assert recorder.of("done") == []


def test_an_ignored_signal_stays_ignored(
    make: Callable[..., Node], recorder: Recorder, run_file: Path
) -> None:
    """As under nohup, when the terminal goes."""
    recorder.react = lambda kind: os.kill(os.getpid(), signal.SIGHUP)
    with inherited(signal.SIGHUP, signal.SIG_IGN):
        assert make(run_file=run_file).run() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert recorder.events[-1]["event"] == "done"


@pytest.fixture
def slow_disk(swarm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The last checkpoint takes longer than anything else may; returns who was cut short."""
    swarm.save_s = 1.5
    monkeypatch.setattr("peer.node.FINISH_S", 0.3)
    monkeypatch.setattr("peer.node.POLITE_S", 0.3)
    cut_short: list[int] = []
    monkeypatch.setattr(Node, "abandon", lambda node, status: cut_short.append(status))
    return cut_short


def test_a_finished_run_has_the_time_to_save_its_model(
    make: Callable[..., Node],
    swarm: Any,
    recorder: Recorder,
    run_file: Path,
    slow_disk: list[int],
) -> None:
    assert make(run_file=run_file).run() == 0
    assert recorder.events[-1]["event"] == "done"
    assert not swarm.sessions[0].saving
    assert slow_disk == []


def test_a_polite_leave_has_the_time_to_save_its_model(
    make: Callable[..., Node],
    swarm: Any,
    recorder: Recorder,
    run_file: Path,
    slow_disk: list[int],
) -> None:
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 0"))
    node = make(run_file=run_file)
    recorder.react = lambda kind: node.stop() if kind == "round" else None
    assert node.run() == 0
    assert recorder.events[-1]["event"] == "left"
    assert not swarm.sessions[0].saving
    assert slow_disk == []


def test_a_leave_that_hangs_for_another_reason_is_cut_short(
    make: Callable[..., Node], swarm: Any, run_file: Path, slow_disk: list[int]
) -> None:
    swarm.hangs, swarm.save_s = True, 10.0
    make(run_file=run_file).run()
    assert slow_disk == [1]


def test_who_saves_says_so(make: Callable[..., Node], swarm: Any, run_file: Path) -> None:
    swarm.save_s = 0.5
    node = make(run_file=run_file)
    phases: list[str] = []

    def watch() -> None:
        while not phases or swarm.sessions[0].saving:
            if swarm.sessions and swarm.sessions[0].saving:
                phases.append(node.status().phase)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert node.run() == 0
    watcher.join()
    assert "saving" in phases


def test_a_full_disk_costs_a_restart_only_how_it_can_be_asked(
    make: Callable[..., Node],
    recorder: Recorder,
    run_file: Path,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peer.homes.write_whole", no_room)
    monkeypatch.setattr("peer.memory.write_whole", no_room)
    assert make(run_file=run_file).run() == 0
    assert recorder.events[-1]["event"] == "done"
    assert "homes.not_published" in caplog.text
    assert read_daemon_file(home.path) is None


def test_a_creator_joins_its_own_run_again_from_its_disk(
    make: Callable[..., Node], swarm: Any, recorder: Recorder, run_file: Path, corpus: Path
) -> None:
    """The link names nobody else: it was the last one, and is the first to come back."""
    make(run_file=run_file).run()
    (link,) = {event["link"] for event in recorder.of("link")}
    parsed = Link.parse(link)
    folder = swarm.sessions[0].config.checkpoints
    (folder / "000000000001.checkpoint").touch()
    swarm.network.runs.clear()
    assert make(link=parsed, data=str(corpus)).run() == 0
    assert recorder.of("done")[-1]["rounds"] == 2


def test_status_and_stop_from_another_process_reach_it(
    make: Callable[..., Node], recorder: Recorder, run_file: Path, home: Home
) -> None:
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 0"))
    seen: list[Any] = []

    def ask() -> None:
        daemon = read_daemon_file(home.path)
        assert daemon is not None
        seen.append((daemon, ask_status(daemon)))
        seen.append(ask_stop(daemon))

    asker = threading.Thread(target=ask)
    recorder.react = lambda kind: asker.start() if kind == "round" and not asker.ident else None
    assert make(run_file=run_file).run() == 0
    asker.join()
    (daemon, status), stopped = seen
    assert stopped
    assert daemon.pid == status.pid == os.getpid()
    assert daemon.run == status.run == recorder.of("link")[0]["run"]
    assert (status.name, status.peers, status.bytes_sent) == ("small", 1, 100)
    assert status.val_loss is not None
    assert status.tokens_per_s > 0
    assert recorder.events[-1]["event"] == "left"


def test_a_dead_network_is_said_in_one_line(
    make: Callable[..., Node], swarm: Any, run_file: Path
) -> None:
    swarm.fail = Unreachable("12D3", "the swarm is gone")
    with pytest.raises(SwarmError, match="the swarm is gone"):
        make(run_file=run_file).run()


def test_a_bug_in_the_network_is_said_too(
    make: Callable[..., Node], swarm: Any, run_file: Path
) -> None:
    swarm.fail = ZeroDivisionError("oops")
    with pytest.raises(SwarmError, match="network thread failed: ZeroDivisionError: oops"):
        make(run_file=run_file).run()


def test_divergence_leaves_politely_and_says_what_may_help(
    make: Callable[..., Node], swarm: Any, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: object) -> None:
        raise TrainingDiverged(3, float("nan"))

    monkeypatch.setattr("model.trainer.Trainer.step", diverge)
    with pytest.raises(SwarmError, match="lower learning rate"):
        make(run_file=run_file).run()
    assert swarm.sessions[0].politely


@pytest.mark.parametrize("error", [BoxError("a process is gone"), ModelError("too small")])
def test_what_fails_on_the_way_is_one_line_and_left_politely(
    make: Callable[..., Node],
    swarm: Any,
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr("model.trainer.Trainer.step", fail)
    with pytest.raises(SwarmError, match=str(error)) as caught:
        make(run_file=run_file).run()
    assert not isinstance(caught.value, ConfigError)
    assert swarm.sessions[0].politely


@pytest.mark.parametrize("error", [BoxError("nobody came"), ModelError("too large")])
def test_what_fails_before_anything_is_published_is_a_mistake(
    make: Callable[..., Node],
    swarm: Any,
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("peer.node.Crew.trainer", fail)
    with pytest.raises(ConfigError, match=str(error)):
        make(run_file=run_file).run()
    assert swarm.network.runs == {}


@pytest.mark.parametrize("stopped", [False, True])
def test_however_a_daemon_ends_its_other_processes_are_sent_home(
    make: Callable[..., Node],
    recorder: Recorder,
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    closed: list[object] = []
    monkeypatch.setattr("model.trainer.Trainer.close", lambda trainer: closed.append(trainer))
    node = make(run_file=run_file)
    recorder.react = lambda kind: node.stop() if stopped and kind == "joined" else None
    assert node.run() == 0
    assert closed


def test_a_process_that_was_gone_at_the_end_is_said(
    make: Callable[..., Node],
    recorder: Recorder,
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: object) -> None:
        raise BoxError("a process is gone")

    monkeypatch.setattr("model.trainer.Trainer.close", fail)
    node = make(run_file=run_file)
    recorder.react = lambda kind: node.stop() if kind == "joined" else None
    with pytest.raises(SwarmError, match="a process is gone"):
        node.run()


def test_finish_after_ends_the_run_there(
    make: Callable[..., Node], recorder: Recorder, run_file: Path
) -> None:
    run_file.write_text(run_file.read_text().replace("rounds = 2", "rounds = 0"))
    node = make(run_file=run_file)
    node.finish_after(2)  # before there is a session
    assert node.run() == 0
    assert [event["round"] for event in recorder.of("round")] == [0, 1, 2]
    assert recorder.events[-1]["event"] == "done"


def test_links_name_addresses_that_help(peer_id: str) -> None:
    tail = f"/p2p/{peer_id}"
    outside, inside = f"/ip4/10.0.0.1/tcp/1{tail}", f"/ip4/127.0.0.1/tcp/1{tail}"
    quic = f"/ip4/10.0.0.1/udp/1/quic{tail}"
    assert shown_addresses((outside, quic, inside)) == (outside,)
    assert shown_addresses((inside,)) == (inside,)


def test_json_output_is_what_the_events_say(recorder: Recorder) -> None:
    event: Event = RoundEvent(
        peer="p",
        round=0,
        train_loss=1.0,
        val_loss=1.0,
        members=1,
        digest="",
        samples=1,
        bytes_sent=1,
        bytes_received=1,
        allreduce_s=1.0,
        round_s=1.0,
        wait_s=0.5,
    )
    outputs.JsonOutput(LineWriter(recorder)).event(event)
    assert recorder.events == [json.loads(to_json(event))]
