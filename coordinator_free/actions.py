"""What the machine wants done: everything that leaves it.

The shell or the simulator carries these out, in order, and answers with the machine's methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator_free.messages import Certificate, Message, Outcome, Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """Deliver a message; report success or failure of the delivery back."""

    to: str
    message: Message


@dataclass(frozen=True, kw_only=True, slots=True)
class StartWork:
    """Train for this round, as seat `seat` of `seats`; answer with `work_done`."""

    round: int
    seat: int
    seats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CloseWork:
    """The others wait: hand in the work of this round as it is."""

    round: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StartExchange:
    """Average by this plan; answer with `exchange_done` or `exchange_failed`."""

    plan: Plan
    digest: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class GoOnWithout:
    """The exchange of this plan shall not wait for these peers any more.

    Attributes:
        plan: its digest.
        peers: for nothing of theirs.
        contributors: for their contributions; they may still reduce.
    """

    plan: bytes
    peers: tuple[str, ...]
    contributors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetch:
    """Get the bytes of this outcome's average and compute its state; answer with `fetched`.

    In place of any other outcome that is being fetched.
    """

    outcome: Outcome
    holders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Apply:
    """Decided: the state of this outcome, which is held, is now the state."""

    certificate: Certificate


@dataclass(frozen=True, kw_only=True, slots=True)
class CatchUp:
    """This peer is at another height or branch: ask it what was decided."""

    peer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The run's last round is committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """The roster no longer names this peer, as it asked."""


Action = (
    Send
    | StartWork
    | CloseWork
    | StartExchange
    | GoOnWithout
    | Fetch
    | Apply
    | CatchUp
    | Finished
    | Left
)
