"""One peer's state at one moment, as `shoal status`, the live table and the demo show it.

A snapshot: immutable, made by the training thread, read by any. It may be a second old, and it is
what the peer says of itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What one peer is doing.

    Attributes:
        run: run id, 40 hex digits; empty while unknown.
        name: the run's name.
        peer: own peer id.
        pid: own process.
        home: folder of the peer's state.
        phase: a word or two: "connecting", "train", "exchange", ...
        round: under way, from 0.
        rounds: after which the run ends; 0 = no end.
        step: inner steps done in this round.
        steps: inner steps to do in a round.
        train_loss: of the last inner step, nats per token; None before the first.
        val_loss: of the model the round started from; None before the first evaluation.
        peers: in the roster.
        tokens_per_s: trained by this peer, over the last round.
        bytes_sent: since the start.
        bytes_received: since the start.
        digest: of the swarm's state, hex.
        checkpoint: round of the newest state on this peer's disk; None for none.
        uptime_s: since the process took up work.
        chosen: what was left to this peer (precision, micro-batch, steps of a round), and why.
        link: the join link as it is now; empty while there is none.
    """

    run: str = ""
    name: str = ""
    peer: str = ""
    pid: int = 0
    home: str = ""
    phase: str = "starting"
    round: int = 0
    rounds: int = 0
    step: int = 0
    steps: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    peers: int = 0
    tokens_per_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    digest: str = ""
    checkpoint: int | None = None
    uptime_s: float = 0.0
    chosen: str = ""
    link: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Status:
        """The reverse of `to_dict`; unknown fields are ignored (an older client asks a newer peer).

        Raises:
            ValueError: a field has a value of the wrong kind.
        """
        hints = get_type_hints(cls)
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name, value in known.items():
            if hints[name] is str:
                fits = isinstance(value, str)
            elif hints[name] is int:
                fits = isinstance(value, int)
            else:  # float, or float | None for what may be unknown (or not finite: null)
                fits = value is None or isinstance(value, int | float)
            if not fits:
                raise ValueError(f"status field {name} is {value!r}")
        if known.get("tokens_per_s", 0.0) is None or known.get("uptime_s", 0.0) is None:
            raise ValueError("status without a speed or an uptime")
        return cls(**known)
