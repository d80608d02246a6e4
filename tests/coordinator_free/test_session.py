"""Whole sessions on loopback: real sockets, TLS and tokens; the training is played."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coordinator_free import wire
from coordinator_free.config import RoundConfig
from coordinator_free.handoff import RoundResult, SessionClosed
from coordinator_free.messages import Heads, Join
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.session import STRANGE_BYTES, TICK_S, Session, SessionConfig, beginning_after
from coordinator_free.state import State
from dht.directory import InMemoryDirectory, InMemoryNetwork
from dht.errors import RoundError, StateError
from dht.identity import Identity
from tests.coordinator_free.test_machine import Rig, commit, seat, signed

NUMEL = 5000
WORK_S = 0.1  # what training for a round takes here
RUN = "ab" * 20


@dataclass
class Peer:
    """A session in the test's loop and a thread that plays the trainer."""

    session: Session
    network: asyncio.Task[None]
    trainer: threading.Thread
    results: list[RoundResult] = field(default_factory=list)


class Swarm:
    def __init__(self, config: RoundConfig, numel: int, serve_bps: float) -> None:
        self.config = config
        self.numel = numel
        self.serve_bps = serve_bps
        self.records = InMemoryNetwork()
        self.identities: list[Identity] = []
        self.peers: list[Peer] = []

    def start(
        self,
        work: Callable[[Tensor, int], Tensor] | None = None,
        *,
        samples: int = 10,
        founder_again: bool = False,
        identity: Identity | None = None,
        disk: Path | None = None,
        link_bps: float = 0.0,
        play: Callable[[Session, list[RoundResult]], None] | None = None,
    ) -> Peer:
        """One more peer; the first one founds the swarm, and no other peer does.

        Args:
            work: plays the training.
            samples: that it claims to have trained on.
            founder_again: it is the first one, restarted.
            identity: it is this one, restarted.
            disk: where it keeps its checkpoints.
            link_bps: what its link takes, either way; 0: anything.
            play: plays all that the training thread does, in place of `work`.
        """
        identity = self.identities[0] if founder_again else identity or Identity.generate()
        self.identities.append(identity)
        session = Session(
            SessionConfig(
                run_id=RUN,
                creator=self.identities[0].peer_id,
                layout="00",
                numel=self.numel,
                round=self.config,
                optimizer=OuterOptimizer(OuterConfig()),
                serve_bps=self.serve_bps,
                upload_bps=link_bps,
                download_bps=link_bps,
                checkpoints=disk / identity.peer_id if disk is not None else None,
            ),
            identity=identity,
            directory=InMemoryDirectory(identity, self.records),
        )
        initial = torch.zeros(self.numel) if founder_again or not self.peers else None
        rejoin_s = 3.0 if founder_again else 0.0
        number = len(self.peers)
        results: list[RoundResult] = []

        def train() -> None:
            while (given := session.next_assignment()) is not None:
                given.closing.wait(WORK_S)
                local = (
                    work(given.theta_N, given.round)
                    if work is not None
                    else given.theta_N - torch.arange(self.numel) * (number + 1) / self.numel
                )
                try:
                    start, stop = given.state.shape.bounds[given.fragment]
                    session.hand_in((given.theta_N - local)[start:stop], samples)
                    results.append(session.result())
                except RoundError:
                    continue
                except SessionClosed:
                    return

        peer = Peer(
            session,
            asyncio.create_task(session.run(initial, lambda: (), rejoin_s=rejoin_s)),
            threading.Thread(
                target=train if play is None else lambda: play(session, results), daemon=True
            ),
            results,
        )
        peer.trainer.start()
        self.peers.append(peer)
        return peer

    def start_gradients(self, *, step: int, value: float) -> Peer:
        """A peer in gradient mode: so many samples every few milliseconds, until it is hurried."""

        def train(session: Session, results: list[RoundResult]) -> None:
            while session.next_assignment() is not None:
                samples = 0
                while samples < self.config.target_batch and not session.hurried:
                    time.sleep(0.02)
                    samples += step
                    session.progress(samples)
                session.hand_in(torch.full((self.numel,), value), samples)
                results.append(session.result())

        return self.start(play=train)

    async def kill_all(self) -> None:
        """No farewell, and what they announced is forgotten."""
        peers, self.peers = self.peers, []
        for peer in peers:
            peer.network.cancel()
        await asyncio.gather(*(peer.network for peer in peers), return_exceptions=True)
        for peer in peers:
            await asyncio.to_thread(peer.trainer.join, 5)
        self.records.peers.clear()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                for peer in self.peers:
                    if peer.network.done():
                        peer.network.result()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def swarm(
    config: RoundConfig, *, numel: int = NUMEL, serve_bps: float = 0.0
) -> AsyncIterator[Swarm]:
    created = Swarm(config, numel, serve_bps)
    try:
        yield created
    finally:
        for peer in created.peers:
            peer.network.cancel()
        await asyncio.gather(*(peer.network for peer in created.peers), return_exceptions=True)
        for peer in created.peers:
            peer.trainer.join(5)
            assert not peer.trainer.is_alive()


