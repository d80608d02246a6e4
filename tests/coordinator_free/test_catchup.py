"""Joining and catching up: what is decided, with played peers, and whole sessions on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, cast

import pytest
from torch import Tensor

from coordinator_free import catchup, wire
from coordinator_free.average import Average
from coordinator_free.catchup import CatchUp, Lookout, Shown, contact_of
from coordinator_free.certificates import Head
from coordinator_free.chain import Chain
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.messages import NO_DIGEST, Certificate, Kind, Outcome
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.replica import MIN_KEPT_AVERAGES, Replica
from coordinator_free.session import Session
from coordinator_free.state import LEAF_ELEMENTS, State
from coordinator_free.transfer import Transfer
from dht.directory import Directory
from dht.errors import ProtocolViolation, StateError, Unreachable
from dht.records import PeerRecord
from tests.coordinator_free.test_replica import OPTIMIZER, apply, average, replica, shape
from tests.coordinator_free.test_session import Peer, Swarm, rounds_of, swarm

NUMEL = 100


def record(name: str, head: bytes = NO_DIGEST, samples: int = 0) -> PeerRecord:
    return PeerRecord(
        peer_id=name,
        run_id="00" * 20,
        maddrs=(),
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
        upload_bps=0.0,
        download_bps=0.0,
        round=0,
        samples=samples,
        head=head,
        leaving=False,
        expires_at=1.0,
    )


class Others:
    """The rest of the swarm, as a directory and as what a `Transfer` gets from it."""

    def __init__(self, **replicas: Replica) -> None:
        self.replicas = replicas
        self.looks: list[list[PeerRecord]] = []
        self.liars: set[str] = set()
        self.dawdlers: set[str] = set()
        self.unwilling: set[str] = set()  # to reduce, lead or serve
        self.proofs: list[str] = []  # whose chains were asked for
        self.look_ups = 0
        self.downloads = 0
        self.averages = 0
        self.forgotten: set[bytes] = set()
        self.during_download: Callable[[], Awaitable[None]] = lambda: asyncio.sleep(0.05)

    # -- the directory ------------------------------------------------------------------------

    async def peers(self, run_id: str) -> list[PeerRecord]:
        self.look_ups += 1
        return [
            dataclasses.replace(record(name), can_reduce=name not in self.unwilling)
            for name in ("me", *self.replicas)
        ]

    async def watch(self, run_id: str, interval_s: float) -> AsyncIterator[list[PeerRecord]]:
        for records in self.looks:
            yield records
            await asyncio.sleep(0.01)

    # -- transfers ----------------------------------------------------------------------------

    async def heads(self, contact: Contact, height: int) -> tuple[Certificate, ...]:
        held = self.replicas[contact.peer_id].certificates
        found = tuple(c for c in held if c.outcome.height >= height)[:3]
        return found if found and found[0].outcome.height == height else (held[-2], held[-1])

    async def newest(self, contact: Contact) -> Certificate:
        return self.replicas[contact.peer_id].chain.newest

    async def claims(self, contacts: Iterable[Contact]) -> list[tuple[Certificate, Contact]]:
        shown = [(await self.newest(contact), contact) for contact in contacts]
        return sorted(shown, key=lambda one: Head.after(one[0]).rank, reverse=True)

    async def chain(self, contact: Contact) -> Chain:
        self.proofs.append(contact.peer_id)
        if contact.peer_id in self.dawdlers:
            await asyncio.sleep(3600)
        if contact.peer_id in self.liars:
            raise ProtocolViolation(contact.peer_id, "proves nothing")
        return self.replicas[contact.peer_id].chain

    def follows(self, before: Certificate, after: Certificate) -> bool:
        return after.outcome.previous == wire.head_digest(before.outcome)

    async def state(self, root: bytes, donors: Callable[[], Awaitable[Sequence[Contact]]]) -> State:
        self.downloads += 1
        asked = {contact.peer_id for contact in await donors()}
        states = {h.state.root: h.state for name, h in self.replicas.items() if name in asked}
        if root not in states:
            raise StateError("nobody is left")
        await self.during_download()
        return states[root]

    async def average(self, contact: Contact, outcome: Outcome) -> Average:
        self.averages += 1
        held = self.replicas[contact.peer_id].average(outcome.vector_root)
        if held is None or outcome.vector_root in self.forgotten:
            raise Unreachable(contact.peer_id, "has not got it")
        return held


class Me:
    """A peer that stands somewhere: the `Place`, with a replica for a machine."""

    def __init__(self, held: Replica | None, others: Others) -> None:
        self.held = held
        self.others = others
        self.stopped = False
        self.installed: list[Chain] = []

    @property
    def head(self) -> Head:
        assert self.held is not None
        return Head.after(self.held.chain.newest)

    @property
    def stuck(self) -> bool:
        return False

    strays: tuple[Contact, ...] = ()

    def yields_to(self, head: Head) -> bool:
        return head.rank > self.head.rank

    def knows(self, head: bytes) -> bool:
        assert self.held is not None
        return any(Head.after(passed).digest == head for passed in self.held.certificates)

    def replay(self, certificate: Certificate, holder: str) -> bool:
        assert self.held is not None
        average = self.others.replicas[holder].average(certificate.outcome.vector_root)
        if certificate.outcome.kind == Kind.AVERAGE:
            assert average is not None
            self.held.consider(average)
        self.held.apply(certificate)
        return not certificate.provisional

    def install(self, state: State, chain: Chain) -> None:
        assert self.held is not None
        self.installed.append(chain)
        self.held.install(state, chain)


def catch_up(me: Me, others: Others, codec: str = "int4", folder: Path | None = None) -> CatchUp:
    return CatchUp(
        me,
        transfer=cast(Transfer, others),
        directory=cast(Directory, others),
        run_id="00" * 20,
        peer_id="me",
        round=RoundConfig(codec=codec, exchange_s=1.0),
        shape=shape(NUMEL),
        optimizer=OPTIMIZER,
        folder=folder,
    )


def at(rounds: int, *, first_seed: int = 0) -> Replica:
    """A replica that averaged so often; with equal seeds, on the same branch."""
    held = replica(NUMEL)
    for seed in range(first_seed, first_seed + rounds):
        step(held, seed)
    return held


def step(held: Replica, seed: int, codec: str = "int4") -> None:
    one = average(seed, NUMEL, codec)
    apply(held, held.consider(one), one)


async def followed(me: Me, others: Others, name: str, codec: str = "int4") -> None:
    catching = catch_up(me, others, codec)
    async with asyncio.TaskGroup() as tasks:
        catching.watch(tasks)
        catching.follow(Contact(name, ("host",), 1, NO_DIGEST))


# -- newcomers --------------------------------------------------------------------------------


async def test_a_newcomer_takes_the_furthest_head_that_is_proven() -> None:
    others = Others(behind=at(2), ahead=at(3), liar=at(5))
    others.liars = {"liar"}
    found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    state, chain = found
    assert state.root == others.replicas["ahead"].state.root
    assert chain == others.replicas["ahead"].chain


async def test_who_shows_a_head_is_asked_for_its_state_though_it_offers_none() -> None:
    """Everybody who leads was restarted, and only a client has what was decided last."""
    others = Others(restarted=at(1), client=at(3))
    others.unwilling = {"client"}
    found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    assert found[0].root == others.replicas["client"].state.root


async def test_chains_that_never_come_hold_up_no_newcomer() -> None:
    others = Others(ahead=at(3), **{f"liar{n}": at(5) for n in range(3)})
    others.dawdlers = {"liar0", "liar1", "liar2"}
    async with asyncio.timeout(5):
        found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    assert found[1] == others.replicas["ahead"].chain


async def test_the_chain_of_an_earlier_head_proves_no_claim_to_more() -> None:
    others = Others(ahead=at(3), liar=at(2))
    honest = others.newest

    async def newest(contact: Contact) -> Certificate:
        shown = await honest(contact)
        if contact.peer_id != "liar":
            return shown
        return dataclasses.replace(shown, outcome=dataclasses.replace(shown.outcome, samples=99))

    others.newest = newest  # type: ignore[method-assign]
    found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    assert found[1] == others.replicas["ahead"].chain


async def test_what_is_committed_during_a_download_is_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catchup, "COLLECT_S", 0.01)
    monkeypatch.setattr(catchup, "COLLECT_SOON_S", 0.01)
    donor = at(1)
    others = Others(donor=donor)
    missed = []

    async def pass_rounds() -> None:
        for seed in range(10, 40):
            step(donor, seed)
            missed.append(donor.chain.newest.outcome.vector_root)
            await asyncio.sleep(0.03)

    others.during_download = pass_rounds
    found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    state, chain = found
    assert donor.average(missed[0]) is None  # the download took longer than donors keep averages
    assert state.root == donor.state.root
    assert chain.newest == donor.chain.newest
    assert others.downloads == 1


async def test_rounds_of_fragments_that_pass_during_a_download_are_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Averages of several lengths, each kept on the disk and checked by its own round's."""
    monkeypatch.setattr(catchup, "COLLECT_S", 0.01)
    monkeypatch.setattr(catchup, "COLLECT_SOON_S", 0.01)
    numel = 3 * ALIGN_ELEMENTS - 9
    donor = replica(numel, fragments=3)
    of = donor.state.shape
    others = Others(donor=donor)

    async def pass_rounds() -> None:
        for round in range(7):
            one = average(round, of.averaged(round))
            apply(donor, donor.consider(one), one)
            await asyncio.sleep(0.03)

    others.during_download = pass_rounds
    catching = CatchUp(
        Me(None, others),
        transfer=cast(Transfer, others),
        directory=cast(Directory, others),
        run_id="00" * 20,
        peer_id="me",
        round=RoundConfig(codec="fp32", fragments=3, exchange_s=1.0),
        shape=of,
        optimizer=OPTIMIZER,
    )
    found = await catching.find(5.0)
    assert found is not None
    state, chain = found
    assert chain.newest == donor.chain.newest
    assert state.digests == donor.state.digests
    assert others.downloads == 1


