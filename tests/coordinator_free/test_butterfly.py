"""Butterflies connected by streams in memory, on a clock that jumps: nothing here really waits."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator_free import reducer as reducer_module
from coordinator_free.average import Average, Chunk, ChunkStore, contributor_bits
from coordinator_free.butterfly import PATIENCE, Butterfly, ExchangeFailed
from coordinator_free.codecs import codec
from coordinator_free.messages import (
    NO_DIGEST,
    Contribution,
    FetchChunks,
    FrameHeader,
    Kept,
    Plan,
    Run,
    Slice,
)
from coordinator_free.partition import chunk_span, runs_of, share
from coordinator_free.planning import weights
from coordinator_free.reducer import WINDOW, Reducer
from coordinator_free.wire import pack_frame, plan_digest, unpack_frame
from dht.errors import PeerError, ProtocolViolation, TimedOut, Unreachable
from tests.coordinator_free.virtual import Inline, now, run

T = TypeVar("T")
EXCHANGE_S = 60.0
STALL_S = 20.0
CHUNK = 256
OPENING = pack_frame(FrameHeader(plan=NO_DIGEST))
END = None


class Line:
    """One exchange: what a client says comes out at the reducer's `serve`, and back."""

    def __init__(self, sender: str, reducer: Butterfly, name: str) -> None:
        self.name = name
        self.up: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self.down: asyncio.Queue[bytes | PeerError | None] = asyncio.Queue(1)
        self.ended = False
        self.pump = asyncio.create_task(self._pump(sender, reducer))

    async def _pump(self, sender: str, reducer: Butterfly) -> None:
        try:
            first = await self.up.get()  # names the plan and the slice
            number = unpack_frame(first)[0].slice if first else 0
            async with aclosing(reducer.serve(sender, number, self._frames())) as served:
                async for frame in served:
                    await self.down.put(frame)
            self._end()
            await self.down.put(END)
        except Exception as error:
            self._end()
            await self.down.put(Unreachable(self.name, repr(error)))

    def _end(self) -> None:
        self.ended = True
        while not self.up.empty():
            self.up.get_nowait()

    async def _frames(self) -> AsyncIterator[bytes]:
        while (frame := await self.up.get()) is not END:
            yield frame

    async def send(self, frame: bytes, timeout_s: float) -> None:
        if self.ended:
            raise Unreachable(self.name, "the stream has ended")
        async with asyncio.timeout(timeout_s):
            await self.up.put(frame)

    async def done_sending(self, timeout_s: float) -> None:
        if self.ended:
            raise Unreachable(self.name, "the stream has ended")
        async with asyncio.timeout(timeout_s):
            await self.up.put(END)

    async def receive(self, timeout_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(timeout_s):
                item = await self.down.get()
        except TimeoutError as error:
            raise TimedOut(self.name, "no frame") from error
        if isinstance(item, PeerError):
            raise item
        return item


class Script:
    """A reducer's side of a stream as the test wants it."""

    def __init__(self, frames: list[bytes], *, at_end: PeerError | None = None) -> None:
        self.frames = list(frames)
        self.at_end = at_end
        self.sent: list[bytes] = []

    async def send(self, frame: bytes, timeout_s: float) -> None:
        self.sent.append(frame)

    async def done_sending(self, timeout_s: float) -> None:
        if self.at_end is not None:
            raise self.at_end

    async def receive(self, timeout_s: float) -> bytes | None:
        return self.frames.pop(0) if self.frames else END


class Mute(Script):
    """Takes everything and never answers."""

    async def receive(self, timeout_s: float) -> bytes | None:
        await asyncio.sleep(timeout_s)
        raise TimedOut("b", "never answers")


class Ends:
    """One member's end of every line."""

    def __init__(self, net: Net, me: str) -> None:
        self.net = net
        self.me = me

    def connect(self, peer: str) -> AbstractAsyncContextManager[Any]:
        return self.net.open(self.me, peer)

    def fetch(
        self, peer: str, request: FetchChunks, timeout_s: float
    ) -> AbstractAsyncContextManager[Any]:
        return self.net.fetch(self.me, peer, request)


class Net:
    """Everybody's butterfly of one plan; `odd[sender, reducer]` replaces a stream.

    `before` is that of the plan that this one mends.
    """

    def __init__(
        self, plan: Plan, values: dict[str, Tensor | None], before: Net | None = None
    ) -> None:
        self.plan = plan
        self.odd: dict[tuple[str, str], Script | PeerError] = {}
        self.before = before
        self.fetched: list[tuple[str, str, FetchChunks]] = []
        self.members = {
            name: Butterfly(
                plan,
                plan_digest(plan),
                name,
                own_N,
                Ends(self, name),
                Inline(),
                before.members.get(name) if before else None,
            )
            for name, own_N in values.items()
        }

    @asynccontextmanager
    async def fetch(self, sender: str, peer: str, request: FetchChunks) -> AsyncIterator[Any]:
        odd = self.odd.get((sender, peer))
        if isinstance(odd, PeerError):
            raise odd
        self.fetched.append((sender, peer, request))
        source = next(n for n in (self, self.before) if n and plan_digest(n.plan) == request.plan)

        async def frames() -> AsyncIterator[bytes]:
            for frame in source.members[peer].frames(request):
                yield frame

        yield frames()

    @asynccontextmanager
    async def open(self, sender: str, reducer: str) -> AsyncIterator[Any]:
        odd = self.odd.get((sender, reducer))
        if isinstance(odd, PeerError):
            raise odd
        if odd is not None:
            yield odd
            return
        line = Line(sender, self.members[reducer], reducer)
        try:
            yield line
        finally:
            line.pump.cancel()
            with suppress(asyncio.CancelledError):
                await line.pump

    async def speak(self, sender: str, reducer: str, frames: list[bytes]) -> None:
        """Open an exchange, say this much, and break off."""
        async with self.open(sender, reducer) as line:
            await line.send(OPENING, EXCHANGE_S)
            for frame in frames:
                with suppress(Unreachable):
                    await line.send(frame, EXCHANGE_S)
            await asyncio.sleep(1)  # on this clock: until nobody has anything left to do

    async def all(
        self,
        *others: Coroutine[Any, Any, None],
        without: tuple[str, ...] = (),
    ) -> dict[str, Average | BaseException]:
        """Run every butterfly but those `without`, who are played by `others`."""
        names = [name for name in self.members if name not in without]
        serving = [asyncio.create_task(self.members[name].reduce()) for name in names]
        played = [asyncio.create_task(other) for other in others]
        ends = await asyncio.gather(
            *(self.members[name].run() for name in names), return_exceptions=True
        )
        await asyncio.gather(*serving)
        for task in played:
            task.cancel()
        for end in await asyncio.gather(*played, return_exceptions=True):
            assert end is None or isinstance(end, asyncio.CancelledError), end
        return dict(zip(names, ends, strict=True))


def make_plan(
    samples: dict[str, int],
    numel: int,
    *,
    reducers: tuple[str, ...] | None = None,
    chunk: int = CHUNK,
    codec_name: str = "fp32",
    slices: tuple[Slice, ...] | None = None,
) -> Plan:
    """`samples` names every receiver; those with none do not contribute."""
    names = tuple(samples)
    return Plan(
        height=1,
        round=3,
        ballot=0,
        attempt=0,
        previous=NO_DIGEST,
        base=NO_DIGEST,
        receivers=names,
        contributions=tuple(
            Contribution(peer_id=name, samples=count) for name, count in samples.items() if count
        ),
        slices=slices or share([Run(start=0, stop=-(-numel // chunk))], reducers or names),
        kept=(),
        numel=numel,
        chunk_elements=chunk,
        codec=codec_name,
        exchange_s=EXCHANGE_S,
        stall_s=STALL_S,
    )


def vectors(names: tuple[str, ...], numel: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(numel, generator=generator) for name in names}


def mean(plan: Plan, values: dict[str, Tensor], present: set[str]) -> np.ndarray:
    """The protocol's mean, operation by operation, in the order of the plan."""
    total = sum(c.samples for c in plan.contributions if c.peer_id in present)
    sum_N = np.zeros(plan.numel, np.float32)
    for c in plan.contributions:
        if c.peer_id in present:
            sum_N = sum_N + values[c.peer_id].numpy() * np.float32(c.samples / total)
    return sum_N


def averages(ends: dict[str, Average | BaseException]) -> dict[str, Average]:
    for end in ends.values():
        assert isinstance(end, Average), repr(end)
    assert len({end.root for end in ends.values()}) == 1, "replicas differ"
    return ends


def spans(plan: Plan, number: int) -> list[tuple[int, int, int]]:
    """(index, start, stop) of every chunk of a slice."""
    piece = plan.slices[number]
    return [
        (n, *chunk_span(n, plan.chunk_elements, plan.numel)) for n in range(piece.start, piece.stop)
    ]


def reduced(plan: Plan, number: int, values_N: Tensor) -> list[bytes]:
    """What a correct reducer would say who has nobody's values but these."""
    everybody = {c.peer_id for c in plan.contributions}
    return [
        Chunk(
            index,
            stop - start,
            contributor_bits(plan, everybody),
            codec(plan.codec).encode(values_N[start:stop]),
        ).frame()
        for index, start, stop in spans(plan, number)
    ]


def contributed(plan: Plan, number: int, values_N: Tensor) -> list[bytes]:
    """What a correct contributor says to the reducer of a slice."""
    return [
        pack_frame(
            FrameHeader(chunk=index, elements=stop - start),
            codec(plan.codec).encode(values_N[start:stop]),
        )
        for index, start, stop in spans(plan, number)
    ]


# -- laws -------------------------------------------------------------------------------------


@st.composite
def exchanges(draw: st.DrawFn, codec_name: str) -> tuple[Plan, dict[str, Tensor]]:
    numel = draw(st.integers(1, 6000))
    counts = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=5).filter(any))
    samples = {f"p{index}": count for index, count in enumerate(counts)}
    reducers = draw(st.permutations(list(samples)))[: draw(st.integers(1, len(samples)))]
    plan = make_plan(
        samples,
        numel,
        reducers=tuple(reducers),
        chunk=draw(st.sampled_from([200, 256, 1000, 1024, 2500, 10_000])),
        codec_name=codec_name,
    )
    return plan, vectors(plan.receivers, numel, draw(st.integers(0, 99)))


def play(plan: Plan, values: dict[str, Tensor]) -> dict[str, Average]:
    async def story() -> dict[str, Average]:
        weights = {c.peer_id for c in plan.contributions}
        net = Net(plan, {n: v if n in weights else None for n, v in values.items()})
        ends = averages(await net.all())
        assert all(member.lost == () for member in net.members.values())
        assert now() == 0.0  # nobody waited for anything but data
        return ends

    return run(story())


@settings(max_examples=40, deadline=None)
@given(exchanges("fp32"))
def test_the_result_is_the_weighted_mean_bit_for_bit(
    exchange: tuple[Plan, dict[str, Tensor]],
) -> None:
    plan, values = exchange
    expected = mean(plan, values, {c.peer_id for c in plan.contributions})
    for average in play(plan, values).values():
        assert np.array_equal(average.values().numpy(), expected)
    exact = sum(values[c.peer_id].double() * c.samples for c in plan.contributions) / sum(
        c.samples for c in plan.contributions
    )
    assert np.allclose(expected, exact, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(exchanges("int4"))
def test_int4_results_are_bit_identical_and_near_the_mean(
    exchange: tuple[Plan, dict[str, Tensor]],
) -> None:
    plan, values = exchange
    contributors = {c.peer_id for c in plan.contributions}
    ends = play(plan, values)  # equal roots: checked there
    payloads = {b"".join(bytes(c.payload) for c in end.chunks) for end in ends.values()}
    assert len(payloads) == 1
    largest = max(float(values[name].abs().max()) for name in contributors)
    off = np.abs(next(iter(ends.values())).values().numpy() - mean(plan, values, contributors))
    assert off.max() <= 0.15 * largest  # both roundings: 0.0722 each, the second of 1.0722


def test_a_root_depends_on_the_values_and_on_who_is_in_them() -> None:
    plan = make_plan({"a": 1, "b": 2}, 3000)
    values = vectors(plan.receivers, 3000)
    root = play(plan, values)["a"].root
    assert play(plan, values)["b"].root == root
    values["b"][2999] += 1e-3
    assert play(plan, values)["a"].root != root


# -- contributors that fail -------------------------------------------------------------------

FOUR = (Slice(reducer="a", start=0, stop=4),)


@pytest.mark.parametrize("delivered", [0, 1, 3, 4])
def test_a_contributor_that_breaks_off_is_missing_from_exactly_the_rest(delivered: int) -> None:
    async def story() -> None:
        plan = make_plan({"a": 5, "b": 7, "c": 3}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        frames = contributed(plan, 0, values["c"])[:delivered]
        ends = averages(await net.all(net.speak("c", "a", frames), without=("c",)))
        average = ends["b"]
        with_c = mean(plan, values, {"a", "b", "c"})
        without_c = mean(plan, values, {"a", "b"})
        for index, chunk in enumerate(average.chunks):
            there = index < delivered
            assert chunk.contributors == (b"\x07" if there else b"\x03")
            span = slice(index * CHUNK, (index + 1) * CHUNK)
            expected = (with_c if there else without_c)[span]
            assert np.array_equal(average.values().numpy()[span], expected)
        assert net.members["a"].lost == (() if delivered == 4 else ("c",))
        assert now() < STALL_S  # a broken stream is noticed at once

    run(story())


def test_nobody_waits_for_a_dropped_contributor_and_what_it_reduces_still_counts() -> None:
    async def story() -> None:
        plan = make_plan({"a": 5, "b": 7, "c": 3}, 3 * CHUNK)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def nothing_comes() -> None:
            """Of c, which reduces its own slice all the same."""
            reducing = asyncio.create_task(net.members["c"].reduce())
            await asyncio.sleep(1)
            for name in ("a", "b"):
                net.members[name].drop_contributor("c")
            await reducing

        ends = averages(await net.all(nothing_comes(), without=("c",)))
        assert now() < STALL_S
        assert [chunk.contributors for chunk in ends["b"].chunks] == [b"\x03", b"\x03", b"\x07"]
        assert net.members["a"].lost == net.members["b"].lost == ("c",)

    run(story())


def test_contributors_that_stall_together_cost_the_wait_for_one() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def stall(name: str, chunks: int) -> None:
            async with net.open(name, "a") as line:
                await line.send(OPENING, EXCHANGE_S)
                for frame in contributed(plan, 0, values[name])[:chunks]:
                    await line.send(frame, EXCHANGE_S)
                await asyncio.sleep(1000)

        ends = averages(
            await net.all(stall("c", 2), stall("d", 2), stall("e", 2), without=("c", "d", "e"))
        )
        assert [chunk.contributors for chunk in ends["b"].chunks] == [b"\x1f"] * 2 + [b"\x03"] * 2
        assert net.members["a"].lost == ("c", "d", "e")
        assert now() == pytest.approx(STALL_S)

    run(story())


def test_who_is_just_in_time_with_every_chunk_does_not_cost_the_slice() -> None:
    async def story() -> None:
        slices = (Slice(reducer="a", start=0, stop=8),)
        plan = make_plan({"a": 1, "b": 1, "c": 1}, 8 * CHUNK, slices=slices)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def dribble() -> None:
            async with net.open("c", "a") as line:
                await line.send(OPENING, EXCHANGE_S)
                for frame in contributed(plan, 0, values["c"]):
                    await asyncio.sleep(0.95 * STALL_S)
                    with suppress(Unreachable):
                        await line.send(frame, EXCHANGE_S)

        ends = averages(await net.all(dribble(), without=("c",)))
        bits = [chunk.contributors for chunk in ends["b"].chunks]
        assert bits == [b"\x07"] + [b"\x03"] * 7
        assert net.members["a"].lost == ("c",)

    run(story())


def test_a_contributor_is_as_late_as_its_own_last_chunk() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1, "c": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def speak(name: str, after_s: float) -> None:
            async with net.open(name, "a") as line:
                await line.send(OPENING, EXCHANGE_S)
                await asyncio.sleep(after_s)
                for frame in contributed(plan, 0, values[name]):
                    await line.send(frame, EXCHANGE_S)
                await asyncio.sleep(30)  # as one does that reads the whole slice before it ends

        await net.all(speak("b", 10), speak("c", 1), without=("b", "c"))
        assert net.members["a"].parts_s == pytest.approx({"b": 10, "c": 1})

    run(story())


def test_a_chunk_that_arrives_as_patience_ends_is_not_taken_for_the_next_one() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        plan = make_plan({"a": 1, "b": 1}, 2 * CHUNK, reducers=("a",))
        values = vectors(("a", "b"), plan.numel)
        payloads = [
            [unpack_frame(f)[1] for f in contributed(plan, 0, values[name])] for name in values
        ]
        reducer = Reducer(
            plan,
            plan.slices[0],
            {name: range(plan.chunks) for name in ("a", "b")},
            ChunkStore(codec(plan.codec), plan.numel, plan.chunk_elements),
            lambda work, *args: loop.run_in_executor(Inline(), work, *args),
            weights=weights(plan, 0.0),
        )
        for payload in payloads[0]:
            await reducer.put("a", payload)

        def too_late() -> None:
            # In the very turn of the loop in which the time-out fires, and before it.
            with pytest.raises(StopIteration):
                reducer.put("b", payloads[1][0]).send(None)

        loop.call_at(STALL_S - 1e-10, too_late)
        await reducer.run()
        chunks = [chunk async for chunk in reducer.reduced()]
        assert [chunk.contributors for chunk in chunks] == [b"\x01", b"\x01"]
        got = torch.cat([codec("fp32").decode(c.payload, c.elements) for c in chunks])
        assert torch.equal(got, values["a"])
        assert reducer.lost == {"b"}

    run(story())


def chunk_frame(index: int, elements: int, payload: bytes) -> bytes:
    return pack_frame(FrameHeader(chunk=index, elements=elements), payload)


FINE = bytes(4 * CHUNK)
NAN = np.full(CHUNK, np.nan, np.float32).tobytes()
HOSTILE_CONTRIBUTIONS = {
    "skips a chunk": chunk_frame(2, CHUNK, FINE),
    "repeats a chunk": chunk_frame(0, CHUNK, FINE),
    "far away": chunk_frame(2**32 - 1, CHUNK, FINE),
    "too short": chunk_frame(1, CHUNK, FINE[:-1]),
    "too long": chunk_frame(1, CHUNK, FINE + b"\0"),
    "empty": chunk_frame(1, CHUNK, b""),
    "NaN": chunk_frame(1, CHUNK, NAN),
    "not a frame": b"\xff" * 40,
    "nothing": b"",
}


@pytest.mark.parametrize("said", HOSTILE_CONTRIBUTIONS.values(), ids=HOSTILE_CONTRIBUTIONS)
def test_nonsense_from_a_contributor_only_costs_its_own_place(said: bytes) -> None:
    async def story() -> None:
        plan = make_plan({"a": 5, "b": 7, "c": 3}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        good = contributed(plan, 0, values["c"])
        spoken = net.speak("c", "a", [good[0], said, *good[1:]])
        ends = averages(await net.all(spoken, without=("c",)))
        assert [chunk.contributors for chunk in ends["b"].chunks] == [b"\x07"] + [b"\x03"] * 3
        without_c = mean(plan, values, {"a", "b"})[CHUNK:]
        assert np.array_equal(ends["a"].values().numpy()[CHUNK:], without_c)
        assert net.members["a"].lost == ("c",)

    run(story())


def test_chunks_beyond_the_slice_or_from_a_mere_receiver_change_nothing() -> None:
    async def story() -> None:
        plan = make_plan({"a": 5, "b": 7, "c": 3, "d": 0}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        more = [*contributed(plan, 0, values["c"]), chunk_frame(4, CHUNK, FINE)]
        meddler = net.speak("d", "a", contributed(plan, 0, values["d"]))
        ends = averages(await net.all(net.speak("c", "a", more), meddler, without=("c", "d")))
        assert np.array_equal(ends["b"].values().numpy(), mean(plan, values, {"a", "b", "c"}))

    run(story())


def test_a_member_with_broken_values_is_left_out_and_still_gets_the_average() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1, "c": 1}, 3 * 1024, codec_name="int4")
        values = vectors(plan.receivers, plan.numel)
        values["b"][-1] = float("nan")  # in the last chunk of the slice of c
        values["c"][0] = float("inf")  # in the first chunk of the slice of a
        net = Net(plan, dict(values))
        ends = averages(await net.all())
        bits = [chunk.contributors for chunk in ends["b"].chunks]
        assert bits == [b"\x03"] * 4 + [b"\x07"] * 7 + [b"\x05"]
        assert net.members["a"].lost == ("c",)
        assert net.members["c"].lost == ("b",)

    run(story())


def test_a_slice_that_nobody_contributes_to_fails_at_its_reducer_alone() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 0}, 2 * 1024)
        net = Net(plan, {"a": torch.full((2048,), float("nan")), "b": None})
        ends = await net.all()
        assert isinstance(ends["a"], ExchangeFailed)
        assert ends["a"].lost == ("b",)
        assert isinstance(ends["b"], ExchangeFailed)
        assert ends["b"].lost == ("a",)
        assert ends["b"].round == plan.round

    run(story())


@pytest.mark.parametrize("window", [WINDOW, 5])
def test_a_contributor_far_ahead_of_the_others_has_to_wait(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer_module, "WINDOW_BYTES", 0 if window == WINDOW else 5 * 4 * CHUNK)

    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 10 * CHUNK, reducers=("a",))
        loop = asyncio.get_running_loop()
        reducer = Reducer(
            plan,
            plan.slices[0],
            {name: range(plan.chunks) for name in ("a", "b")},
            ChunkStore(codec(plan.codec), plan.numel, plan.chunk_elements),
            lambda work, *args: loop.run_in_executor(None, work, *args),
            weights=weights(plan, 0.0),
        )
        for _ in range(window):
            await asyncio.wait_for(reducer.put("b", FINE), 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reducer.put("b", FINE), 1)

    run(story())


# -- who may open an exchange -----------------------------------------------------------------


async def nothing() -> AsyncIterator[bytes]:
    return
    yield b""


@pytest.mark.parametrize(
    ("reducer", "sender"),
    [("a", "stranger"), ("b", "a")],
    ids=["a stranger", "at a member that reduces nothing"],
)
def test_an_exchange_that_the_plan_does_not_have_is_refused(reducer: str, sender: str) -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, CHUNK, reducers=("a",))
        net = Net(plan, dict(vectors(plan.receivers, CHUNK)))
        with pytest.raises(ProtocolViolation) as refusal:
            await anext(net.members[reducer].serve(sender, 0, nothing()))
        assert refusal.value.peer_id == sender

    run(story())


def test_one_stream_a_member_and_no_more() -> None:
    """Chunks of two streams would mix, and the short last one break the sum for everybody."""

    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, CHUNK + 1, reducers=("a",))
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def twice() -> None:
            async with net.open("b", "a") as first, net.open("b", "a") as second:
                for line in (first, second):
                    await line.send(OPENING, 1)
                frames = contributed(plan, 0, values["b"])
                await first.send(frames[0], 1)
                with pytest.raises(Unreachable, match="twice"):
                    await second.receive(1)
                await first.send(frames[1], 1)
                while await first.receive(1) is not END:
                    pass

        ends = await net.all(twice(), without=("b",))
        assert isinstance(ends["a"], Average)
        assert np.array_equal(ends["a"].values().numpy(), mean(plan, values, {"a", "b"}))

    run(story())


