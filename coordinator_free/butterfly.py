"""The butterfly all-reduce of one plan, as one member runs it.

Every member streams each slice of its vector to that slice's reducer and gets the averaged slice
back on the same stream; as reducer of its own slice it does the other half of that. A reducer sums
a chunk as soon as all contributions to it are there, in the plan's order so that anybody can
reproduce the bytes, encodes it once, and sends those bytes to everybody, itself included.

Guarantees: `run` returns a complete average or raises; a contributor that breaks off or stalls is
left out of the chunks it did not deliver; everything a partner sends is checked against the plan
before it is used; memory is bounded by the vector and `WINDOW` chunks per contributor, as a slow
reader or a slow reducer stops the streams that feed it. Not guaranteed: that a reducer averaged
honestly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from coordinator_free.average import Average, Chunk, check_bits, contributor_bits
from coordinator_free.codecs import Codec, NonFinite, codec
from coordinator_free.messages import FrameHeader, Plan, Slice
from coordinator_free.partition import chunk_bounds
from coordinator_free.wire import pack_frame, unpack_frame
from dht.errors import PeerError, ProtocolViolation, RoundError, innermost

logger = logging.getLogger(__name__)

WINDOW = 4  # chunks of one contributor that wait for those of the others
STALL_SHARE = 3  # a contributor may be silent for this part of the exchange's deadline

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


class ExchangeFailed(RoundError):
    """The exchange came to nothing here.

    Args:
        round: the round.
        lost: peers that broke off.
        reason: for a log line.
    """

    def __init__(self, round: int, lost: tuple[str, ...], reason: str) -> None:
        super().__init__(round, reason)
        self.lost = lost


class Reducer:
    """Averages one slice: contributions in, in any order; reduced chunks out, in order."""

    def __init__(
        self, plan: Plan, number: int, compute: Callable[..., asyncio.Future[None]]
    ) -> None:
        self._plan = plan
        self._number = number
        self._compute = compute
        self._codec = codec(plan.codec)
        self._bounds = list(chunk_bounds(plan.slices[number], plan.chunk_elements))
        self._stall_s = plan.exchange_s / STALL_SHARE
        self._queues: dict[str, asyncio.Queue[bytes | memoryview | None]] = {
            c.peer_id: asyncio.Queue(WINDOW) for c in plan.contributions
        }
        self._lost: set[str] = set()
        self._reduced: list[Chunk] = []
        self._aborted = False
        self._news = asyncio.Condition()

    @property
    def lost(self) -> tuple[str, ...]:
        """Contributors that did not deliver everything."""
        return tuple(sorted(self._lost))

    async def put(self, peer: str, payload: bytes | memoryview) -> None:
        """The next chunk of a contributor; waits while it is too far ahead of the others."""
        if peer not in self._lost:
            await self._queues[peer].put(payload)

    def drop(self, peer: str) -> None:
        """Nothing more comes from this contributor."""
        queue = self._queues.get(peer)
        if queue is not None and peer not in self._lost:
            self._lost.add(peer)
            # Wakes whoever waits on an empty queue; a full one holds chunks that still count.
            if queue.empty():
                queue.put_nowait(None)

    async def run(self) -> None:
        """Reduce every chunk.

        Raises:
            RoundError: a chunk got no contribution at all.
        """
        loop = asyncio.get_running_loop()
        for index, (start, stop) in enumerate(self._bounds):
            payloads = {}
            # One clock for all: contributors that stall together must not add up to the deadline.
            until = loop.time() + self._stall_s
            for contribution in self._plan.contributions:
                payload = await self._next(contribution.peer_id, until)
                if payload is not None:
                    payloads[contribution.peer_id] = payload
            if not payloads:
                raise RoundError(self._plan.round, f"nobody contributed to chunk {index}")
            chunk: list[Chunk] = []
            await self._compute(self._reduce, index, stop - start, payloads, chunk)
            async with self._news:
                self._reduced += chunk
                self._news.notify_all()

    async def _next(self, peer: str, until: float) -> bytes | memoryview | None:
        queue = self._queues[peer]
        if peer in self._lost and queue.empty():
            return None
        try:
            async with asyncio.timeout_at(until):
                return await queue.get()
        except TimeoutError:
            logger.warning("butterfly.contributor_stalled peer=%s", peer)
            self._lost.add(peer)
            # What slipped in at the last moment is of this chunk: it must not pass for the next.
            while not queue.empty():
                queue.get_nowait()
            return None

    def _reduce(
        self,
        index: int,
        elements: int,
        payloads: dict[str, bytes | memoryview],
        out: list[Chunk],
    ) -> None:
        """Weighted mean in the plan's order, each weight rounded to float32 once."""
        total = sum(c.samples for c in self._plan.contributions if c.peer_id in payloads)
        sum_E = torch.zeros(elements, dtype=torch.float32)
        for contribution in self._plan.contributions:
            payload = payloads.get(contribution.peer_id)
            if payload is not None:
                self._codec.decode_add(payload, elements, contribution.samples / total, sum_E)
        out.append(
            Chunk(
                slice=self._number,
                index=index,
                elements=elements,
                contributors=contributor_bits(self._plan, set(payloads)),
                payload=self._codec.encode(sum_E),
            )
        )

    async def abort(self) -> None:
        """No more chunks will come: whoever waits for one is told, unless it has them all."""
        async with self._news:
            self._aborted = True
            self._news.notify_all()

    async def reduced(self) -> AsyncIterator[Chunk]:
        """Every reduced chunk, each as soon as it is there.

        Raises:
            RoundError: the slice was given up.
        """
        for index in range(len(self._bounds)):
            async with self._news:
                while len(self._reduced) <= index:
                    if self._aborted:
                        raise RoundError(self._plan.round, "the reducer gave up its slice")
                    await self._news.wait()
            yield self._reduced[index]


