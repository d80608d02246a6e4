"""What a donor gives, and a whole download from several of them through a played network."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest
import torch

from coordinator_free import transfer as transfers
from coordinator_free import wire
from coordinator_free.chain import Chain
from coordinator_free.config import RoundConfig
from coordinator_free.contact import Contact
from coordinator_free.donor import KEPT_STATES, LEASE_S, SLOT_S, SLOTS, Donor, Throttle
from coordinator_free.messages import (
    MAX_CERTIFICATES,
    NO_DIGEST,
    U64_MAX,
    FetchChain,
    FetchOutcome,
    FetchState,
    Heads,
    Hello,
    Kind,
)
from coordinator_free.replica import Replica
from coordinator_free.state import LEAF_ELEMENTS, State
from coordinator_free.transfer import Transfer
from coordinator_free.transport import Client
from dht.errors import Declined, Overloaded, StateError, Unreachable
from tests.coordinator_free.test_replica import (
    OPTIMIZER,
    apply,
    average,
    certificate,
    replica,
    shape,
    state,
)
from tests.sim.world import RUN, check


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def donor(held: Replica, clock: Callable[[], float]) -> Donor:
    return Donor(held, 0.0, clock)


def step(held: Replica, seed: int) -> None:
    one = average(seed, held.state.shape.numel)
    apply(held, held.consider(one), one)


async def all_of(frames: AsyncIterator[bytes]) -> list[bytes]:
    return [frame async for frame in frames]


def fetch(root: bytes, *leaves: int) -> FetchState:
    return FetchState(state_root=root, leaves=leaves)


# -- what is served ---------------------------------------------------------------------------


async def test_digests_and_leaves_of_the_current_state_are_served() -> None:
    held = replica(numel=2 * LEAF_ELEMENTS)
    serving = donor(held, Clock())
    root = held.state.root
    (frame,) = await all_of(serving.serve("x", fetch(root)))
    header, payload = wire.unpack_frame(frame)
    assert header.part == 1
    assert bytes(payload) == b"".join(held.state.digests)
    frames = await all_of(serving.serve("x", fetch(root, 3, 0)))
    sent = [(h.chunk, bytes(p)) for h, p in map(wire.unpack_frame, frames)]
    assert sent == [(3, bytes(held.state.leaf(3))), (0, bytes(held.state.leaf(0)))]
    with pytest.raises(ValueError, match="leaf"):
        await all_of(serving.serve("x", fetch(root, 4)))


async def test_an_average_and_the_chain_are_served() -> None:
    held = replica()
    serving = donor(held, Clock())
    one = average(1, 100)
    apply(held, held.consider(one), one)
    request = FetchOutcome(vector_root=one.root)
    assert await all_of(serving.serve("x", request)) == [*one.frames()]
    sent = map(wire.unpack_frame, await all_of(serving.serve("x", FetchChain())))
    links = tuple(wire.decode_certificate(bytes(payload)) for _, payload in sent)
    assert links == held.chain.links


async def test_what_is_not_held_is_not_served() -> None:
    serving = donor(replica(), Clock())
    for request in (fetch(NO_DIGEST), fetch(NO_DIGEST, 0), FetchOutcome(vector_root=NO_DIGEST)):
        with pytest.raises(StateError):
            await all_of(serving.serve("x", request))
    assert serving.kept == ()


@pytest.mark.parametrize(
    ("kept", "height", "answer"),
    [
        (range(5), 0, range(5)),
        (range(5), 2, range(2, 5)),
        (range(5), 4, range(4, 5)),
        (range(5), 5, range(3, 5)),  # not decided yet
        (range(5), U64_MAX, range(3, 5)),
        (range(2, 5), 1, range(3, 5)),  # not kept any more
        (range(4, 5), 0, range(4, 5)),
        (range(40), 3, range(3, 3 + MAX_CERTIFICATES)),  # a page
    ],
)
def test_hello_is_answered_from_the_asked_height_or_with_the_newest_two(
    kept: range, height: int, answer: range
) -> None:
    held = replica()
    while len(held.certificates) < kept.stop:
        apply(held, held.state.root, None)
    every = list(held.certificates)
    held.certificates.clear()
    held.certificates.extend(every[kept.start :])
    reply = wire.decode(donor(held, Clock()).answer(Hello(height=height)))
    assert reply == Heads(certificates=tuple(every[answer.start : answer.stop]))


def test_an_answer_is_cut_to_what_one_message_holds() -> None:
    held = replica()
    first = held.chain.newest
    roster = tuple(
        dataclasses.replace(first.outcome.roster[0], peer_id=f"p{n:04}", hosts=("h" * 250,) * 2)
        for n in range(800)
    )
    outcome = dataclasses.replace(first.outcome, roster=roster)
    large = [
        dataclasses.replace(first, outcome=dataclasses.replace(outcome, height=height))
        for height in range(4)
    ]
    held.certificates.clear()
    held.certificates.extend(large)
    raw = donor(held, Clock()).answer(Hello(height=0))
    assert wire.decode(raw) == Heads(certificates=tuple(large[:2]))
    assert len(raw) <= wire.MAX_MESSAGE_BYTES


# -- leases -----------------------------------------------------------------------------------


async def test_a_state_stays_while_somebody_asks_for_its_parts() -> None:
    held, clock = replica(), Clock()
    serving = donor(held, clock)
    old = held.state
    await all_of(serving.serve("x", fetch(old.root)))
    for seed in range(12):  # rounds pass, each shorter than a lease
        step(held, seed)
        clock.now += LEASE_S - 1
        (frame,) = await all_of(serving.serve("x", fetch(old.root, 1)))
        assert bytes(wire.unpack_frame(frame)[1]) == bytes(old.leaf(1))
    clock.now += LEASE_S + 1
    serving.tidy()
    assert serving.kept == ()
    with pytest.raises(StateError, match="any more"):
        await all_of(serving.serve("x", fetch(old.root, 1)))


async def test_few_old_states_are_kept_those_asked_for_last() -> None:
    held, clock = replica(), Clock()
    serving = donor(held, clock)
    roots = []
    for seed in range(KEPT_STATES + 2):
        roots.append(held.state.root)
        await all_of(serving.serve("x", fetch(held.state.root)))
        step(held, seed)
        clock.now += 1
    serving.tidy()
    assert serving.kept == tuple(roots[-KEPT_STATES:])
    # A refused request leaves nothing behind.
    with pytest.raises(StateError):
        await all_of(serving.serve("x", fetch(roots[0])))
    assert serving.kept == tuple(roots[-KEPT_STATES:])


# -- slots and the cap ------------------------------------------------------------------------


async def test_few_downloads_at_once_and_the_others_are_sent_elsewhere() -> None:
    held, clock = replica(), Clock()
    serving = donor(held, clock)
    root = held.state.root
    open_stream = serving.serve("p0", fetch(root, 0, 1))
    await anext(open_stream)
    for number in range(1, SLOTS):
        await all_of(serving.serve(f"p{number}", fetch(root)))
    with pytest.raises(Overloaded):
        await all_of(serving.serve("late", fetch(root)))
    await all_of(serving.serve("p1", fetch(root, 1)))  # those who have begun go on
    clock.now += SLOT_S + 1  # all but the open stream have fallen silent
    for number in range(SLOTS - 1):
        await all_of(serving.serve(f"q{number}", fetch(root)))
    with pytest.raises(Overloaded):
        await all_of(serving.serve("late", fetch(root)))
    await open_stream.aclose()
    clock.now += SLOT_S + 1
    await all_of(serving.serve("late", fetch(root)))


class Line:
    """A virtual clock that everybody who sleeps moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    async def sleep(self, seconds: float) -> None:
        due = self.now + seconds
        await asyncio.sleep(0)
        self.now = max(self.now, due)


