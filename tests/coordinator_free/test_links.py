"""Rounds over links of known speeds: real butterflies, measured, believed and planned by the rest.

On a clock that jumps. Sockets take what they get at once, as real ones do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any

import pytest
import torch

from coordinator_free.average import Average
from coordinator_free.bandwidth import RAISE, Rate
from coordinator_free.butterfly import Butterfly
from coordinator_free.codecs import codec
from coordinator_free.config import Layout, RoundConfig
from coordinator_free.links import Links
from coordinator_free.messages import NO_DIGEST, FetchChunks, Plan, View
from coordinator_free.partition import largest_chunk
from coordinator_free.planning import Seat, draft
from coordinator_free.shares import Party, balance, times
from coordinator_free.wire import plan_digest, unpack_frame
from dht.errors import Unreachable
from tests.coordinator_free.virtual import Inline, now, run

NUMEL = 1 << 18
VECTOR = 4 * NUMEL  # bytes
CONFIG = RoundConfig(codec="fp32", exchange_s=600.0)
LAYOUT = Layout(lengths=(NUMEL,), largest_chunk=largest_chunk(codec("fp32").encoded_bytes))
BPS = 250e3  # an equal exchange of four takes 6.3 s
SOCKET = VECTOR // 4  # bytes that a stream takes at once: what one of four sends to another
PACKET = 4096
WINDOW = 8  # packets of a stream that are on their way
USED = 4096


class Wire:
    """One direction of a peer's link."""

    def __init__(self, bps: float) -> None:
        self.bps = bps
        self._free_at = 0.0

    async def carry(self, nbytes: int) -> None:
        """Streams take turns, as each has one packet in the line."""
        self._free_at = max(now(), self._free_at) + nbytes / self.bps
        await asyncio.sleep(self._free_at - now())


class Flow:
    """One way of a stream: the socket, the uplink of the sender, the downlink of the receiver."""

    def __init__(self, source: Machine, target: Machine) -> None:
        self._source, self._target = source, target
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._travelling: asyncio.Queue[tuple[int, bytes | None, bool]] = asyncio.Queue(WINDOW)
        self._room = asyncio.Condition()
        self.arrived: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.unsent = 0
        self.acked = 0
        source.flows.append(self)
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    async def write(self, frame: bytes | None) -> None:
        """A frame, or None for the end; over when the socket has taken it."""
        async with self._room:
            if frame is not None:
                self._source.written += len(frame)
                await self._room.wait_for(lambda: self.unsent < SOCKET)
                self.unsent += len(frame)
            self._frames.put_nowait(frame)

    async def read(self) -> bytes | None:
        frame = await self.arrived.get()
        self._target.received += len(frame or b"")
        return frame

    async def _send(self) -> None:
        while True:
            frame = await self._frames.get()
            left = len(frame or b"")
            while left:
                nbytes = min(PACKET, left)
                left -= nbytes
                await self._source.up.carry(nbytes)
                async with self._room:
                    self.unsent -= nbytes
                    self._room.notify_all()
                await self._travelling.put((nbytes, frame, not left))
            if frame is None:
                await self._travelling.put((0, None, True))

    async def _receive(self) -> None:
        while True:
            nbytes, frame, whole = await self._travelling.get()
            await self._target.down.carry(nbytes)
            self.acked += nbytes
            if whole:
                self.arrived.put_nowait(frame)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


class Machine:
    """A peer: its link, what its sockets say, and what it makes of that."""

    def __init__(self, up_bps: float, down_bps: float) -> None:
        self.up, self.down = Wire(up_bps), Wire(down_bps)
        self.flows: list[Flow] = []
        self.written = self.received = 0
        self._seen: dict[Flow, int] = {}
        self.links = Links(lambda: (self.written, self.received), self._look)

    def _look(self) -> tuple[int, bool]:
        """As `sockets.Outgoing` does."""
        waiting = sum(flow.unsent > 0 for flow in self.flows)
        used = sum(
            flow.unsent > 0 or flow.acked - self._seen.get(flow, 0) >= USED for flow in self.flows
        )
        self._seen = {flow: flow.acked for flow in self.flows}
        return sum(flow.acked for flow in self.flows), 2 * waiting > used


