"""`shoal assist`: take work off the peers of a run without training.

A process with a good link and no GPU adds up what the others send each other. It claims a folder
and has an identity like a daemon, so `shoal status` and `shoal stop` know it. Guarantees: the first
Ctrl-C, SIGTERM or `shoal stop` ends it within seconds. Not guaranteed: that there is work; the
leader of a round asks for help where the members' links are what an exchange takes its time for.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator_free.assistant import Assistant, AssistantConfig
from coordinator_free.network import Network, NetworkConfig
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.session import SessionConfig
from coordinator_free.transport import probe_bind
from dht.addresses import announced_hosts
from dht.identity import Identity
from peer.config import load
from peer.control import ControlServer
from peer.events import AssistedEvent, LeftEvent
from peer.homes import DaemonFile, Home
from peer.output import Output
from peer.signals import heeded
from peer.status import Status

if TYPE_CHECKING:
    from torch import Tensor

    from dht.directory import Directory
    from dht.link import Link
    from dht.records import SignedRun

LEAVE_S = 8.0  # an exchange that is under way is finished first
_SOURCE = "the run's file as published"


@dataclass(frozen=True, kw_only=True, slots=True)
class AssistConfig:
    """How this machine helps.

    Attributes:
        network: how it takes part; its `link` says which run.
        grpc_port: of the data plane; 0 = a free one.
        upload_bps: most bytes per second sent; 0: no limit.
        download_bps: the same, received.
        workers: threads that add up.
    """

    network: NetworkConfig
    grpc_port: int = 0
    upload_bps: float = 0.0
    download_bps: float = 0.0
    workers: int = 1


class Helper:
    """The process, from start to end: `Helper(...).run()`."""

    def __init__(self, config: AssistConfig, home: Home, output: Output) -> None:
        self._config = config
        self._home = home
        self._output = output
        self._identity = Identity.load_or_create(home.identity_path)
        self._control = ControlServer(self.status, self.stop)
        self._assistant: Assistant | None = None
        self._began = time.monotonic()
        self._stopping = False
        self._status = Status(
            peer=self._identity.peer_id, pid=os.getpid(), home=str(home.path), phase="connecting"
        )
        self._network: Network[_Taking] = Network(
            config.network,
            self._identity,
            make_session=self._take_part,
            control=self._control,
            on_control=self._publish,
            on_run=self._on_run,
        )

    def status(self) -> Status:
        """What this peer does; from any thread."""
        status = dataclasses.replace(self._status, uptime_s=time.monotonic() - self._began)
        if self._assistant is None:
            return status
        helps = self._assistant.status()
        return dataclasses.replace(
            status,
            phase="leaving" if self._stopping else "assisting",
            round=helps.round,
            peers=helps.members,
            bytes_sent=helps.bytes_sent,
            bytes_received=helps.bytes_received,
        )

    def stop(self) -> None:
        """End; from any thread."""
        self._stopping = True
        self._network.stop()

    def run(self) -> int:
        """Help until stopped; returns the exit status.

        Raises:
            ConfigError: a person's mistake.
            SwarmError: the run cannot be reached.
        """
        for ending in heeded():
            signal.signal(ending, lambda *_: self.stop())
        if self._config.grpc_port:
            probe_bind(self._config.network.host, self._config.grpc_port)
        self._network.start()
        run = self._network.found()
        if run is not None:
            config = self._config
            self._network.begin(
                SessionConfig(
                    run_id=run.run_id,
                    creator=run.creator,
                    layout="",
                    numel=0,
                    round=load(run.run_file.decode(), _SOURCE).round,
                    optimizer=OuterOptimizer(OuterConfig()),
                    host=config.network.host,
                    port=config.grpc_port,
                    announce_hosts=announced_hosts(
                        config.network.host, config.network.announce_hosts, self._network.maddrs
                    ),
                    upload_bps=config.upload_bps,
                    download_bps=config.download_bps,
                    workers=config.workers,
                ),
                None,
            )
        while not self._network.join(0.5):  # a signal's handler runs between two waits
            if self._stopping and not self._network.join(LEAVE_S):
                break
        if self._network.failure is not None:
            raise self._network.failure
        helped = self._assistant.status().exchanges if self._assistant is not None else 0
        self._output.event(LeftEvent(peer=self._identity.peer_id, rounds=helped))
        return 0

    # -- in the network's thread

    def _take_part(
        self, config: SessionConfig, identity: Identity, directory: Directory
    ) -> _Taking:
        assistant = Assistant(
            AssistantConfig(
                run_id=config.run_id,
                creator=config.creator,
                round=config.round,
                host=config.host,
                port=config.port,
                announce_hosts=config.announce_hosts,
                upload_bps=config.upload_bps,
                download_bps=config.download_bps,
                workers=config.workers,
            ),
            identity=identity,
            directory=directory,
            on_reduced=self._on_reduced,
        )
        self._assistant = assistant
        return _Taking(assistant)

    def _on_reduced(self, number: int, seconds: float) -> None:
        assert self._assistant is not None
        status = self._assistant.status()
        event = AssistedEvent(
            peer=self._identity.peer_id,
            round=number,
            seconds=round(seconds, 3),
            bytes_sent=status.bytes_sent,
            bytes_received=status.bytes_received,
        )
        # A reader that does not read must not stop the network.
        threading.Thread(target=self._output.event, args=(event,), daemon=True).start()

    def _on_run(self, run: SignedRun, link: Link) -> None:
        config = load(run.run_file.decode(), _SOURCE)
        self._status = dataclasses.replace(self._status, run=run.run_id, name=config.name)
        self._publish()

    def _publish(self) -> None:
        self._home.publish(
            DaemonFile(
                pid=os.getpid(),
                port=self._control.port,
                token=self._control.token,
                run=self._status.run,
            )
        )


class _Taking:
    """An assistant as `network.Running`."""

    def __init__(self, assistant: Assistant) -> None:
        self._assistant = assistant

    async def run(
        self,
        initial_N: Tensor | None,
        maddrs: Callable[[], tuple[str, ...]],
        /,
        *,
        rejoin_s: float,
    ) -> None:
        """Help until stopped; there is no model to begin with."""
        await self._assistant.run()

    def stop(self) -> None:
        """In the network's thread."""
        self._assistant.stop()
