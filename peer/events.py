"""What a daemon tells the outside while it runs: one JSON object per line.

    {"event": "round", ...}      round `round` is committed; exactly the fields of `RoundEvent`
    {"event": "done", ...}       the run came to its end for this peer
    {"event": "link", ...}       this peer can be joined now
    {"event": "joined", ...}     this peer is in the swarm
    {"event": "chosen", ...}     what was left to this peer, and why so; once, when measured
    {"event": "left", ...}       stopped before the end, politely
    {"event": "progress", ...}   several a second, only for a supervising `shoal demo`
    {"event": "died", ...}       a demo's peer ended unasked; the others go on
    {"event": "chaos", ...}      `shoal demo --chaos` did something to a peer
    {"event": "summary", ...}    last line of `shoal demo`

Guarantees: every line is valid JSON (a loss that is not finite is null, never NaN), written whole
and flushed, whichever thread writes; a reader that goes away is noticed once, and neither that nor
a file that finds no room raises: its line is lost, or comes with a later one, and training goes on.
Digests are lower-case hex, losses nats per token, sizes bytes, times seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundEvent:
    """Round `round` is committed.

    Attributes:
        peer: who says so.
        round: counted from 0.
        train_loss: mean over this peer's steps of the round; null when it took none.
        val_loss: of the model that the round STARTED from; round 0's is that of the initial model.
            Null where that lies between two averagings of the whole model.
        members: peers whose work is in the outcome.
        digest: of the swarm's state after the round.
        samples: this peer's.
        bytes_sent: by this peer, in this round.
        bytes_received: by this peer, in this round.
        allreduce_s: from the plan to the outcome.
        round_s: from the start of the work to the commit.
        wait_s: of it, how long training stood still for the swarm.
    """

    event: ClassVar[str] = "round"
    peer: str
    round: int
    train_loss: float | None
    val_loss: float | None
    members: int
    digest: str
    samples: int
    bytes_sent: int
    bytes_received: int
    allreduce_s: float
    round_s: float
    wait_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DoneEvent:
    """The run is over for this peer. `val_loss` and `digest` are the final model's."""

    event: ClassVar[str] = "done"
    peer: str
    rounds: int
    val_loss: float
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkEvent:
    """This peer can be joined through `link`."""

    event: ClassVar[str] = "link"
    peer: str
    run: str
    link: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedEvent:
    """This peer holds the swarm's state and works from `round` on."""

    event: ClassVar[str] = "joined"
    peer: str
    run: str
    round: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenEvent:
    """What was left to this peer, each as "value: why".

    `local_steps` is null in gradient mode, `processes` where there is one.
    """

    event: ClassVar[str] = "chosen"
    peer: str
    precision: str
    micro_batch: str
    local_steps: str | None = None
    processes: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftEvent:
    """This peer stopped before the run's end, politely, after `rounds` rounds of its own."""

    event: ClassVar[str] = "left"
    peer: str
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressEvent:
    """How far a supervised peer is, for the demo's table; `status` is `Status.to_dict()`."""

    event: ClassVar[str] = "progress"
    peer: str
    status: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiedEvent:
    """A demo's peer ended unasked: exit status, or minus the signal; `reason` is its last line."""

    event: ClassVar[str] = "died"
    peer: str
    number: int
    status: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosEvent:
    """What was done to a demo's peer: "kill", "freeze", "thaw" or "revive"."""

    event: ClassVar[str] = "chaos"
    action: str
    peer: str
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """Memory of one peer of a demo: mean resident megabytes (10^6 bytes) of its process.

    Attributes:
        number: of the peer in the demo.
        first_quarter_mb: while the first quarter of the training went on; None: not measured.
        last_quarter_mb: the same for the last quarter.
    """

    number: int
    first_quarter_mb: float | None
    last_quarter_mb: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryEvent:
    """What a demo came to.

    Attributes:
        rounds: completed by all peers that lived to the end.
        peers: that reported anything.
        first_val_loss: of the initial model.
        last_val_loss: of the final model.
        digests_agree: in every round all digests were equal and no surviving peer's was missing.
        wall_s: from the command's start.
        memory: of each peer.
        chaos_seed: of what was done to the peers; None without --chaos.
        faults: how many peers were killed or frozen.
    """

    event: ClassVar[str] = "summary"
    rounds: int
    peers: int
    first_val_loss: float | None
    last_val_loss: float | None
    digests_agree: bool
    wall_s: float
    memory: tuple[MemoryUse, ...] = ()
    chaos_seed: int | None = None
    faults: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistedEvent:
    """This peer reduced its share of an exchange, without a seat in the run.

    Attributes:
        peer: peer id.
        round: whose exchange it was.
        seconds: that it took.
        bytes_sent: since the start, of any kind.
        bytes_received: the same, the other way.
    """

    event: ClassVar[str] = "assisted"
    peer: str
    round: int
    seconds: float
    bytes_sent: int
    bytes_received: int


Event = (
    RoundEvent
    | AssistedEvent
    | DoneEvent
    | LinkEvent
    | JoinedEvent
    | ChosenEvent
    | LeftEvent
    | ProgressEvent
    | DiedEvent
    | ChaosEvent
    | SummaryEvent
)


def to_json(event: Event) -> str:
    """One line of JSON, without the line's end; "event" comes first."""
    return json.dumps({"event": event.event, **_finite(asdict(event))}, allow_nan=False)


class Stream(Protocol):
    """What `LineWriter` needs of a stream."""

    def write(self, text: str, /) -> int:
        """Write text."""
        ...

    def flush(self) -> None:
        """Hand over what was written."""
        ...


class LineWriter:
    """Whole lines to a stream, from any thread.

    Args:
        stream: text stream; stdout as a rule.
        on_broken: called once, from the writing thread, when the reader has gone away.
    """

    def __init__(self, stream: Stream, on_broken: Callable[[], None] = lambda: None) -> None:
        self._stream = stream
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._broken = False
        self._complained = False

    @property
    def broken(self) -> bool:
        """Whether the reader has gone away."""
        return self._broken

    def line(self, text: str) -> None:
        """Write `text` and a line's end; dropped where there is no reader, or no room."""
        with self._lock:
            if self._broken:
                return
            try:
                self._stream.write(text + "\n")
                self._stream.flush()
                return
            except (BrokenPipeError, ConnectionResetError, ValueError):  # the last: it was closed
                self._broken = True
            except OSError as error:  # a full disk, above all: somebody may make room
                complain, self._complained = not self._complained, True
                if complain:
                    logger.warning("events.lines_lost reason=%r", error.strerror)
                return
        silence_stdout()
        self._on_broken()

    def event(self, event: Event) -> None:
        """Write an event as JSON."""
        self.line(to_json(event))


def silence_stdout() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not raise again.

    Only when stdout itself is what is broken. Source: "Note on SIGPIPE", documentation of Python's
    `signal` module.
    """
    with contextlib.suppress(ValueError, OSError):  # closed, or not a file at all
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())
            os.close(nothing)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