class Line:
    """A stream to a reducer (`butterfly.Stream`)."""

    def __init__(self, sender: str, reducer: str, swarm: Swarm) -> None:
        self._name = reducer
        self.there = Flow(swarm.machines[sender], swarm.machines[reducer])
        self.back = Flow(swarm.machines[reducer], swarm.machines[sender])
        self.task = asyncio.create_task(self._serve(sender, swarm.butterflies[reducer]))

    async def _serve(self, sender: str, reducer: Butterfly) -> None:
        first = await self.there.read()
        assert first is not None
        number = unpack_frame(first)[0].slice
        async with aclosing(reducer.serve(sender, number, self._frames())) as served:
            async for frame in served:
                await self.back.write(frame)
        await self.back.write(None)

    async def _frames(self) -> AsyncIterator[bytes]:
        while (frame := await self.there.read()) is not None:
            yield frame

    async def send(self, frame: bytes, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            await self.there.write(frame)

    async def done_sending(self, timeout_s: float) -> None:
        await self.there.write(None)

    async def receive(self, timeout_s: float) -> bytes | None:
        async with asyncio.timeout(timeout_s):
            return await self.back.read()

    async def close(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        self.there.close()
        self.back.close()


class Wires:
    """What a butterfly needs of the wire (`butterfly.Network`)."""

    def __init__(self, swarm: Swarm, me: str) -> None:
        self._swarm = swarm
        self._me = me

    @asynccontextmanager
    async def connect(self, peer: str) -> AsyncIterator[Line]:
        line = Line(self._me, peer, self._swarm)
        try:
            yield line
        finally:
            await line.close()

    def fetch(
        self, peer: str, request: FetchChunks, timeout_s: float
    ) -> AbstractAsyncContextManager[Any]:
        raise Unreachable(peer, "nothing is mended here")


class Swarm:
    """Rounds of the peers a, b, c, ..."""

    def __init__(self, rates: list[tuple[float, float]]) -> None:
        self.machines = {chr(97 + n): Machine(*rate) for n, rate in enumerate(rates)}
        self.butterflies: dict[str, Butterfly] = {}
        self.claims: dict[str, Rate] = {}  # of those that do not say what they measured
        self.plan: Plan | None = None
        self.took_s = 0.0

    async def round(self) -> dict[str, float]:
        """Plan, exchange, measure; who reduced how much."""
        seats = [
            Seat(
                peer_id=name,
                can_reduce=True,
                samples=8,
                rate=self.claims.get(name, machine.links.rate),
                views=tuple(
                    View(peer_id=peer, up_bps=int(rate.up_bps), down_bps=int(rate.down_bps))
                    for peer, rate in machine.links.views.items()
                ),
            )
            for name, machine in self.machines.items()
        ]
        plan = self.plan = _plan(seats, 0 if self.plan is None else self.plan.round + 1)
        values_N = torch.zeros(NUMEL)
        self.butterflies = {
            name: Butterfly(plan, plan_digest(plan), name, values_N, Wires(self, name), Inline())
            for name in self.machines
        }
        began = now()
        async with asyncio.TaskGroup() as tasks:
            ends = [tasks.create_task(self._exchange(name)) for name in self.machines]
        self.took_s = now() - began
        assert all(isinstance(end.result(), Average) for end in ends)
        self.butterflies.clear()  # they lead back here: their memory would wait for the collector
        for machine in self.machines.values():
            machine.flows.clear()
        counts = dict.fromkeys(self.machines, 0)
        for piece in plan.slices:
            counts[piece.reducer] += piece.stop - piece.start
        return {name: count / plan.chunks for name, count in counts.items()}

    async def _exchange(self, name: str) -> Average:
        butterfly = self.butterflies[name]
        async with self.machines[name].links.watching(butterfly), asyncio.TaskGroup() as tasks:
            tasks.create_task(butterfly.reduce())
            average = tasks.create_task(butterfly.run())
        return average.result()

    def believed(self, name: str) -> float:
        """The uplink that the last plan was made with."""
        assert self.plan is not None
        return next(float(link.up_bps) for link in self.plan.links if link.peer_id == name)

    def best(self) -> tuple[dict[str, float], float]:
        """The shares that the links allow at the best, and the seconds."""
        parties = [
            Party(peer_id=name, up_bps=machine.up.bps, down_bps=machine.down.bps)
            for name, machine in self.machines.items()
        ]
        shares = balance(parties)
        return dict(zip(self.machines, shares, strict=True)), max(times(parties, shares)) * VECTOR


def _plan(seats: list[Seat], round: int) -> Plan:
    drafted = draft(seats, LAYOUT, round, CONFIG, None)
    return Plan(
        height=round,
        round=round,
        ballot=0,
        attempt=0,
        previous=NO_DIGEST,
        base=NO_DIGEST,
        receivers=tuple(seat.peer_id for seat in seats),
        contributions=drafted.contributions,
        slices=drafted.slices,
        kept=(),
        links=drafted.links,
        expected_s=drafted.expected_s,
        numel=NUMEL,
        chunk_elements=drafted.chunk_elements,
        codec="fp32",
        exchange_s=drafted.exchange_s,
        stall_s=drafted.exchange_s / 5,
    )


EQUAL = [(BPS, 5 * BPS)] * 4


SLOWEST = 1.15  # times the best: with 64 chunks, all stand still while the last one is added up


def near(shares: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Within a tenth of what each would have if all were equal, and two chunks of 64."""
    return all(abs(shares[peer] - best[peer]) <= 0.1 / len(best) + 2 / 64 for peer in best)


@pytest.mark.parametrize(
    "lines",
    [
        EQUAL,
        [(5 * BPS, 5 * BPS)] + [(BPS, 5 * BPS)] * 3,
        [(BPS, 4 * BPS)] * 2 + [(2 * BPS, 4 * BPS)] * 2,
    ],
    ids=["equal", "one wide uplink", "two and two"],
)
def test_the_first_exchange_shows_what_the_links_are(lines: list[tuple[float, float]]) -> None:
    async def story() -> None:
        swarm = Swarm(lines)
        best, best_s = swarm.best()
        await swarm.round()
        for number in range(5):
            shares = await swarm.round()
            assert near(shares, best), (number, shares)
            assert swarm.took_s < SLOWEST * best_s

    run(story())


def test_a_downlink_that_is_the_slower_one_costs_one_round_more() -> None:
    async def story() -> None:
        swarm = Swarm([(4 * BPS, 4 * BPS)] * 3 + [(4 * BPS, BPS)])
        best, best_s = swarm.best()
        await swarm.round()
        await swarm.round()
        for _ in range(5):
            assert near(await swarm.round(), best)
            assert swarm.took_s < SLOWEST * best_s

    run(story())


def test_a_link_that_looked_five_times_as_fast_costs_one_round() -> None:
    async def story() -> None:
        swarm = Swarm(EQUAL)
        best, best_s = swarm.best()
        swarm.machines["a"].up.bps *= 5  # as through an empty bucket, and only in this exchange
        await swarm.round()
        swarm.machines["a"].up.bps /= 5
        assert (await swarm.round())["a"] > 0.9
        for number in range(5):
            shares = await swarm.round()
            assert near(shares, best), (number, shares)
            assert swarm.took_s < SLOWEST * best_s

    run(story())


@pytest.mark.parametrize("slow", [["d"], ["c", "d"]])
def test_who_was_given_next_to_nothing_comes_back_with_its_link(slow: list[str]) -> None:
    async def story() -> None:
        swarm = Swarm(EQUAL)
        best, best_s = swarm.best()
        for name in slow:
            swarm.machines[name].up.bps /= 10
        for _ in range(4):
            shares = await swarm.round()
        assert max(shares[name] for name in slow) < 0.02
        for name in slow:
            swarm.machines[name].up.bps *= 10
        await swarm.round()
        for number in range(3):
            shares = await swarm.round()
            assert near(shares, best), (number, shares)
            assert swarm.took_s < SLOWEST * best_s

    run(story())


def test_who_claims_too_much_is_believed_less_from_then_on() -> None:
    async def story() -> None:
        swarm = Swarm(EQUAL)
        _, best_s = swarm.best()
        await swarm.round()
        claim = swarm.claims["d"] = Rate(up_bps=4 * BPS, down_bps=5 * BPS)
        await swarm.round()
        assert swarm.believed("d") == claim.up_bps
        assert swarm.took_s > 2 * best_s
        for number in range(12):
            await swarm.round()
            assert swarm.believed("d") <= RAISE * BPS, number
            assert swarm.took_s < SLOWEST * best_s, number
            assert all(swarm.believed(name) >= 0.9 * BPS for name in "abc"), number

    run(story())