@pytest.mark.parametrize("late_s", [5.0, 1000.0])
def test_a_stream_does_not_end_under_a_member_that_is_still_writing(late_s: float) -> None:
    """Its write would fail then, and with gRPC it loses what it has not read yet."""

    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def slow() -> None:
            async with net.open("b", "a") as line:
                await line.send(OPENING, 1)
                for frame in contributed(plan, 0, values["b"]):
                    await line.send(frame, 1)
                for _ in range(4):
                    assert await line.receive(1)
                await asyncio.sleep(min(late_s, PATIENCE * STALL_S - 1))
                assert not line.ended
                if late_s < PATIENCE * STALL_S:
                    await line.done_sending(1)
                assert await line.receive(2) is END  # not later than patience ends

        speaking = asyncio.create_task(slow())
        averages(await net.all(without=("b",)))
        await speaking

    run(story())


# -- reducers that fail -----------------------------------------------------------------------


def test_a_reducer_that_breaks_off_is_named_and_the_others_still_get_my_part() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 2, "c": 3}, 6 * 1024, chunk=1024)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        net.odd["a", "b"] = Script(reduced(plan, 1, values["a"])[:1])
        ends = await net.all()
        failed = ends.pop("a")
        assert isinstance(failed, ExchangeFailed)
        assert failed.lost == ("b",)
        assert failed.round == plan.round
        bits = [chunk.contributors for chunk in averages(ends)["c"].chunks]
        # b never heard from a; in the slices of a and c it is.
        assert bits == [b"\x07"] * 2 + [b"\x06"] * 2 + [b"\x07"] * 2

    run(story())


