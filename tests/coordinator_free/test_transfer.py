from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Iterable
from typing import cast

import pytest
import torch
from blake3 import blake3

from coordinator_free import transfer as module
from coordinator_free import wire
from coordinator_free.average import Average, Chunk
from coordinator_free.certificates import ACCEPT_DOMAIN, found, signed_text
from coordinator_free.chain import Chain
from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.messages import (
    NO_DIGEST,
    U64_MAX,
    Certificate,
    Contribution,
    FetchChain,
    FetchOutcome,
    FrameHeader,
    Heads,
    Hello,
    Kind,
    Leave,
    Member,
    Message,
    Outcome,
    Signature,
)
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.state import Shape
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Client
from dht.errors import PeerError, ProtocolViolation, StateError, TimedOut, Unreachable
from tests.sim.world import RUN, Key, check

NUMEL = 500


def seat(name: str) -> Member:
    return Member(
        peer_id=name,
        session=1,
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    )


def contact(name: str) -> Contact:
    return seat(name).contact


def signed(
    outcome: Outcome, *voters: str, run: str = RUN, provisional: bool = False
) -> Certificate:
    text = signed_text(run, 0, outcome)
    return Certificate(
        outcome=outcome,
        ballot=0,
        provisional=provisional,
        signatures=tuple(
            Signature(peer_id=v, signature=Key(v).sign(ACCEPT_DOMAIN, text)) for v in voters
        ),
    )


def follow(before: Outcome, roster: str = "abc", *, samples: int = 10) -> Outcome:
    return Outcome(
        height=before.height + 1,
        round=before.round + 1,
        kind=Kind.AVERAGE,
        previous=wire.head_digest(before),
        plan=NO_DIGEST,
        vector_root=NO_DIGEST,
        state_root=blake3(before.state_root).digest(),
        samples=before.samples + samples,
        contributions=(Contribution(peer_id=before.roster[0].peer_id, samples=samples),),
        roster=tuple(seat(name) for name in roster),
    )


FIRST = found(RUN, seat("a"), Key("a"), blake3(b"initial").digest())
SECOND = signed(follow(FIRST.outcome), "a")
THIRD = signed(follow(SECOND.outcome, "bcd"), "a", "c")
FOURTH = signed(follow(THIRD.outcome), "b", "d")


class Peers:
    """Answers as the test wants, in place of a network."""

    def __init__(self) -> None:
        self.replies: dict[str, bytes | PeerError] = {}
        self.frames: list[bytes | PeerError] = []
        self.pause_s = 0.0  # before each of them
        self.asked: list[Message | wire.FetchRequest] = []

    def shows(self, peer: str, *certificates: Certificate) -> None:
        self.replies[peer] = wire.encode(Heads(certificates=certificates))

    async def deliver(self, to: Contact, message: bytes, timeout_s: float) -> bytes:
        self.asked.append(wire.decode(message))
        reply = self.replies.get(to.peer_id, Unreachable(to.peer_id, "gone"))
        if isinstance(reply, PeerError):
            raise reply
        return reply

    async def fetch(
        self, to: Contact, request: bytes, idle_timeout_s: float
    ) -> AsyncIterator[bytes]:
        self.asked.append(wire.decode_fetch(request))
        for frame in self.frames:
            await asyncio.sleep(self.pause_s)
            if isinstance(frame, PeerError):
                raise frame
            yield frame


@pytest.fixture
def peers() -> Peers:
    return Peers()


def transfer_of(peers: Peers, numel: int = NUMEL, exchange_s: float = 60.0) -> Transfer:
    return Transfer(
        client=cast(Client, peers),
        run_id=RUN,
        creator="a",
        shape=Shape.of("layout", numel, 1, OuterOptimizer(OuterConfig())),
        round=RoundConfig(exchange_s=exchange_s),
        check=check,
    )


@pytest.fixture
def transfer(peers: Peers) -> Transfer:
    return transfer_of(peers)


# -- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain", [(FIRST,), (FIRST, SECOND), (SECOND, THIRD), (FIRST, SECOND, THIRD, FOURTH)]
)
async def test_a_signed_head_on_a_chain_is_believed(
    peers: Peers, transfer: Transfer, chain: tuple[Certificate, ...]
) -> None:
    peers.shows("x", *chain)
    assert await transfer.newest(contact("x")) == chain[-1]
    assert peers.asked == [Hello(height=U64_MAX)]


def changed(certificate: Certificate, **changes: object) -> Certificate:
    outcome = dataclasses.replace(certificate.outcome, **changes)
    return dataclasses.replace(certificate, outcome=outcome)


