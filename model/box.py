"""Several processes, one peer: what `torchrun` starts on a machine with several GPUs.

    torchrun --nproc-per-node 4 --no-python shoal join 'shoal://...'

Rank 0 speaks for the box. To the swarm its `Box` is a `Trainer` like any other; the other ranks do
what it announces, until it closes. Each of them holds the whole model and its optimizer. A batch is
dealt out among the ranks and their gradients are summed, so the box takes the steps that one device
would take on the whole batch.

What is to be trained only rank 0 can find out. It leaves the run file in the launcher's store,
where the others wait for it (`Crew`, `follow`), or an empty one, with which they go home.

Announcements are four integers each, over gloo even between GPUs: when a process dies, its sockets
close at once, while NCCL would wait. Nothing is pickled.

Guaranteed: equal steps to those of one process but for the order of sums; a rank that fails is a
`BoxError` in rank 0; the others end within seconds when rank 0 dies and within `PATIENCE_S` when it
hangs between two commands (until `EXCHANGE_S` inside one). Not guaranteed: to go on with one rank
less, or safety against the other ranks, or others who reach the launcher's ports: torch.distributed
trusts its network, so between machines that has to be a private one.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from model.processes import processes
from model.trainer import StepReport, Trainer, TrainerConfig, TrainingDiverged

# Rank 0 may have nothing to say for hours, while it waits for other peers. It says so.
BEAT_S = 5.0
PATIENCE_S = 60.0

# The slowest rank may be so late in a sum: it may be cutting down its micro-batch.
EXCHANGE_S = 600.0

# Rank 0 looks for its run, for minutes perhaps, before the others hear of it. They come within
# seconds, or minutes where many processes load their libraries from one slow disk.
RUN_S = 1800.0
MUSTER_S = 300.0
_CLOSE_S = 5.0  # to reach a launcher that may be gone itself
_LOOK_S = 0.1

# What is in the store: how many have come, besides rank 0, and what they are to train.
_HERE = "here"
_RUN_FILE = "run_file"

# Also the limit of a run file in the swarm.
_MAX_RUN_FILE = 32 * 1024

# Gradients are summed in pieces of 64 MiB: large enough for the links, small beside the model.
_PIECE = 2**24


class BoxError(RuntimeError):
    """A process of this box is gone, and with it the box."""


class _Do(enum.IntEnum):
    NOTHING = 0
    STOP = 1
    WRITE = 2
    RESET = 3
    SET_PROGRESS = 4
    BEGIN_ROUND = 5
    STEP = 6
    ACCUMULATE = 7
    GRADIENT = 8
    EVALUATE = 9


@dataclass(frozen=True, slots=True)
class _Links:
    """This process's connections to the others of the box."""

    rank: int
    ranks: int
    commands: dist.ProcessGroup
    sums: dist.ProcessGroup

    def announce(self, do: _Do, a: int = 0, b: int = 0, c: int = 0) -> None:
        """Rank 0: say what comes next."""
        self.share(torch.tensor([do, a, b, c], dtype=torch.int64))

    def hear(self) -> tuple[_Do, int, int, int]:
        """The others: wait for it."""
        command = torch.zeros(4, dtype=torch.int64)
        self.share(command)
        do, a, b, c = command.tolist()
        return _Do(do), a, b, c

    def share(self, vector: Tensor) -> None:
        """Overwrite it, on the CPU, by rank 0's."""
        with _gone():
            for piece in torch.split(vector, _PIECE):
                dist.broadcast(piece, 0, group=self.commands)

    def sum(self, tensor: Tensor) -> None:
        """Add up all ranks' tensors, in place."""
        with _gone():
            dist.all_reduce(tensor, group=self.sums)


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed raises when a connection ends
        line = next(iter(str(error).splitlines()), type(error).__name__)
        # Without the place in gloo's source before it, and the advice after it.
        reason = re.sub(r"^\[[^]]*\] *", "", line).split(". ")[0]
        raise BoxError(f"a process of this box is gone: {reason}") from error