def test_a_member_whose_own_exchange_failed_goes_on_reducing_for_others() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 2, "c": 3}, 3 * 1024)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        net.odd["a", "b"] = net.odd["a", "c"] = Unreachable("x", "refused")
        a = net.members["a"]
        reducing = asyncio.create_task(a.reduce())

        async def fail_first() -> ExchangeFailed:
            with pytest.raises(ExchangeFailed) as failure:
                await a.run()
            return failure.value

        own = asyncio.create_task(fail_first())
        await asyncio.sleep(5)  # the others come late
        ends = averages(await net.all(without=("a",)))
        assert (await own).lost == ("b", "c")
        await reducing
        got = ends["b"].values().numpy()[:1024]
        assert np.array_equal(got, mean(plan, values, {"a", "b", "c"})[:1024])

    run(story())


@pytest.mark.parametrize("sent", [0, 1, 4])
def test_a_stream_that_ends_before_the_last_word_is_no_failure(sent: int) -> None:
    """A reducer that did without this member has all chunks and ends the stream first."""

    class EndsFirst(Script):
        async def send(self, frame: bytes, timeout_s: float) -> None:
            await super().send(frame, timeout_s)
            if len(self.sent) > 1 + sent:
                raise Unreachable("a", "the stream has ended")

    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        stream = EndsFirst(reduced(plan, 0, values["a"]), at_end=Unreachable("a", "has ended"))
        net.odd["b", "a"] = stream
        average = await net.members["b"].run()
        assert torch.equal(average.values(), values["a"])
        assert unpack_frame(stream.sent[0])[0].plan == plan_digest(plan)

    run(story())


