"""The butterfly all-reduce of one plan, as one member runs it.

Every member streams each slice of its vector to that slice's reducer and gets the averaged slice
back on the same stream; for its own slices it is the reducer (`reducer`). A plan that mends another
one goes on from the chunks that this member got by that, fetches those that only others got, and
exchanges the rest with new reducers.

Guarantees: `run` returns a complete average or raises with what there is; a partner that breaks
off, falls silent or does not read costs its own slice and its own contribution, and no more than
the plan's deadlines; everything a partner sends is checked against the plan before it is used;
memory is bounded by the vector and a few chunks per contributor, as a slow reader or a slow reducer
stops the streams that feed it. Not guaranteed: that a reducer averaged honestly, or that a holder
of chunks hands on what it got; who was told something else than the majority finds out by the root.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from torch import Tensor

from coordinator_free import failpoints, kernels
from coordinator_free.average import Average, Chunk, ChunkStore, check_bits
from coordinator_free.codecs import Codec, NonFinite, codec
from coordinator_free.feedback import Feedback
from coordinator_free.messages import FetchChunks, FrameHeader, Plan, Run, Slice
from coordinator_free.partition import chunk_span, runs_of, share, within
from coordinator_free.planning import sent_by, weights
from coordinator_free.reducer import Reducer
from coordinator_free.wire import pack_frame, unpack_frame
from dht.errors import PeerError, ProtocolViolation, RoundError, Unreachable, innermost

logger = logging.getLogger(__name__)

PATIENCE = 2.0  # a reducer may be silent for so many times as long as it waits for a contributor
# What goes through no more memory than this is done in about a millisecond, hashing included. To
# hand it to a thread and be told of its end costs 0.03 ms, and where cores are short 0.15 ms.
AT_ONCE_BYTES = 4 << 20
# What a thread has done once, by codec: the first time, kernels are compiled, which takes seconds.
_practised: set[tuple[str, str]] = set()

T = TypeVar("T")


class Stream(Protocol):
    """One open stream to a reducer (`transport.ExchangeStream`)."""

    async def send(self, frame: bytes, timeout_s: float) -> None:
        """Send one frame, or wait until there is room for it."""
        ...

    async def done_sending(self, timeout_s: float) -> None:
        """Nothing more comes from this side."""
        ...

    async def receive(self, timeout_s: float) -> bytes | None:
        """The next frame; None at the end."""
        ...


class Network(Protocol):
    """What a butterfly needs of the wire. Both raise `PeerError`."""

    def connect(self, peer: str) -> AbstractAsyncContextManager[Stream]:
        """Open a stream to a reducer."""
        ...

    def fetch(
        self, peer: str, request: FetchChunks, timeout_s: float
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask a member for chunks that it has; the frames, each within the time."""
        ...


class ExchangeFailed(RoundError):
    """The exchange did not come to its end here.

    Args:
        round: the round.
        lost: peers that broke off or fell silent.
        held: what there is all the same.
        reason: for a log line.
    """

    def __init__(
        self, round: int, lost: tuple[str, ...], held: tuple[Run, ...], reason: str
    ) -> None:
        super().__init__(round, reason)
        self.lost = lost
        self.held = held