async def test_the_cap_holds_for_all_together_and_is_shared_evenly() -> None:
    line = Line()
    throttle = Throttle(1000.0, lambda: line.now, line.sleep)
    sent: dict[str, int] = {"greedy": 0, "modest": 0}

    async def stream(downloader: str) -> None:
        while line.now < 10:
            await throttle.take(downloader, 50)
            sent[downloader] += 50

    await asyncio.gather(*(stream("greedy") for _ in range(8)), stream("modest"))
    total = sum(sent.values())
    assert 9_500 <= total <= 11_000
    assert sent["modest"] >= 0.45 * total


async def test_without_a_cap_nobody_waits() -> None:
    line = Line()
    throttle = Throttle(0.0, lambda: line.now, line.sleep)
    await asyncio.gather(*(throttle.take("x", 10**9) for _ in range(100)))
    assert line.now == 0


# -- whole downloads --------------------------------------------------------------------------

BIG = 5 * LEAF_ELEMENTS + 7


class Network:
    """Carries requests to donors in this process; some of them misbehave."""

    def __init__(self) -> None:
        self.donors: dict[str, Donor] = {}
        self.mangle: dict[str, Callable[[bytes], bytes]] = {}
        self.leaves: dict[str, list[int]] = {}
        self.dies_after: dict[str, int] = {}

    async def fetch(
        self, to: Contact, request: bytes, idle_timeout_s: float
    ) -> AsyncIterator[bytes]:
        name = to.peer_id
        decoded = wire.decode_fetch(request)
        assert isinstance(decoded, FetchState)
        try:
            async for frame in self.donors[name].serve("me", decoded):
                await asyncio.sleep(0.01)
                sent = self.leaves.setdefault(name, [])
                if len(sent) >= self.dies_after.get(name, 10**9):
                    raise Unreachable(name, "is gone")
                sent.extend(decoded.leaves)
                yield self.mangle.get(name, bytes)(frame)
        except Overloaded as error:
            raise Overloaded(name, error.reason) from error
        except StateError as error:
            raise Declined(name, str(error)) from error


