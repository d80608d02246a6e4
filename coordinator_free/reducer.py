"""The reducing half of a butterfly: one slice, everybody's contributions in, its average out.

A chunk is summed as soon as all contributions to it are there, in the plan's order so that anybody
can reproduce the bytes, encoded once, and those bytes go to everybody, this peer included.

Guarantees: a contributor that breaks off or stalls is left out of what it did not deliver, and the
chunk says so; memory is bounded by the slice and a window per contributor. Not guaranteed:
that a reducer averages honestly.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping

import torch
from torch import Tensor

from coordinator_free import failpoints
from coordinator_free.average import Chunk, ChunkStore, contributor_bits
from coordinator_free.codecs import codec, mean_of_sent, sparse_codec
from coordinator_free.memory import empty_vector
from coordinator_free.messages import Plan, Slice
from dht.errors import RoundError

logger = logging.getLogger(__name__)

PAUSE_S = 1.0  # a time-out that is noticed so late was noticed by a process that stood still
# What may wait of one contributor for the others: so many chunks, and where they are small, bytes.
# Streams that share a link take turns; with less, each of them stops for every moment of another.
WINDOW = 2
WINDOW_BYTES = 4 << 20
SLICE_SHARE = 0.75  # of the exchange, for all contributions to a slice at an even pace
KEPT_FRAMES = 4  # reduced chunks as they travel: made once for all receivers that keep up


class Reducer:
    """Averages one slice: contributions in, in any order; reduced chunks out, in order.

    Args:
        plan: that the slice belongs to.
        piece: which chunks.
        sent: by contributor, which of them it sends.
        store: where reduced chunks go.
        compute: runs what takes longer than a moment.
        weights: by contributor, what it counts for.
        add_residual: adds what was cut off earlier to a chunk's mean, in place; None for nothing.
        keep_residual: gets what was cut off of a chunk now, in memory that is used again.
    """

    def __init__(
        self,
        plan: Plan,
        piece: Slice,
        sent: Mapping[str, Collection[int]],
        store: ChunkStore,
        compute: Callable[..., asyncio.Future[None]],
        *,
        weights: Mapping[str, float],
        add_residual: Callable[[int, Tensor], None] | None = None,
        keep_residual: Callable[[Chunk, Tensor], None] | None = None,
    ) -> None:
        self.piece = piece
        self._plan = plan
        self._sent = sent
        self._store = store
        self._compute = compute
        self._codec = codec(plan.codec)
        self._weights = weights
        self._add_residual = add_residual
        self._keep_residual = keep_residual
        self._sum_E = empty_vector(store.elements(piece.start))
        # Of a sparse codec: the weight of those who sent an element, over which the mean is.
        self._sparse = sparse_codec(plan.codec)
        self._sent_E = torch.empty_like(self._sum_E) if self._sparse is not None else None
        self._frames: OrderedDict[int, bytes] = OrderedDict()
        window = max(WINDOW, WINDOW_BYTES // len(store.room(piece.start)))
        self._queues: dict[str, asyncio.Queue[bytes | memoryview | None]] = {
            c.peer_id: asyncio.Queue(window) for c in plan.contributions
        }
        # A mend names all contributions of its base, also of those who are gone.
        self._lost = self._queues.keys() - set(plan.receivers)
        self._reduced: list[Chunk] = []
        self._aborted = False
        self._news = asyncio.Condition()

    @property
    def lost(self) -> frozenset[str]:
        """Contributors that did not deliver everything."""
        return frozenset(self._lost)

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
        await failpoints.reach_async("reduce.begin")
        began = loop.time()
        for index in range(self.piece.start, self.piece.stop):
            if index == self.piece.middle:
                await failpoints.reach_async("reduce.half")
            payloads = {}
            # One clock for all: contributors that stall together must not add up to the deadline.
            until = min(loop.time() + self._plan.stall_s, began + self._due_s(index))
            due = [
                contribution.peer_id
                for contribution in self._plan.contributions
                if index in self._sent[contribution.peer_id]
            ]
            for peer in due:
                payload = await self._next(peer, until)
                if payload is None and loop.time() > until + PAUSE_S:
                    # This process stood still, not the others: what they sent waits in its sockets.
                    began += loop.time() - until
                    until = loop.time() + self._plan.stall_s
                    payload = await self._next(peer, until)
                if payload is not None:
                    payloads[peer] = payload
            if not payloads:
                raise RoundError(self._plan.round, f"nobody contributed to chunk {index}")
            chunk: list[Chunk] = []
            await self._compute(self._reduce, index, payloads, chunk)
            for peer in due:
                if peer not in payloads:
                    self._leave_out(peer)
            if not chunk:
                raise RoundError(self._plan.round, f"nothing sound was sent for chunk {index}")
            async with self._news:
                self._reduced += chunk
                self._news.notify_all()

    def _due_s(self, index: int) -> float:
        """How long after the begin a chunk is waited for at most.

        By the deadline of one chunk alone, who is just within it every time would take the slice
        beyond that of the exchange, and its honest reducer would be blamed.
        """
        ended = (index + 1 - self.piece.start) / (self.piece.stop - self.piece.start)
        return self._plan.stall_s + ended * SLICE_SHARE * self._plan.exchange_s

    async def _next(self, peer: str, until: float) -> bytes | memoryview | None:
        queue = self._queues[peer]
        if peer in self._lost and queue.empty():
            return None
        try:
            async with asyncio.timeout_at(until):
                return await queue.get()
        except TimeoutError:
            return None

    def _leave_out(self, peer: str) -> None:
        """Nothing of this contributor counts from this chunk on."""
        if peer not in self._lost:
            logger.warning("butterfly.contributor_stalled peer=%s", peer)
            self._lost.add(peer)
        # What slipped in at the last moment is of this chunk: it must not pass for the next.
        queue = self._queues[peer]
        while not queue.empty():
            queue.get_nowait()

    def _reduce(
        self, index: int, payloads: dict[str, bytes | memoryview], out: list[Chunk]
    ) -> None:
        """Weighted mean in the plan's order, each weight rounded to float32 once, and encoded.

        Args:
            index: of the chunk.
            payloads: by peer. Those that are not what the codec makes are taken out.
            out: gets the chunk, if anything was sound.
        """
        while payloads:
            broken = self._add_up(index, payloads)
            if broken is None:
                break
            del payloads[broken]  # and once more without it: a sum cannot be taken back exactly
        else:
            return
        elements, room = self._store.elements(index), self._store.room(index)
        mean_E, encoding = self._sum_E[:elements], codec(self._codec.average)
        if self._add_residual is not None:
            self._add_residual(index, mean_E)
        encoding.encode(mean_E, room)
        chunk = Chunk(index, elements, contributor_bits(self._plan, set(payloads)), room)
        chunk.digest  # noqa: B018  here and not in the event loop
        if self._keep_residual is not None:
            encoding.decode_add(room, elements, -1.0, mean_E)
            self._keep_residual(chunk, mean_E)
        out.append(chunk)

    def _add_up(self, index: int, payloads: dict[str, bytes | memoryview]) -> str | None:
        """Whose payload is broken, or None, and then the sum is in place."""
        total = sum(self._weights[peer] for peer in payloads)
        elements = self._store.elements(index)
        sum_E = self._sum_E[:elements]
        sent_E = self._sent_E
        if sent_E is not None:
            sum_E.zero_()
            sent_E = sent_E[:elements].zero_()
        first = True
        for contribution in self._plan.contributions:
            payload = payloads.get(contribution.peer_id)
            if payload is None:
                continue
            weight = self._weights[contribution.peer_id] / total
            try:
                if sent_E is not None:
                    assert self._sparse is not None
                    self._sparse.decode_add_sent(payload, elements, weight, sum_E, sent_E)
                elif first:
                    self._codec.decode(payload, elements, sum_E, weight)
                else:
                    self._codec.decode_add(payload, elements, weight, sum_E)
            except ValueError as error:
                logger.warning("butterfly.nonsense peer=%s %s", contribution.peer_id, error)
                return contribution.peer_id
            first = False
        if sent_E is not None:
            mean_of_sent(sum_E, sent_E)
        return None

    async def abort(self) -> None:
        """No more chunks will come: whoever waits for one is told, unless it has them all."""
        async with self._news:
            self._aborted = True
            self._news.notify_all()

    def frame(self, chunk: Chunk) -> bytes:
        """A reduced chunk as it travels."""
        frame = self._frames.get(chunk.index)
        if frame is None:
            frame = self._frames[chunk.index] = chunk.frame()
            if len(self._frames) > KEPT_FRAMES:
                self._frames.popitem(last=False)
        return frame

    async def reduced(self) -> AsyncIterator[Chunk]:
        """Every reduced chunk, each as soon as it is there.

        Raises:
            RoundError: the slice was given up.
        """
        for number in range(self.piece.stop - self.piece.start):
            async with self._news:
                while len(self._reduced) <= number:
                    if self._aborted:
                        raise RoundError(self._plan.round, "the reducer gave up its slice")
                    await self._news.wait()
            yield self._reduced[number]
