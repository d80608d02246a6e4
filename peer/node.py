"""A daemon: one process that trains in its main thread and talks to the swarm in another.

Guarantees: the first Ctrl-C, SIGTERM, `shoal stop` or broken pipe makes it leave politely, the
second Ctrl-C at once, and a polite leave that takes too long is cut short, but for a checkpoint
that is being written: that has the time it takes. Either way the folder's lock and `daemon.json`
are given back and the libp2p daemon goes with the process. A signal that was ignored when the
process started (`nohup`) stays ignored. What a run file from the swarm says never opens a text of
this machine: its data are read from where the person says; nor does it make this machine download a
model, unless the person says so. Not guaranteed: that a leave cut short is noticed by the others
before their own time-outs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from coordinator_free.handoff import SessionClosed
from coordinator_free.local import LocalLoop, Turn
from coordinator_free.network import (
    MakeSession,
    Network,
    NetworkConfig,
    OpenDirectory,
    SwarmSession,
)
from coordinator_free.recipe import feeds_back
from coordinator_free.session import Session, SessionConfig
from coordinator_free.transport import probe_bind
from dht.addresses import announced_hosts
from dht.errors import ConfigError, SwarmError
from dht.identity import Identity
from dht.kademlia import KademliaDirectory
from dht.link import Link
from dht.records import SignedRun
from model.box import BoxError, Crew
from model.builders import ModelError
from model.data import DataError
from model.processes import processes
from model.trainer import StepReport, Trainer, TrainingDiverged
from peer import runfile
from peer.config import RunConfig, configured, optimizer, published
from peer.control import ControlServer
from peer.events import ChosenEvent, DoneEvent, Event, JoinedEvent, LeftEvent, LinkEvent, RoundEvent
from peer.homes import DaemonFile, Home
from peer.link_file import remove_link_file, write_link_file
from peer.memory import Memory
from peer.output import Output
from peer.signals import heeded
from peer.status import Status
from peer.supervision import Supervision

if TYPE_CHECKING:
    from coordinator_free.handoff import Assignment

logger = logging.getLogger(__name__)

FINISH_S = 20.0  # longest wait for others at the run's end; a save in progress does not count
REJOIN_S = 10.0  # how long a restarted creator looks for those who went on without it
POLITE_S = 8.0  # longest polite leave, the same: `docker stop` kills after 10 s
MAX_WORKERS = 8  # threads that encode, add up and hash: more than the fastest link needs
WAIT_S = 0.1  # between two looks whether the last checkpoint is still being written


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig:
    """What this machine does for a run.

    Attributes:
        network: how it takes part; its `link` says what to join.
        run_file: the run to create, None to join.
        grpc_port: of the data plane; 0 = a free one.
        serve_bps: most bytes per second for newcomers' downloads of the model; 0 = no cap.
        upload_bps: most bytes per second sent in all; 0 = no limit.
        download_bps: the same, received.
        new: create a new run even if this peer created one from the same file before.
        link_file: where to write the join link; None for nowhere.
        data: where this machine has the run's data; empty: as the run file says.
        device: "auto", "cpu", "cuda", ...
        allow_download: may the run's model be fetched from the hub; a run file of one's own may say
            so, too.
        threads: for torch; 0 = its own choice.
        checkpoint_every: save the run's state after so many rounds; 0 for never.
        keep_checkpoints: how many of the last ones stay on disk.
    """

    network: NetworkConfig
    run_file: Path | None = None
    grpc_port: int = 0
    serve_bps: float = 0.0
    upload_bps: float = 0.0
    download_bps: float = 0.0
    new: bool = False
    link_file: Path | None = None
    data: str = ""
    device: str = "auto"
    allow_download: bool = False
    threads: int = 0
    checkpoint_every: int = 1
    keep_checkpoints: int = 3


class Node:
    """A daemon, from start to end: `Node(...).run()`.

    Args:
        config: what to do.
        home: own folder, claimed.
        output: where events go.
        supervision: when a demo started this process; there is no control server then.
        open_directory: the DHT; a fake one in tests.
        make_session: the swarm; a fake one in tests.
    """

    def __init__(
        self,
        config: NodeConfig,
        home: Home,
        output: Output,
        *,
        supervision: Supervision | None = None,
        open_directory: OpenDirectory = KademliaDirectory.open,
        make_session: MakeSession[SwarmSession] | None = None,
    ) -> None:
        self._config = config
        self._home = home
        self._output = output
        self._identity = Identity.load_or_create(home.identity_path)
        self._control = None if supervision else ControlServer(self.status, self.stop)
        self._memory = Memory(home.path)
        known = config.network.link.run_id if config.network.link else self._created_before()
        # A run that can go on from this disk, should nobody of it be there any more.
        self._kept = self._memory.resumable(known) if config.network.link else None
        self._network = Network(
            dataclasses.replace(
                config.network,
                known_peers=self._memory.peers(known),
                port=config.network.port or self._memory.port(config.network.host),
                may_be_first=self._kept is not None,
            ),
            self._identity,
            open_directory=open_directory,
            make_session=make_session or _session,
            control=self._control,
            on_control=self._publish_daemon,
            on_run=self._on_run,
            on_peers=self._memory.keep_peers,
            on_port=self._memory.keep_port,
        )
        self._supervision = supervision
        self._crew = Crew()
        self._session: SwarmSession | None = None
        self._stopped = False
        self._resumed = False  # the run was created by this peer at an earlier start
        self._watched, self._leash = os.pipe()
        self._finish_after: int | None = None
        self._rounds_done = 0
        self._began = time.monotonic()
        self._status_lock = threading.Lock()
        self._status = Status(
            peer=self._identity.peer_id, pid=os.getpid(), home=str(home.path), phase="starting"
        )

    # -- what others ask of a daemon; from any thread

    def status(self) -> Status:
        """What this peer is doing now."""
        with self._status_lock:
            status = self._status
        if self._stopped:
            status = dataclasses.replace(status, phase="leaving")
        link = self._network.link
        if link is not None:
            status = dataclasses.replace(status, link=str(link))
        session = self._session
        uptime_s = time.monotonic() - self._began
        if session is None:
            return dataclasses.replace(status, uptime_s=uptime_s)
        swarm = session.status()
        over = status.phase in ("leaving", "done")
        return dataclasses.replace(
            status,
            phase="saving" if over and swarm.saving else status.phase or swarm.phase,
            peers=len(swarm.members),
            bytes_sent=swarm.bytes_sent,
            bytes_received=swarm.bytes_received,
            checkpoint=swarm.checkpoint,
            uptime_s=uptime_s,
        )

    def stop(self) -> None:
        """Leave politely. Takes no lock, as a signal handler calls it: hence the pipe."""
        if not self._stopped:
            self._stopped = True
            os.write(self._leash, b".")
            self._network.stop()

    def finish_after(self, round: int) -> None:
        """End the run for this peer when that round is committed."""
        self._finish_after = round
        if self._session is not None:
            self._session.finish_after(round)

    def report(self, event: Event) -> None:
        """Tell whoever reads this peer's events."""
        self._output.event(event)

    def abandon(self, status: int) -> None:
        """End this process at once, leaving as little behind as can be."""
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the live table hides the cursor
        self._home.release()
        if self._supervision is not None:
            self._supervision.clean_up()
        os._exit(status)

    # -- the life of a daemon

    def run(self) -> int:
        """Take part until stopped or the run's end; returns the exit status.

        Raises:
            ConfigError: a person's mistake, for exit status 2.
            SwarmError: the run cannot go on here, for exit status 1.
        """
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            stack.enter_context(self._output.showing(self.status))
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if self._supervision is not None:
                self._supervision.attach(self)
            try:
                self._take_part()
            except (BoxError, ModelError) as error:  # the memory of a GPU, too
                kind = SwarmError if self._session is not None else ConfigError
                raise kind(str(error)) from error
            finally:
                left = self._stopped
                lost = self._close()
            if self._network.failure is not None:
                raise self._network.failure
            if lost is not None:
                raise SwarmError(str(lost)) from lost
            if left:
                self._output.event(LeftEvent(peer=self._identity.peer_id, rounds=self._rounds_done))
        return 0

    def _watch(self) -> None:
        os.read(self._watched, 1)  # told to stop; the second byte says that it is done
        if not self._wait(
            lambda wait_s: bool(select.select([self._watched], [], [], wait_s)[0]), POLITE_S
        ):
            logger.warning("node.leave_cut_short after_s=%g", POLITE_S)
            self.abandon(1)

    def _wait(self, ended: Callable[[float], bool], limit_s: float) -> bool:
        """Wait for an end; the time in which a checkpoint is being written does not count.

        Args:
            ended: waits for so many seconds; whether it has ended.
            limit_s: for all else.
        """
        left_s = limit_s
        while left_s > 0:
            began = time.monotonic()
            if ended(min(WAIT_S, left_s)):
                return True
            if self._session is None or not self._session.status().saving:
                left_s -= time.monotonic() - began
        return False

    def _take_part(self) -> None:
        if self._config.grpc_port:  # taken: better said before anybody is invited
            probe_bind(self._config.network.host, self._config.grpc_port)
        begun = self._create() if self._config.run_file else self._join()
        if begun is None or self._stopped:
            return
        config, trainer, run = begun
        logger.info("node.model %s", trainer.describe())
        session_config = SessionConfig(
            run_id=run.run_id,
            creator=run.creator,
            layout=trainer.layout,
            numel=trainer.numel,
            round=config.round,
            optimizer=optimizer(config, trainer, self._config.threads or os.cpu_count() or 1),
            feedback=feeds_back(config.local, config.round.codec),
            host=self._config.network.host,
            port=self._config.grpc_port,
            announce_hosts=announced_hosts(
                self._config.network.host,
                self._config.network.announce_hosts,
                self._network.maddrs,
            ),
            serve_bps=self._config.serve_bps,
            upload_bps=self._config.upload_bps,
            download_bps=self._config.download_bps,
            workers=_workers(trainer.device, self._config.threads),
            checkpoints=self._memory.run_folder(run.run_id),
            checkpoint_every=self._config.checkpoint_every,
            keep_checkpoints=self._config.keep_checkpoints,
        )
        if self._config.checkpoint_every:
            self._memory.keep_resumable(run)
        initial = trainer.read() if self._config.run_file else None
        rejoin_s = REJOIN_S if self._resumed else 0.0
        session = self._network.begin(session_config, initial, rejoin_s)
        if session is None:
            return
        self._session = session
        self._update(phase="", name=config.name, rounds=config.round.rounds)
        self._train(config, trainer, session)

    def _create(self) -> tuple[RunConfig, Trainer, SignedRun] | None:
        path = self._config.run_file
        assert path is not None
        text = runfile.read(path)
        config = self._configured(text, path)
        if self._config.link_file is not None:
            remove_link_file(self._config.link_file)  # nobody shall join what an old one names
        # The trainer first: a run that cannot be trained here should not be published.
        trainer = self._trainer(config, text)
        if trainer is None:
            return None
        public = published(text, config).encode()
        run = self._memory.run()
        self._resumed = run is not None and self._is_ours(run, public)
        if run is None or not self._resumed:
            run = SignedRun.sign(self._identity, public, time.time())
            self._memory.keep_run(run)
        self._network.start(run)
        self._update(phase="connecting", name=config.name)
        return (config, trainer, run) if self._network.found() is not None else None

    def _is_ours(self, run: SignedRun, run_file: bytes) -> bool:
        """Whether this peer created exactly this run before, and is to go on with it."""
        mine = run.creator == self._identity.peer_id and run.run_file == run_file
        return mine and not self._config.new

    def _created_before(self) -> str:
        run = self._memory.run()
        return run.run_id if run is not None and not self._config.new else ""

    def _join(self) -> tuple[RunConfig, Trainer, SignedRun] | None:
        self._network.start(self._kept)
        self._update(phase="connecting")
        run = self._network.found()
        if run is None:
            return None
        text = run.run_file.decode()
        config = self._configured(text)
        self._update(name=config.name)
        trainer = self._trainer(config, text)
        return (config, trainer, run) if trainer is not None else None

    def _configured(self, text: str, run_file: Path | None = None) -> RunConfig:
        return configured(
            text,
            run_file=run_file,
            data=self._config.data,
            device=self._config.device,
            allow_download=self._config.allow_download,
        )

    def _trainer(self, config: RunConfig, run_file: str) -> Trainer | None:
        try:
            trainer = self._crew.trainer(config.trainer, run_file, lambda: self._stopped)
            if trainer is not None:
                _check_deadline(config, trainer)
            return trainer
        except (ValueError, BoxError) as error:  # of model, data, a device that is not there
            raise ConfigError(str(error)) from error

    def _train(self, config: RunConfig, trainer: Trainer, session: SwarmSession) -> None:
        loop = LocalLoop(session, trainer, config.round, config.local)
        try:
            work = loop.begin()
            if work is not None:
                if self._finish_after is not None:  # came before there was a session to tell
                    session.finish_after(self._finish_after)
                self._output.event(
                    JoinedEvent(peer=self._identity.peer_id, run=self._status.run, round=work.round)
                )
                _Rounds(self, config, trainer, loop, work).run()
        except SessionClosed:
            pass
        except TrainingDiverged as error:
            raise SwarmError(f"{error}: a lower learning rate ([optimizer] lr) may help") from error
        except DataError as error:  # too few blocks for so many peers
            raise ConfigError(str(error)) from error
        # A run that was finished before has nothing left to do but to say so.
        if not self._stopped and (self._rounds_done or session.status().phase == "finished"):
            self._finish(trainer, session)

    # -- what the rounds tell (`_Rounds`)

    @property
    def stopped(self) -> bool:
        """Whether this peer is about to leave."""
        return self._stopped

    def update(self, **changes: object) -> None:
        """Change the status."""
        self._update(**changes)

    def tell_chosen(self, chosen: dict[str, str]) -> None:
        """Say what was left to this peer, and how it chose."""
        self._output.event(ChosenEvent(peer=self._identity.peer_id, **chosen))

    def round_done(self, turn: Turn, losses: list[float], val_loss: float | None) -> None:
        """A round of this peer's ended."""
        result = turn.result
        assert result is not None
        self._rounds_done += 1
        self._output.event(
            RoundEvent(
                peer=self._identity.peer_id,
                round=result.round,
                train_loss=sum(losses) / len(losses) if losses else None,
                val_loss=val_loss,
                members=result.members,
                digest=result.digest,
                samples=result.samples,
                bytes_sent=result.bytes_sent,
                bytes_received=result.bytes_received,
                allreduce_s=round(result.allreduce_s, 4),
                round_s=round(result.round_s, 4),
                wait_s=round(turn.wait_s, 4),
            )
        )

    def _finish(self, trainer: Trainer, session: SwarmSession) -> None:
        self._update(phase="evaluate")
        trainer.write(session.state.theta_N)
        val_loss = trainer.evaluate()  # while the network sees to those who are not done yet
        self._crew.close()
        self._update(phase="done", val_loss=val_loss)
        ended = self._wait(self._network.join, FINISH_S)
        if not ended and not self._stopped:
            logger.warning("node.finish_cut_short after_s=%g", FINISH_S)
            self._network.stop()
            ended = self._wait(self._network.join, POLITE_S)
        if not ended or self._network.failure is not None or self._stopped:
            return
        final = session.status()
        self._output.event(
            DoneEvent(
                peer=self._identity.peer_id,
                rounds=final.round,
                val_loss=val_loss,
                digest=final.digest,
            )
        )

    def _close(self) -> BoxError | None:
        """End the other processes, and the network thread, politely if it still can.

        Returns:
            That one of the processes was gone already.
        """
        self.stop()
        lost = None
        try:
            self._crew.close()
        except BoxError as error:
            lost = error
        finally:
            self._wait(self._network.join, 2 * POLITE_S)  # the watchdog comes first
            os.write(self._leash, b".")
        return lost

    # -- callbacks from the network thread

    def _on_run(self, run: SignedRun, link: Link) -> None:
        self._update(run=run.run_id)
        if self._control is not None:
            self._publish_daemon()
        if self._config.link_file is not None:
            write_link_file(self._config.link_file, link)
        self._output.event(LinkEvent(peer=self._identity.peer_id, run=run.run_id, link=str(link)))

    def _publish_daemon(self) -> None:
        assert self._control is not None
        self._home.publish(
            DaemonFile(
                pid=os.getpid(),
                port=self._control.port,
                token=self._control.token,
                run=self._status.run,
            )
        )

    def _update(self, **changes: object) -> None:
        with self._status_lock:
            self._status = dataclasses.replace(self._status, **changes)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            if self._stopped and number == signal.SIGINT:
                self.abandon(130)
            self.stop()

        before = {number: signal.signal(number, handle) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Rounds:
    """One peer's rounds, one after the other: train, hand in, go on from what the swarm decided.

    With a delay, training goes on while a round's exchange runs, so the round that is trained for
    is one ahead of the round that is waited for.
    """

    def __init__(
        self, node: Node, config: RunConfig, trainer: Trainer, loop: LocalLoop, work: Assignment
    ) -> None:
        self._node = node
        self._gradient = config.round.mode == "gradient"
        self._fragments = len(work.state.shape.bounds)
        self._trainer = trainer
        self._loop = loop
        self._work = work
        self._told = False  # what was chosen
        self._losses: dict[int, list[float]] = {}
        self._val_losses: dict[int, float] = {}

    def run(self) -> None:
        """Until there is no more work.

        Raises:
            SessionClosed: the session ended, or this peer was told to stop.
            TrainingDiverged: see `Trainer.step`.
            DataError: see `Trainer.begin_round`.
        """
        self._say_chosen(tell=False)
        self._evaluate()
        self._begin_work()
        while True:
            report = self._trainer.accumulate() if self._gradient else self._trainer.step()
            self._note(report)
            if self._node.stopped:
                return  # the farewell is on its way: nobody waits for this work
            turn = self._loop.stepped(report.samples)
            if turn is not None and not self._turn(turn):
                return
            if not self._loop.steps:
                self._begin_work()

    def _begin_work(self) -> None:
        """Deal the blocks of the round that is worked for from now on."""
        work, round_ = self._work, self._loop.round
        steps = 0 if self._gradient else self._loop.due_steps
        self._trainer.begin_round(round_, work.seat, work.seats)
        self._trainer.set_progress(self._loop.swarm_samples(), work.seats)
        self._losses[round_] = []
        self._began, self._tokens = time.monotonic(), 0
        self._node.update(phase="train", round=round_, step=0, steps=steps)

    def _note(self, report: StepReport) -> None:
        losses = self._losses[self._loop.round]
        losses.append(report.loss)
        self._tokens += report.tokens
        speed = self._tokens / (time.monotonic() - self._began)
        done = self._loop.steps + 1 >= self._loop.due_steps and not self._gradient
        self._node.update(
            # From the last step on the session knows best.
            phase="" if done else "train",
            step=len(losses),
            train_loss=report.loss,
            tokens_per_s=speed,
        )

    def _turn(self, turn: Turn) -> bool:
        """A round ended; whether there is another one."""
        before, result = self._work, turn.result
        if turn.restarted:
            if result is None:
                logger.warning(
                    "node.round_void round=%d: the swarm went on elsewhere", before.round
                )
            self._trainer.reset()
        if result is not None:
            self._node.update(digest=result.digest)
            if result.round == before.round:
                losses = self._losses.pop(result.round, [])
                self._node.round_done(turn, losses, self._val_losses.pop(result.round, None))
            else:
                # The swarm went on while this peer was away; nothing to say about those rounds.
                logger.warning("node.rounds_missed from=%d to=%d", before.round, result.round)
            self._losses = {r: each for r, each in self._losses.items() if r > result.round}
        if turn.work is None:
            return False
        self._work = turn.work
        measured = self._gradient or self._loop.paced
        self._say_chosen(tell=not self._told and result is not None and measured)
        self._evaluate()
        return True

    def _say_chosen(self, *, tell: bool) -> None:
        """What this peer chose by itself, and why: always in the status, once in the output."""
        chosen = dict(self._trainer.chosen)
        if not self._gradient:
            chosen["local_steps"] = self._loop.pace
        self._node.update(chosen="; ".join(f"{name} {why}" for name, why in chosen.items()))
        if tell:
            self._told = True
            self._node.tell_chosen(chosen)

    def _evaluate(self) -> None:
        """Once for every averaging of the whole model: what the swarm has, not what is trained."""
        if self._work.round % self._fragments == 0:
            self._node.update(phase="evaluate")
            val_loss = self._trainer.evaluate(self._work.theta_N)
            self._val_losses = {self._work.round: val_loss}
            self._node.update(phase="train", val_loss=val_loss)


def _session(config: SessionConfig, identity: Identity, directory: object) -> SwarmSession:
    return Session(config, identity=identity, directory=directory)  # type: ignore[arg-type]


def _workers(device: torch.device, threads: int) -> int:
    """Threads for the network: the cores that training leaves, and one where it takes them all."""
    cores = os.cpu_count() or 1
    training = threads or cores if device.type == "cpu" else 1
    return max(1, min(MAX_WORKERS, cores - training * processes()))


def _check_deadline(config: RunConfig, trainer: Trainer) -> None:
    """Refuse a run whose rounds end before this machine has taken a step.

    Raises:
        ConfigError: it is too slow for the run, or the run too hasty.
    """
    work_s = config.local.work_s
    if not work_s or config.round.mode == "gradient":
        return
    trainer.begin_round(0, 0, 1)
    step_s = math.inf
    for _ in range(2):  # the first one pays for what is made only once
        began, samples = time.monotonic(), 0
        while samples < config.trainer.batch_size:
            samples += trainer.accumulate().samples
        step_s = min(step_s, time.monotonic() - began)
    if step_s > work_s:
        raise ConfigError(
            f"[round] work_s = {work_s:g} is shorter than one step, which takes {step_s:.2g} s on "
            "this machine: a run for it needs a longer work_s or a smaller batch_size"
        )