def transfer_over(network: Network, numel: int = BIG) -> Transfer:
    return Transfer(
        client=cast(Client, network),
        run_id=RUN,
        creator="a",
        shape=shape(numel),
        round=RoundConfig(),
        check=check,
    )


def contacts(names: str) -> Callable[[], AsyncIterator[list[Contact]]]:
    async def look() -> list[Contact]:
        return [Contact(name, ("host",), 1, NO_DIGEST) for name in names]

    return look  # type: ignore[return-value]


def swarm(names: str) -> tuple[Network, State]:
    network = Network()
    whole = state(numel=BIG)
    chain = Chain.begin(certificate(whole.root, kind=Kind.FOUND))
    for name in names:
        held = Replica(OPTIMIZER, whole, chain)
        network.donors[name] = donor(held, asyncio.get_running_loop().time)
    return network, whole


def assert_same(got: State, whole: State) -> None:
    assert got.root == whole.root
    assert got.digests == whole.digests
    assert all(map(torch.equal, got.vectors(), whole.vectors()))


async def test_a_state_comes_from_all_donors(caplog: pytest.LogCaptureFixture) -> None:
    network, whole = swarm("abcd")
    got = await transfer_over(network).state(whole.root, contacts("abcd"))  # type: ignore[arg-type]
    assert_same(got, whole)
    assert set(network.leaves) == set("abcd")
    assert all(len(leaves) <= len(whole.shape.leaves) // 2 for leaves in network.leaves.values())


def last_byte_flipped(frame: bytes) -> bytes:
    return frame[:-1] + bytes([frame[-1] ^ 1])


@pytest.mark.parametrize(
    "mangle",
    [
        last_byte_flipped,
        lambda frame: frame[:-4],
        lambda frame: b"\xff",
        lambda frame: wire.pack_frame(wire.FrameHeader(chunk=99), bytes(4)),
    ],
    ids=["corrupt", "short", "no frame", "another leaf"],
)
async def test_a_liar_is_reported_and_another_one_that_dies_is_made_up_for(
    mangle: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    network, whole = swarm("abcd")
    network.mangle["b"] = mangle
    network.dies_after["c"] = 2
    transfer = transfer_over(network)
    got = await transfer.state(whole.root, contacts("abcd"))  # type: ignore[arg-type]
    assert_same(got, whole)
    assert transfer.liars == {"b": 1}
    assert "transfer.donor_lied peer=b" in caplog.text


async def test_a_state_that_nobody_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = swarm("ab")
    transfer = transfer_over(network)
    with pytest.raises(StateError, match="nobody is left"):
        await transfer.state(NO_DIGEST, contacts("ab"))  # type: ignore[arg-type]


async def test_a_donor_that_answers_nothing_at_all_costs_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "LEAF_S", 0.2)
    network, whole = swarm("ab")

    async def hangs(sender: str, request: FetchState) -> AsyncIterator[bytes]:
        await asyncio.sleep(3600)
        yield b""

    network.donors["a"].serve = hangs  # type: ignore[method-assign, assignment]
    got = await transfer_over(network).state(whole.root, contacts("ab"))  # type: ignore[arg-type]
    assert_same(got, whole)


async def test_a_state_in_fragments_comes_whole() -> None:
    network = Network()
    whole = state(numel=BIG, fragments=3)
    assert len({sum(lengths) for lengths in whole.shape.lengths}) > 1
    chain = Chain.begin(certificate(whole.root, kind=Kind.FOUND))
    for name in "ab":
        held = Replica(OPTIMIZER, whole, chain)
        network.donors[name] = donor(held, asyncio.get_running_loop().time)
    transfer = Transfer(
        client=cast(Client, network),
        run_id=RUN,
        creator="a",
        shape=shape(BIG, fragments=3),
        round=RoundConfig(fragments=3),
        check=check,
    )
    got = await transfer.state(whole.root, contacts("ab"))  # type: ignore[arg-type]
    assert_same(got, whole)
    assert torch.equal(got.theta_N, whole.theta_N)
    for one, other in zip(got.fragments, whole.fragments, strict=True):
        assert one.digests == other.digests
