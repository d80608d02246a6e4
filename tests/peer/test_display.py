from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from peer import display
from peer.events import RoundEvent
from peer.status import Status

ROW = Status(
    run="5f" * 20,
    name="stdlib-gpt",
    peer="12D3KooWBmAwcd4PJNJvfV89HwE48nwkRmAgo8Vy3uQEyNNHBox2",
    phase="train",
    round=1234,
    step=100,
    steps=100,
    val_loss=12.345,
    peers=12345,
    tokens_per_s=123456.0,
    bytes_sent=999_000_000,
    bytes_received=999_000_000,
    digest="a1b2c3d4e5f6" * 5,
    uptime_s=86399.0,
)


def drawn(renderable: RenderableType, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_live_table_shows_everything_in_80_columns() -> None:
    lines = drawn(display.screen("title", [ROW, ROW], [5.5, 4.0, 3.0], "foot"))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for heading in ["peer", "phase", "round", "loss", "tok/s", "peers", "up", "down", "digest"]:
        assert heading in text
    for value in (
        "NNHBox2"[-6:],
        "train 100/100",
        "1234",
        "12.345",
        "123k",
        "12345",
        "999 MB",
        "a1b2c3d4e5f6",
    ):
        assert value in text
    assert "…" not in text


def test_the_status_table_fits_80_columns() -> None:
    lines = drawn(display.status_table([ROW]))
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)
    assert "23h59" in "\n".join(lines)


def test_a_daemon_that_has_only_started_can_be_shown() -> None:
    assert "starting" in "\n".join(drawn(display.screen("t", [Status()], [], "")))
    assert "starting" in "\n".join(drawn(display.status_table([Status()])))


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_940, "9.9 kB"),
        (9_960, "10 kB"),
        (999_499, "999 kB"),
        (999_501, "1.0 MB"),
        (3.5e12, "3.5 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes(count: float, shown: str) -> None:
    assert display.human_bytes(count) == shown


@pytest.mark.parametrize(
    ("rate", "shown"), [(0, "0"), (12.3, "12"), (1234, "1.2k"), (123_456, "123k"), (2.5e6, "2.5M")]
)
def test_rates(rate: float, shown: str) -> None:
    assert display.human_rate(rate) == shown


def test_losses_are_drawn_by_their_height() -> None:
    assert display.loss_curve([5.0]) == ""
    assert display.loss_curve([5.0, 4.0, 3.0]) == "█▅▁"
    assert display.loss_curve([2.0, 2.0]) == "▁▁"
    assert len(display.loss_curve([float(n) for n in range(100)])) == 24


def test_a_round_is_one_line() -> None:
    event = RoundEvent(
        peer="p",
        round=3,
        train_loss=None,
        val_loss=2.25,
        members=1,
        digest="ab" * 32,
        samples=0,
        bytes_sent=1_200_000,
        bytes_received=5,
        allreduce_s=0.1,
        round_s=7.5,
        wait_s=0.5,
    )
    line = display.round_line(event, 1500.0)
    assert line == (
        "round 3: loss 2.250, 1 peer, 1.5k tokens/s, up 1.2 MB, down 5 B, 7.5 s, "
        "digest abababababab"
    )
