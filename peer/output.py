"""Where a daemon's events go: JSON lines, a live table, or plain lines.

One of the three is chosen at the start: JSON when asked for, the table on a terminal, plain lines
otherwise. All three may be written to from any thread.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console, Group
from rich.text import Text

from peer import display
from peer.events import (
    AssistedEvent,
    ChosenEvent,
    DoneEvent,
    Event,
    JoinedEvent,
    LeftEvent,
    LineWriter,
    LinkEvent,
    RoundEvent,
)
from peer.status import Status


class Output(Protocol):
    """What a daemon tells, and to whom."""

    def event(self, event: Event) -> None:
        """Tell what has happened."""
        ...

    def showing(self, status: Callable[[], Status]) -> contextlib.AbstractContextManager[None]:
        """While entered, show what `status` returns, where that makes sense."""
        ...


class JsonOutput:
    """Every event as a line of JSON, and nothing else on stdout."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def event(self, event: Event) -> None:
        """See `Output`."""
        self._writer.event(event)

    @contextlib.contextmanager
    def showing(self, status: Callable[[], Status]) -> Iterator[None]:
        """See `Output`."""
        yield


class PlainOutput:
    """A line for a round, and a few words at the ends."""

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer
        self._status: Callable[[], Status] = Status

    def event(self, event: Event) -> None:
        """See `Output`."""
        match event:
            case RoundEvent():
                self._writer.line(display.round_line(event, self._status().tokens_per_s))
            case LinkEvent():
                self._writer.line(invitation(event))
            case JoinedEvent():
                self._writer.line(
                    f"peer {event.peer} is in run {event.run[:8]}, from round {event.round} on"
                )
            case AssistedEvent():
                self._writer.line(
                    f"round {event.round}: reduced a share in {event.seconds:.1f} s, "
                    f"{display.human_bytes(event.bytes_sent)} sent and "
                    f"{display.human_bytes(event.bytes_received)} received so far"
                )
            case ChosenEvent():
                self._writer.line(choices(event))
            case DoneEvent() | LeftEvent():
                self._writer.line(farewell(event))
            case _:
                pass

    @contextlib.contextmanager
    def showing(self, status: Callable[[], Status]) -> Iterator[None]:
        """See `Output`."""
        self._status = status
        yield


class LiveOutput:
    """The table, on a terminal; what must stay readable (the link) goes above it."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout)
        self._losses: list[float] = []
        self._status: Callable[[], Status] = Status

    def event(self, event: Event) -> None:
        """See `Output`."""
        match event:
            case RoundEvent():
                if event.val_loss is not None:
                    self._losses.append(event.val_loss)
            case LinkEvent():
                self._line(invitation(event))
            case ChosenEvent():
                self._line(choices(event))
            case DoneEvent():
                self._losses.append(event.val_loss)
                self._line(farewell(event))
            case LeftEvent():
                self._line(farewell(event))
            case _:
                pass

    def _line(self, text: str) -> None:
        # soft_wrap: a line end in the middle of a link would be copied with it.
        self._console.print(Text(text), soft_wrap=True)

    @contextlib.contextmanager
    def showing(self, status: Callable[[], Status]) -> Iterator[None]:
        """See `Output`."""
        self._status = status
        with display.live(self._screen, self._console):
            yield

    def _screen(self) -> Group:
        row = self._status()
        title = f"{row.name or 'shoal'}  run {row.run[:8] or '...'}"
        leaving = row.phase == "leaving"
        foot = "Ctrl-C again ends it at once" if leaving else "Ctrl-C leaves politely"
        return display.screen(title, [row], self._losses, foot)


def invitation(event: LinkEvent) -> str:
    """What to tell others, ready to be pasted into a shell."""
    return f"run {event.run} can be joined with\n\n    shoal join '{event.link}'\n"


def choices(event: ChosenEvent) -> str:
    """What was left to this peer, a line for each."""
    lines = [f"precision {event.precision}", f"micro-batch {event.micro_batch}"]
    if event.local_steps is not None:
        lines.append(f"steps between two averagings {event.local_steps}")
    if event.processes is not None:
        lines.append(f"processes {event.processes}")
    return "\n".join(f"chosen: {line}" for line in lines)


def farewell(event: DoneEvent | LeftEvent) -> str:
    """The last line."""
    if isinstance(event, LeftEvent):
        return f"left the run after {event.rounds} rounds"
    return (
        f"done: {event.rounds} rounds, loss {display.human_loss(event.val_loss)}, "
        f"digest {event.digest[:12]}"
    )


def choose(*, json: bool, on_broken: Callable[[], None]) -> Output:
    """The right output for stdout.

    Args:
        json: asked for with --json.
        on_broken: called once when nobody reads any more.
    """
    if not json and sys.stdout.isatty():
        return LiveOutput()
    return lines(json=json, on_broken=on_broken)


def lines(*, json: bool, on_broken: Callable[[], None]) -> Output:
    """Without the table, for those who have none to show; as `choose`."""
    writer = LineWriter(sys.stdout, on_broken)
    return JsonOutput(writer) if json else PlainOutput(writer)