def rounds_of(peer: Peer) -> dict[int, str]:
    return {result.round: result.digest for result in peer.results}


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
async def test_four_peers_average_bit_identically(codec: str) -> None:
    config = RoundConfig(start_peers=4, rounds=3, codec=codec)
    async with swarm(config) as four:
        for _ in range(4):
            four.start()
        await asyncio.wait_for(asyncio.gather(*(p.network for p in four.peers)), 60)
        digests = [rounds_of(peer) for peer in four.peers]
        assert set(digests[0]) == {0, 1, 2}
        assert all(other == digests[0] for other in digests)
        states = [peer.session.state.theta_N for peer in four.peers]
        assert all(torch.equal(state, states[0]) for state in states)
        assert all(r.included and r.members == 4 for p in four.peers for r in p.results)
        assert all(r.bytes_sent > 0 and r.bytes_received > 0 for r in four.peers[0].results)


async def test_the_average_is_the_mean_weighted_by_samples() -> None:
    config = RoundConfig(start_peers=3, rounds=1, codec="fp32")
    async with swarm(config) as three:
        pieces = [torch.randn(NUMEL) for _ in range(3)]
        for number, piece in enumerate(pieces):
            three.start(lambda theta, _, piece=piece: theta - piece, samples=10 * (number + 1))
        await asyncio.wait_for(asyncio.gather(*(p.network for p in three.peers)), 30)
        mean = (10 * pieces[0] + 20 * pieces[1] + 30 * pieces[2]) / 60
        # The first Nesterov step from zero momentum: -lr * (1 + momentum) * gradient.
        expected = -0.7 * (1 + 0.6) * mean
        assert torch.allclose(three.peers[0].session.state.theta_N, expected, atol=1e-6)
        assert {result.total_samples for p in three.peers for result in p.results} == {60}


FRAGMENTED = 5 * ALIGN_ELEMENTS + 7  # in three fragments: of one, two and two pieces and a bit


async def test_four_peers_that_average_fragments_in_turn_stay_identical() -> None:
    config = RoundConfig(start_peers=4, rounds=6, codec="int4", fragments=3)
    async with swarm(config, numel=FRAGMENTED) as four:
        for _ in range(4):
            four.start()
        await asyncio.wait_for(asyncio.gather(*(p.network for p in four.peers)), 60)
        digests = [rounds_of(peer) for peer in four.peers]
        assert set(digests[0]) == set(range(6))
        assert len(set(digests[0].values())) == 6
        assert all(other == digests[0] for other in digests)
        states = [peer.session.state for peer in four.peers]
        assert {state.root.hex() for state in states} == {digests[0][5]}
        for state in states:
            assert all(map(torch.equal, state.vectors(), states[0].vectors()))
            # Whoever has the same bytes has the same name.
            again = State.of(state.shape, [fragment.vectors for fragment in state.fragments])
            assert again.root == state.root
        lengths = [length for length, _ in states[0].shape.lengths]
        assert len(set(lengths)) > 1
        for peer in four.peers:
            assert all(r.members == 4 for r in peer.results)
            assert [r.spans for r in peer.results] == [((0, lengths[n % 3]),) for n in range(6)]


async def test_every_fragment_is_averaged_by_samples_and_moved_by_its_own_momentum() -> None:
    config = RoundConfig(start_peers=3, rounds=6, codec="fp32", fragments=3)
    async with swarm(config, numel=FRAGMENTED) as three:
        pieces = [torch.randn(FRAGMENTED) for _ in range(3)]
        for number, piece in enumerate(pieces):
            three.start(lambda theta, _, piece=piece: theta - piece, samples=10 * (number + 1))
        await asyncio.wait_for(asyncio.gather(*(p.network for p in three.peers)), 60)
        mean = (10 * pieces[0] + 20 * pieces[1] + 30 * pieces[2]) / 60
        # Two Nesterov steps of each: m = delta, then 1.6 delta.
        expected = -0.7 * ((1 + 0.6) + (1 + 0.6 * 1.6)) * mean
        for peer in three.peers:
            assert torch.allclose(peer.session.state.theta_N, expected, atol=1e-4)
            momentum = torch.cat([f.vectors[1] for f in peer.session.state.fragments])
            assert torch.allclose(momentum, 1.6 * mean, atol=1e-5)


