"""Messages to bytes and back, and the digests that are taken over those bytes.

One table drives both directions: a message class and its protobuf twin have the same field names.
`decode` refuses over-long, malformed and out-of-range bytes with a `ValueError`; nothing that
comes out of it needs its shape checked again. Digests are BLAKE3 over a domain string and the
deterministic protobuf encoding, which has no maps and no unknown fields here.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import struct
import types
import typing
from collections.abc import Iterable
from typing import Any

from blake3 import blake3
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from coordinator_free import messages
from coordinator_free.messages import (
    Certificate,
    FetchChain,
    FetchChunks,
    FetchOutcome,
    FetchState,
    FrameHeader,
    Message,
    Outcome,
    Plan,
)
from coordinator_free.proto import rounds_pb2

MAX_MESSAGE_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 12
_LENGTH = struct.Struct(">I")

_ENVELOPE = {
    "lead": messages.Lead,
    "ready": messages.Ready,
    "progress": messages.Progress,
    "prepare": messages.Prepare,
    "promise": messages.Promise,
    "plan": messages.Plan,
    "report": messages.Report,
    "propose": messages.Propose,
    "accepted": messages.Accepted,
    "refused": messages.Refused,
    "commit": messages.Commit,
    "join": messages.Join,
    "assist": messages.Assist,
    "leave": messages.Leave,
    "hello": messages.Hello,
    "heads": messages.Heads,
}
_REPLIES = ("heads",)
_ENVELOPE_NAME = {kind: name for name, kind in _ENVELOPE.items()}
FetchRequest = FetchState | FetchOutcome | FetchChunks | FetchChain
_FETCH: dict[str, type[FetchRequest]] = {
    "state": FetchState,
    "outcome": FetchOutcome,
    "chunks": FetchChunks,
    "chain": FetchChain,
}


def encode(message: Message) -> bytes:
    """One message as the bytes of an Envelope.

    Raises:
        ValueError: it is larger than `MAX_MESSAGE_BYTES`.
    """
    envelope = rounds_pb2.Envelope()
    _fill(getattr(envelope, _ENVELOPE_NAME[type(message)]), message)
    raw = envelope.SerializeToString(deterministic=True)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a {type(message).__name__} of {len(raw)} bytes is too large to send")
    return raw


def decode(raw: bytes, *, reply: bool = True) -> Message:
    """The message in an Envelope's bytes.

    Args:
        raw: hostile bytes.
        reply: whether they are an answer. What is only ever one is else refused by its name: to
            read the largest takes a hundred times as long as to see what it is.

    Raises:
        ValueError: the bytes are not one well-formed message.
    """
    envelope = rounds_pb2.Envelope()
    name = _parse(envelope, raw, MAX_MESSAGE_BYTES, "message")
    if not reply and name in _REPLIES:
        raise ValueError(f"{name} that nobody asked for")
    message: Message = _read(_ENVELOPE[name], getattr(envelope, name))
    return message


def encode_fetch(request: FetchRequest) -> bytes:
    """A fetch request as bytes."""
    proto = rounds_pb2.FetchRequest()
    name = next(name for name, kind in _FETCH.items() if isinstance(request, kind))
    _fill(getattr(proto, name), request)
    return proto.SerializeToString(deterministic=True)


def decode_fetch(raw: bytes) -> FetchRequest:
    """The request in these bytes.

    Raises:
        ValueError: the bytes are not one well-formed request.
    """
    proto = rounds_pb2.FetchRequest()
    name = _parse(proto, raw, MAX_HEADER_BYTES, "request")
    request: FetchRequest = _read(_FETCH[name], getattr(proto, name))
    return request


def encode_certificate(certificate: Certificate) -> bytes:
    """A certificate alone, as it lies in a chain."""
    proto = rounds_pb2.Certificate()
    _fill(proto, certificate)
    return proto.SerializeToString(deterministic=True)


def decode_certificate(raw: bytes) -> Certificate:
    """The certificate in these bytes; neither its signatures nor its place are checked.

    Raises:
        ValueError: the bytes are not one well-formed certificate.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a certificate of {len(raw)} bytes is over the limit")
    proto = rounds_pb2.Certificate()
    try:
        proto.ParseFromString(raw)
    except DecodeError as error:
        raise ValueError(f"not a certificate: {error}") from error
    certificate: Certificate = _read(Certificate, proto)
    return certificate


def pack_frame(header: FrameHeader, payload: bytes | memoryview = b"") -> bytes:
    """Header and payload as one frame."""
    proto = rounds_pb2.FrameHeader()
    _fill(proto, header)
    raw = proto.SerializeToString(deterministic=True)
    return b"".join((_LENGTH.pack(len(raw)), raw, payload))