class Butterfly:
    """One member's exchange by one plan.

    Args:
        plan: of the leader, checked by the machine.
        digest: the plan's.
        me: this peer's id.
        values_N: (N,) float32 pseudo-gradient; None for a member that only receives.
        network: to the other members.
        executor: runs what takes longer than a moment.
        base: the exchange that the plan mends, if this peer took part in that.
        weight_cap: `RoundConfig.weight_cap`.
        feedback: residuals of what this peer reduces, and the fragment that the round averages;
            None keeps none.

    Attributes:
        slices_s: by reducer, after how many seconds all of its slices were here.
        parts_s: by contributor, after how many its part of my slices was here, less those for which
            it had to wait for others.
    """

    def __init__(
        self,
        plan: Plan,
        digest: bytes,
        me: str,
        values_N: Tensor | None,
        network: Network,
        executor: Executor,
        base: Butterfly | None = None,
        *,
        weight_cap: float = 0.0,
        feedback: tuple[Feedback, int] | None = None,
    ) -> None:
        self.plan = plan
        self.digest = digest
        self._me = me
        self._codec: Codec = codec(plan.codec)
        self._values_N = values_N
        self._network = network
        # Not a method: a cycle through the reducers would keep the vector's chunks until the
        # collector comes by, rounds later.
        self._compute = functools.partial(_compute, executor, plan.codec)
        self._store = ChunkStore(codec(self._codec.average), plan.numel, plan.chunk_elements)
        self._chunks: list[Chunk | None] = [None] * plan.chunks
        if base is not None and base.digest == plan.base and _alike(base.plan, plan):
            # Only what the plan keeps: whatever else has arrived will be averaged once more.
            for kept in plan.kept:
                self._chunks[kept.start : kept.stop] = base._chunks[kept.start : kept.stop]
        self._began = asyncio.get_running_loop().time()
        self.slices_s: dict[str, float] = {}  # by reducer: when all of it was here
        self.parts_s: dict[str, float] = {}  # by contributor: when its part of my slices was
        self._failures: dict[str, BaseException] = {}  # by peer
        self._dropped: set[str] = set()
        self._parts: list[tuple[str, asyncio.Task[None]]] = []
        self._served: set[tuple[str, int]] = set()
        self._sent = {c.peer_id: sent_by(plan, c.peer_id) for c in plan.contributions}
        add_residual, keep_residual = _residuals(plan, feedback)
        summed_bytes = self._store.float_bytes * (1 + len(plan.contributions))
        self._reducers = {
            number: Reducer(
                plan,
                piece,
                {peer: within(runs, piece) for peer, runs in self._sent.items()},
                self._store,
                functools.partial(self._compute, summed_bytes),
                weights=weights(plan, weight_cap),
                add_residual=add_residual,
                keep_residual=keep_residual,
            )
            for number, piece in enumerate(plan.slices)
            if piece.reducer == me
        }

    @property
    def lost(self) -> tuple[str, ...]:
        """Contributors that my slices had to do without."""
        return tuple(sorted(set().union(*(r.lost for r in self._reducers.values()))))

    @property
    def held(self) -> tuple[Run, ...]:
        """The chunks that are here."""
        return runs_of(n for n, chunk in enumerate(self._chunks) if chunk is not None)

    def release(self) -> None:
        """Nothing will be sent any more: forget the vector. What was averaged stays for others."""
        self._values_N = None

    def drop(self, peer: str) -> None:
        """Go on without this peer, as contributor and as reducer."""
        if peer in self._dropped or peer == self._me:
            return
        self._dropped.add(peer)
        self.drop_contributor(peer)
        for partner, part in self._parts:
            if partner == peer and not part.done():
                self._give_up(peer)
                part.cancel()

    def drop_contributor(self, peer: str) -> None:
        """Wait for no more of this peer's contribution; it may still reduce."""
        if peer != self._me:
            for reducer in self._reducers.values():
                reducer.drop(peer)

    def _give_up(self, reducer: str) -> None:
        self._failures[reducer] = Unreachable(reducer, "was given up by the leader")

    # -- as reducer ---------------------------------------------------------------------------

    async def reduce(self) -> None:
        """Average my slices for everybody, however my own exchange goes."""
        async with asyncio.TaskGroup() as tasks:
            for reducer in self._reducers.values():
                tasks.create_task(self._reduce(reducer))

    async def _reduce(self, reducer: Reducer) -> None:
        try:
            async with asyncio.timeout(self.plan.exchange_s), asyncio.TaskGroup() as tasks:
                tasks.create_task(reducer.run())
                tasks.create_task(self._feed(reducer))
        except TimeoutError:
            logger.warning("butterfly.slice_late round=%d", self.plan.round)
        except BaseExceptionGroup as group:
            error = innermost(group)
            if not isinstance(error, (RoundError, ValueError)):
                raise
            logger.warning("butterfly.slice_given_up %s", error)
        finally:
            await reducer.abort()

    async def serve(
        self, sender: str, number: int, frames: AsyncIterator[bytes]
    ) -> AsyncGenerator[bytes]:
        """The other side of a member's stream: its chunks of my slice in, reduced chunks out.

        Args:
            sender: authentic.
            number: which slice of the plan; sender's word.
            frames: what follows the frame that named plan and slice.
        """
        reducer = self._reducers.get(number)
        if reducer is None or sender not in self.plan.receivers:
            raise ProtocolViolation(sender, "opened an exchange that it has no part in")
        if (sender, number) in self._served:
            # Chunks of two streams would mix in one queue, of other lengths than the plan's.
            raise ProtocolViolation(sender, "opened the same exchange twice")
        self._served.add((sender, number))
        # No TaskGroup: one must not stay open across a generator's yields. The generator's end,
        # which the transport brings about in every case, ends the task.
        reading = asyncio.create_task(self._take(reducer, sender, frames))
        try:
            async for chunk in reducer.reduced():
                if chunk.index == reducer.piece.middle:
                    await failpoints.reach_async("results.half")
                yield reducer.frame(chunk)
            # The stream ends with this generator. Under a member that has yet to say its last word,
            # that would fail its write, and a failed write costs it what it has not read yet.
            await asyncio.wait({reading}, timeout=PATIENCE * self.plan.stall_s)
        finally:
            reading.cancel()

    async def _take(self, reducer: Reducer, sender: str, frames: AsyncIterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        expected = list(within(self._sent.get(sender, ()), reducer.piece))
        done = 0
        held_up_s = 0.0  # by those whose chunks were missing, not by this sender
        try:
            async with asyncio.timeout(self.plan.exchange_s):
                async for frame in frames:
                    header, payload = unpack_frame(frame)
                    if done == len(expected) or header.chunk != expected[done]:
                        raise ProtocolViolation(sender, "sent a chunk that the plan does not have")
                    elements = self._store.elements(header.chunk)
                    if len(payload) != self._codec.encoded_bytes(elements):
                        raise ProtocolViolation(sender, "sent a chunk of another length")
                    arrived = loop.time()
                    await reducer.put(sender, payload)
                    held_up_s += loop.time() - arrived
                    done += 1
                    # The stream's end says nothing: it comes when the whole slice has gone back.
                    if done == len(expected):
                        took_s = loop.time() - self._began - held_up_s
                        self.parts_s[sender] = max(took_s, self.parts_s.get(sender, 0.0))
        except (TimeoutError, ValueError, PeerError) as error:
            logger.warning("butterfly.contributor_lost peer=%s chunks=%d %s", sender, done, error)
        finally:
            if done < len(expected):
                reducer.drop(sender)

    async def _feed(self, reducer: Reducer) -> None:
        """My own contribution to my own slice takes the same way as everybody's."""
        if self._values_N is None:
            reducer.drop(self._me)
            return
        size = self._store.float_bytes
        try:
            for index in within(self._sent[self._me], reducer.piece):
                await reducer.put(self._me, await self._compute(size, self._encode, index))
        except NonFinite as error:
            logger.error("butterfly.not_finite round=%d %s", self.plan.round, error)
            reducer.drop(self._me)

    # -- as holder ----------------------------------------------------------------------------

    def frames(self, run: Run) -> Iterator[bytes]:
        """For a member that missed them: these chunks, up to the first that is not here."""
        for chunk in self._chunks[run.start : run.stop]:
            if chunk is None:
                return
            yield chunk.frame()

    # -- as member ----------------------------------------------------------------------------

    async def run(self) -> Average:
        """Take part in every slice; `reduce` has to run beside it.

        Returns:
            The complete average.

        Raises:
            ExchangeFailed: chunks are missing, and nothing more will come.
        """
        late = False
        try:
            async with asyncio.timeout(self.plan.exchange_s), asyncio.TaskGroup() as tasks:
                for number, piece in enumerate(self.plan.slices):
                    if piece.reducer in self._dropped:
                        self._give_up(piece.reducer)
                    else:
                        part = tasks.create_task(self._part(number, piece))
                        self._parts.append((piece.reducer, part))
                for kept in self.plan.kept:
                    tasks.create_task(self._collect(kept, kept.holders, self.plan.base))
        except TimeoutError:
            late = True
        chunks = [chunk for chunk in self._chunks if chunk is not None]
        if len(chunks) == len(self._chunks):
            return Average(self._codec.average, chunks, checked=True)
        lost = set(self._failures)
        if late:
            lost |= {
                piece.reducer
                for piece in self.plan.slices
                if None in self._chunks[piece.start : piece.stop]
            }
        reasons = [str(error) for error in self._failures.values()]
        if late:
            reasons.append("the deadline passed")
        missing = len(self._chunks) - len(chunks)
        raise ExchangeFailed(
            self.plan.round,
            tuple(sorted(lost - {self._me})),
            self.held,
            f"{missing} of {len(self._chunks)} chunks are missing: {'; '.join(reasons)}",
        )

    async def _part(self, number: int, piece: Slice) -> None:
        """One slice; when its reducer fails, the other slices still get my contribution."""
        try:
            reducer = self._reducers.get(number)
            if reducer is not None:
                async for chunk in reducer.reduced():
                    self._chunks[chunk.index] = chunk
            else:
                await self._stream(number, piece)
                took_s = asyncio.get_running_loop().time() - self._began
                self.slices_s[piece.reducer] = max(took_s, self.slices_s.get(piece.reducer, 0.0))
        except (PeerError, RoundError, ValueError, ExceptionGroup) as caught:
            error = innermost(caught)
            if not isinstance(error, (PeerError, RoundError, ValueError)):
                raise
            self._failures[piece.reducer] = error

    async def _stream(self, number: int, piece: Slice) -> None:
        patience_s = PATIENCE * self.plan.stall_s
        async with (
            self._network.connect(piece.reducer) as stream,
            asyncio.TaskGroup() as tasks,
        ):
            opening = FrameHeader(plan=self.digest, slice=number)
            await stream.send(pack_frame(opening), patience_s)
            sending = tasks.create_task(self._send(stream, piece))
            for index in range(piece.start, piece.stop):
                frame = await stream.receive(patience_s)
                if frame is None:
                    raise ProtocolViolation(piece.reducer, "ended its stream early")
                self._chunks[index] = await self._checked(piece.reducer, frame, index)
            # The last word comes last of all: gRPC fails a write that the stream's end overtakes,
            # and then drops what was not read yet. Now there is nothing to drop.
            if not sending.done():
                await asyncio.wait({sending}, timeout=self.plan.stall_s)
            if sending.done():
                with contextlib.suppress(PeerError):
                    await stream.done_sending(patience_s)
            sending.cancel()  # the reducer has done without what it did not wait for

    async def _checked(self, peer: str, frame: bytes, index: int) -> Chunk:
        """The reduced chunk in a frame, which must be this one, at its place."""
        header, payload = unpack_frame(frame)
        if (header.chunk, header.elements) != (index, self._store.elements(index)):
            raise ProtocolViolation(peer, "sent a chunk out of order")
        check_bits(self.plan, header.contributors)
        put = self._store.put
        return await self._compute(len(payload), put, index, header.contributors, payload)

    async def _send(self, stream: Stream, piece: Slice) -> None:
        """Send my part of a slice; with broken values, end it early.

        Whether the stream broke or only ended before my last chunk is for the receiving side to
        tell, which knows if anything is missing.
        """
        patience_s = PATIENCE * self.plan.stall_s
        try:
            if self._values_N is not None:
                await failpoints.reach_async("send.begin")
                async with contextlib.aclosing(self._encoded(piece)) as frames:
                    async for index, frame in frames:
                        if index == piece.middle:
                            await failpoints.reach_async("send.half")
                        await stream.send(frame, patience_s)
        except NonFinite as error:
            logger.error("butterfly.not_finite round=%d %s", self.plan.round, error)
            with contextlib.suppress(PeerError):
                await stream.done_sending(patience_s)
        except failpoints.Disconnected:
            raise
        except PeerError as error:
            logger.debug("butterfly.send_ended %s", error)

    async def _encoded(self, piece: Slice) -> AsyncGenerator[tuple[int, bytes]]:
        """My part of a slice as frames, each encoded while the one before it is on its way."""
        mine, size = within(self._sent[self._me], piece), self._store.float_bytes
        coming: asyncio.Future[bytes] | None = None
        try:
            for index, following in itertools.zip_longest(mine, mine[1:]):
                frame = await (coming or self._compute(size, self._frame, index))
                coming = None
                if following is not None:
                    coming = self._compute(size, self._frame, following)
                yield index, frame
        finally:
            if coming is not None:  # nobody asks any more what became of it
                coming.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def complete(self, holders: tuple[str, ...]) -> Average | None:
        """Fetch what is missing from members who have it all; None if that fails."""
        try:
            async with asyncio.timeout(self.plan.exchange_s):
                everything = Run(start=0, stop=self.plan.chunks)
                await self._collect(everything, holders, self.digest)
        except TimeoutError:
            logger.warning("butterfly.not_completed round=%d", self.plan.round)
        chunks = [chunk for chunk in self._chunks if chunk is not None]
        if len(chunks) < len(self._chunks):
            return None
        return Average(self._codec.average, chunks, checked=True)

    async def _collect(self, run: Run, holders: tuple[str, ...], plan: bytes) -> None:
        """Fetch what only others got by a plan, a part of it from each of them."""
        missing = [n for n in range(run.start, run.stop) if self._chunks[n] is None]
        others = [peer for peer in holders if peer != self._me]
        if not missing or not others:
            return
        # Members begin with different holders, and so do runs that are shorter than their number.
        turn = (missing[0] + self.plan.receivers.index(self._me)) % len(others)
        others = others[turn:] + others[:turn]
        async with asyncio.TaskGroup() as tasks:
            for piece in share(runs_of(missing), others):
                at = others.index(piece.reducer)
                tasks.create_task(self._collect_run(piece, others[at:] + others[:at], plan))

    async def _collect_run(self, run: Run, holders: list[str], plan: bytes) -> None:
        index = run.start
        for holder in holders:
            if holder in self._dropped:
                continue
            request = FetchChunks(plan=plan, start=index, stop=run.stop)
            try:
                async with self._network.fetch(holder, request, self.plan.stall_s) as frames:
                    async for frame in frames:
                        if index == run.stop:
                            raise ProtocolViolation(holder, "sent more chunks than asked for")
                        self._chunks[index] = await self._checked(holder, frame, index)
                        index += 1
            except (PeerError, ValueError) as error:
                self._failures[holder] = error
            if index == run.stop:
                return

    def _encode(self, index: int) -> memoryview:
        """My part of a chunk."""
        values_N = self._values_N
        if values_N is None:  # released: this exchange is over
            raise Unreachable(self._me, "takes part in it no longer")
        start, stop = chunk_span(index, self.plan.chunk_elements, self.plan.numel)
        return self._codec.encode(values_N[start:stop])

    def _frame(self, index: int) -> bytes:
        """My part of a chunk as it travels."""
        header = FrameHeader(chunk=index, elements=self._store.elements(index))
        return pack_frame(header, self._encode(index))


def _compute(
    executor: Executor, name: str, size: int, work: Callable[..., T], *args: object
) -> asyncio.Future[T]:
    """Have it done, at once if that takes but a moment.

    Args:
        executor: does what takes longer.
        name: of the codec.
        size: bytes that it goes through, about.
        work: a method.
        args: of it.
    """
    loop = asyncio.get_running_loop()
    what = (name, work.__qualname__)
    if size > AT_ONCE_BYTES or what not in _practised or not kernels.compiled():
        coming = loop.run_in_executor(executor, work, *args)
        coming.add_done_callback(lambda it: None if it.cancelled() else _practised.add(what))
        return coming
    done: asyncio.Future[T] = loop.create_future()
    try:
        done.set_result(work(*args))
    except Exception as error:  # whoever awaits it gets it, as from a thread
        done.set_exception(error)
    return done


def _residuals(
    plan: Plan, feedback: tuple[Feedback, int] | None
) -> tuple[Callable[[int, Tensor], None] | None, Callable[[Chunk, Tensor], None] | None]:
    """The two ends of error feedback for the chunks of a plan. Holds on to no butterfly."""
    if feedback is None:
        return None, None
    residuals, fragment = feedback
    length = plan.chunk_elements

    def add(index: int, mean_E: Tensor) -> None:
        residuals.add(fragment, index * length, mean_E)

    def keep(chunk: Chunk, residual_E: Tensor) -> None:
        residuals.keep(fragment, chunk.index * length, chunk, residual_E.clone())

    return add, keep


def _alike(base: Plan, plan: Plan) -> bool:
    """Whether a chunk of the base is the same chunk in the plan that mends it."""
    return (base.numel, base.chunk_elements, base.codec, base.contributions) == (
        plan.numel,
        plan.chunk_elements,
        plan.codec,
        plan.contributions,
    )