def bad_chunk(**changes: Any) -> bytes:
    fields = {
        "index": 1,
        "elements": CHUNK,
        "contributors": b"\x03",
        "payload": FINE,
    }
    return Chunk(**{**fields, **changes}).frame()


HOSTILE_RESULTS = {
    "skips a chunk": bad_chunk(index=2),
    "repeats a chunk": bad_chunk(index=0),
    "fewer elements": bad_chunk(elements=CHUNK - 1, payload=FINE[:-4]),
    "short payload": bad_chunk(payload=FINE[:-4]),
    "long payload": bad_chunk(payload=FINE + b"\0"),
    "NaN": bad_chunk(payload=NAN),
    "mean of nobody": bad_chunk(contributors=b"\0"),
    "mean of a stranger": bad_chunk(contributors=b"\x07"),
    "no bitmap": bad_chunk(contributors=b""),
    "long bitmap": bad_chunk(contributors=b"\x03\0"),
    "not a frame": b"\xff" * 40,
    "nothing": b"",
}


@pytest.mark.parametrize("said", HOSTILE_RESULTS.values(), ids=HOSTILE_RESULTS)
def test_nonsense_from_a_reducer_fails_the_exchange_and_names_it(said: bytes) -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        good = reduced(plan, 0, values["a"])
        net.odd["b", "a"] = Script([good[0], said, *good[2:]])
        with pytest.raises(ExchangeFailed) as failure:
            await net.members["b"].run()
        assert failure.value.lost == ("a",)

    run(story())