class Butterfly:
    """One member's exchange by one plan.

    Args:
        plan: of the leader, checked by the machine.
        digest: the plan's.
        me: this peer's id.
        values_N: (N,) float32 pseudo-gradient; None for a member that only receives.
        connect: opens a stream to a reducer; an async context manager.
        executor: runs what takes longer than a moment.
    """

    def __init__(
        self,
        plan: Plan,
        digest: bytes,
        me: str,
        values_N: Tensor | None,
        connect: Callable[[str], AbstractAsyncContextManager[Stream]],
        executor: Executor,
    ) -> None:
        self._plan = plan
        self._digest = digest
        self._me = me
        self._codec: Codec = codec(plan.codec)
        self._values_N = values_N
        self._connect = connect
        self._executor = executor
        self._failures: dict[str, BaseException] = {}  # by reducer
        self._served: set[str] = set()
        mine = [n for n, piece in enumerate(plan.slices) if piece.reducer == me]
        self._reducer = Reducer(plan, mine[0], self._compute) if mine else None

    def _compute(self, work: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._executor, work, *args)

    # -- as reducer ---------------------------------------------------------------------------

    async def reduce(self) -> None:
        """Average my slice for everybody, however my own exchange goes."""
        reducer = self._reducer
        if reducer is None:
            return
        piece = next(piece for piece in self._plan.slices if piece.reducer == self._me)
        try:
            async with asyncio.timeout(self._plan.exchange_s), asyncio.TaskGroup() as tasks:
                tasks.create_task(reducer.run())
                tasks.create_task(self._feed(reducer, piece))
        except TimeoutError:
            logger.warning("butterfly.slice_late round=%d", self._plan.round)
        except BaseExceptionGroup as group:
            error = innermost(group)
            if not isinstance(error, (RoundError, ValueError)):
                raise
            logger.warning("butterfly.slice_given_up %s", error)
        finally:
            await reducer.abort()

    async def serve(self, sender: str, frames: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """The other side of a member's stream: its chunks of my slice in, reduced chunks out.

        Args:
            sender: authentic.
            frames: what follows the frame that named the plan.
        """
        if self._reducer is None or sender not in self._plan.receivers:
            raise ProtocolViolation(sender, "opened an exchange that it has no part in")
        if sender in self._served:
            # Chunks of two streams would mix in one queue, of other lengths than the plan's.
            raise ProtocolViolation(sender, "opened the same exchange twice")
        self._served.add(sender)
        # No TaskGroup: one must not stay open across a generator's yields. The generator's end,
        # which the transport brings about in every case, ends the task.
        reading = asyncio.create_task(self._take(self._reducer, sender, frames))
        try:
            async for chunk in self._reducer.reduced():
                yield chunk.frame()
        finally:
            reading.cancel()

    async def _take(self, reducer: Reducer, sender: str, frames: AsyncIterator[bytes]) -> None:
        contributors = {c.peer_id for c in self._plan.contributions}
        piece = next(piece for piece in self._plan.slices if piece.reducer == self._me)
        bounds = list(chunk_bounds(piece, self._plan.chunk_elements))
        taken = 0
        try:
            async with asyncio.timeout(self._plan.exchange_s):
                async for frame in frames:
                    header, payload = unpack_frame(frame)
                    if sender not in contributors or taken == len(bounds) or header.chunk != taken:
                        raise ProtocolViolation(sender, "sent a chunk that the plan does not have")
                    start, stop = bounds[taken]
                    await self._compute(self._codec.validate, payload, stop - start)
                    await reducer.put(sender, payload)
                    taken += 1
        except (TimeoutError, ValueError, PeerError) as error:
            logger.warning("butterfly.contributor_lost peer=%s chunks=%d %s", sender, taken, error)
        finally:
            if taken < len(bounds):
                reducer.drop(sender)

    # -- as member ----------------------------------------------------------------------------

    async def run(self) -> Average:
        """Take part in every slice; `reduce` has to run beside it.

        Returns:
            The complete average.

        Raises:
            ExchangeFailed: a reducer broke off, or the deadline passed.
        """
        results: dict[int, list[Chunk]] = {}
        try:
            async with asyncio.timeout(self._plan.exchange_s), asyncio.TaskGroup() as tasks:
                for number, piece in enumerate(self._plan.slices):
                    results[number] = []
                    tasks.create_task(self._part(number, piece, results[number]))
        except TimeoutError as error:
            waiting = {
                piece.reducer
                for number, piece in enumerate(self._plan.slices)
                if len(results.get(number, ())) < len(self._bounds(piece))
            }
            raise ExchangeFailed(
                self._plan.round, tuple(sorted(waiting - {self._me})), "the deadline passed"
            ) from error
        if self._failures:
            raise ExchangeFailed(
                self._plan.round,
                tuple(sorted(peer for peer in self._failures if peer != self._me)),
                "; ".join(map(str, self._failures.values())),
            )
        chunks = [chunk for number in sorted(results) for chunk in results[number]]
        return await self._compute(Average, self._plan.codec, chunks)

    @property
    def lost(self) -> tuple[str, ...]:
        """Contributors that my slice had to do without."""
        return self._reducer.lost if self._reducer is not None else ()

    def _bounds(self, piece: Slice) -> list[tuple[int, int]]:
        return list(chunk_bounds(piece, self._plan.chunk_elements))

    async def _feed(self, reducer: Reducer, piece: Slice) -> None:
        """My own contribution to my own slice takes the same way as everybody's."""
        if self._values_N is None:
            reducer.drop(self._me)
            return
        try:
            for start, stop in self._bounds(piece):
                await reducer.put(self._me, await self._encode(start, stop))
        except NonFinite as error:
            logger.error("butterfly.not_finite round=%d %s", self._plan.round, error)
            reducer.drop(self._me)

    async def _part(self, number: int, piece: Slice, out: list[Chunk]) -> None:
        """One slice; when its reducer fails, the other slices still get my contribution."""
        try:
            if self._reducer is not None and piece.reducer == self._me:
                async for chunk in self._reducer.reduced():
                    out.append(chunk)
            else:
                await self._stream(number, piece, out)
        except (PeerError, RoundError, ValueError, ExceptionGroup) as caught:
            error = innermost(caught)
            if not isinstance(error, (PeerError, RoundError, ValueError)):
                raise
            self._failures[piece.reducer] = error

    async def _stream(self, number: int, piece: Slice, out: list[Chunk]) -> None:
        deadline_s = self._plan.exchange_s
        async with self._connect(piece.reducer) as stream, asyncio.TaskGroup() as tasks:
            await stream.send(pack_frame(FrameHeader(plan=self._digest)), deadline_s)
            tasks.create_task(self._send(stream, number, piece))
            for index, (start, stop) in enumerate(self._bounds(piece)):
                frame = await stream.receive(deadline_s)
                if frame is None:
                    raise ProtocolViolation(piece.reducer, "ended its stream early")
                chunk = Chunk.from_frame(frame)
                if (chunk.slice, chunk.index, chunk.elements) != (number, index, stop - start):
                    raise ProtocolViolation(piece.reducer, "sent a chunk out of order")
                check_bits(self._plan, chunk.contributors)
                await self._compute(self._codec.validate, chunk.payload, chunk.elements)
                out.append(chunk)

    async def _send(self, stream: Stream, number: int, piece: Slice) -> None:
        """Send my part of a slice; without values, or with broken ones, only end the stream.

        Whether the stream broke or only ended before my last word is for the receiving side to
        tell, which knows if anything is missing.
        """
        deadline_s = self._plan.exchange_s
        try:
            if self._values_N is not None:
                for index, (start, stop) in enumerate(self._bounds(piece)):
                    payload = await self._encode(start, stop)
                    header = FrameHeader(slice=number, chunk=index, elements=stop - start)
                    await stream.send(pack_frame(header, payload), deadline_s)
            await stream.done_sending(deadline_s)
        except NonFinite as error:
            logger.error("butterfly.not_finite round=%d %s", self._plan.round, error)
            with contextlib.suppress(PeerError):
                await stream.done_sending(deadline_s)
        except PeerError as error:
            logger.debug("butterfly.send_ended %s", error)

    async def _encode(self, start: int, stop: int) -> memoryview:
        assert self._values_N is not None
        return await self._compute(self._codec.encode, self._values_N[start:stop])
