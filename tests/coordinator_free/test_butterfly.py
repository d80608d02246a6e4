"""Butterflies connected by streams in memory, on a clock that jumps: nothing here really waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coordinator_free.average import Average, Chunk, contributor_bits
from coordinator_free.butterfly import WINDOW, Butterfly, ExchangeFailed, Reducer
from coordinator_free.codecs import codec
from coordinator_free.messages import NO_DIGEST, Contribution, FrameHeader, Plan, Slice
from coordinator_free.partition import chunk_bounds, equal_slices
from coordinator_free.wire import pack_frame, plan_digest, unpack_frame
from dht.errors import PeerError, ProtocolViolation, Unreachable

T = TypeVar("T")
EXCHANGE_S = 60.0
CHUNK = 256
END = None


class Jump(selectors.SelectSelector):
    """Time passes only when nobody can run, and then at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for something that never comes"
        self.now += max(timeout, 0.0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = Jump()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now


class Inline(Executor):
    def submit(self, work: Callable[..., T], /, *args: Any, **_: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(work(*args))
        except Exception as error:
            done.set_exception(error)
        return done


def run(story: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(story)


def now() -> float:
    return asyncio.get_running_loop().time()


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
            await self.up.get()  # names the plan
            async with aclosing(reducer.serve(sender, self._frames())) as served:
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
        async with asyncio.timeout(timeout_s):
            item = await self.down.get()
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
        return await asyncio.get_running_loop().create_future()


class Net:
    """Everybody's butterfly of one plan; `odd[sender, reducer]` replaces a stream."""

    def __init__(self, plan: Plan, values: dict[str, Tensor | None]) -> None:
        self.plan = plan
        self.odd: dict[tuple[str, str], Script | PeerError] = {}
        self.members = {
            name: Butterfly(plan, plan_digest(plan), name, own_N, self._connect(name), Inline())
            for name, own_N in values.items()
        }

    def _connect(self, sender: str) -> Callable[[str], AbstractAsyncContextManager[Any]]:
        return lambda reducer: self.open(sender, reducer)

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
            await line.send(b"plan", EXCHANGE_S)
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
        previous=NO_DIGEST,
        receivers=names,
        contributions=tuple(
            Contribution(peer_id=name, samples=count) for name, count in samples.items() if count
        ),
        slices=slices or equal_slices(numel, reducers or names),
        chunk_elements=chunk,
        codec=codec_name,
        exchange_s=EXCHANGE_S,
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


def reduced(plan: Plan, number: int, values_N: Tensor) -> list[bytes]:
    """What a correct reducer would say who has nobody's values but these."""
    everybody = {c.peer_id for c in plan.contributions}
    return [
        Chunk(
            number,
            index,
            stop - start,
            contributor_bits(plan, everybody),
            codec(plan.codec).encode(values_N[start:stop]),
        ).frame()
        for index, (start, stop) in enumerate(
            chunk_bounds(plan.slices[number], plan.chunk_elements)
        )
    ]


def contributed(plan: Plan, number: int, values_N: Tensor) -> list[bytes]:
    """What a correct contributor says to the reducer of a slice."""
    return [
        pack_frame(
            FrameHeader(slice=number, chunk=index, elements=stop - start),
            codec(plan.codec).encode(values_N[start:stop]),
        )
        for index, (start, stop) in enumerate(
            chunk_bounds(plan.slices[number], plan.chunk_elements)
        )
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

FOUR = (Slice(reducer="a", start=0, stop=4 * CHUNK),)


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
        assert now() < EXCHANGE_S / 3  # a broken stream is noticed at once

    run(story())


def test_contributors_that_stall_together_cost_a_third_of_the_deadline_once() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))

        async def stall(name: str, chunks: int) -> None:
            async with net.open(name, "a") as line:
                await line.send(b"plan", EXCHANGE_S)
                for frame in contributed(plan, 0, values[name])[:chunks]:
                    await line.send(frame, EXCHANGE_S)
                await asyncio.sleep(1000)

        ends = averages(
            await net.all(stall("c", 2), stall("d", 2), stall("e", 2), without=("c", "d", "e"))
        )
        assert [chunk.contributors for chunk in ends["b"].chunks] == [b"\x1f"] * 2 + [b"\x03"] * 2
        assert net.members["a"].lost == ("c", "d", "e")
        assert now() == pytest.approx(EXCHANGE_S / 3)

    run(story())


def test_a_chunk_that_arrives_as_patience_ends_is_not_taken_for_the_next_one() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        plan = make_plan({"a": 1, "b": 1}, 2 * CHUNK, reducers=("a",))
        values = vectors(("a", "b"), plan.numel)
        payloads = [
            [unpack_frame(f)[1] for f in contributed(plan, 0, values[name])] for name in values
        ]
        reducer = Reducer(plan, 0, lambda work, *args: loop.run_in_executor(Inline(), work, *args))
        for payload in payloads[0]:
            await reducer.put("a", payload)

        def too_late() -> None:
            # In the very turn of the loop in which the time-out fires, and before it.
            with pytest.raises(StopIteration):
                reducer.put("b", payloads[1][0]).send(None)

        loop.call_at(EXCHANGE_S / 3 - 1e-10, too_late)
        await reducer.run()
        chunks = [chunk async for chunk in reducer.reduced()]
        assert [chunk.contributors for chunk in chunks] == [b"\x01", b"\x01"]
        got = torch.cat([codec("fp32").decode(c.payload, c.elements) for c in chunks])
        assert torch.equal(got, values["a"])
        assert reducer.lost == ("b",)

    run(story())


def chunk_frame(index: int, elements: int, payload: bytes, number: int = 0) -> bytes:
    return pack_frame(FrameHeader(slice=number, chunk=index, elements=elements), payload)


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


def test_a_contributor_far_ahead_of_the_others_has_to_wait() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 10 * CHUNK, reducers=("a",))
        loop = asyncio.get_running_loop()
        reducer = Reducer(plan, 0, lambda work, *args: loop.run_in_executor(None, work, *args))
        for _ in range(WINDOW):
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
            await anext(net.members[reducer].serve(sender, nothing()))
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
                    await line.send(b"plan", 1)
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

    class Ends(Script):
        async def send(self, frame: bytes, timeout_s: float) -> None:
            await super().send(frame, timeout_s)
            if len(self.sent) > 1 + sent:
                raise Unreachable("a", "the stream has ended")

    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 4 * CHUNK, slices=FOUR)
        values = vectors(plan.receivers, plan.numel)
        net = Net(plan, dict(values))
        stream = Ends(reduced(plan, 0, values["a"]), at_end=Unreachable("a", "has ended"))
        net.odd["b", "a"] = stream
        average = await net.members["b"].run()
        assert torch.equal(average.values(), values["a"])
        assert unpack_frame(stream.sent[0])[0].plan == plan_digest(plan)

    run(story())


def bad_chunk(**changes: Any) -> bytes:
    fields = {
        "slice": 0,
        "index": 1,
        "elements": CHUNK,
        "contributors": b"\x03",
        "payload": FINE,
    }
    return Chunk(**{**fields, **changes}).frame()


HOSTILE_RESULTS = {
    "another slice": bad_chunk(slice=1),
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


def test_a_reducer_that_never_answers_is_given_up_at_the_deadline() -> None:
    async def story() -> None:
        plan = make_plan({"a": 1, "b": 1}, 2 * 1024)
        net = Net(plan, dict(vectors(plan.receivers, plan.numel)))
        net.odd["a", "b"] = Mute([])
        ends = await net.all()
        assert isinstance(ends["a"], ExchangeFailed)
        assert ends["a"].lost == ("b",)
        assert now() == pytest.approx(EXCHANGE_S)
        assert isinstance(ends["b"], Average)

    run(story())
