"""Which named points of a round a list of actions passes, for `failpoints`.

Looked at in the shell, so that the machine stays free of it. Each point is passed once a height,
however often a message is said again.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator_free.actions import Action, Apply, Send
from coordinator_free.messages import Accepted, Commit, Kind, Message, Plan, Ready


class Marks:
    """Remembers for one session what was passed."""

    def __init__(self) -> None:
        self._heights: dict[str, int] = {}

    def passed(self, wanted: Iterable[Action]) -> list[str]:
        """The points, without `.before` and `.after`, that these actions pass for the first time.

        Only a round's commit counts, not that of a roster, and only for who decides it: who tells
        a straggler of an old one applies nothing.
        """
        actions = list(wanted)
        applied = any(isinstance(action, Apply) for action in actions)
        new = []
        for action in actions:
            found = _mark(action.message, applied) if isinstance(action, Send) else None
            if found is not None and self._heights.get(found[0], -1) < found[1]:
                self._heights[found[0]] = found[1]
                new.append(found[0])
        return new


def _mark(message: Message, applied: bool) -> tuple[str, int] | None:
    match message:
        case Ready():
            return "ready", message.height
        case Plan():
            return "leader.plan", message.height
        case Accepted():
            return "accept", message.height
        case Commit() if applied and message.certificate.outcome.kind == Kind.AVERAGE:
            return "leader.commit", message.certificate.outcome.height
        case _:
            return None
