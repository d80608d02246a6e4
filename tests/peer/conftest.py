"""Fakes of what is under a daemon: a swarm of one, and a directory in memory."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coordinator_free.handoff import Assignment, RoundResult, SessionClosed
from coordinator_free.session import SessionConfig, SessionStatus
from coordinator_free.state import Fragment, Shape, State
from dht.directory import InMemoryDirectory, InMemoryNetwork
from dht.identity import Identity
from dht.kademlia import KademliaConfig
from peer.homes import Home


class FakeSession:
    """A swarm of this peer alone: the state becomes what it trained."""

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.last_round = config.round.rounds - 1
        shape = Shape.of(config.layout, config.numel, config.round.parts, config.optimizer)
        self.state = State.begin(shape, torch.zeros(config.numel))
        self.round = 0
        self.digest = ""
        self.samples: list[int] = []
        self.reported: list[int] = []
        self.hurried = False
        self.stopped = threading.Event()
        self.politely = False
        self.fail: Exception | None = None
        self.save_s = 0.0  # how long the last checkpoint takes
        self.saving = False
        self.hangs = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._work: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()

    async def run(
        self,
        initial_N: Tensor | None,
        maddrs: Callable[[], tuple[str, ...]],
        *,
        rejoin_s: float = 0.0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        if initial_N is not None:
            self.state = State.begin(self.state.shape, initial_N.clone())
        try:
            if self.fail is not None:
                raise self.fail
            self._assign()
            await self._over.wait()
        finally:
            self.saving = self.save_s > 0 and not self.hangs
            self.stopped.set()
            self._work.put(None)
            await asyncio.sleep(self.save_s)
            self.saving = False

    def _assign(self) -> None:
        closing = threading.Event()
        self._work.put(
            Assignment(
                round=self.round,
                seat=0,
                seats=1,
                samples=sum(self.samples),
                state=self.state,
                closing=closing,
            )
        )

    def next_assignment(self) -> Assignment | None:
        return self._work.get()

    def progress(self, samples: int) -> None:
        self.reported.append(samples)

    def hand_in(self, update_E: Tensor, samples: int) -> bool:
        if self.stopped.is_set():
            raise SessionClosed("over")
        self.samples.append(samples)
        number = self.state.shape.fragment(self.round)
        theta_E, *moments = self.state.fragments[number].vectors
        trained = Fragment.of((theta_E - update_E, *moments))
        self._next = self.state.then(number, trained)
        return True

    def result(self) -> RoundResult:
        if self.stopped.is_set():
            raise SessionClosed("over")
        assert self._loop is not None
        samples = self.samples[-1]
        spans = ((0, self.state.shape.averaged(self.round)),)
        self.state = self._next
        result = RoundResult(
            round=self.round,
            spans=spans,
            members=1,
            digest=f"{self.round:064x}",
            samples=samples,
            total_samples=samples,
            bytes_sent=100,
            bytes_received=200,
            allreduce_s=0.01,
            commit_s=0.01,
            round_s=0.1,
        )
        self.digest = result.digest
        self.round += 1
        if result.round == self.last_round:
            self._loop.call_soon_threadsafe(self._over.set)
        else:
            self._assign()
        return result

    def stop(self) -> None:
        assert self._loop is not None
        self.politely = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._over.set)

    def finish_after(self, round: int) -> None:
        self.last_round = round

    def status(self) -> SessionStatus:
        return SessionStatus(
            phase="exchange",
            round=self.round,
            members=("me",),
            leader="me",
            digest=self.digest,
            samples=0,
            bytes_sent=100,
            bytes_received=200,
            saving=self.saving,
        )


class FakeSwarm:
    """Stands where the DHT and the sessions would be."""

    def __init__(self) -> None:
        self.network = InMemoryNetwork()
        self.sessions: list[FakeSession] = []
        self.configs: list[KademliaConfig] = []
        self.fail: Exception | None = None
        self.save_s = 0.0
        self.hangs = False  # at the end, and not because it saves

    def open_directory(self, config: KademliaConfig) -> Any:
        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[Any]:
            self.configs.append(config)
            identity = Identity.load_or_create(config.identity_path)
            directory: Any = InMemoryDirectory(identity, self.network)
            directory.maddrs = (f"/ip4/127.0.0.1/tcp/4001/p2p/{identity.peer_id}",)
            yield directory

        return opened()

    def make_session(self, config: SessionConfig, identity: Identity, directory: Any) -> Any:
        session = FakeSession(config)
        session.fail = self.fail
        session.save_s = self.save_s
        session.hangs = self.hangs
        self.sessions.append(session)
        return session


@pytest.fixture
def swarm() -> FakeSwarm:
    return FakeSwarm()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home.claim(tmp_path / "home") as claimed:
        yield claimed


@pytest.fixture(scope="session")
def peer_id() -> str:
    return Identity.generate().peer_id


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text that loads in no time."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n}: {n * n} is the square of {n}\n" for n in range(8000)))
    return path


@pytest.fixture
def run_file(tmp_path: Path, corpus: Path) -> Path:
    """A run small enough for a test."""
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
name = "small"
[model]
layers = 1
width = 16
heads = 2
context = 16
[data]
path = "{corpus.name}"
[training]
batch_size = 2
eval_blocks = 4
[round]
local_steps = 3
fragments = 1
delay_steps = 0
rounds = 2
"""
    )
    return path
