"""The one tree of errors that Shoal raises on purpose.

    SwarmError
    |-- ConfigError              a person's mistake: one line, exit status 2
    |-- PeerError(peer_id)       one partner's fault: go on without it
    |   |-- Unreachable          no connection, or it broke
    |   |   `-- Declined         there, but will not do this
    |   |       `-- Overloaded   will not do it now
    |   |-- TimedOut             connected, but a deadline passed
    |   |-- Unauthenticated      is not, or does not believe, who was asked for
    |   `-- ProtocolViolation    said something that no correct peer says
    |-- RoundError(round)        this round is void; local progress is kept
    |-- RecordError(reason)      a DHT record that must not be believed
    |-- RunNotFound(run_id)      nobody who can be reached knows this run
    `-- StateError               nothing trustworthy to load

Errors of gRPC, hivemind and the operating system never leave the module that talks to them: they
are mapped onto this tree there, `from` the original.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Root of everything below."""


class ConfigError(SwarmError):
    """A wrong file, field, link or address. The text says what is wrong and how to mend it."""


class PeerError(SwarmError):
    """One partner's fault; the others go on without it.

    Args:
        peer_id: the partner, base58; empty when it never said who it is.
        reason: what it did, for a log line.
    """

    def __init__(self, peer_id: str, reason: str) -> None:
        super().__init__(f"peer {peer_id or '?'}: {reason}")
        self.peer_id = peer_id
        self.reason = reason


class Unreachable(PeerError):
    """No connection could be made, or an open one broke."""


class Declined(Unreachable):
    """The partner is there and will not do what was asked, for a reason of its own."""


class Overloaded(Declined):
    """The partner has too much to do: ask another one, or later."""


class TimedOut(PeerError):
    """The connection stands, but the deadline passed without an answer."""


class Unauthenticated(PeerError):
    """The partner is not who was asked for, or refused our own proof."""


class ProtocolViolation(PeerError):
    """The partner sent what no correct peer sends."""


class RoundError(SwarmError):
    """A round came to nothing. The model is as before and local progress is kept.

    Args:
        round: index of the averaging round.
        reason: why, for a log line.
    """

    def __init__(self, round: int, reason: str) -> None:
        super().__init__(f"round {round}: {reason}")
        self.round = round
        self.reason = reason


class RecordError(SwarmError):
    """A record from the DHT that must be neither stored nor believed.

    Args:
        reason: a short constant such as "bad signature": it is counted, so it names the rule that
            was broken and never repeats what the other side sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"DHT record refused: {reason}")
        self.reason = reason


class RunNotFound(SwarmError):
    """Nobody who could be reached knows this run.

    Args:
        run_id: the run that was looked for, 40 hex digits.
    """

    def __init__(self, run_id: str) -> None:
        super().__init__(f"no peer knows run {run_id}; is one of its peers running?")
        self.run_id = run_id


class StateError(SwarmError):
    """No state could be obtained that matches a digest the swarm vouches for."""


def innermost(error: BaseException) -> BaseException:
    """The first error of nested groups: what went wrong, without the scaffolding around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
