from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from coordinator_free import outbox, wire
from coordinator_free.contact import Contact
from coordinator_free.messages import Leave, Message
from coordinator_free.outbox import QUEUED, Outbox
from coordinator_free.transport import Client
from dht.errors import Unreachable


def contact(name: str, port: int = 1) -> Contact:
    return Contact(name, ("host",), port, bytes(32))


class Lines:
    """A client whose deliveries the test lets through, or not, one by one."""

    def __init__(self) -> None:
        self.tried: list[tuple[str, Message]] = []
        self.contacts: list[Contact] = []
        self.open: dict[str, asyncio.Semaphore] = {}
        self.down: set[str] = set()
        self.timeouts: set[float] = set()

    def hold(self, peer: str) -> asyncio.Semaphore:
        return self.open.setdefault(peer, asyncio.Semaphore(0))

    async def deliver(self, to: Contact, message: bytes, timeout_s: float) -> bytes:
        self.tried.append((to.peer_id, wire.decode(message)))
        self.contacts.append(to)
        self.timeouts.add(timeout_s)
        if to.peer_id in self.open:
            await self.open[to.peer_id].acquire()
        if to.peer_id in self.down:
            raise Unreachable(to.peer_id, "gone")
        return b""

    def heights(self, peer: str) -> list[int]:
        return [m.height for to, m in self.tried if to == peer and isinstance(m, Leave)]


class Desk:
    def __init__(self, lines: Lines, tasks: asyncio.TaskGroup) -> None:
        self.verdicts: list[tuple[str, bool]] = []
        self.on_failed: Callable[[str], None] = lambda peer: None
        self.outbox = Outbox(
            client=cast(Client, lines),
            tasks=tasks,
            deliver_s=3.0,
            on_delivered=lambda peer: self.verdicts.append((peer, True)),
            on_failed=self._failed,
        )

    def _failed(self, peer: str) -> None:
        self.verdicts.append((peer, False))
        self.on_failed(peer)

    def send(self, peer: str, *heights: int) -> None:
        for height in heights:
            self.outbox.send(contact(peer), Leave(height=height))


class Done(Exception):
    pass


@asynccontextmanager
async def desk(lines: Lines) -> AsyncIterator[Desk]:
    try:
        async with asyncio.TaskGroup() as tasks:
            yield Desk(lines, tasks)
            raise Done
    except* Done:
        pass


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    pytest.fail("it never came about")


async def test_messages_of_a_peer_arrive_in_order_and_are_confirmed() -> None:
    lines = Lines()
    async with desk(lines) as at:
        at.send("a", *range(10))
        await at.outbox.flush()
        assert lines.heights("a") == list(range(10))
        assert at.verdicts == [("a", True)] * 10
        assert lines.timeouts == {3.0}


async def test_one_delivery_at_a_time_for_each_peer() -> None:
    lines = Lines()
    gate = lines.hold("a")
    async with desk(lines) as at:
        at.send("a", 1, 2)
        await until(lambda: lines.heights("a") == [1])
        for _ in range(20):
            await asyncio.sleep(0)
        assert lines.heights("a") == [1]
        gate.release()
        await until(lambda: lines.heights("a") == [1, 2])


async def test_what_is_said_again_while_it_is_on_its_way_holds_up_nothing() -> None:
    lines = Lines()
    gate = lines.hold("a")
    async with desk(lines) as at:
        at.send("a", 1)
        await until(lambda: lines.heights("a") == [1])
        at.send("a", 1, 1, 2, 2, 1)  # the last one takes 2 back
        for _ in range(3):
            gate.release()
        await at.outbox.flush()
        assert lines.heights("a") == [1, 2, 1]
        at.send("a", 1)  # said again later, it may have been lost on the other side
        gate.release()
        await at.outbox.flush()
        assert lines.heights("a") == [1, 2, 1, 1]
        assert at.verdicts == [("a", True)] * 4


async def test_what_failed_may_be_said_again_at_once() -> None:
    lines = Lines()
    lines.down.add("a")
    async with desk(lines) as at:

        def again(peer: str) -> None:
            lines.down.clear()
            at.send(peer, 1)

        at.on_failed = again
        at.send("a", 1)
        await at.outbox.flush()
        assert lines.heights("a") == [1, 1]


async def test_a_slow_peer_delays_nobody_else() -> None:
    lines = Lines()
    lines.hold("slow")
    async with desk(lines) as at:
        at.send("slow", 1, 2, 3)
        at.send("quick", 1, 2, 3)
        await until(lambda: at.verdicts == [("quick", True)] * 3)
        assert lines.heights("slow") == [1]


async def test_a_failure_is_reported_once_and_drops_what_waits_for_that_peer_alone() -> None:
    lines = Lines()
    gate = lines.hold("dead")
    lines.down.add("dead")
    async with desk(lines) as at:
        at.send("dead", 1, 2, 3)
        at.send("live", 1)
        await until(lambda: lines.heights("dead") == [1])
        gate.release()
        await at.outbox.flush()
        assert sorted(at.verdicts) == [("dead", False), ("live", True)]
        assert lines.heights("dead") == [1]
        lines.down.clear()  # and when it is back, what is sent from then on arrives
        at.send("dead", 4)
        gate.release()
        await at.outbox.flush()
        assert lines.heights("dead") == [1, 4]
        assert at.verdicts[-1] == ("dead", True)


async def test_what_is_sent_because_of_a_failure_is_not_dropped_with_the_rest() -> None:
    lines = Lines()
    lines.down.add("a")
    async with desk(lines) as at:

        def again(peer: str) -> None:
            lines.down.clear()
            at.send(peer, 9)

        at.on_failed = again
        at.send("a", 1, 2)
        await at.outbox.flush()
        assert lines.heights("a") == [1, 9]


async def test_the_oldest_gives_way_when_a_queue_is_full() -> None:
    lines = Lines()
    gate = lines.hold("a")
    async with desk(lines) as at:
        at.send("a", 0)
        await until(lambda: lines.heights("a") == [0])
        at.send("a", *range(1, QUEUED + 3))
        for _ in range(QUEUED + 1):
            gate.release()
        await at.outbox.flush()
        assert lines.heights("a") == [0, *range(3, QUEUED + 3)]


async def test_each_message_goes_to_the_address_it_was_sent_to() -> None:
    lines = Lines()
    async with desk(lines) as at:
        at.outbox.send(contact("a", 1), Leave(height=1))
        at.outbox.send(contact("a", 2), Leave(height=2))
        await at.outbox.flush()
        assert [to.port for to in lines.contacts] == [1, 2]


async def test_an_idle_queue_is_taken_down_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "IDLE_S", 0.0)
    lines = Lines()
    async with desk(lines) as at:
        tasks = len(asyncio.all_tasks())
        at.send("a", 1)
        assert len(asyncio.all_tasks()) == tasks + 1
        await at.outbox.flush()
        await until(lambda: len(asyncio.all_tasks()) == tasks)
        at.send("a", 2)
        await at.outbox.flush()
        assert lines.heights("a") == [1, 2]


async def test_once_the_session_breaks_off_nothing_is_sent() -> None:
    lines = Lines()
    async with desk(lines) as at:
        at.send("a", 1)
        await at.outbox.flush()
    at.send("b", 1)  # there is no task any more that could deliver it
    await at.outbox.flush()
    assert (lines.heights("a"), lines.heights("b")) == ([1], [])