def test_a_reducer_that_never_answers_is_given_up_when_patience_ends() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 2 * 1024)
        net = Net(plan, dict(vectors(plan.receivers, plan.numel)))
        net.odd["a", "b"] = Mute([])
        ends = await net.all()
        assert isinstance(ends["a"], ExchangeFailed)
        assert ends["a"].lost == ("b",)
        assert now() == pytest.approx(PATIENCE * STALL_S)
        assert isinstance(ends["b"], Average)

    run(story())


# -- mends ------------------------------------------------------------------------------------


def mend(plan: Plan, kept: tuple[Kept, ...], receivers: tuple[str, ...], **changes: Any) -> Plan:
    """As the leader would make it after this plan."""
    found = {n for run in kept for n in range(run.start, run.stop)}
    missing = runs_of(n for n in range(plan.chunks) if n not in found)
    return dataclasses.replace(
        plan,
        attempt=plan.attempt + 1,
        base=plan_digest(plan),
        receivers=receivers,
        slices=share(missing, receivers),
        kept=kept,
        **changes,
    )


def test_the_rest_of_a_dead_reducers_slice_is_averaged_again_and_the_start_is_kept() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 2, "c": 3, "d": 4}, 16 * CHUNK)
        values = vectors(plan.receivers, plan.numel)
        first = Net(plan, dict(values))
        by_b = [reduced(plan, 1, values["b"])[n] for n in range(3)]
        # b dies; a got three of its four chunks, c one, d none.
        first.odd["a", "b"] = Script(by_b)
        first.odd["c", "b"] = Script(by_b[:1])
        first.odd["d", "b"] = Script([])
        ends = await first.all(without=("b",))
        for name, chunks in (("a", 3), ("c", 1), ("d", 0)):
            end = ends[name]
            assert isinstance(end, ExchangeFailed)
            assert end.lost == ("b",)
            held = {n for run in end.held for n in range(run.start, run.stop)}
            assert held == set(range(16)) - {4, 5, 6, 7} | {4 + n for n in range(chunks)}
        everybody = ("a", "c", "d")
        plan2 = mend(
            plan,
            (
                Kept(start=0, stop=4, holders=everybody),
                Kept(start=4, stop=5, holders=("a", "c")),
                Kept(start=5, stop=7, holders=("a",)),
                Kept(start=8, stop=16, holders=everybody),
            ),
            everybody,
        )
        second = Net(plan2, {name: values[name] for name in everybody}, first)
        average = averages(await second.all())["d"]
        got = average.values().numpy()
        assert np.array_equal(got[4 * CHUNK : 7 * CHUNK], values["b"][4 * CHUNK : 7 * CHUNK])
        without_b = mean(plan, values, {"a", "c", "d"})
        assert np.array_equal(got[7 * CHUNK : 8 * CHUNK], without_b[7 * CHUNK : 8 * CHUNK])
        assert average.chunks[7].contributors == b"\x0d"
        asked = {(sender, peer) for sender, peer, _ in second.fetched}
        assert asked == {("c", "a"), ("d", "a"), ("d", "c")}

    run(story())


