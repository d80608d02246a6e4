"""What a person sees: the live table on a terminal, one line a round elsewhere.

Pure functions from snapshots to rich renderables and strings, and `live()`, which keeps one on the
screen. Fits 80 columns; narrower terminals lose the ends of cells, never the order of the lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from peer.events import RoundEvent
from peer.status import Status

REFRESH_PER_S = 4
_BARS = "▁▂▃▄▅▆▇█"
_PHASE_STYLES = {
    "train": "green",
    "averaging": "cyan",
    "evaluate": "blue",
    "gone": "red",
    "killed": "bold red",
    "frozen": "bold blue",
    "back": "bold green",
}


def short_peer(peer: str) -> str:
    """The part of a peer id by which people tell peers apart (all ids begin with 12D3KooW)."""
    return f"..{peer[-6:]}" if len(peer) > 10 else peer or "-"


def human_bytes(count: float) -> str:
    """At most 6 characters: `999 B`, `1.2 MB`, `350 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            digits = 1 if unit != "B" and count < 9.95 else 0
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_rate(rate: float) -> str:
    """Tokens a second, at most 5 characters."""
    for unit in ("", "k", "M"):
        if rate < 999.5:
            return f"{rate:.1f}{unit}" if unit and rate < 99.5 else f"{rate:.0f}{unit}"
        rate /= 1000
    return f"{rate:.0f}G"


def human_time(seconds: float) -> str:
    """`42s`, `12m`, `3h07`, `5d`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m"
    if whole < 86400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}"
    return f"{whole // 86400}d"


def human_loss(loss: float | None) -> str:
    """Nats, three decimals."""
    return "-" if loss is None else f"{loss:.3f}"


def loss_curve(losses: Sequence[float], width: int = 24) -> str:
    """The last `width` losses as a row of bars, lowest loss lowest bar."""
    shown = losses[-width:]
    if len(shown) < 2:
        return ""
    low, high = min(shown), max(shown)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((loss - low) / step)] for loss in shown)


def peers_table(rows: Sequence[Status]) -> Table:
    """One row per peer: the table of the demo and of a single daemon."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    # Least widths, so that the columns stand still while numbers grow.
    for heading, width in (
        ("peer", 8),
        ("phase", 11),
        ("round", 5),
        ("loss", 6),
        ("tok/s", 5),
        ("peers", 5),
        ("up", 6),
        ("down", 6),
        ("digest", 12),
    ):
        left = heading in ("peer", "phase", "digest")
        table.add_column(
            heading, justify="left" if left else "right", min_width=width, no_wrap=True
        )
    # Peers end a round some milliseconds apart: only digests of the same round can disagree.
    digests = {(row.round, row.digest) for row in rows if row.digest}
    agree = len(digests) == len({number for number, _ in digests})
    for row in rows:
        table.add_row(
            short_peer(row.peer),
            _phase(row),
            str(row.round),
            Text(human_loss(row.val_loss), style="bold"),
            human_rate(row.tokens_per_s),
            str(row.peers),
            human_bytes(row.bytes_sent),
            human_bytes(row.bytes_received),
            Text(row.digest[:12] or "-", style="green" if agree else "red"),
        )
    return table


def status_table(rows: Sequence[Status]) -> Table:
    """One row per daemon of this machine, for `shoal status`."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    headings = ("run", "peer", "round", "loss", "peers", "phase", "tok/s", "up/down")
    for heading in (*headings, "digest", "age"):
        left = heading in ("run", "peer", "phase", "digest")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.run[:8] or "-",
            short_peer(row.peer),
            str(row.round),
            human_loss(row.val_loss),
            str(row.peers),
            row.phase,
            human_rate(row.tokens_per_s),
            f"{human_bytes(row.bytes_sent)}/{human_bytes(row.bytes_received)}".replace(" ", ""),
            row.digest[:8] or "-",
            human_time(row.uptime_s),
        )
    return table


def chosen_lines(rows: Sequence[Status]) -> list[Text]:
    """What each peer chose by itself, below the table."""
    return [Text(f"{short_peer(row.peer)} chose {row.chosen}") for row in rows if row.chosen]


def screen(title: str, rows: Sequence[Status], losses: Sequence[float], foot: str) -> Group:
    """The whole live display.

    Args:
        title: one line above the table.
        rows: one per peer.
        losses: validation losses, by round, from the first.
        foot: one line below; may be empty.
    """
    lines: list[RenderableType] = [
        Text(title, style="bold", no_wrap=True, overflow="ellipsis"),
        peers_table(rows),
    ]
    if losses:
        curve = Text("validation loss ", no_wrap=True, overflow="ellipsis")
        curve.append(human_loss(losses[0]))
        curve.append(f" {loss_curve(losses)} ", style="cyan")
        curve.append(human_loss(losses[-1]), style="bold")
        rounds = len(losses) - 1
        after = f"after {rounds} round{'' if rounds == 1 else 's'}" if rounds else "at the start"
        curve.append(f"  {after}")
        lines.append(curve)
    if foot:
        lines.append(Text(foot, style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


@contextlib.contextmanager
def live(render: Callable[[], RenderableType], console: Console) -> Iterator[None]:
    """Keep `render()` on the terminal; its last state stays there.

    Args:
        render: called a few times a second, from another thread.
        console: the terminal; what is printed through it meanwhile goes above.
    """
    with Live(get_renderable=render, console=console, refresh_per_second=REFRESH_PER_S):
        yield


def round_line(event: RoundEvent, tokens_per_s: float) -> str:
    """One round of one peer as plain text."""
    losses = [] if event.val_loss is None else [f"loss {human_loss(event.val_loss)}"]
    if event.train_loss is not None:
        trained = f"training {human_loss(event.train_loss)}"
        losses.append(f"({trained})" if losses else trained)
    return (
        f"round {event.round}: {' '.join(losses)}{', ' if losses else ''}"
        f"{event.members} {'peer' if event.members == 1 else 'peers'}, "
        f"{human_rate(tokens_per_s)} tokens/s, up {human_bytes(event.bytes_sent)}, "
        f"down {human_bytes(event.bytes_received)}, {event.round_s:.1f} s, "
        f"digest {event.digest[:12]}"
    )


def _phase(row: Status) -> Text:
    word = row.phase
    style = _PHASE_STYLES.get(word, "")
    if word == "train" and row.steps:
        word = f"train {row.step}/{row.steps}"
    return Text(word, style=style)
