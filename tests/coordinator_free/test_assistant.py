"""Peers behind slow links, and one that only reduces: real sockets, the training is played."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from coordinator_free import wire
from coordinator_free.assistant import Assistant, AssistantConfig
from coordinator_free.config import RoundConfig
from coordinator_free.messages import NO_DIGEST, Contribution, Member, Plan, Slice
from dht.directory import InMemoryDirectory
from dht.errors import StateError
from dht.identity import Identity
from tests.coordinator_free.test_session import RUN, Swarm

NUMEL = 400_000  # 1.6 MB, behind 1 MB/s


@asynccontextmanager
async def assisting(swarm: Swarm) -> AsyncIterator[Assistant]:
    identity = Identity.generate()
    assistant = Assistant(
        AssistantConfig(run_id=RUN, creator=swarm.identities[0].peer_id, round=swarm.config),
        identity=identity,
        directory=InMemoryDirectory(identity, swarm.records),
    )
    running = asyncio.create_task(assistant.run())
    try:
        yield assistant
    finally:
        assistant.stop()
        await running


@pytest.fixture
async def slow() -> AsyncIterator[Swarm]:
    swarm = Swarm(RoundConfig(start_peers=3, codec="fp32", rounds=6), NUMEL, 0.0)
    for _ in range(3):
        swarm.start(link_bps=1e6)
    await swarm.until(lambda: all(peer.session.status().round >= 1 for peer in swarm.peers))
    yield swarm
    await swarm.kill_all()


@pytest.mark.slow
async def test_an_assistant_takes_work_off_slow_links_and_gets_no_seat(slow: Swarm) -> None:
    async with assisting(slow) as assistant:
        await slow.until(lambda: all(p.session.status().phase == "finished" for p in slow.peers))
        await asyncio.gather(*(peer.network for peer in slow.peers))
        assert assistant.status().exchanges >= 2
        assert assistant.status().bytes_received > 1e6
    digests = {peer.session.status().digest for peer in slow.peers}
    assert len(digests) == 1
    for peer in slow.peers:
        assert [result.members for result in peer.results] == [3] * 6
    # With a fourth of the vector reduced elsewhere every member has less to send.
    sent = [max(peer.results[n].bytes_sent for peer in slow.peers) for n in (1, 5)]
    assert sent[1] < sent[0]


@pytest.mark.slow
async def test_an_assistant_that_dies_costs_a_mend_and_is_left_alone(slow: Swarm) -> None:
    async with assisting(slow) as assistant:
        await slow.until(lambda: assistant.status().bytes_received > 1e5)
    await slow.until(lambda: all(p.session.status().phase == "finished" for p in slow.peers))
    await asyncio.gather(*(peer.network for peer in slow.peers))
    assert len({peer.session.status().digest for peer in slow.peers}) == 1
    for peer in slow.peers:
        assert [result.members for result in peer.results] == [3] * 6


async def test_an_assistant_takes_plans_of_the_roster_alone(slow: Swarm) -> None:
    async with assisting(slow) as assistant:
        await slow.until(lambda: assistant.status().members == 3)
        assert assistant._chain is not None
        newest = assistant._chain.newest.outcome
        me = dataclasses.replace(newest.roster[0], peer_id=assistant._identity.peer_id)
        plan = Plan(
            height=newest.height + 1,
            round=newest.round,
            ballot=0,
            attempt=0,
            previous=wire.head_digest(newest),
            base=NO_DIGEST,
            receivers=(newest.roster[0].peer_id,),
            contributions=(Contribution(peer_id=newest.roster[0].peer_id, samples=1),),
            slices=(Slice(start=0, stop=1, reducer=me.peer_id),),
            kept=(),
            assistants=(me,),
            numel=4096,
            chunk_elements=4096,
            codec="fp32",
            exchange_s=15.0,
            stall_s=3.0,
        )
        sender = newest.roster[0].peer_id
        assert assistant._sound(sender, plan)
        stranger = Identity.generate().peer_id
        changes: list[tuple[str, dict[str, object]]] = [
            (stranger, {}),
            (sender, {"height": newest.height + 2}),
            (sender, {"round": newest.round + 1}),
            (sender, {"codec": "int4"}),
            (sender, {"exchange_s": 1e4}),
            (
                sender,
                {
                    "numel": 2**40,
                    "chunk_elements": 2**26,
                    "slices": (Slice(start=0, stop=2**14, reducer=me.peer_id),),
                },
            ),
            (
                sender,
                {"assistants": (_other(me),), "slices": (Slice(start=0, stop=1, reducer=sender),)},
            ),
        ]
        for who, change in changes:
            assert not assistant._sound(who, dataclasses.replace(plan, **change)), change
        with pytest.raises(StateError):
            await anext(assistant.fetch(sender, b""))


def _other(member: Member) -> Member:
    return dataclasses.replace(member, peer_id=Identity.generate().peer_id)
