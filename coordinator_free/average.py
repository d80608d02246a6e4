"""The encoded result of one exchange: the bytes that every peer applies.

A reducer encodes each finished chunk once and everybody, itself included, uses those bytes: that is
what makes replicas bit-identical however the sums were rounded. `root` names the bytes; peers that
hold the same root hold the same average.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3
from torch import Tensor

from coordinator_free.codecs import Codec, codec
from coordinator_free.memory import empty_bytes, empty_vector
from coordinator_free.messages import MAX_MEMBERS, Contribution, FrameHeader, Plan
from coordinator_free.partition import ALIGN_ELEMENTS, chunk_span
from coordinator_free.wire import pack_frame, tree_root, unpack_frame

_PREFIX = struct.Struct(">IQI")


@dataclass(frozen=True)
class Chunk:
    """One reduced chunk.

    Attributes:
        index: of the chunk in the vector.
        elements: encoded in `payload`.
        contributors: bit i of byte i // 8 is set if contribution i of the plan is in the mean.
        payload: codec bytes.
    """

    index: int
    elements: int
    contributors: bytes
    payload: bytes | memoryview

    @functools.cached_property
    def digest(self) -> bytes:
        """(32,) bytes over everything above; the first look takes a moment."""
        hasher = blake3(b"shoal chunk v1\0")
        hasher.update(_PREFIX.pack(self.index, self.elements, len(self.contributors)))
        hasher.update(self.contributors)
        hasher.update(self.payload)
        return hasher.digest()

    def frame(self) -> bytes:
        """As it travels."""
        header = FrameHeader(
            chunk=self.index, contributors=self.contributors, elements=self.elements
        )
        return pack_frame(header, self.payload)

    @classmethod
    def from_frame(cls, frame: bytes) -> Chunk:
        """Read one back; neither its place nor its payload is checked yet.

        Raises:
            ValueError: not a frame.
        """
        header, payload = unpack_frame(frame)
        return cls(header.chunk, header.elements, header.contributors, payload)


class ChunkStore:
    """Room for the encoded chunks of one vector, in one piece of memory that is used once.

    Received frames end here, so that the memory they came in is free for the next ones.

    Args:
        codec: how payloads are encoded.
        numel: length of the vector.
        chunk_elements: of every chunk but the last.

    Attributes:
        float_bytes: of a chunk as float32.
    """

    def __init__(self, codec: Codec, numel: int, chunk_elements: int) -> None:
        self._codec = codec
        self._numel = numel
        self._chunk_elements = chunk_elements
        self.float_bytes = 4 * min(chunk_elements, numel)
        self._chunk_bytes = codec.encoded_bytes(chunk_elements)
        chunks = -(-numel // chunk_elements)
        last = numel - (chunks - 1) * chunk_elements
        self._memory = empty_bytes((chunks - 1) * self._chunk_bytes + codec.encoded_bytes(last))

    def elements(self, index: int) -> int:
        """Length of a chunk."""
        start, stop = chunk_span(index, self._chunk_elements, self._numel)
        return stop - start

    def room(self, index: int) -> memoryview:
        """Where the payload of a chunk belongs; exactly as long as that is."""
        start = index * self._chunk_bytes
        return self._memory[start : start + self._codec.encoded_bytes(self.elements(index))]

    def put(self, index: int, contributors: bytes, payload: memoryview) -> Chunk:
        """Copy a payload to its place, and look at it: call this in a worker thread.

        Raises:
            ValueError: it is not what the codec makes of so many elements.
        """
        room, elements = self.room(index), self.elements(index)
        if len(payload) != len(room):
            raise ValueError(f"{len(payload)} bytes are not {elements} elements")
        room[:] = payload
        self._codec.validate(room, elements)
        chunk = Chunk(index, elements, contributors, room)
        chunk.digest  # noqa: B018  here and not in the event loop
        return chunk


class Average:
    """All chunks of a vector, in order.

    Args:
        codec_name: how payloads are encoded.
        chunks: every chunk of the vector, in the order of its elements.
        checked: whether the payloads are known to be what the codec makes.

    Raises:
        ConfigError: nobody knows the codec.
        ValueError: a payload is not what the codec makes.
    """

    def __init__(self, codec_name: str, chunks: list[Chunk], *, checked: bool = False) -> None:
        self.codec_name = codec_name
        self.chunks = chunks
        if not checked:
            for chunk in chunks:
                codec(codec_name).validate(chunk.payload, chunk.elements)

    @functools.cached_property
    def root(self) -> bytes:
        """(32,) bytes that name this average."""
        name = blake3(b"shoal average v1\0" + self.codec_name.encode()).digest()
        return tree_root([name, *(chunk.digest for chunk in self.chunks)])

    @property
    def numel(self) -> int:
        """Length of the vector."""
        return sum(chunk.elements for chunk in self.chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        return sum(len(chunk.payload) for chunk in self.chunks)

    def decode(self, chunk: Chunk, out_E: Tensor) -> None:
        """One chunk of the averaged pseudo-gradient, into (E,) float32."""
        codec(self.codec_name).decode(chunk.payload, chunk.elements, out_E)

    def values(self) -> Tensor:
        """The averaged pseudo-gradient, decoded: (N,) float32."""
        out_N = empty_vector(self.numel)
        start = 0
        for chunk in self.chunks:
            self.decode(chunk, out_N[start : start + chunk.elements])
            start += chunk.elements
        return out_N

    def frames(self) -> Iterator[bytes]:
        """For somebody who fetches it: the codec's name, then every chunk."""
        yield pack_frame(FrameHeader(codec=self.codec_name))
        for chunk in self.chunks:
            yield chunk.frame()


