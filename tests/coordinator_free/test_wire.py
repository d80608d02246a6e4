from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free import messages, wire
from coordinator_free.messages import (
    MAX_CERTIFICATES,
    MAX_LEAVES,
    NO_DIGEST,
    U64_MAX,
    Certificate,
    Contribution,
    FetchChain,
    FetchOutcome,
    FetchState,
    FrameHeader,
    Kept,
    Kind,
    Member,
    Message,
    Outcome,
    Plan,
    Signature,
    Slice,
    View,
)

# -- every message there can be ---------------------------------------------------------------

names = st.text("abcdefghijkmnopqrstuvwxyzABCDEFGH123456789", min_size=1, max_size=52)
digests = st.binary(min_size=32, max_size=32)
naturals = st.integers(0, U64_MAX)
samples = st.integers(1, 2**48)
at_ballot = {"height": naturals, "ballot": naturals}
peers = st.lists(names, max_size=4, unique=True).map(tuple)
members = st.builds(
    Member,
    peer_id=names,
    session=naturals,
    hosts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=3).map(tuple),
    port=st.integers(1, 65535),
    certificate_sha256=digests,
    can_reduce=st.booleans(),
)
rosters = st.lists(members, min_size=1, max_size=4, unique_by=lambda m: m.peer_id).map(
    lambda roster: tuple(sorted(roster, key=lambda m: m.peer_id))
)
contributions = st.lists(
    st.builds(Contribution, peer_id=names, samples=samples),
    max_size=4,
    unique_by=lambda c: c.peer_id,
).map(tuple)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    receivers = draw(st.lists(names, min_size=1, max_size=4, unique=True))
    weights = draw(st.dictionaries(st.sampled_from(receivers), samples, min_size=1))
    reducers = draw(st.lists(st.sampled_from(receivers), min_size=1, unique=True))
    mends = draw(st.booleans())
    slices, kept, start = [], [], 0
    for reducer in reducers:
        stop = start + draw(st.integers(1, 2**16))
        if mends and draw(st.booleans()):
            kept.append(Kept(start=start, stop=stop, holders=(reducer,)))
        else:
            slices.append(Slice(reducer=reducer, start=start, stop=stop))
        start = stop
    elements = draw(st.integers(1, 2**26))
    return Plan(
        height=draw(naturals),
        round=draw(naturals),
        ballot=draw(naturals),
        attempt=draw(st.integers(1, 2**64 - 1)) if mends else 0,
        previous=draw(digests),
        base=draw(digests.filter(any)) if mends else NO_DIGEST,
        receivers=tuple(receivers),
        contributions=tuple(Contribution(peer_id=p, samples=n) for p, n in weights.items()),
        slices=tuple(slices),
        kept=tuple(kept),
        numel=start * elements - draw(st.integers(0, elements - 1)),
        chunk_elements=elements,
        codec=draw(st.sampled_from(["fp32", "int4"])),
        exchange_s=draw(st.floats(1e-3, 86400)),
        stall_s=draw(st.floats(1e-3, 86400)),
    )


outcomes = st.builds(
    Outcome,
    height=naturals,
    round=naturals,
    kind=st.sampled_from(Kind),
    previous=digests,
    plan=digests,
    vector_root=digests,
    state_root=digests,
    samples=st.integers(0, messages.MAX_SAMPLES),
    contributions=contributions,
    roster=rosters,
)
certificates = st.builds(
    Certificate,
    outcome=outcomes,
    ballot=naturals,
    provisional=st.booleans(),
    signatures=st.lists(
        st.builds(Signature, peer_id=names, signature=st.binary(min_size=64, max_size=64)),
        max_size=3,
        unique_by=lambda s: s.peer_id,
    ).map(tuple),
)
reports = st.builds(
    messages.Report,
    **at_ballot,
    plan=digests,
    complete=st.booleans(),
    vector_root=digests,
    state_root=digests,
    lost=peers,
)