class Crew:
    """The processes of this peer as rank 0, or one that is alone, begins and ends with them."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._called = False
        self._trainer: Trainer | None = None

    def trainer(
        self, config: TrainerConfig, run_file: str, should_stop: Callable[[], bool]
    ) -> Trainer | None:
        """The trainer of this peer, in however many processes.

        Args:
            config: what to train; `device` "auto", "cpu" or "cuda" unless this process is alone.
            run_file: what the others are to make the same of; at most 32 KiB.
            should_stop: asked while the others are awaited.

        Returns:
            A plain `Trainer` in a process that is alone, else a `Box`; None when told to stop.

        Raises:
            BoxError: the others do not come.
            ModelError, DataError, ValueError: as `Trainer` does.
        """
        if processes() == 1:
            self._trainer = Trainer(config)
            return self._trainer
        config = _own(config)
        self._store = _meet(MUSTER_S)
        if not self._mustered(self._store, should_stop):
            return None
        self._call(run_file)
        self._trainer = Box(config, _connect(self._store, torch.device(config.device)))
        return self._trainer

    def close(self) -> None:
        """Send the others home, wherever they wait.

        Raises:
            BoxError: one of them was gone before.
        """
        if self._trainer is not None:
            self._trainer.close()
        elif processes() > 1 and not self._called:
            with contextlib.suppress(BoxError):  # then they have gone already, with the launcher
                self._store = self._store or _meet(_CLOSE_S)
                self._call("")

    def _mustered(self, store: Store, should_stop: Callable[[], bool]) -> bool:
        """Wait until all are here, with open ears: a connection in the making hears no signal."""
        deadline = time.monotonic() + MUSTER_S
        while not should_stop():
            with _gone():
                missing = processes() - 1 - store.add(_HERE, 0)
            if not missing:
                return True
            if time.monotonic() > deadline:
                raise BoxError(f"{missing} processes of this box have not come in {MUSTER_S:.0f} s")
            time.sleep(_LOOK_S)
        return False

    def _call(self, run_file: str) -> None:
        assert self._store is not None
        self._called = True
        with _gone():
            self._store.set(_RUN_FILE, run_file)


def follow(configured: Callable[[str], TrainerConfig]) -> None:
    """Be one of the other processes: do as rank 0 says until it closes the box.

    Args:
        configured: makes of the run file what rank 0 makes of it.

    Raises:
        BoxError: rank 0 is gone, or has not found its run for too long.
        ModelError, DataError, ValueError: as `Trainer` does.
    """
    store = _meet(RUN_S)
    with _gone():
        store.add(_HERE, 1)
        store.wait([_RUN_FILE])
        run_file = store.get(_RUN_FILE)
    if len(run_file) > _MAX_RUN_FILE:
        raise BoxError(f"a run file of {len(run_file)} bytes came instead of rank 0's")
    if run_file:
        config = _own(configured(run_file.decode()))
        links = _connect(store, torch.device(config.device))
        _follow(_Member(config, links), links)


def _meet(limit_s: float) -> Store:
    with _gone():
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=limit_s)))
    return PrefixStore("shoal", store)


def _own(config: TrainerConfig) -> TrainerConfig:
    """The configuration with this process's own device."""
    return replace(config, device=_device(config.device, int(os.environ["LOCAL_RANK"])))


def _device(name: str, local_rank: int) -> str:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is for one process: use auto, cpu or cuda with torchrun")
    if name == "cpu":
        return name
    # Rank 0 refuses for all who share its machine.
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if wanted > torch.cuda.device_count():
        raise ValueError(
            f"{wanted} processes need as many GPUs, and this machine has"
            f" {torch.cuda.device_count()}: use a smaller --nproc-per-node or --device cpu"
        )
    return f"cuda:{local_rank}"


def _connect(store: Store, device: torch.device) -> _Links:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with _gone():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(seconds=EXCHANGE_S),
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=processes(),
            device_id=device if cuda else None,
        )
        commands = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_S))
    sums = dist.group.WORLD
    assert sums is not None
    return _Links(dist.get_rank(), dist.get_world_size(), commands, sums)