def test_a_member_that_missed_the_base_fetches_all_that_is_kept_from_several() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 2, "c": 0}, 12 * CHUNK, reducers=("a", "b"))
        values = vectors(plan.receivers, plan.numel)
        first = Net(plan, {"a": values["a"], "b": values["b"], "c": None})
        ends = averages(await first.all(first.speak("c", "a", []), without=("c",)))
        holders = ("a", "b")
        plan2 = mend(plan, (Kept(start=0, stop=12, holders=holders),), plan.receivers)
        second = Net(plan2, {"a": values["a"], "b": values["b"], "c": None}, first)
        second.members["c"] = Butterfly(
            plan2, plan_digest(plan2), "c", None, Ends(second, "c"), Inline()
        )
        averaged = averages(await second.all())
        assert averaged["c"].root == ends["a"].root
        shares = {peer: r.stop - r.start for _, peer, r in second.fetched}
        assert shares == {"a": 6, "b": 6}

    run(story())


def test_chunks_are_fetched_from_the_next_holder_when_one_fails() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 2, "c": 3}, 12 * CHUNK, reducers=("a", "b"))
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        net.odd["c", "a"] = net.odd["c", "b"] = Unreachable("x", "refused")
        ends = await net.all()
        assert isinstance(ends.pop("c"), ExchangeFailed)
        del net.odd["c", "b"]
        completed = await net.members["c"].complete(("a", "b"))
        assert completed is not None
        assert completed.root == averages(ends)["a"].root
        net.odd["c", "b"] = Unreachable("x", "refused")
        assert await net.members["c"].complete(()) is not None  # nothing is missing any more

    run(story())