@st.composite
def promises(draw: st.DrawFn) -> messages.Promise:
    accepted = draw(st.none() | outcomes)
    plan = draw(st.none() | plans())
    return messages.Promise(
        height=draw(naturals),
        ballot=draw(naturals),
        accepted_ballot=None if accepted is None else draw(naturals),
        accepted=accepted,
        plan=plan,
        report=None if plan is None else draw(st.none() | reports),
    )


@st.composite
def chains(draw: st.DrawFn) -> messages.Heads:
    first = draw(st.integers(0, 2**60))
    drawn = draw(st.lists(certificates, min_size=1, max_size=3))
    return messages.Heads(
        certificates=tuple(
            dataclasses.replace(c, outcome=dataclasses.replace(c.outcome, height=first + number))
            for number, c in enumerate(drawn)
        )
    )


EVERY: dict[type[Any], st.SearchStrategy[Any]] = {
    messages.Lead: st.builds(messages.Lead, **at_ballot, closing=st.booleans()),
    messages.Ready: st.builds(
        messages.Ready, **at_ballot, head=digests, samples=st.integers(0, 2**48)
    ),
    messages.Prepare: st.builds(messages.Prepare, **at_ballot),
    messages.Promise: promises(),
    messages.Plan: plans(),
    messages.Report: reports,
    messages.Propose: st.builds(messages.Propose, **at_ballot, outcome=outcomes, holders=peers),
    messages.Accepted: st.builds(
        messages.Accepted,
        **at_ballot,
        outcome=digests,
        signature=st.binary(min_size=64, max_size=64),
    ),
    messages.Progress: st.builds(messages.Progress, **at_ballot, samples=st.integers(0, 2**48)),
    messages.Refused: st.builds(messages.Refused, **at_ballot, promised=naturals),
    messages.Commit: st.builds(messages.Commit, certificate=certificates, holders=peers),
    messages.Join: st.builds(messages.Join, member=members, height=naturals),
    messages.Assist: st.builds(messages.Assist, member=members, up_bps=naturals, down_bps=naturals),
    messages.Leave: st.builds(messages.Leave, height=naturals),
    messages.Hello: st.builds(messages.Hello, height=naturals),
    messages.Heads: chains(),
}
anything = st.one_of(*EVERY.values())


def test_no_message_is_forgotten_here() -> None:
    assert set(EVERY) == set(Message.__args__)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_message_survives_the_wire(kind: type[Any]) -> None:
    @settings(max_examples=25, deadline=None)
    @given(EVERY[kind])
    def law(message: Message) -> None:
        raw = wire.encode(message)
        back = wire.decode(raw)
        assert type(back) is kind
        assert back == message
        assert wire.encode(back) == raw

    law()


def test_an_unset_option_is_not_a_zero() -> None:
    nothing = messages.Promise(
        height=1, ballot=2, accepted_ballot=None, accepted=None, plan=None, report=None
    )
    assert wire.decode(wire.encode(nothing)) == nothing
    zero = dataclasses.replace(nothing, accepted_ballot=0, accepted=OUTCOME)
    back = wire.decode(wire.encode(zero))
    assert isinstance(back, messages.Promise)
    assert back.accepted_ballot == 0


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(
            FetchState,
            state_root=digests,
            leaves=st.lists(st.integers(0, 2**32 - 1), max_size=MAX_LEAVES).map(tuple),
        ),
        st.builds(FetchOutcome, vector_root=digests),
        st.just(FetchChain()),
    )
)
def test_fetch_requests_survive_the_wire(request: wire.FetchRequest) -> None:
    assert wire.decode_fetch(wire.encode_fetch(request)) == request


def test_a_request_names_few_leaves() -> None:
    for leaves in ((0,) * (MAX_LEAVES + 1), (2**32,), (-1,)):
        with pytest.raises(ValueError, match="leaves"):
            FetchState(state_root=NO_DIGEST, leaves=leaves)


@pytest.mark.parametrize("raw", [b"", b"\xff", bytes(wire.MAX_MESSAGE_BYTES + 1)])
def test_what_is_no_certificate_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"certificate|missing"):
        wire.decode_certificate(raw)


# -- bytes from strangers ---------------------------------------------------------------------