UNPROVEN = {
    "without the one before": (THIRD,),
    "not connected": (SECOND, signed(changed(THIRD, previous=NO_DIGEST).outcome, "a", "b")),
    "changed after signing": (SECOND, changed(THIRD, samples=10**6)),
    "unsigned": (SECOND, signed(THIRD.outcome)),
    "signed by too few": (SECOND, signed(THIRD.outcome, "a")),
    "signed by the next roster": (SECOND, signed(THIRD.outcome, "b", "c", "d")),
    "of another run": (SECOND, signed(THIRD.outcome, "a", "b", run="11" * 20)),
    "founded by somebody else": (found(RUN, seat("b"), Key("b"), NO_DIGEST),),
}


@pytest.mark.parametrize("chain", UNPROVEN.values(), ids=UNPROVEN)
async def test_a_head_that_is_not_proven_is_a_violation(
    peers: Peers, transfer: Transfer, chain: tuple[Certificate, ...]
) -> None:
    peers.shows("x", *chain)
    with pytest.raises(ProtocolViolation) as refusal:
        await transfer.newest(contact("x"))
    assert refusal.value.peer_id == "x"


@pytest.mark.parametrize("reply", [b"", b"\xff" * 9, wire.encode(Leave(height=1))])
async def test_another_answer_than_heads_is_a_violation(
    peers: Peers, transfer: Transfer, reply: bytes
) -> None:
    peers.replies["x"] = reply
    with pytest.raises(ProtocolViolation):
        await transfer.heads(contact("x"), 3)


async def test_the_furthest_proven_head_wins_whoever_else_fails_or_lies(
    peers: Peers, transfer: Transfer
) -> None:
    peers.shows("behind", FIRST, SECOND)
    peers.shows("ahead", SECOND, THIRD)
    peers.shows("liar", THIRD, signed(follow(THIRD.outcome, samples=10**9), "a"))
    names: Iterable[str] = ("liar", "dead", "behind", "ahead")
    assert await transfer.claims(map(contact, names)) == [
        (THIRD, contact("ahead")),
        (SECOND, contact("behind")),
    ]
    with pytest.raises(StateError, match="none of 2"):
        await transfer.claims(map(contact, ("liar", "dead")))


async def test_more_samples_outrank_more_heights(peers: Peers, transfer: Transfer) -> None:
    branch = signed(follow(SECOND.outcome, samples=10**6), "a", "b")
    peers.shows("samples", SECOND, branch)
    peers.shows("heights", THIRD, FOURTH)
    best, _ = await transfer.claims([contact("heights"), contact("samples")])
    assert best == (branch, contact("samples"))


# -- chains -----------------------------------------------------------------------------------


def links(*certificates: Certificate) -> list[bytes | PeerError]:
    return [
        wire.pack_frame(FrameHeader(chunk=number), wire.encode_certificate(certificate))
        for number, certificate in enumerate(certificates)
    ]


async def test_a_chain_from_the_creator_on_is_believed(peers: Peers, transfer: Transfer) -> None:
    peers.frames = links(FIRST, SECOND, THIRD, FOURTH)
    chain = await transfer.chain(contact("x"))
    assert chain == Chain.verified([FIRST, SECOND, THIRD, FOURTH], RUN, "a", check)
    assert peers.asked == [FetchChain()]


async def test_a_chain_that_proves_nothing_is_a_violation(peers: Peers, transfer: Transfer) -> None:
    good = links(FIRST, SECOND, THIRD)
    for frames in (
        [],
        links(SECOND, THIRD),
        links(FIRST, THIRD),
        [good[0], good[2]],
        [*good, good[2]],
        [good[0], b"\xff"],
        [good[0], wire.pack_frame(FrameHeader(chunk=1), b"\xff\xff")],
    ):
        peers.frames = [*frames]
        with pytest.raises(ProtocolViolation) as refusal:
            await transfer.chain(contact("x"))
        assert refusal.value.peer_id == "x"
    peers.frames = [good[0], Unreachable("x", "gone")]
    with pytest.raises(Unreachable):
        await transfer.chain(contact("x"))


