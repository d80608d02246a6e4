"""When a stranded peer goes over to somebody and when it waits no longer; the network is played."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable
from typing import cast

import pytest

from coordinator_free import comeback, revival
from coordinator_free.catchup import CatchUp
from coordinator_free.certificates import Head
from coordinator_free.chain import Chain
from coordinator_free.comeback import TRIES_BEFORE_REVIVAL, ComeBack
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.machine import Machine
from coordinator_free.messages import Certificate, Kind
from coordinator_free.state import State
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Client
from dht.directory import Directory
from dht.errors import StateError, Unreachable
from dht.records import PeerRecord
from tests.coordinator_free.test_catchup import NUMEL, record
from tests.coordinator_free.test_machine import Rig
from tests.coordinator_free.test_replica import OPTIMIZER, shape, state
from tests.sim.world import Key

CONFIG = RoundConfig(codec="fp32", exchange_s=1.0, provisional_s=0.1)


class Stranded:
    """A peer that was in a roster of three, all of which are gone."""

    def __init__(self, others: Others) -> None:
        self.rig = Rig("a", "abc", session=2, config=CONFIG)
        self.certificate = dataclasses.replace(
            self.rig.certificate,
            outcome=dataclasses.replace(self.rig.certificate.outcome, kind=Kind.FOUND),
        )
        self.others = others
        self.stopped = False
        self.stuck = False
        self.strays: tuple[Contact, ...] = ()
        self.revived: list[Certificate] = []
        self.installed: list[Chain] = []
        now = asyncio.get_running_loop().time()
        for gone in "bc":
            self.machine.undeliverable(gone, now)

    @property
    def machine(self) -> Machine:
        return self.rig.machine

    @property
    def head(self) -> Head:
        return self.machine.head

    @property
    def chain(self) -> Chain:
        return Chain((self.certificate,))

    def yields_to(self, head: Head) -> bool:
        return self.machine.yields_to(head)

    def knows(self, head: bytes) -> bool:
        return self.machine.knows(head)

    def replay(self, certificate: Certificate, holder: str) -> bool:
        raise AssertionError("heads here do not follow on each other")

    def install(self, state: State, chain: Chain) -> None:
        self.installed.append(chain)
        self.stopped = True

    def revive(self, certificate: Certificate) -> None:
        self.revived.append(certificate)
        self.stopped = True

    async def comes_back(self) -> None:
        """Until it has gone over to somebody or revived the run."""
        catching = CatchUp(
            self,
            transfer=cast(Transfer, self.others),
            directory=cast(Directory, self.others),
            run_id="00" * 20,
            peer_id="a",
            round=CONFIG,
            shape=shape(NUMEL),
            optimizer=OPTIMIZER,
        )
        coming = ComeBack(
            self,
            catch_up=catching,
            transfer=cast(Transfer, self.others),
            client=cast(Client, self.others),
            signer=Key("a"),
        )
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            catching.watch(tasks)
            running = tasks.create_task(coming.run())
            while not self.stopped:  # noqa: ASYNC110 - a played session sets no events
                await asyncio.sleep(0.01)
            running.cancel()
            self.others.over.set()


class Others:
    """Who else shows something in the directory."""

    def __init__(self, show: Callable[[], dict[str, int]]) -> None:
        self.show = show  # names and samples
        self.over = asyncio.Event()
        self.proofs: list[str] = []
        self.prove: Callable[[Contact], bool] = lambda contact: False
        self.downloads = 0
        self.held = state(numel=NUMEL)
        self.gives = False

    async def peers(self, run_id: str) -> list[PeerRecord]:
        return [record(name, samples=samples) for name, samples in self.show().items()]

    async def watch(self, run_id: str, interval_s: float) -> AsyncIterator[list[PeerRecord]]:
        yield []

    async def deliver(self, contact: Contact, message: bytes, timeout_s: float) -> bytes:
        return b""

    def claim(self, contact: Contact) -> Certificate:
        """A head of its own, a new one each time."""
        samples = self.show().get(contact.peer_id, 1000)
        certificate = Rig("z", "z").certificate
        outcome = dataclasses.replace(
            certificate.outcome, kind=Kind.FOUND, samples=samples, state_root=self.held.root
        )
        return dataclasses.replace(certificate, outcome=outcome)

    async def newest(self, contact: Contact) -> Certificate:
        return self.claim(contact)

    async def heads(self, contact: Contact, height: int) -> tuple[Certificate, ...]:
        return (self.claim(contact),)

    async def claims(self, contacts: Iterable[Contact]) -> list[tuple[Certificate, Contact]]:
        return [(self.claim(contact), contact) for contact in contacts]

    async def chain(self, contact: Contact) -> Chain:
        self.proofs.append(contact.peer_id)
        if not self.prove(contact):
            await self.over.wait()  # a chain that never gets done
            raise Unreachable(contact.peer_id, "is gone")
        return Chain((self.claim(contact),))

    def follows(self, before: Certificate, after: Certificate) -> bool:
        return False

    async def state(self, root: bytes, donors: object) -> State:
        self.downloads += 1
        if not self.gives:
            raise StateError("nobody is left")
        return self.held


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revival, "LOOK_S", 0.02)
    monkeypatch.setattr(comeback, "UNPROVEN_S", 0.5, raising=False)
    monkeypatch.setattr("coordinator_free.catchup.SILENT_S", 0.05, raising=False)


async def test_strangers_with_ever_new_names_and_heads_keep_no_run_dead() -> None:
    names = iter(range(10**6))
    samples = iter(range(10**6, 10**7))
    others = Others(lambda: {f"liar{next(names)}": next(samples) for _ in range(6)})
    peer = Stranded(others)
    await peer.comes_back()
    assert len(peer.revived) == 1
    assert others.proofs
    assert peer.installed == []


async def test_who_proves_a_head_and_never_gives_its_state_is_tried_three_times() -> None:
    samples = iter(range(10**6, 10**7))
    others = Others(lambda: {"miser": next(samples)})
    others.prove = lambda contact: True
    peer = Stranded(others)
    await peer.comes_back()
    assert others.downloads == TRIES_BEFORE_REVIVAL
    assert len(peer.revived) == 1


async def test_an_honest_head_is_taken_over_though_liars_show_more() -> None:
    shown = {f"liar{n}": 10**9 + n for n in range(3)} | {"honest": 10**6}
    others = Others(lambda: shown)
    others.prove = lambda contact: contact.peer_id == "honest"
    others.gives = True
    peer = Stranded(others)
    await peer.comes_back()
    (chain,) = peer.installed
    assert chain.newest.outcome.samples == 10**6
    assert peer.revived == []