def only_value_errors(read: Any, raw: bytes) -> Any:
    """What was read, or None for a ValueError; anything else fails the test."""
    try:
        return read(raw)
    except ValueError:
        return None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_value_error_or_a_message(raw: bytes) -> None:
    for read in (wire.decode, wire.decode_fetch, wire.unpack_frame):
        only_value_errors(read, raw)


@settings(max_examples=200, deadline=None)
@given(anything, st.data())
def test_mangled_messages_are_a_value_error_or_another_message(
    message: Message, data: st.DataObject
) -> None:
    raw = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        if not raw:
            break
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "drop"])):
            case "flip":
                raw[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del raw[at:]
            case "insert":
                raw[at:at] = data.draw(st.binary(max_size=9))
            case "drop":
                del raw[at]
    got = only_value_errors(wire.decode, bytes(raw))
    if got is not None:
        assert wire.decode(wire.encode(got)) == got


def test_over_long_and_empty_messages_are_refused() -> None:
    fine = wire.encode(messages.Leave(height=1))
    # Unknown fields are skipped, so these bytes are a message but for their length.
    padding = wire.MAX_MESSAGE_BYTES - len(fine)
    head = b"\xfa\x07"  # field 127, length-delimited
    longest = fine + head + varint(padding - 5) + bytes(padding - 5)
    assert len(longest) == wire.MAX_MESSAGE_BYTES
    assert wire.decode(longest) == messages.Leave(height=1)
    with pytest.raises(ValueError, match="over the limit"):
        wire.decode(longest + b"\0")
    with pytest.raises(ValueError, match="over the limit"):
        wire.decode_fetch(bytes(wire.MAX_HEADER_BYTES + 1))
    for read in (wire.decode, wire.decode_fetch):
        with pytest.raises(ValueError, match="no known kind"):
            read(b"")


def test_a_message_too_large_to_send_is_refused_by_its_sender() -> None:
    long_host = dataclasses.replace(ROSTER[0], hosts=("h" * 255,) * 2)
    roster = tuple(
        dataclasses.replace(long_host, peer_id=f"p{number:04}") for number in range(2000)
    )
    large = messages.Propose(
        height=1, ballot=0, outcome=dataclasses.replace(OUTCOME, roster=roster), holders=()
    )
    with pytest.raises(ValueError, match="too large"):
        wire.encode(large)


def test_a_member_with_over_long_host_names_is_refused() -> None:
    with pytest.raises(ValueError, match="over-long"):
        dataclasses.replace(ROSTER[0], hosts=("h" * 255,) * 3)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("previous", b"short"),
        ("receivers", ("a",)),
        ("receivers", ("a", "b", "c", "a")),
        ("contributions", ()),
        ("contributions", (Contribution(peer_id="x", samples=1),)),
        ("slices", ()),
        ("slices", (Slice(reducer="x", start=0, stop=3),)),
        ("slices", (Slice(reducer="a", start=1, stop=3),)),
        ("slices", (Slice(reducer="a", start=0, stop=1), Slice(reducer="b", start=2, stop=3))),
        ("slices", (Slice(reducer="a", start=0, stop=2), Slice(reducer="b", start=1, stop=3))),
        ("slices", (Slice(reducer="a", start=0, stop=4),)),
        ("slices", (Slice(reducer="a", start=0, stop=2),)),
        ("kept", (Kept(start=0, stop=3, holders=("a",)),)),
        ("attempt", 1),
        ("base", b"\x01" * 32),
        ("base", b"short"),
        ("numel", 0),
        ("numel", 1537),
        ("chunk_elements", 0),
        ("chunk_elements", 2**26 + 1),
        ("codec", ""),
        ("exchange_s", float("nan")),
        ("exchange_s", float("inf")),
        ("exchange_s", 0.0),
        ("stall_s", float("nan")),
        ("stall_s", -1.0),
        ("height", -1),
        ("ballot", 2**64),
    ],
)
def test_a_plan_that_no_correct_leader_makes_cannot_be_built(field: str, change: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        dataclasses.replace(PLAN, **{field: change})


def test_other_things_that_no_correct_peer_says() -> None:
    a, b = ROSTER
    with pytest.raises(ValueError, match="sorted"):
        dataclasses.replace(OUTCOME, roster=(b, a))
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(OUTCOME, roster=(a, a))
    with pytest.raises(ValueError, match="at least one"):
        dataclasses.replace(OUTCOME, roster=())
    signature = Signature(peer_id="a", signature=bytes(64))
    with pytest.raises(ValueError, match="twice"):
        Certificate(outcome=OUTCOME, ballot=0, provisional=False, signatures=(signature, signature))
    certificate = Certificate(outcome=OUTCOME, ballot=0, provisional=False, signatures=())
    with pytest.raises(ValueError, match="follow"):
        messages.Heads(certificates=(certificate, certificate))
    for count in (0, MAX_CERTIFICATES + 1):
        with pytest.raises(ValueError, match="out of range"):
            messages.Heads(certificates=(certificate,) * count)
    with pytest.raises(ValueError, match="together"):
        messages.Promise(
            height=1, ballot=1, accepted_ballot=None, accepted=OUTCOME, plan=None, report=None
        )


# -- digests ----------------------------------------------------------------------------------

ROSTER = tuple(
    Member(
        peer_id=name,
        session=7,
        hosts=("10.0.0.1",),
        port=99,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    )
    for name in "ab"
)
PLAN = Plan(
    height=3,
    round=2,
    ballot=1,
    attempt=0,
    previous=b"\x01" * 32,
    base=NO_DIGEST,
    receivers=("a", "b", "c"),
    contributions=(Contribution(peer_id="a", samples=300), Contribution(peer_id="c", samples=1)),
    slices=(Slice(reducer="b", start=0, stop=2), Slice(reducer="a", start=2, stop=3)),
    kept=(),
    numel=1500,
    chunk_elements=512,
    codec="int4",
    exchange_s=60.0,
    stall_s=12.0,
)
MEND = dataclasses.replace(
    PLAN,
    attempt=1,
    base=b"\x05" * 32,
    slices=(Slice(reducer="b", start=0, stop=2),),
    kept=(Kept(start=2, stop=3, holders=("a",)),),
)
OUTCOME = Outcome(
    height=3,
    round=2,
    kind=Kind.AVERAGE,
    previous=b"\x01" * 32,
    plan=b"\x02" * 32,
    vector_root=b"\x03" * 32,
    state_root=b"\x04" * 32,
    samples=301,
    contributions=PLAN.contributions,
    roster=ROSTER,
)
OTHER = b"\xff" * 32
PLAN_CHANGES = {
    "height": 4,
    "round": 3,
    "ballot": 2,
    "attempt": 2,
    "previous": OTHER,
    "base": OTHER,
    "receivers": ("a", "c", "b"),
    "contributions": (
        Contribution(peer_id="a", samples=301),
        Contribution(peer_id="c", samples=1),
    ),
    "slices": (Slice(reducer="a", start=0, stop=2),),
    "kept": (Kept(start=2, stop=3, holders=("b",)),),
    "numel": 1501,
    "chunk_elements": 513,
    "codec": "int8",
    "exchange_s": 60.5,
    "stall_s": 12.5,
    "assistants": (dataclasses.replace(ROSTER[0], peer_id="z"),),
    "links": (View(peer_id="a", up_bps=1, down_bps=0),),
    "expected_s": 0.5,
}
OUTCOME_CHANGES = {
    "height": 4,
    "round": 3,
    "kind": Kind.REGROUP,
    "previous": OTHER,
    "plan": OTHER,
    "vector_root": OTHER,
    "state_root": OTHER,
    "samples": 302,
    "contributions": PLAN.contributions[::-1],
    "roster": (ROSTER[0], dataclasses.replace(ROSTER[1], session=8)),
}


def test_every_field_is_in_the_digest() -> None:
    for value, changes, digest in (
        (MEND, PLAN_CHANGES, wire.plan_digest),
        (OUTCOME, OUTCOME_CHANGES, wire.outcome_digest),
        (OUTCOME, OUTCOME_CHANGES, wire.head_digest),
    ):
        assert set(changes) == {field.name for field in dataclasses.fields(value)}
        variants = [value, *(dataclasses.replace(value, **{f: c}) for f, c in changes.items())]
        assert len({digest(variant) for variant in variants}) == len(variants)


def test_every_field_of_a_seat_is_in_the_digest() -> None:
    changes: dict[str, Any] = {
        "peer_id": "aa",
        "session": 8,
        "hosts": ("10.0.0.2",),
        "port": 98,
        "certificate_sha256": OTHER,
        "can_reduce": False,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Member)}
    for field, change in changes.items():
        changed = dataclasses.replace(ROSTER[0], **{field: change})
        outcome = dataclasses.replace(OUTCOME, roster=(changed, ROSTER[1]))
        assert wire.outcome_digest(outcome) != wire.outcome_digest(OUTCOME), field


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def blob(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def test_the_digest_is_what_the_protocol_says() -> None:
    """Written out by hand from docs/protocol.md and rounds.proto: another peer must agree."""
    contributions = b"".join(
        blob(8, blob(1, c.peer_id.encode()) + number(2, c.samples)) for c in PLAN.contributions
    )
    slices = blob(9, number(2, 2) + blob(3, b"b"))  # fields of value 0 are left out
    kept = blob(10, number(1, 2) + number(2, 3) + blob(3, b"a"))
    text = (
        number(1, 3)
        + number(2, 2)
        + number(3, 1)
        + number(4, 1)
        + blob(5, MEND.previous)
        + blob(6, MEND.base)
        + b"".join(blob(7, peer.encode()) for peer in MEND.receivers)
        + contributions
        + slices
        + kept
        + number(11, 1500)
        + number(12, 512)
        + blob(13, b"int4")
        + varint(14 << 3 | 1)
        + struct.pack("<d", 60.0)
        + varint(15 << 3 | 1)
        + struct.pack("<d", 12.0)
    )
    assert wire.plan_digest(MEND) == blake3(b"shoal plan v1\0" + text).digest()
    expected = blake3(b"shoal head v1\0" + OUTCOME.previous + wire.outcome_digest(OUTCOME))
    assert wire.head_digest(OUTCOME) == expected.digest()
    assert wire.tree_root([b"x" * 32, b"y" * 32]) == (
        blake3(b"shoal tree v1\0" + b"x" * 32 + b"y" * 32).digest()
    )


# -- frames -----------------------------------------------------------------------------------

headers = st.builds(
    FrameHeader,
    plan=st.just(b"") | digests,
    slice=st.integers(0, 2**32 - 1),
    chunk=st.integers(0, 2**32 - 1),
    contributors=st.binary(max_size=512),
    codec=st.text(max_size=32),
    elements=st.integers(0, 2**26),
    part=st.integers(0, 2**32 - 1),
)


@settings(deadline=None)
@given(headers, st.binary(max_size=100))
def test_frames_come_back(header: FrameHeader, payload: bytes) -> None:
    got, rest = wire.unpack_frame(wire.pack_frame(header, payload))
    assert got == header
    assert bytes(rest) == payload


@settings(deadline=None)
@given(headers, st.binary(max_size=20), st.data())
def test_mangled_frames_are_a_value_error_or_another_frame(
    header: FrameHeader, payload: bytes, data: st.DataObject
) -> None:
    raw = bytearray(wire.pack_frame(header, payload))
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[at:]
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
    only_value_errors(wire.unpack_frame, bytes(raw))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\x05abcd",
        b"\xff\xff\xff\xff",
        struct.pack(">I", wire.MAX_HEADER_BYTES + 1) + bytes(wire.MAX_HEADER_BYTES + 1),
        wire.pack_frame(FrameHeader())[:0] + b"\0\0\0\x03\x0a\x01x",  # a plan of one byte
        struct.pack(">I", 6) + number(6, 2**26 + 1) + b"\0",
    ],
)
def test_broken_frames_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        wire.unpack_frame(raw)
