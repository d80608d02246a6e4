"""Whole sessions on loopback: real sockets, TLS and tokens; the training is played."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from coordinator_free.config import RoundConfig
from coordinator_free.handoff import RoundResult, SessionClosed
from coordinator_free.outer import OuterConfig
from coordinator_free.session import Session, SessionConfig
from dht.directory import InMemoryDirectory, InMemoryNetwork
from dht.errors import RoundError
from dht.identity import Identity

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
    def __init__(self, config: RoundConfig) -> None:
        self.config = config
        self.records = InMemoryNetwork()
        self.identities: list[Identity] = []
        self.peers: list[Peer] = []

    def start(
        self,
        work: Callable[[Tensor, int], Tensor] | None = None,
        *,
        samples: int = 10,
        founder_again: bool = False,
    ) -> Peer:
        """One more peer; the first one founds the swarm."""
        identity = self.identities[0] if founder_again else Identity.generate()
        self.identities.append(identity)
        session = Session(
            SessionConfig(
                run_id=RUN,
                creator=self.identities[0].peer_id,
                layout="00",
                numel=NUMEL,
                round=self.config,
                outer=OuterConfig(),
            ),
            identity=identity,
            directory=InMemoryDirectory(identity, self.records),
        )
        initial = torch.zeros(NUMEL) if founder_again or not self.peers else None
        rejoin_s = 3.0 if founder_again else 0.0
        number = len(self.peers)
        results: list[RoundResult] = []

        def train() -> None:
            while (given := session.next_assignment()) is not None:
                given.closing.wait(WORK_S)
                local = (
                    work(given.theta_N, given.round)
                    if work is not None
                    else given.theta_N - torch.arange(NUMEL) * (number + 1) / NUMEL
                )
                try:
                    results.append(session.submit(local, samples))
                except RoundError:
                    continue
                except SessionClosed:
                    return

        peer = Peer(
            session,
            asyncio.create_task(session.run(initial, lambda: (), rejoin_s=rejoin_s)),
            threading.Thread(target=train, daemon=True),
            results,
        )
        peer.trainer.start()
        self.peers.append(peer)
        return peer

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                for peer in self.peers:
                    if peer.network.done():
                        peer.network.result()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def swarm(config: RoundConfig) -> AsyncIterator[Swarm]:
    created = Swarm(config)
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
        states = [peer.session.final_N for peer in four.peers]
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
        assert torch.allclose(three.peers[0].session.final_N, expected, atol=1e-6)
        assert {result.total_samples for p in three.peers for result in p.results} == {60}


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
        state = three.peers[0].session.final_N
        assert torch.isfinite(state).all()
        assert (state < -1.0).all()