def unpack_frame(frame: bytes) -> tuple[FrameHeader, memoryview]:
    """The header of a frame and a view of its payload.

    Raises:
        ValueError: the frame is malformed.
    """
    if len(frame) < _LENGTH.size:
        raise ValueError("a frame is shorter than its length field")
    (length,) = _LENGTH.unpack_from(frame)
    if length > MAX_HEADER_BYTES or _LENGTH.size + length > len(frame):
        raise ValueError(f"a frame header of {length} bytes does not fit")
    proto = rounds_pb2.FrameHeader()
    try:
        proto.ParseFromString(frame[_LENGTH.size : _LENGTH.size + length])
    except DecodeError as error:
        raise ValueError(f"not a frame header: {error}") from error
    header: FrameHeader = _read(FrameHeader, proto)
    return header, memoryview(frame)[_LENGTH.size + length :]


def plan_digest(plan: Plan) -> bytes:
    """(32,) bytes that name a plan."""
    return _digest_of(b"shoal plan v1\0", rounds_pb2.Plan(), plan)


def outcome_digest(outcome: Outcome) -> bytes:
    """(32,) bytes that name an outcome; what a certificate signs."""
    return _digest_of(b"shoal outcome v1\0", rounds_pb2.Outcome(), outcome)


def head_digest(outcome: Outcome) -> bytes:
    """(32,) bytes: the hash chain over every outcome up to this one."""
    return blake3(b"shoal head v1\0" + outcome.previous + outcome_digest(outcome)).digest()


def tree_root(leaves: Iterable[bytes]) -> bytes:
    """(32,) bytes over a list of leaf digests: a tree of depth one.

    With leaves of 256 Ki elements the list for a billion parameters and their momentum has 8 Ki
    entries, 256 KiB: one level is enough.
    """
    hasher = blake3(b"shoal tree v1\0")
    for leaf in leaves:
        hasher.update(leaf)
    return hasher.digest()


def _digest_of(domain: bytes, proto: Proto, value: object) -> bytes:
    _fill(proto, value)
    return blake3(domain + proto.SerializeToString(deterministic=True)).digest()


def _parse(proto: Proto, raw: bytes, limit: int, what: str) -> str:
    if len(raw) > limit:
        raise ValueError(f"a {what} of {len(raw)} bytes is over the limit of {limit}")
    try:
        proto.ParseFromString(raw)
    except DecodeError as error:
        raise ValueError(f"not a {what}: {error}") from error
    name = proto.WhichOneof(proto.DESCRIPTOR.oneofs[0].name)
    if name is None:
        raise ValueError(f"a {what} of no known kind")
    return str(name)


class _Shape(enum.Enum):
    """How a field travels."""

    VALUE = enum.auto()
    MESSAGE = enum.auto()
    VALUES = enum.auto()
    MESSAGES = enum.auto()


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, _Shape, Any, bool], ...]:
    """(name, shape, type of one, may be None) of each field; looked up once, as rounds wait."""
    found = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if optional:
            hint = next(option for option in typing.get_args(hint) if option is not type(None))
        many = typing.get_origin(hint) is tuple
        one = typing.get_args(hint)[0] if many else hint
        if dataclasses.is_dataclass(one):
            shape = _Shape.MESSAGES if many else _Shape.MESSAGE
        else:
            shape = _Shape.VALUES if many else _Shape.VALUE
        found.append((field.name, shape, one, optional))
    return tuple(found)


def _fill(proto: Any, value: Any) -> None:
    # A dataclass without set fields must still mark its place in a oneof.
    proto.SetInParent()
    kind: Any = type(value)
    for name, shape, _, _ in _fields(kind):
        item = getattr(value, name)
        if item is None:
            continue
        if shape is _Shape.VALUE:
            setattr(proto, name, item)
        elif shape is _Shape.MESSAGE:
            _fill(getattr(proto, name), item)
        elif shape is _Shape.VALUES:
            getattr(proto, name).extend(item)
        else:
            repeated = getattr(proto, name)
            for entry in item:
                _fill(repeated.add(), entry)


def _read(kind: Any, proto: Any) -> Any:
    values: dict[str, Any] = {}
    for name, shape, one, optional in _fields(kind):
        if optional and not proto.HasField(name):
            values[name] = None
            continue
        item = getattr(proto, name)
        if shape is _Shape.VALUE:
            values[name] = one(item)
        elif shape is _Shape.MESSAGE:
            if not proto.HasField(name):
                raise ValueError(f"{name} is missing")
            values[name] = _read(one, item)
        else:
            if len(item) > messages.MAX_RUNS:
                raise ValueError(f"{name} holds {len(item)} entries")
            many = tuple(item) if shape is _Shape.VALUES else tuple(_read(one, e) for e in item)
            values[name] = many
    return kind(**values)