async def test_a_round_that_nobody_kept_ends_the_replay_at_a_state_of_the_run() -> None:
    donor = at(1)
    others = Others(donor=donor)

    async def pass_rounds() -> None:
        for seed in range(10, 14):
            step(donor, seed)
        others.forgotten = {donor.certificates[-2].outcome.vector_root}

    others.during_download = pass_rounds
    found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    state, chain = found
    assert chain.newest == donor.certificates[-3]
    assert state.root == chain.newest.outcome.state_root


async def test_a_download_asks_the_directory_for_nobody_while_who_showed_the_head_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catchup, "COLLECT_SOON_S", 0.01)
    others = Others(donor=at(1), other=at(1))
    shown = []

    async def look() -> None:
        shown.append(others.look_ups)
        await asyncio.sleep(0.3)
        shown.append(others.look_ups)

    others.during_download = look
    assert await catch_up(Me(None, others), others).find(5.0) is not None
    assert shown[0] == shown[1]


async def test_what_is_asked_for_during_a_download_is_paced_by_what_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catchup, "COLLECT_SOON_S", 0.01)
    monkeypatch.setattr(catchup, "COLLECT_S", 0.2)
    others = Others(donor=at(1))
    asked: list[int] = []
    heads = others.heads

    async def counting(contact: Contact, height: int) -> tuple[Certificate, ...]:
        asked.append(height)
        return await heads(contact, height)

    others.heads = counting  # type: ignore[method-assign]
    others.during_download = lambda: asyncio.sleep(1.0)
    assert await catch_up(Me(None, others), others).find(5.0) is not None
    # 0.01, 0.02, 0.04 ... and then every 0.2 s: nothing is committed here.
    assert 6 <= len(asked) <= 11