async def test_a_newcomer_gets_all_fragments_and_takes_part() -> None:
    async with swarm(RoundConfig(codec="int8", fragments=3), numel=FRAGMENTED) as two:
        first = two.start()
        await two.until(lambda: len(first.results) >= 4)
        second = two.start()
        await two.until(lambda: sum(r.included for r in second.results) >= 4)
        await two.until(lambda: first.results[-1].round >= second.results[-1].round)
        shared = rounds_of(first).keys() & rounds_of(second).keys()
        assert len(shared) >= 4
        assert all(rounds_of(first)[r] == rounds_of(second)[r] for r in shared)


@pytest.mark.parametrize("tick_s", [TICK_S, 1.0])
async def test_a_batch_of_gradients_ends_when_all_together_have_enough(
    tick_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session's own `progress` is what the leader adds up, also of steps between two ticks."""
    monkeypatch.setattr("coordinator_free.session.TICK_S", tick_s)
    config = RoundConfig(mode="gradient", target_batch=60, start_peers=3, rounds=4, codec="fp32")
    async with swarm(config) as three:
        for number in range(3):
            three.start_gradients(step=2, value=float(number + 1))
        await asyncio.wait_for(asyncio.gather(*(p.network for p in three.peers)), 60)
        digests = [rounds_of(peer) for peer in three.peers]
        assert all(other == digests[0] for other in digests)
        for results in zip(*(peer.results for peer in three.peers), strict=True):
            total = results[0].total_samples
            assert {result.total_samples for result in results} == {total}
            assert sum(result.samples for result in results) == total
            # Nobody made the batch alone, and the news of it took a few steps at most.
            assert 60 <= total < 120
            assert all(result.samples < 60 for result in results)


async def test_a_newcomer_gets_the_state_and_takes_part() -> None:
    async with swarm(RoundConfig(codec="int8")) as two:
        first = two.start(lambda theta, _: theta - 1.0)
        await two.until(lambda: len(first.results) >= 2)
        second = two.start(lambda theta, _: theta - 2.0)
        await two.until(lambda: sum(r.included for r in second.results) >= 2)
        await two.until(lambda: len(first.results) > second.results[-1].round)
        shared = rounds_of(first).keys() & rounds_of(second).keys()
        assert len(shared) >= 2
        assert all(rounds_of(first)[r] == rounds_of(second)[r] for r in shared)


async def test_a_polite_leave_lets_the_others_go_on_at_once() -> None:
    async with swarm(RoundConfig(start_peers=3)) as three:
        for _ in range(3):
            three.start()
        await three.until(lambda: all(len(p.results) >= 2 for p in three.peers))
        leaver = three.peers.pop()
        leaver.session.stop()
        await asyncio.wait_for(leaver.network, 10)
        before = len(three.peers[0].results)
        await three.until(lambda: len(three.peers[0].results) >= before + 3)
        assert three.peers[0].results[-1].members == 2


async def test_a_peer_that_vanishes_does_not_stop_the_others() -> None:
    async with swarm(RoundConfig(start_peers=4)) as four:
        for _ in range(4):
            four.start()
        await four.until(lambda: all(len(p.results) >= 2 for p in four.peers))
        lost = four.peers.pop()
        lost.network.cancel()  # no farewell
        await asyncio.gather(lost.network, return_exceptions=True)
        before = max(len(p.results) for p in four.peers)
        await four.until(lambda: all(len(p.results) >= before + 3 for p in four.peers))
        last = [rounds_of(peer) for peer in four.peers]
        shared = set.intersection(*(set(one) for one in last))
        assert all(len({one[r] for one in last}) == 1 for r in shared)


async def test_a_restarted_founder_goes_on_with_those_who_stayed() -> None:
    async with swarm(RoundConfig(start_peers=2)) as two:
        founder, second = two.start(), two.start()
        await two.until(lambda: len(second.results) >= 2)
        two.peers.remove(founder)
        founder.network.cancel()
        await asyncio.gather(founder.network, return_exceptions=True)
        again = two.start(founder_again=True)
        await two.until(lambda: any(result.included for result in again.results), 60)
        first = again.results[0]
        assert first.round >= 2
        await two.until(lambda: first.round in rounds_of(second))
        assert rounds_of(second)[first.round] == first.digest


async def test_a_founder_that_finds_nobody_founds() -> None:
    async with swarm(RoundConfig(rounds=1)) as one:
        one.identities.append(Identity.generate())
        alone = one.start(founder_again=True)
        await asyncio.wait_for(alone.network, 40)
        assert [result.round for result in alone.results] == [0]


async def test_broken_values_of_one_peer_stay_out_of_the_average() -> None:
    config = RoundConfig(start_peers=3, rounds=2, codec="int8", exchange_s=10)
    async with swarm(config) as three:
        three.start(lambda theta, _: theta - 1.0)
        three.start(lambda theta, _: theta - 1.0)
        three.start(lambda theta, _: theta * float("nan"))
        await asyncio.wait_for(asyncio.gather(*(p.network for p in three.peers)), 60)
        state = three.peers[0].session.state.theta_N
        assert torch.isfinite(state).all()
        assert (state < -1.0).all()


async def test_what_strangers_send_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("a", "abc")
    identity = Identity.generate()
    session = Session(
        SessionConfig(
            run_id=RUN,
            creator=identity.peer_id,
            layout="00",
            numel=NUMEL,
            round=RoundConfig(),
            optimizer=OuterOptimizer(OuterConfig()),
        ),
        identity=identity,
        directory=InMemoryDirectory(identity, InMemoryNetwork()),
    )
    with pytest.raises(StateError):
        await session.deliver("x", b"\xff" * 10)
    session._machine = rig.machine
    roster = tuple(seat(f"peer{number:04d}") for number in range(1500))
    large = wire.encode(commit(signed(rig.regroup(*roster), "ab")))
    heads = wire.encode(Heads(certificates=(signed(rig.regroup(*roster), "ab"),)))
    assert len(large) > STRANGE_BYTES
    read: list[type] = []
    shipped = wire._read

    def noting(kind: type, proto: object) -> object:
        read.append(kind)
        return shipped(kind, proto)

    monkeypatch.setattr(wire, "_read", noting)
    with pytest.raises(ValueError, match="without a seat"):
        await session.deliver("x", large)
    for sender in "xb":
        with pytest.raises(ValueError, match=r"without a seat|nobody asked for"):
            await session.deliver(sender, heads)
    small = wire.encode(Heads(certificates=(rig.certificate,)))
    with pytest.raises(ValueError, match="nobody asked for"):
        await session.deliver("x", small)
    assert read == []
    monkeypatch.setattr(session, "_do", lambda wanted: None)
    assert await session.deliver("b", large) == b""
    assert await session.deliver("x", wire.encode(Join(member=seat("x"), height=0))) == b""
    assert read


def test_those_who_miss_the_same_ask_different_holders_first() -> None:
    holders = ("b", "d", "f")
    assert beginning_after("a", holders) == holders
    assert beginning_after("c", holders) == ("d", "f", "b")
    assert beginning_after("d", holders) == ("f", "b", "d")
    assert beginning_after("z", holders) == holders
    assert beginning_after("z", ()) == ()


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
async def test_when_all_were_killed_the_run_goes_on_from_disk(tmp_path: Path, first: int) -> None:
    config = RoundConfig(start_peers=2, provisional_s=2.0)
    async with swarm(config) as two:
        old = [two.start(disk=tmp_path), two.start(disk=tmp_path)]
        await two.until(lambda: all(len(peer.results) >= 3 for peer in old))
        await two.kill_all()
        reached = max(max(rounds_of(peer)) for peer in old)
        digests = rounds_of(old[0]) | rounds_of(old[1])
        again = [two.start(identity=two.identities[i], disk=tmp_path) for i in (first, 1 - first)]
        await two.until(lambda: all(len(peer.results) >= 3 for peer in again), 60)
        begun = [min(rounds_of(peer)) for peer in again]
        assert reached + 1 <= min(begun) <= reached + 2
        assert any(r.included and r.members == 2 for r in again[0].results)
        assert rounds_of(again[0]).items() & rounds_of(again[1]).items()
        assert len(digests) >= 3


@pytest.mark.slow
async def test_with_fragments_the_run_goes_on_from_disk_as_well(tmp_path: Path) -> None:
    config = RoundConfig(start_peers=2, provisional_s=2.0, codec="int4", fragments=3)
    async with swarm(config, numel=FRAGMENTED) as two:
        old = [two.start(disk=tmp_path), two.start(disk=tmp_path)]
        await two.until(lambda: all(len(peer.results) >= 4 for peer in old))
        await two.kill_all()
        reached = max(max(rounds_of(peer)) for peer in old)
        again = [two.start(identity=two.identities[i], disk=tmp_path) for i in (1, 0)]
        await two.until(lambda: all(len(peer.results) >= 4 for peer in again), 60)
        begun = [min(rounds_of(peer)) for peer in again]
        assert reached + 1 <= min(begun) <= reached + 2
        shared = rounds_of(again[0]).keys() & rounds_of(again[1]).keys()
        assert len(shared) >= 2
        assert all(rounds_of(again[0])[r] == rounds_of(again[1])[r] for r in shared)
        # Each fragment's round comes in its turn, whatever was saved last.
        shape = again[0].session.state.shape
        for result in again[0].results:
            assert result.spans in ((), ((0, shape.averaged(result.round)),))


@pytest.mark.slow
async def test_one_who_comes_back_alone_goes_on_alone(tmp_path: Path) -> None:
    async with swarm(RoundConfig(start_peers=2, provisional_s=2.0)) as two:
        old = [two.start(disk=tmp_path), two.start(disk=tmp_path)]
        await two.until(lambda: all(len(peer.results) >= 3 for peer in old))
        await two.kill_all()
        alone = two.start(identity=two.identities[1], disk=tmp_path)
        await two.until(lambda: len(alone.results) >= 2, 60)
        assert alone.results[0].round >= 2
        assert alone.results[0].members == 1
        samples = alone.session.status().samples
        assert samples == (alone.results[0].round) * 20 + len(alone.results) * 10


@pytest.mark.slow
async def test_who_left_politely_can_go_on_with_what_the_others_had(tmp_path: Path) -> None:
    async with swarm(RoundConfig(start_peers=2, provisional_s=2.0)) as two:
        leaver, stayer = two.start(disk=tmp_path), two.start(disk=tmp_path)
        await two.until(lambda: all(len(peer.results) >= 3 for peer in two.peers))
        leaver.session.stop()
        await asyncio.wait_for(leaver.network, 20)
        left = rounds_of(leaver)
        assert stayer.session.status().round > max(left)
        await two.kill_all()
        again = two.start(identity=two.identities[0], disk=tmp_path)
        await two.until(lambda: len(again.results) >= 1, 60)
        assert again.results[0].round == max(left) + 1


@pytest.mark.slow
async def test_the_newest_of_those_who_come_back_is_what_the_run_goes_on_from(
    tmp_path: Path,
) -> None:
    async with swarm(RoundConfig(start_peers=2, provisional_s=2.0)) as two:
        first, second = two.start(disk=tmp_path), two.start(disk=tmp_path)
        await two.until(lambda: all(len(peer.results) >= 2 for peer in two.peers))
        two.peers.remove(first)
        first.network.cancel()
        await asyncio.gather(first.network, return_exceptions=True)
        behind = max(rounds_of(first))
        await two.until(lambda: max(rounds_of(second)) >= behind + 5, 60)
        ahead = max(rounds_of(second))
        await two.kill_all()
        again = two.start(identity=two.identities[0], disk=tmp_path)
        other = two.start(identity=two.identities[1], disk=tmp_path)
        await two.until(lambda: len(again.results) >= 2 and len(other.results) >= 2, 60)
        assert min(rounds_of(again)) >= ahead
        assert min(rounds_of(other)) >= ahead


@pytest.mark.slow
async def test_a_restart_among_the_living_revives_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with swarm(RoundConfig(start_peers=3, provisional_s=2.0)) as three:
        for _ in range(3):
            three.start(disk=tmp_path)
        await three.until(lambda: all(len(peer.results) >= 2 for peer in three.peers))
        victim = three.peers.pop()
        victim.network.cancel()
        await asyncio.gather(victim.network, return_exceptions=True)
        again = three.start(identity=three.identities[2], disk=tmp_path)
        await three.until(lambda: any(r.members == 3 for r in again.results), 60)
        assert "session.revived" not in caplog.text