class AverageReader:
    """Collects the frames of a fetched average, bounded by the length of the vector."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._codec_name: str | None = None
        self._chunks: list[Chunk] = []
        self._elements = 0

    def add(self, frame: bytes) -> None:
        """Take one frame.

        Raises:
            ValueError: not a frame, or more than there can be.
        """
        if self._codec_name is None:
            self._codec_name = unpack_frame(frame)[0].codec
            return
        chunk = Chunk.from_frame(frame)
        self._elements += chunk.elements
        if chunk.elements == 0 or self._elements > self._numel or chunk.index != len(self._chunks):
            raise ValueError("the chunks of an average do not add up")
        # No codec takes more than float32 does: bounds the memory before `finish` validates.
        if len(chunk.payload) > 4 * chunk.elements:
            raise ValueError("a chunk of an average is over-long")
        if len(self._chunks) > self._numel // ALIGN_ELEMENTS:
            raise ValueError("an average in too many chunks")
        self._chunks.append(chunk)

    def finish(self, root: bytes) -> Average:
        """The average, which has this root.

        Raises:
            ValueError: it is another one, or incomplete.
        """
        if self._codec_name is None or self._elements != self._numel:
            raise ValueError("an average is incomplete")
        average = Average(self._codec_name, self._chunks)
        if average.root != root:
            raise ValueError("an average has another root than asked for")
        return average


def contributor_bits(plan: Plan, present: set[str]) -> bytes:
    """The bitmap of those contributions of a plan that are by `present`."""
    bits = bytearray(-(-len(plan.contributions) // 8))
    for number, contribution in enumerate(plan.contributions):
        if contribution.peer_id in present:
            bits[number // 8] |= 1 << number % 8
    return bytes(bits)


def absent(plan: Plan, average: Average) -> tuple[str, ...]:
    """Contributors of a plan that are in no chunk of its average."""
    present = 0
    for chunk in average.chunks:
        present |= int.from_bytes(chunk.contributors, "little")
    return tuple(c.peer_id for n, c in enumerate(plan.contributions) if not present >> n & 1)


def contributors(
    average: Average, contributions: Sequence[Contribution]
) -> list[tuple[Contribution, ...]]:
    """Who is in each chunk of an average, by what its outcome says.

    An outcome names those who are in some chunk, in the plan's order. Bitmaps are numbered by the
    plan, which may have named others as well: the first bit that is set anywhere is the first of
    the outcome's contributions, and so on.

    Args:
        average: of one round.
        contributions: of the outcome of that round.

    Raises:
        ValueError: the outcome names more or fewer than there are in the chunks.
    """
    numbers = [int.from_bytes(chunk.contributors, "little") for chunk in average.chunks]
    anywhere = functools.reduce(operator.or_, numbers, 0)
    bits = [bit for bit in range(anywhere.bit_length()) if anywhere >> bit & 1]
    if len(bits) != len(contributions):
        raise ValueError(f"{len(bits)} contributors are averaged, {len(contributions)} are named")
    named = list(zip(bits, contributions, strict=True))
    return [tuple(who for bit, who in named if number >> bit & 1) for number in numbers]


def spans_of(
    peer: str, average: Average, contributions: Sequence[Contribution]
) -> tuple[tuple[int, int], ...]:
    """Where a peer's contribution is in an average: (start, stop) in elements, ascending.

    Args:
        peer: whose.
        average: of one round.
        contributions: of the outcome of that round.

    Raises:
        ValueError: as `contributors`.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    for chunk, named in zip(average.chunks, contributors(average, contributions), strict=True):
        stop = start + chunk.elements
        if any(contribution.peer_id == peer for contribution in named):
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        start = stop
    return tuple(spans)


def check_bits(plan: Plan, bits: bytes) -> None:
    """Refuse a bitmap that names nobody, or a contribution that the plan does not have.

    Raises:
        ValueError: such a bitmap.
    """
    count = len(plan.contributions)
    if len(bits) != -(-count // 8) or count > MAX_MEMBERS:
        raise ValueError("a contributor bitmap has the wrong length")
    number = int.from_bytes(bits, "little")
    if number == 0 or number >> count:
        raise ValueError("a contributor bitmap names nobody, or somebody who is not there")