class _Member(Trainer):
    """One process's part of the work; all of them call the same methods in the same order."""

    def __init__(self, config: TrainerConfig, links: _Links) -> None:
        self._rank, self._ranks = links.rank, links.ranks
        self._links = links
        super().__init__(config)

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        self._links.sum(total)
        return total.item()

    def _sum_gradients(self) -> None:
        # A parameter that no rank has a gradient for must stay without one, which is not zero: no
        # weight decay. One that only some have (no block was left for a rank) is zero elsewhere.
        used = torch.tensor([float(p.grad is not None) for p in self._trained], device=self.device)
        self._links.sum(used)
        piece: list[nn.Parameter] = []
        for p, count in zip(self._trained, used.tolist(), strict=True):
            if not count:
                continue
            piece.append(p)
            if sum(q.numel() for q in piece) >= _PIECE:
                self._sum_piece(piece)
                piece = []
        if piece:
            self._sum_piece(piece)

    @torch.no_grad()
    def _sum_piece(self, parameters: list[nn.Parameter]) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self._links.sum(flat)
        parts = torch.split(flat, [p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view(p.shape)

    def hand_over_gradients(self) -> None:
        """Give what was accumulated to rank 0, which keeps the sum."""
        self._sum_gradients()
        self._optimizer.zero_grad()


class Box(_Member):
    """Rank 0: a `Trainer` in several processes. `close` it at the end.

    Args:
        config: `device` is this rank's own.
        links: to the other ranks.
    """

    def __init__(self, config: TrainerConfig, links: _Links) -> None:
        super().__init__(config, links)
        self._closed = threading.Event()
        # One announcement at a time, with all that belongs to it: the heart beats in a thread.
        self._turn = threading.Lock()
        self._heart = threading.Thread(target=self._beat, name="box-heart", daemon=True)
        self._heart.start()
        self.write(self.read())  # the ranks have built equal models; this makes sure

    @property
    def chosen(self) -> dict[str, str]:
        """What "auto" has become and why, one line each."""
        return {**super().chosen, "processes": f"{self._ranks}: started by torchrun"}

    def describe(self) -> str:
        """One line: model, parameters, device, processes, tokens."""
        return f"{super().describe()}, in {self._ranks} processes"

    def write(self, theta_S: Tensor, *, start: int = 0, stop: int | None = None) -> None:
        """As `Trainer.write`, in all ranks."""
        super().write(theta_S, start=start, stop=stop)  # raises before the others hear of it
        with self._command(_Do.WRITE, start, start + theta_S.numel()):
            self._links.share(theta_S.contiguous())

    def reset(self) -> None:
        """As `Trainer.reset`, in all ranks."""
        with self._command(_Do.RESET):
            super().reset()

    def set_progress(self, samples: int, peers: int = 1) -> None:
        """As `Trainer.set_progress`; all ranks are one peer."""
        with self._command(_Do.SET_PROGRESS, samples, peers):
            super().set_progress(samples, peers)

    def begin_round(self, round: int, seat: int, seats: int) -> None:
        """As `Trainer.begin_round`; all ranks sit on one seat."""
        super().begin_round(round, seat, seats)  # raises before the others hear of it
        with self._command(_Do.BEGIN_ROUND, round, seat, seats):
            pass

    def step(self) -> StepReport:
        """As `Trainer.step`; each rank has its share of the batch."""
        with self._command(_Do.STEP):
            return super().step()

    def accumulate(self) -> StepReport:
        """As `Trainer.accumulate`; a micro-batch in each rank."""
        size = self._micro * self._ranks
        with self._command(_Do.ACCUMULATE, size):
            return self._accumulate(size)

    def gradient(self, out: Tensor | None = None) -> Tensor:
        """As `Trainer.gradient`, over the samples of all ranks."""
        with self._command(_Do.GRADIENT):
            return super().gradient(out)

    def evaluate(self, theta_N: Tensor | None = None) -> float:
        """As `Trainer.evaluate`; each rank has its share of the blocks."""
        if theta_N is None:
            with self._command(_Do.EVALUATE):
                return super().evaluate()
        held_N = self.read()
        self.write(theta_N)
        try:
            return self.evaluate()
        finally:
            self.write(held_N)

    def close(self) -> None:
        """Send the other ranks home; nothing can be asked of the box afterwards.

        Raises:
            BoxError: one of them was gone before.
        """
        if self._closed.is_set():
            return
        try:
            with self._command(_Do.STOP):
                self._closed.set()
        finally:
            self._closed.set()
            self._heart.join()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _command(self, do: _Do, a: int = 0, b: int = 0, c: int = 0) -> Iterator[None]:
        with self._turn:
            if self._closed.is_set():
                raise BoxError("this box is closed")
            self._links.announce(do, a, b, c)
            yield

    def _beat(self) -> None:
        # Who is gone shows in the next real command, which has somebody to tell.
        with contextlib.suppress(BoxError):
            while not self._closed.wait(BEAT_S):
                with self._command(_Do.NOTHING):
                    pass


def _follow(member: _Member, links: _Links) -> None:
    """Do what rank 0 announces until it says stop.

    Raises:
        BoxError: it says nothing any more.
    """
    while True:
        do, a, b, c = links.hear()
        if do is _Do.STOP:
            dist.destroy_process_group()
            return
        _obey(member, links, do, a, b, c)


def _obey(member: _Member, links: _Links, do: _Do, a: int, b: int, c: int) -> None:
    # Rank 0 has the same error, at the same place, and decides what becomes of it.
    with contextlib.suppress(TrainingDiverged):
        match do:
            case _Do.WRITE:
                theta_S = torch.empty(b - a)
                links.share(theta_S)
                member.write(theta_S, start=a, stop=b)
            case _Do.RESET:
                member.reset()
            case _Do.SET_PROGRESS:
                member.set_progress(a, b)
            case _Do.BEGIN_ROUND:
                member.begin_round(a, b, c)
            case _Do.STEP:
                member.step()
            case _Do.ACCUMULATE:
                member._accumulate(a)
            case _Do.GRADIENT:
                member.hand_over_gradients()
            case _Do.EVALUATE:
                member.evaluate()
