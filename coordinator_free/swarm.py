"""Shoal as a library: a plain torch loop that trains together with others.

    with SwarmOptimizer(model, optimizer, batch_size=8) as swarm:  # or link="shoal://..."
        print(swarm.link)
        for inputs, targets in batches:
            loss_of(model, inputs, targets).backward()
            if swarm.step().over:
                break

`step` takes the local optimizer's step, or in gradient mode counts the gradients that `backward`
left; now and then it hands work in and takes up what the swarm decided. What the daemon does, this
does by the same `Session` and `LocalLoop`, in the same way; only model, data and loop are the
caller's. The network runs in a thread of its own.

Guarantees: `state` is bit-identical in all peers that finished the same round; every peer of a run
has the settings its creator chose, and names and shapes of the parameters that it has. What is not
checked is that the others train on what they should: see docs/threat_model.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import tempfile
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coordinator_free.bounds import shown
from coordinator_free.config import RoundConfig
from coordinator_free.gradient import GradientConfig, GradientOptimizer, schedule
from coordinator_free.handoff import RoundResult, SessionClosed
from coordinator_free.local import LocalLoop, Turn
from coordinator_free.memory import empty_vector
from coordinator_free.network import Network, NetworkConfig
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.pace import LocalConfig
from coordinator_free.recipe import LOCAL, ROUND, check, feeds_back
from coordinator_free.session import Session, SessionConfig
from coordinator_free.state import State
from coordinator_free.tensors import FlatTensors
from dht.addresses import announced_hosts
from dht.errors import ConfigError, RecordError
from dht.identity import Identity
from dht.link import Link
from dht.records import SignedRun

if TYPE_CHECKING:
    from coordinator_free.optimizer import StateOptimizer
    from dht.directory import Directory

_MARK = "shoal library run"
_CLOSE_S = 20.0  # for a polite leave
REJOIN_S = 10.0  # how long a restarted creator looks for those who went on without it
MOST_SAMPLES = 2**20  # of one step
MOST_WORKERS = 256
JOINER_STEPS = 10  # of a joiner's rising learning rate: its optimizer has seen a few batches only


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What all peers of a library run agree on; its creator chooses, joiners get it.

    Attributes:
        name: shown to people, at most 64 characters.
        round: how rounds are run.
        local: what a peer does between two averagings.
        outer: applies averages of parameter changes ("diloco").
        gradient: applies averages of gradients ("gradient"), in place of a local optimizer.
    """

    name: str = "library run"
    round: RoundConfig = ROUND
    local: LocalConfig = LOCAL
    outer: OuterConfig = field(default_factory=OuterConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if type(value) is not kind:
                raise ConfigError(f"{name} = {shown(value)}: give a {kind.__name__}")
            if dataclasses.is_dataclass(kind):
                for key, wanted in typing.get_type_hints(kind).items():
                    _check_type(f"{name}.{key}", wanted, getattr(value, key))
        if not 1 <= len(self.name) <= 64 or not self.name.isprintable():
            raise ConfigError(f"name = {shown(self.name)}: use 1 to 64 printable characters")
        check(self.round, self.local)
        other, kind = (
            ("outer", OuterConfig)
            if self.round.mode == "gradient"
            else ("gradient", GradientConfig)
        )
        if getattr(self, other) != kind():
            raise ConfigError(
                f'{other} means nothing with round.mode = "{self.round.mode}": leave it out'
            )

    def dump(self, layout: str) -> bytes:
        """As it is signed and published, for a model of this layout."""
        return json.dumps({_MARK: 1, "layout": layout, **dataclasses.asdict(self)}).encode()

    @classmethod
    def load(cls, raw: bytes) -> tuple[Recipe, str]:
        """What a creator published, checked, and the layout of its model.

        Raises:
            ConfigError: it is no library run, or has settings that are unknown or impossible.
        """
        try:
            tables = json.loads(raw)
        except (ValueError, RecursionError):
            tables = None
        if not isinstance(tables, dict) or tables.pop(_MARK, None) != 1:
            raise ConfigError(
                "this run was made by 'shoal create', for the daemon: join it with 'shoal join'"
            )
        layout = tables.pop("layout", "")
        kinds = typing.get_type_hints(cls)
        unknown = tables.keys() - kinds.keys()
        if unknown or not isinstance(layout, str):
            raise ConfigError(
                f"this run has settings that are unknown here: {shown(sorted(unknown))}"
            )
        values = {name: _read(kinds[name], name, value) for name, value in tables.items()}
        return cls(**values), layout


def _read(kind: type[Any], name: str, value: object) -> Any:
    if kind is str:
        if type(value) is not kind:
            raise ConfigError(f"this run's {name} = {shown(value)} is no {kind.__name__}")
        return value
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() - hints.keys():
        raise ConfigError(f"this run's settings of {name} are unknown here: install the same shoal")
    values = {}
    for key, item in value.items():
        values[key] = tuple(item) if isinstance(item, list) else item
        _check_type(f"this run's {name}.{key}", hints[key], values[key])
    try:
        return kind(**values)
    except (ValueError, ArithmeticError) as error:  # the latter of numbers beyond all floats
        raise ConfigError(f"this run's settings of {name}: {error}") from error


def _check_type(name: str, wanted: Any, value: object) -> None:
    """Whether a setting is of its type: what only its creator can read is a run that nobody joins.

    Raises:
        ConfigError: one line, what would be right.
    """
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is typing.Literal:
        fits, right = value in parts, " or ".join(map(repr, parts))
    elif origin is tuple:
        each = value if isinstance(value, tuple) else ()
        fits = [type(part) for part in each] == list(parts)
        right = f"({', '.join(part.__name__ for part in parts)})"
    else:
        fits = type(value) is wanted or (wanted is float and type(value) is int)
        right = f"of type {wanted.__name__}"
    if not fits:
        raise ConfigError(f"{name} = {shown(value)}: it has to be {right}")


def cosine(*, warmup_samples: int, total_samples: int) -> Callable[[int], float]:
    """A linear rise to 1, then half a cosine down to a tenth, by the samples of all peers.

    Args:
        warmup_samples: where the rise ends.
        total_samples: where the cosine ends; 0: it stays at 1.

    Raises:
        ConfigError: a negative number, or an end before the warm-up's.
    """
    if min(warmup_samples, total_samples) < 0:
        raise ConfigError(
            f"warmup_samples = {warmup_samples}, total_samples = {total_samples}: use at least 0"
        )
    if 0 < total_samples <= warmup_samples:
        raise ConfigError(
            f"total_samples = {total_samples} has to be more than warmup_samples = {warmup_samples}"
        )
    return functools.partial(schedule, warmup_samples=warmup_samples, total_samples=total_samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one `SwarmOptimizer.step` did.

    Attributes:
        round: of the swarm, that is worked for now.
        ended: the round that ended with this step, if one did.
        wait_s: how long this step stood still for the swarm.
        restarted: the parameters were overwritten by the swarm's, as this peer had fallen behind.
        over: the run is finished, or this peer was stopped: no further step counts.
    """

    round: int
    ended: RoundResult | None = None
    wait_s: float = 0.0
    restarted: bool = False
    over: bool = False


class SwarmOptimizer:
    """A local optimizer whose steps are averaged with those of others.

    Args:
        parameters: a module, or (name, parameter) pairs; float32, each once. Those that need no
            gradient are shared all the same, so that all peers start equal; buffers, such as
            BatchNorm's, are not.
        optimizer: takes the local steps; None in gradient mode, where all peers take the same one.
            A joiner's begins anew: what it has of steps before belongs to other parameters.
        batch_size: samples of one `step`, this peer's weight in the average.
        schedule: what the optimizer's learning rates are multiplied by in a step after which the
            swarm is trained on so many samples, as `cosine` gives it: so a peer that joins late is
            where the others are. None leaves them to you. The first steps of a joiner, and of who
            had fallen behind, rise to it.
        hidden_matrices: in gradient mode, what Muon takes; None: all matrices, but a module's
            embeddings and what it calls its output embeddings.
        recipe: of a run that is created; a joiner gets that of the run.
        link: the run to join; None creates one.
        home: folder for this peer's key and checkpoints, with which it comes back as the same peer;
            None for none. After all have stopped, the run's creator can go on with it; its link
            stays the same where `port` is given.
        host: IP address to listen on.
        port: of libp2p; 0: a free one.
        announce_hosts: what others dial instead of the own addresses; needs `port`.
        upload_bps: most bytes per second sent in all; 0: no limit.
        download_bps: the same, received.
        workers: threads that encode, add up and hash.

    Raises:
        ConfigError: one line: something given here cannot be.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, Tensor]],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        batch_size: int,
        schedule: Callable[[int], float] | None = None,
        hidden_matrices: Iterable[Tensor] | None = None,
        recipe: Recipe | None = None,
        link: str | None = None,
        home: str | os.PathLike[str] | None = None,
        host: str = "0.0.0.0",
        port: int = 0,
        announce_hosts: tuple[str, ...] = (),
        upload_bps: float = 0.0,
        download_bps: float = 0.0,
        workers: int = 2,
    ) -> None:
        _check_numbers(batch_size, workers, upload_bps, download_bps)
        for name, value, kind in (("link", link, str), ("recipe", recipe, Recipe)):
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} = {shown(value)}: give a {kind.__name__}, or None")
        if schedule is not None and not callable(schedule):
            raise ConfigError("schedule: give a function of the swarm's samples, such as cosine()")
        if announce_hosts and not port:
            raise ConfigError("announce_hosts needs a port: the one at which others reach you")
        if link is not None and recipe is not None:
            raise ConfigError("a joiner gets the recipe of its run: leave recipe or link out")
        self._flat = FlatTensors(parameters, hidden_matrices)
        if optimizer is not None and not any(
            self._flat.has(p) for group in optimizer.param_groups for p in group["params"]
        ):
            raise ConfigError("optimizer: it has none of these parameters, but those of others")
        self._optimizer = optimizer
        self._batch_size = batch_size
        self._schedule = schedule
        self._recipe = recipe or Recipe()
        self._joins = Link.parse(link) if link is not None else None
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-") if home is None else None
        self._home = Path(self._folder.name if self._folder is not None else home or "")
        self._keeps = home is not None
        self._network_config = NetworkConfig(
            identity_path=self._home / "identity.key",
            host=host,
            port=port,
            announce_hosts=announce_hosts,
            link=self._joins,
            relay=not (upload_bps or download_bps),
        )
        self._upload_bps, self._download_bps = upload_bps, download_bps
        self._workers = workers
        self._network: Network[Session] | None = None
        self._session: Session | None = None
        self._loop: LocalLoop | None = None
        self._entered = self._begun = self._over = False
        self._risen = JOINER_STEPS  # steps that were taken, where they have to be smaller at first

    # -- its life -----------------------------------------------------------------------------

    def enter(self) -> None:
        """Create the run or join it; a joiner's parameters become those of the swarm.

        A creator is in at once; if its run waits for more peers (`start_peers`), so does its first
        step.

        Raises:
            ConfigError: one line: the link leads nowhere, or the run is another model's.
            SwarmError: the run's state cannot be had.
        """
        if self._entered:
            raise ConfigError("a SwarmOptimizer is entered once: make a new one")
        self._entered = True
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SwarmOptimizer:
        self.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        box = torch.distributed
        if box.is_available() and box.is_initialized() and box.get_world_size() > 1:
            raise ConfigError(
                f"{box.get_world_size()} processes of torch.distributed cannot be one peer here:"
                " train in one process, or let 'torchrun' start 'shoal join'"
            )
        identity = Identity.load_or_create(self._network_config.identity_path)
        network = self._network = Network(
            self._network_config, identity, make_session=_make_session
        )
        run, resumed = None, False
        if self._joins is None:
            self._check_optimizer()
            run, resumed = self._own_run(identity)
        network.start(run)
        found = network.found()
        assert found is not None  # only `close` stops it
        if self._joins is not None:
            self._recipe, layout = Recipe.load(found.run_file)
            self._check_optimizer()
            if layout != self._layout:
                raise ConfigError(
                    "this model is not the run's: names or shapes of the parameters differ"
                )
        recipe = self._recipe
        initial_N = (
            None
            if self._joins is not None
            else self._flat.read(empty_vector(self._flat.numel), start=0, stop=self._flat.numel)
        )
        checkpoints = self._home / "checkpoints" / found.run_id if self._keeps else None
        self._session = network.begin(
            SessionConfig(
                run_id=found.run_id,
                creator=found.creator,
                layout=self._layout,
                numel=self._flat.numel,
                round=recipe.round,
                optimizer=self._state_optimizer(),
                feedback=feeds_back(recipe.local, recipe.round.codec),
                host=self._network_config.host,
                announce_hosts=announced_hosts(
                    self._network_config.host, self._network_config.announce_hosts, network.maddrs
                ),
                checkpoints=checkpoints,
                upload_bps=self._upload_bps,
                download_bps=self._download_bps,
                workers=self._workers,
            ),
            initial_N,
            REJOIN_S if resumed else 0.0,
        )
        assert self._session is not None
        self._loop = LocalLoop(self._session, self._flat, recipe.round, recipe.local)
        # Who founds the run anew has its parameters already, and may wait for others at its first
        # step: they need the link before that.
        if self._joins is not None or resumed:
            self._begin_anew()
            self._begin()

    def _own_run(self, identity: Identity) -> tuple[SignedRun, bool]:
        """The run to publish, and whether it is one that this peer created before."""
        raw = self._recipe.dump(self._layout)
        kept = self._home / "run"
        with contextlib.suppress(OSError, RecordError):
            run = SignedRun.from_bytes(kept.read_bytes())
            if (run.creator, run.run_file) == (identity.peer_id, raw):
                return run, True
        run = SignedRun.sign(identity, raw, time.time())
        if self._keeps:
            try:
                kept.write_bytes(run.to_bytes())
            except OSError as error:
                raise ConfigError(f"cannot write {kept}: {error.strerror}") from error
        return run, False

    def _begin(self) -> None:
        """Wait for the swarm's parameters and the first round."""
        assert self._loop is not None
        assert self._network is not None
        self._begun = True
        if self._loop.begin() is None:
            self._end()

    def _end(self) -> None:
        """There is no more work: either the run is over, or something went wrong."""
        self._over = True
        network = self._network
        if network is not None:
            network.join(_CLOSE_S)  # what went wrong is known then
            if network.failure is not None:
                raise network.failure
            with contextlib.suppress(SessionClosed):  # stopped before there was a state
                self.adopt()

    def _begin_anew(self) -> None:
        """The parameters are not those that the optimizer has known."""
        self._risen = 0
        if self._optimizer is not None:
            self._optimizer.state = defaultdict(dict)

    def close(self) -> None:
        """Leave the swarm politely; the parameters stay as they are."""
        self._over = True
        network, self._network = self._network, None
        if network is not None:
            network.stop()
            network.join(_CLOSE_S)
        if self._folder is not None:
            self._folder.cleanup()

    # -- training -----------------------------------------------------------------------------

    def step(self) -> Step:
        """After `backward`: take a step, clear the gradients, and do what is due with the swarm.

        Raises:
            ConfigError: the swarm was not entered.
            SwarmError: the swarm cannot be reached any more, or what it has is not to be trusted.
        """
        self._begin_late()
        if not self._over:
            if self._recipe.round.mode == "gradient":
                self._flat.accumulate(self._batch_size)
            else:
                assert self._optimizer is not None
                with self.scheduled():
                    self._optimizer.step()
                self._optimizer.zero_grad()
        return self._stepped()

    def stepped(self) -> Step:
        """The same where somebody else has taken the local step already.

        With a `torch.amp.GradScaler`:

            with swarm.scheduled():
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step = swarm.stepped()

        Raises:
            ConfigError: the swarm was not entered, or is in gradient mode, which has no such step.
            SwarmError: as with `step`.
        """
        if self._recipe.round.mode == "gradient":
            raise ConfigError('in mode "gradient" nobody takes a step of their own: use step()')
        return self._stepped()

    def _stepped(self) -> Step:
        self._begin_late()
        if self._loop is None or self._over:
            return Step(round=0, over=True)
        try:
            turn = self._loop.stepped(self._batch_size)
        except SessionClosed:
            self._end()
            return Step(round=0, over=True)
        return self._took(turn) if turn is not None else Step(round=self._loop.round)

    @contextlib.contextmanager
    def scheduled(self) -> Iterator[None]:
        """For who takes the local step: within, the learning rates are those of this step."""
        self._begin_late()
        factor = self._factor()
        self._risen = min(self._risen + 1, JOINER_STEPS)
        groups = self._optimizer.param_groups if self._optimizer is not None else []
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _factor(self) -> float:
        factor = 1.0
        if self._schedule is not None and self._loop is not None and not self._over:
            samples = self._loop.swarm_samples(self._batch_size)
            factor = self._schedule(samples)
            if not (math.isfinite(factor) and factor >= 0):
                raise ConfigError(
                    f"schedule({samples}) = {factor}: it has to be a number of at least 0"
                )
        if self._risen >= JOINER_STEPS:
            return factor
        return min(factor, (self._risen + 1) / JOINER_STEPS)

    def _begin_late(self) -> None:
        if not self._entered:
            raise ConfigError("the swarm was not entered: write 'with swarm:' around the loop")
        if self._loop is not None and not self._over and not self._begun:
            self._begin()

    def _took(self, turn: Turn) -> Step:
        assert self._loop is not None
        self._over = turn.work is None
        if turn.restarted:
            self._begin_anew()
        if self._over and self._session is not None:
            self.adopt()
        return Step(
            round=turn.result.round if self._over and turn.result else self._loop.round,
            ended=turn.result,
            wait_s=turn.wait_s,
            restarted=turn.restarted,
            over=self._over,
        )

    def adopt(self) -> None:
        """Overwrite the parameters with what all peers share, as of the last round that ended here.

        For the end: what this peer has trained since then is lost to it. Where the run itself ends,
        `step` has done it.

        Raises:
            SessionClosed: this peer never had a state.
        """
        state = self.state
        self._flat.write(state.theta_N, start=0, stop=state.shape.numel)

    # -- what can be seen ---------------------------------------------------------------------

    @property
    def pace(self) -> str:
        """How many steps of this peer are between two averagings, and why: one line."""
        return self._loop.pace if self._loop is not None else ""

    @property
    def link(self) -> str:
        """By which others join."""
        link = self._network.link if self._network is not None else None
        return str(link) if link is not None else ""

    @property
    def recipe(self) -> Recipe:
        """What the run's peers agree on; of a joiner, once it has entered."""
        return self._recipe

    @property
    def state(self) -> State:
        """What all peers share, as of the last round that ended here.

        Raises:
            SessionClosed: this peer never had one.
        """
        if self._session is None:
            raise SessionClosed("the swarm was not entered")
        return self._session.state

    # -- inside -------------------------------------------------------------------------------

    @property
    def _layout(self) -> str:
        return self._flat.layout(in_step=self._recipe.round.mode == "gradient")

    def _check_optimizer(self) -> None:
        gradient = self._recipe.round.mode == "gradient"
        if gradient and self._optimizer is not None:
            raise ConfigError(
                'in mode "gradient" all peers take the same step, which recipe.gradient says: give '
                "optimizer=None, in a loop of your own"
            )
        if gradient and self._schedule is not None:
            raise ConfigError(
                'in mode "gradient" all have one schedule: leave yours out, and set warmup_samples '
                "and total_samples in recipe.gradient"
            )
        if not gradient and self._optimizer is None:
            raise ConfigError("this run averages parameters: give the optimizer of the local steps")

    def _state_optimizer(self) -> StateOptimizer:
        if self._recipe.round.mode == "gradient":
            step_samples = self._recipe.round.target_batch
            config = dataclasses.replace(self._recipe.gradient, step_samples=step_samples)
            return GradientOptimizer(config, self._flat.specs(), threads=self._workers)
        return OuterOptimizer(self._recipe.outer)


def _check_numbers(batch_size: int, workers: int, upload_bps: float, download_bps: float) -> None:
    for name, number, most in (
        ("batch_size", batch_size, MOST_SAMPLES),
        ("workers", workers, MOST_WORKERS),
    ):
        if type(number) is not int or not 1 <= number <= most:
            raise ConfigError(f"{name} = {shown(number)}: use a whole number from 1 to {most}")
    for name, rate in (("upload_bps", upload_bps), ("download_bps", download_bps)):
        if type(rate) not in (int, float) or not 0 <= rate < math.inf:
            raise ConfigError(f"{name} = {shown(rate)}: use bytes per second, or 0 for no limit")


def _make_session(config: SessionConfig, identity: Identity, directory: Directory) -> Session:
    return Session(config, identity=identity, directory=directory)