def test_who_is_given_up_is_waited_for_no_longer() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1, "c": 1}, 12 * CHUNK)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        net.odd["a", "c"] = net.odd["b", "c"] = Mute([])
        ending = asyncio.create_task(net.all(without=("c",)))
        await asyncio.sleep(3)
        for name in ("a", "b"):
            net.members[name].drop("c")
        ends = await ending
        assert now() == 3
        for name in ("a", "b"):
            end = ends[name]
            assert isinstance(end, ExchangeFailed)
            assert end.lost == ("c",)
            assert end.held == (Run(start=0, stop=8),)
            bits = {net.members[name]._chunks[n].contributors for n in range(8)}
            assert bits == {b"\x03"}

    run(story())


def test_a_vector_that_is_not_needed_any_more_is_let_go() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 4 * CHUNK)
        net = Net(plan, dict(vectors(plan.receivers, plan.numel)))
        averages(await net.all())
        net.members["a"].release()
        chunks = list(net.members["a"].frames(Run(start=0, stop=4)))
        assert len(chunks) == 4  # others may still fetch

    run(story())


def test_a_mend_of_another_shape_takes_nothing_from_its_base() -> None:
    """A leader that lies about it must not crash those who believe it."""

    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 4 * CHUNK)
        values = vectors(plan.receivers, plan.numel)
        first = Net(plan, dict(values))
        averages(await first.all())
        kept = (Kept(start=0, stop=2, holders=("b",)),)
        odd = dataclasses.replace(
            plan,
            attempt=1,
            base=plan_digest(plan),
            chunk_elements=2 * CHUNK,
            slices=(),
            kept=kept,
        )
        second = Net(odd, dict(values), first)
        end = (await second.all(without=("b",)))["a"]
        assert isinstance(end, ExchangeFailed)
        assert end.held == ()

    run(story())


def test_a_reducer_that_stood_still_does_not_blame_the_others() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        plan = make_plan({"a": 1, "b": 1}, 2 * CHUNK, reducers=("a",))
        values = vectors(("a", "b"), plan.numel)
        reducer = Reducer(
            plan,
            plan.slices[0],
            {name: range(plan.chunks) for name in ("a", "b")},
            ChunkStore(codec(plan.codec), plan.numel, plan.chunk_elements),
            lambda work, *args: loop.run_in_executor(Inline(), work, *args),
            weights=weights(plan, 0.0),
        )
        payloads = {n: [unpack_frame(f)[1] for f in contributed(plan, 0, values[n])] for n in "ab"}
        running = asyncio.create_task(reducer.run())
        await reducer.put("a", payloads["a"][0])
        await asyncio.sleep(1)
        loop.clock.now += 2 * STALL_S  # SIGSTOP and SIGCONT; what b sent waits in a socket
        await asyncio.sleep(0.01)
        for payload in payloads["b"]:
            await reducer.put("b", payload)
        await reducer.put("a", payloads["a"][1])
        await running
        assert [c.contributors async for c in reducer.reduced()] == [b"\x03", b"\x03"]
        assert reducer.lost == frozenset()

    run(story())