async def test_who_does_not_go_on_with_the_rounds_is_not_asked_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catchup, "COLLECT_S", 0.01)
    monkeypatch.setattr(catchup, "COLLECT_SOON_S", 0.01)
    monkeypatch.setattr(catchup, "IDLE_LOOKS", 3)
    others = Others(stuck=at(2), alive=at(1))
    alive = others.replicas["alive"]

    async def pass_rounds() -> None:
        for seed in range(1, 5):
            step(alive, seed)
            await asyncio.sleep(0.2)

    others.during_download = pass_rounds
    found = await catch_up(Me(None, others), others).find(5.0)
    assert found is not None
    assert found[1].newest == alive.chain.newest


class FullDisk:
    """A file in a place with room for so many bytes."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file = file
        self.room = room

    def write(self, data: memoryview) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self.file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [True, False])
async def test_a_download_without_room_for_rounds_gives_up_on_them_and_not_on_itself(
    monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    monkeypatch.setattr(catchup, "COLLECT_S", 0.01)
    monkeypatch.setattr(catchup, "COLLECT_SOON_S", 0.01)
    shipped = tempfile.TemporaryFile
    one_and_a_half = average(0, NUMEL).nbytes * 3 // 2

    def on_full_disk(*args: object, **options: object) -> FullDisk:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        file = shipped(*args, **options)  # type: ignore[call-overload]
        return FullDisk(file, one_and_a_half)

    monkeypatch.setattr(tempfile, "TemporaryFile", on_full_disk)
    donor = at(1)
    others = Others(donor=donor)
    first = donor.chain.newest

    async def pass_rounds() -> None:
        for seed in (10, 11):
            step(donor, seed, codec="fp32")
        await asyncio.sleep(0.5)

    others.during_download = pass_rounds
    found = await catch_up(Me(None, others), others, codec="fp32").find(5.0)
    assert found is not None
    state, chain = found
    # The one that found room is replayed; none is asked for again and again.
    assert chain.newest == (donor.certificates[-2] if room else first)
    assert state.root == chain.newest.outcome.state_root
    assert others.averages == (2 if room else 0)


async def test_rounds_are_kept_beside_the_checkpoints_if_there_are_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = []
    shipped = tempfile.TemporaryFile

    def noting(*, dir: Path | None, **options: object) -> IO[bytes]:
        folders.append(dir)
        return shipped(dir=dir, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(tempfile, "TemporaryFile", noting)
    for folder in (tmp_path, tmp_path / "none", None):
        others = Others(donor=at(1))
        assert await catch_up(Me(None, others), others, folder=folder).find(5.0) is not None
    assert folders == [tmp_path, None, None]


async def test_a_stopped_newcomer_looks_no_further() -> None:
    others = Others()
    me = Me(None, others)
    me.stopped = True
    assert await catch_up(me, others).find(5.0) is None


async def test_a_newcomer_can_be_stopped_in_the_middle_of_a_download() -> None:
    others = Others(donor=at(1))
    me = Me(None, others)

    async def stop_it() -> None:
        me.stopped = True
        await asyncio.sleep(3600)

    others.during_download = stop_it
    assert await asyncio.wait_for(catch_up(me, others).find(5.0), 5.0) is None


async def test_nobody_there_is_an_error_after_a_while() -> None:
    with pytest.raises(StateError, match=r"0\.2 s"):
        await catch_up(Me(None, Others()), Others()).find(0.2)


# -- from behind ------------------------------------------------------------------------------


async def test_a_peer_a_few_rounds_behind_replays_them() -> None:
    others = Others(ahead=at(9))
    me = Me(at(2), others)
    await followed(me, others, "ahead")
    assert me.head.digest == Head.after(others.replicas["ahead"].chain.newest).digest
    assert others.downloads == 0
    assert me.installed == []


@pytest.mark.parametrize(("behind", "downloads"), [(MIN_KEPT_AVERAGES, 0), (5, 1)])
async def test_the_state_is_fetched_where_that_is_less_than_the_averages(
    behind: int, downloads: int
) -> None:
    # An average in fp32 is half as large as a state; the last few are replayed all the same.
    others = Others(ahead=at(3 + behind))
    me = Me(at(3), others)
    await followed(me, others, "ahead", codec="fp32")
    assert me.held is not None
    assert me.held.state.root == others.replicas["ahead"].state.root
    assert others.downloads == downloads


async def test_another_branch_is_taken_over_whole_if_it_outranks_and_is_proven() -> None:
    others = Others(ahead=at(4), liar=at(5), behind=at(2))
    others.liars = {"liar"}
    for name, installs in (("behind", 0), ("liar", 0), ("ahead", 1)):
        me = Me(at(3, first_seed=50), others)
        await followed(me, others, name)
        assert len(me.installed) == installs


# -- what nobody has proven yet ---------------------------------------------------------------


def looks(records: list[PeerRecord], times: int) -> list[list[PeerRecord]]:
    return [records] * times


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is played sets no events
            await asyncio.sleep(0.01)


async def test_an_unproven_claim_holds_up_neither_a_member_nor_a_lost_one() -> None:
    others = Others(liar=at(9, first_seed=70), a=at(5), stray=at(6, first_seed=50))
    others.dawdlers = {"liar"}
    others.looks = looks([record("liar", bytes(32))], 3)
    me = Me(at(2), others)
    async with asyncio.TaskGroup() as tasks:
        catching = catch_up(me, others)
        catching.watch(tasks)
        await until(lambda: "liar" in others.proofs)
        catching.follow(Contact("a", ("host",), 1, NO_DIGEST))  # the roster is "a" alone
        await until(lambda: me.head.height == at(5).chain.newest.outcome.height + 1)
        stop(catching)
    me = Me(at(2), others)
    me.strays = (contact_of(record("stray")),)
    async with asyncio.TaskGroup() as tasks:
        catching = catch_up(me, others)
        catching.watch(tasks)
        await until(lambda: bool(me.installed))
        stop(catching)
    assert me.installed[0] == others.replicas["stray"].chain


async def test_who_did_not_prove_what_it_showed_is_left_alone_for_a_while() -> None:
    others = Others(liar=at(9, first_seed=70), ahead=at(5, first_seed=50))
    others.liars = {"liar"}
    digests = {name: Head.after(held.chain.newest).digest for name, held in others.replicas.items()}
    others.looks = looks([record("liar", digests["liar"])], 10)
    others.looks += looks([record(name, digests[name]) for name in digests], 10)
    me = Me(at(2), others)
    async with asyncio.TaskGroup() as tasks:
        catch_up(me, others).watch(tasks)
    assert others.proofs == ["liar", "ahead"]
    assert me.installed == [others.replicas["ahead"].chain]


async def test_a_record_that_shows_more_than_its_peer_has_is_not_looked_at_again() -> None:
    others = Others(liar=at(2))
    asked: list[str] = []
    honest = others.newest

    async def newest(contact: Contact) -> Certificate:
        asked.append(contact.peer_id)
        return await honest(contact)

    others.newest = newest  # type: ignore[method-assign]
    others.looks = looks([record("liar", bytes(32), 2**53)], 10)
    async with asyncio.TaskGroup() as tasks:
        catch_up(Me(at(2), others), others).watch(tasks)
    assert asked == ["liar"]


async def test_strangers_that_take_too_long_make_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catchup, "PROOF_S", 0.1)
    liars = {f"liar{n}": at(9, first_seed=70) for n in range(catchup.LOOKED_INTO)}
    others = Others(**liars, ahead=at(5, first_seed=50))
    others.dawdlers = set(liars)
    me = Me(at(2), others)
    async with asyncio.TaskGroup() as tasks:
        catching = catch_up(me, others)
        catching.watch(tasks)
        for name in liars:
            assert catching.suggest(contact_of(record(name)))
        ahead = contact_of(record("ahead"))
        assert not catching.suggest(ahead)
        await until(lambda: catching.suggest(ahead))
        await until(lambda: bool(me.installed))
        stop(catching)


def stop(catching: CatchUp) -> None:
    for task, _ in catching._looking.values():
        task.cancel()


# -- branches of one weight -------------------------------------------------------------------


async def test_equal_branches_are_noticed_and_settled_by_rank() -> None:
    one, two = at(3), at(3, first_seed=50)
    heads = {"one": Head.after(one.chain.newest), "two": Head.after(two.chain.newest)}
    assert heads["one"].samples == heads["two"].samples
    winner = max(heads, key=lambda name: heads[name].rank)
    for mine, other, theirs in ((one, "two", two), (two, "one", one)):
        others = Others(**{other: theirs})
        others.looks = [[record(other, heads[other].digest)]] * 3
        me = Me(mine, others)
        async with asyncio.TaskGroup() as tasks:
            catch_up(me, others).watch(tasks)
        assert me.head.digest == heads[winner].digest
        assert len(me.installed) == (1 if other == winner else 0)
        if me.installed:
            break
    else:
        pytest.fail("neither gave way")


def test_who_is_ahead_is_asked_first_and_of_those_elsewhere_each_in_turn() -> None:
    head = Head.after(at(3).chain.newest)
    mine = {b"old" * 8, head.digest}
    lookout = Lookout()

    def look(**heads: bytes) -> str | None:
        shown = {peer: Shown(head.samples, digest) for peer, digest in heads.items()}
        return lookout.whom_to_ask(shown, head, mine.__contains__)

    assert look(a=b"x", b=b"y", c=b"old" * 8) is None  # the news may be on its way
    assert {look(a=b"x", b=b"y", c=b"z"), look(a=b"x", b=b"y")} == {"a", "b"}
    mine |= {b"x", b"y"}
    assert look(a=b"x", b=b"y", c=b"w") is None  # it was only news; c has gone on as well
    lookout.whom_to_ask({"a": Shown(head.samples + 1, b"v")}, head, mine.__contains__)
    assert look(a=b"v", b=b"y") == "a"
    assert look() is None


def test_two_branches_that_grow_at_the_same_pace_see_each_other() -> None:
    """Neither is ever ahead of the other by more than what a record may be old."""
    mine, theirs = Lookout(), Lookout()
    asked = set()
    heads = {"me": at(1), "they": at(1, first_seed=50)}
    for seed in range(2):
        for held in heads.values():
            step(held, seed)
        me, they = (Head.after(held.chain.newest) for held in heads.values())
        for lookout, own, other in ((mine, me, they), (theirs, they, me)):
            known = {own.digest}
            shown = {"other": Shown(other.samples, other.digest)}
            if lookout.whom_to_ask(shown, own, known.__contains__):
                asked.add(own.digest)
    assert len(asked) == 2


async def test_a_lost_member_is_asked_where_the_directory_shows_nobody() -> None:
    """A partition parts the directory, too."""
    others = Others(stray=at(5), dead=at(1))
    others.looks = [[]] * 4
    others.liars = {"dead"}
    me = Me(at(3, first_seed=50), others)
    me.strays = (contact_of(record("dead")), contact_of(record("stray")))
    async with asyncio.TaskGroup() as tasks:
        catch_up(me, others).watch(tasks)
    assert me.head.digest == Head.after(others.replicas["stray"].chain.newest).digest


async def test_a_head_that_was_only_a_little_old_starts_nothing() -> None:
    others = Others(x=at(4))
    heads = [Head.after(c).digest for c in others.replicas["x"].certificates]
    others.looks = [[record("x", digest)] for digest in heads[:-1]]
    me = Me(at(4), others)
    async with asyncio.TaskGroup() as tasks:
        catch_up(me, others).watch(tasks)
    assert others.averages == others.downloads == 0


# -- whole sessions ---------------------------------------------------------------------------

LARGE = 6 * LEAF_ELEMENTS
STATE_BYTES = 8 * LARGE


async def four_donors(four: Swarm, gate: threading.Event) -> list[Peer]:
    """Four peers that hold a state of `LARGE` elements and stay in their first round."""

    def held_up(theta_N: Tensor, _: int) -> Tensor:
        gate.wait(60)
        return theta_N - 1.0

    donors = [four.start(held_up) for _ in range(4)]
    await four.until(lambda: all(len(d.session.status().members) == 4 for d in donors))
    return donors


@pytest.mark.slow
async def test_a_newcomer_gets_its_state_from_all_donors() -> None:
    gate = threading.Event()
    config = RoundConfig(start_peers=4, codec="int4")
    async with swarm(config, numel=LARGE, serve_bps=6e6) as four:
        try:
            donors = await four_donors(four, gate)
            before = [donor.session.status().bytes_sent for donor in donors]
            newcomer = four.start()
            await four.until(lambda: newcomer.session.status().digest != "", 60)
            sent = [
                donor.session.status().bytes_sent - already
                for donor, already in zip(donors, before, strict=True)
            ]
        finally:
            gate.set()
        assert newcomer.session.status().digest == donors[0].session.status().digest
        # All of it came once, but for what was asked for twice in the end, and from everybody.
        assert STATE_BYTES <= sum(sent) < 1.4 * STATE_BYTES
        assert all(0.1 * STATE_BYTES < one < 0.45 * STATE_BYTES for one in sent)


def corrupting(session: Session) -> Callable[[str, bytes], AsyncIterator[bytes]]:
    honest = session.fetch

    async def fetch(sender: str, request: bytes) -> AsyncIterator[bytes]:
        async for frame in honest(sender, request):
            yield frame if len(frame) < 2**20 else frame[:-1] + bytes([frame[-1] ^ 1])

    return fetch


@pytest.mark.slow
async def test_a_donor_that_is_killed_and_one_that_lies_cost_no_more_than_their_share(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = threading.Event()
    config = RoundConfig(start_peers=4, codec="int4")
    async with swarm(config, numel=LARGE, serve_bps=6e6) as four:
        try:
            donors = await four_donors(four, gate)
            liar, victim = donors[1], donors[2]
            liar.session.fetch = corrupting(liar.session)  # type: ignore[method-assign]
            already = victim.session.status().bytes_sent
            newcomer = four.start()
            await four.until(lambda: victim.session.status().bytes_sent - already > 2**20, 60)
            four.peers.remove(victim)
            victim.network.cancel()
            await asyncio.gather(victim.network, return_exceptions=True)
            await four.until(lambda: newcomer.session.status().digest != "", 60)
        finally:
            gate.set()
        assert newcomer.session.status().digest == donors[0].session.status().digest
        lied = [line for line in caplog.messages if line.startswith("transfer.donor_lied")]
        assert len(lied) == 1
        assert four.identities[1].peer_id in lied[0]


@pytest.mark.slow
async def test_a_download_that_takes_ten_rounds_converges(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "coordinator_free")
    numel = 3 * LEAF_ELEMENTS
    # In fp32, donors keep the last two averages and no more.
    config = RoundConfig(start_peers=2, codec="fp32")
    pause = threading.Event()

    def train(theta_N: Tensor, _: int) -> Tensor:
        pause.wait(0.4)  # a round takes longer than to fetch its average, as any that trains does
        return theta_N - 1.0

    async with swarm(config, numel=numel) as two:
        first, _ = two.start(train), two.start(train)
        await two.until(lambda: len(first.results) >= 1)
        began = first.results[-1].round
        caplog.clear()
        donors = [peer.session._donor for peer in two.peers]

        def throttle(bps: float) -> None:
            for donor in donors:
                assert donor is not None
                donor._throttle._bps = bps

        throttle(0.1e6)
        newcomer = two.start()
        await two.until(lambda: first.results[-1].round - began >= 10, 100)
        throttle(1e9)
        await two.until(lambda: any(r.included for r in newcomer.results), 100)
        joined = next(r for r in newcomer.results if r.included)
        await two.until(lambda: joined.round in rounds_of(first))
        assert joined.round - began >= 10
        assert rounds_of(first)[joined.round] == joined.digest
        downloads = [line for line in caplog.messages if line.startswith("transfer.state ")]
        assert len(downloads) == 1