async def test_a_chain_is_read_up_to_its_limit(
    peers: Peers, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers.frames = links(FIRST, SECOND, THIRD)
    for limit in ("MAX_LINKS", "MAX_CHAIN_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 2)
            with pytest.raises(ProtocolViolation, match="too long"):
                await transfer.chain(contact("x"))


async def test_a_chain_that_comes_in_drops_is_given_up(
    peers: Peers, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    peers.frames = links(FIRST, SECOND, THIRD, FOURTH)
    peers.pause_s = 0.1  # a frame is never awaited for long
    with pytest.raises(TimedOut, match="too slowly"):
        await transfer.chain(contact("x"))
    monkeypatch.setattr(module, "SLOWEST_BPS", 1e3)  # a few hundred bytes in a tenth of a second
    assert len(await transfer.chain(contact("x"))) == 4


# -- averages ---------------------------------------------------------------------------------


def average() -> Average:
    payload = bytes(codec("int4").encode(torch.ones(NUMEL)))
    return Average("int4", [Chunk(0, NUMEL, b"\x01", payload)])


def outcome(vector_root: bytes) -> Outcome:
    return dataclasses.replace(SECOND.outcome, vector_root=vector_root)


async def test_an_average_that_has_the_root_is_believed(peers: Peers, transfer: Transfer) -> None:
    one = average()
    peers.frames = [*one.frames()]
    assert (await transfer.average(contact("x"), outcome(one.root))).root == one.root
    assert peers.asked == [FetchOutcome(vector_root=one.root)]


async def test_an_average_has_the_length_of_its_rounds_fragment(peers: Peers) -> None:
    """One of another round's length is refused, though its root is the one that was asked for."""
    numel = 3 * ALIGN_ELEMENTS - 9
    shape = Shape.of("layout", numel, 3, OuterOptimizer(OuterConfig()))
    transfer = Transfer(
        client=cast(Client, peers),
        run_id=RUN,
        creator="a",
        shape=shape,
        round=RoundConfig(fragments=3),
        check=check,
    )
    lengths = [shape.averaged(round) for round in range(3)]
    assert lengths == [ALIGN_ELEMENTS, ALIGN_ELEMENTS, ALIGN_ELEMENTS - 9]
    payload = bytes(codec("int4").encode(torch.ones(lengths[2])))
    one = Average("int4", [Chunk(0, lengths[2], b"\x01", payload)])
    for round in range(6):
        decided = dataclasses.replace(outcome(one.root), round=round + 1)
        peers.frames = [*one.frames()]
        if round % 3 == 2:
            assert (await transfer.average(contact("x"), decided)).root == one.root
        else:
            with pytest.raises(ProtocolViolation, match="incomplete"):
                await transfer.average(contact("x"), decided)


async def test_a_holder_that_sends_something_else_or_breaks_off_is_named(
    peers: Peers, transfer: Transfer
) -> None:
    encoded = [*average().frames()]
    unknown = wire.pack_frame(wire.FrameHeader(codec="zip"))
    leaf = wire.pack_frame(FrameHeader(), bytes(4 * NUMEL))
    for frames in (
        [],
        encoded[:1],
        [*encoded, encoded[1]],
        [unknown, encoded[1]],
        [b"\xff"],
        [leaf, leaf],
    ):
        peers.frames = [*frames]
        with pytest.raises(ProtocolViolation) as refusal:
            await transfer.average(contact("x"), outcome(average().root))
        assert refusal.value.peer_id == "x"
    peers.frames = [*encoded]
    with pytest.raises(ProtocolViolation, match="another root"):
        await transfer.average(contact("x"), outcome(NO_DIGEST))
    peers.frames = [encoded[0], Unreachable("x", "gone")]
    with pytest.raises(Unreachable):
        await transfer.average(contact("x"), outcome(average().root))


async def test_a_holder_has_no_longer_for_an_average_than_an_exchange_may_take(
    peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the model: it was hours where that is large."""
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    payload = bytes(codec("int4").encode(torch.ones(4096)))
    peers.frames = [
        *Average("int4", [Chunk(n, 4096, b"\x01", payload) for n in range(20)]).frames()
    ]
    peers.pause_s = 0.05
    transfer = transfer_of(peers, numel=10**9, exchange_s=0.3)
    began = time.monotonic()
    with pytest.raises(TimedOut, match="too slowly"):
        await transfer.average(contact("x"), outcome(NO_DIGEST))
    assert time.monotonic() - began < 0.8
    # At the pace of an exchange of this length it comes through: 10 kB in a second.
    monkeypatch.setattr(module, "SLOWEST_BPS", 1e3)
    transfer = transfer_of(peers, numel=20 * 4096, exchange_s=3.0)
    with pytest.raises(ProtocolViolation, match="another root"):
        await transfer.average(contact("x"), outcome(NO_DIGEST))
