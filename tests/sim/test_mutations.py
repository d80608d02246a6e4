"""The checker has teeth: broken on purpose, the protocol is caught.

Each mutation takes away one rule that the argument in docs/protocol.md needs, or the check that
every leaf of a downloaded state goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from blake3 import blake3

from coordinator_free.certificates import Head
from coordinator_free.download import Download, Step
from coordinator_free.leadership import Leadership
from coordinator_free.machine import Machine
from coordinator_free.messages import Prepare
from tests.sim.chaos import trouble
from tests.sim.world import Diverged

SEEDS = 1000  # the rarest takes about two hundred


def half_is_enough(patch: pytest.MonkeyPatch) -> None:
    """Certificates need half of the roster instead of more than half."""
    patch.setattr(Head, "majority", property(lambda head: max(1, len(head.roster) // 2)))


def members_forget(patch: pytest.MonkeyPatch) -> None:
    """A member does not tell a new leader what it accepted, holds and takes part in."""
    honest = Machine._on_prepare

    def forget(machine: Machine, sender: str, message: Prepare) -> None:
        machine._accepted = machine._report = machine._plan = None
        honest(machine, sender, message)

    patch.setattr(Machine, "_on_prepare", forget)


def leaders_do_not_ask(patch: pytest.MonkeyPatch) -> None:
    """A new leader proposes without learning first what may have been accepted."""
    honest = Leadership.__init__

    def rash(leadership: Leadership, *arguments: object) -> None:
        honest(leadership, *arguments)  # type: ignore[arg-type]
        leadership._prepared = True

    patch.setattr(Leadership, "__init__", rash)


def nobody_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    """Whoever answers first is all that is left of the roster."""

    def hasty(leadership: Leadership, peers: Iterable[str], now: float) -> str | None:
        present = set(peers)
        majority = len(present) >= leadership._machine.head.majority
        return "majority" if majority else "provisional" if present else None

    patch.setattr(Leadership, "_quorum", hasty)


def leaves_are_believed(patch: pytest.MonkeyPatch) -> None:
    """A downloader takes whatever bytes a donor sends."""
    honest = Download.leaf

    def believe(
        download: Download, donor: str, leaf: int, payload: bytes | memoryview, now: float
    ) -> list[Step]:
        if download._digests is not None:
            digests = list(download._digests)
            digests[leaf] = blake3(payload).digest()
            download._digests = digests
        return honest(download, donor, leaf, payload, now)

    patch.setattr(Download, "leaf", believe)


def all_troubles() -> None:
    for seed in range(SEEDS):
        trouble(seed)


@pytest.mark.parametrize(
    "mutation",
    [
        half_is_enough,
        members_forget,
        leaders_do_not_ask,
        nobody_is_waited_for,
        leaves_are_believed,
    ],
)
def test_a_broken_protocol_is_caught(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(Diverged):
        all_troubles()
