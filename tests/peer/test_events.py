from __future__ import annotations

import contextlib
import errno
import io
import json
import threading
from typing import Any

import pytest

from peer.events import DoneEvent, LineWriter, MemoryUse, RoundEvent, SummaryEvent, to_json

ROUND = RoundEvent(
    peer="12D3KooW",
    round=3,
    train_loss=2.5,
    val_loss=2.25,
    members=4,
    digest="ab" * 32,
    samples=240,
    bytes_sent=1000,
    bytes_received=2000,
    allreduce_s=0.25,
    round_s=7.5,
    wait_s=0.5,
)


def test_a_round_has_exactly_the_fields_that_scripts_rely_on() -> None:
    fields = json.loads(to_json(ROUND))
    assert list(fields) == [
        "event",
        "peer",
        "round",
        "train_loss",
        "val_loss",
        "members",
        "digest",
        "samples",
        "bytes_sent",
        "bytes_received",
        "allreduce_s",
        "round_s",
        "wait_s",
    ]
    assert fields["event"] == "round"
    assert fields["val_loss"] == 2.25


def test_a_summary_has_exactly_the_fields_that_scripts_rely_on() -> None:
    summary = SummaryEvent(
        rounds=6,
        peers=4,
        first_val_loss=5.5,
        last_val_loss=3.0,
        digests_agree=True,
        wall_s=60.0,
        memory=(MemoryUse(number=0, first_quarter_mb=300.5, last_quarter_mb=None),),
    )
    assert json.loads(to_json(summary)) == {
        "event": "summary",
        "rounds": 6,
        "peers": 4,
        "first_val_loss": 5.5,
        "last_val_loss": 3.0,
        "digests_agree": True,
        "wall_s": 60.0,
        "memory": [{"number": 0, "first_quarter_mb": 300.5, "last_quarter_mb": None}],
        "chaos_seed": None,
        "faults": 0,
    }


def test_what_is_not_finite_is_null() -> None:
    done = DoneEvent(peer="p", rounds=1, val_loss=float("nan"), digest="")
    assert json.loads(to_json(done))["val_loss"] is None


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_goes_away_is_noticed_once() -> None:
    noticed: list[str] = []
    writer = LineWriter(Broken(), lambda: noticed.append("gone"))
    writer.event(ROUND)
    writer.event(ROUND)
    assert noticed == ["gone"]
    assert writer.broken


class Disk(io.RawIOBase):
    """A file on a disk with little room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        fits = bytes(data)[: self.room]
        if not fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(fits)
        self.held += fits
        return len(fits)


def test_a_full_disk_ends_nobody_and_leaves_lines_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = Disk(room=20)
    noticed: list[str] = []
    stream = io.TextIOWrapper(io.BufferedWriter(disk, 100), write_through=False)
    writer = LineWriter(stream, lambda: noticed.append("gone"))
    for number in range(100):
        writer.line(f"line {number}")
    assert not writer.broken
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # said once
    assert "No space left" in caplog.text
    disk.room = 10_000
    writer.line("the last")
    lines = disk.held.decode().splitlines()
    assert lines[0] == "line 0"
    assert lines[-1] == "the last"
    assert set(lines) <= {f"line {number}" for number in range(100)} | {"the last"}
    assert noticed == []


def test_a_full_device_is_no_reader_that_went_away() -> None:
    stream = open("/dev/full", "w")  # noqa: SIM115 - closing it raises
    writer = LineWriter(stream)
    writer.event(ROUND)
    writer.event(ROUND)
    assert not writer.broken
    with contextlib.suppress(OSError):
        stream.close()


def test_lines_of_many_threads_stay_whole() -> None:
    stream = io.StringIO()
    writer = LineWriter(stream)
    threads = [
        threading.Thread(target=lambda: [writer.event(ROUND) for _ in range(100)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 400
    assert set(lines) == {to_json(ROUND)}


def test_events_are_frozen() -> None:
    with pytest.raises(AttributeError):
        ROUND.round = 4  # type: ignore[misc]
