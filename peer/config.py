"""A run's whole configuration, checked.

Each part is a dataclass that lives beside what it configures; this module composes them and turns a
run file into them. Guarantees: a `RunConfig` that `load` returns has only known fields, each of the
right type and inside its bounds; whatever is wrong becomes one `ConfigError` line with file, field,
value and remedy. It does not look at data or weights: whether they exist shows when they are
opened.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from coordinator_free.codecs import codec
from coordinator_free.config import RoundConfig
from coordinator_free.gradient import GradientConfig, GradientOptimizer, TensorSpec
from coordinator_free.optimizer import StateOptimizer
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.pace import LocalConfig
from coordinator_free.recipe import BOUNDS, LOCAL, ROUND, check
from dht.errors import ConfigError
from model.builders import MOST_LAYERS, ModelConfig
from model.data import DataConfig
from model.optimizers import OptimizerConfig
from model.trainer import Trainer, TrainerConfig
from peer import runfile

# Set elsewhere than in the run file: by [model], [data], [optimizer], the top level and --device.
_NOT_IN_TRAINING = frozenset({"model", "data", "optimizer", "seed", "device"})

_TABLES = ("model", "data", "optimizer", "training", "round", "outer")
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
_REMEDIES = {
    bool: "write true or false, without quotes",
    int: "write a whole number, without quotes",
    float: "write a number, without quotes",
    str: "write it in quotes",
}
_T = TypeVar("_T")

# What the numbers must keep to, where their owners have no bounds of their own.
_BOUNDS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "model.layers": (1, MOST_LAYERS),
    "model.width": (1, 2**20),
    "model.heads": (1, 2**16),
    "model.context": (1, 2**24),
    "model.vocabulary": (2, 2**24),
    "data.validation_fraction": (0.0001, 0.9),
    "training.batch_size": (1, 2**20),
    "training.micro_batch": (0, 2**20),
    "training.eval_blocks": (1, 2**20),
    **{f"round.{name}": bounds for name, bounds in BOUNDS.items()},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What all peers of a run agree on.

    Attributes:
        name: shown to people, at most 64 characters.
        local: what each peer does between two averagings.
        trainer: the model, its data and how each peer trains it; holds the run's seed.
        round: how the peers average.
        outer: how the average is applied.
    """

    name: str = "stdlib-gpt"
    local: LocalConfig = LOCAL
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    round: RoundConfig = ROUND
    outer: OuterConfig = field(default_factory=OuterConfig)


def load(text: str, source: str) -> RunConfig:
    """Check a run file.

    Args:
        text: TOML.
        source: what to call it in an error; the file's path as a rule.

    Raises:
        ConfigError: one line: file, field, value, remedy.
    """
    default = RunConfig()
    if text.lstrip().startswith("{"):
        raise ConfigError(
            f"{source} is of a program that uses SwarmOptimizer, not of 'shoal create': start that "
            "program with this link"
        )
    top = runfile.parse(text, source)
    tables = {}
    for name in _TABLES:
        tables[name] = top.pop(name, {})
        if not isinstance(tables[name], dict):
            raise ConfigError(
                f"{source}: {name} = {_shown(tables[name])} is a value: write a table [{name}]"
            )
    general = _values({"name": str, "seed": int}, top, "", source, also=_TABLES)
    name = general.get("name", default.name)
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise ConfigError(f"{source}: name = {_shown(name)}: use 1 to 64 printable characters")
    locals_, common = _fields(LocalConfig), _fields(RoundConfig)
    rounds = _values({**locals_, **common}, tables["round"], "round", source)
    local = dataclasses.replace(LOCAL, **{n: v for n, v in rounds.items() if n in locals_})
    round_ = dataclasses.replace(ROUND, **{n: v for n, v in rounds.items() if n in common})
    try:
        codec(round_.codec)
    except ConfigError as error:
        raise ConfigError(f"{source}: [round] codec = {_shown(round_.codec)}: {error}") from error
    try:
        check(round_, local)
    except ConfigError as error:
        raise ConfigError(f"{source}: [round] {error}") from error
    training = _fields(TrainerConfig, without=_NOT_IN_TRAINING)
    trainer = _values(training, tables["training"], "training", source)
    trainer |= {
        "model": _build(ModelConfig, tables["model"], "model", source),
        "data": _build(DataConfig, tables["data"], "data", source),
        "optimizer": _build(OptimizerConfig, tables["optimizer"], "optimizer", source),
    }
    if round_.mode == "gradient":
        try:
            gradient_config(trainer["optimizer"], round_.target_batch)
        except ConfigError as error:
            raise ConfigError(f"{source}: [optimizer] {error}") from error
        if _build(OuterConfig, tables["outer"], "outer", source) != OuterConfig():
            raise ConfigError(
                f'{source}: [outer] means nothing with mode = "gradient", where all take the step '
                "that [optimizer] says: leave it out"
            )
    if "seed" in general:
        trainer["seed"] = general["seed"]
    return RunConfig(
        name=name,
        local=local,
        trainer=_make(TrainerConfig, trainer, "training", source),
        round=round_,
        outer=_build(OuterConfig, tables["outer"], "outer", source),
    )


def published(text: str, config: RunConfig) -> str:
    """The run file as it is signed and shown to everybody.

    The text as it was written, comments and all, unless the run has data of its own: a path on this
    machine means nothing on another and is nobody's business, so only its last part stays, and
    every joiner gives the place of its own copy.
    """
    return runfile.published(text, config.trainer.data.path)


def configured(
    text: str,
    *,
    run_file: Path | None = None,
    data: str = "",
    device: str = "",
    allow_download: bool = False,
) -> RunConfig:
    """What this machine makes of a run file, its own or one from the swarm.

    The swarm's is of a stranger: its `allow_download` does not make this machine download.

    Args:
        text: TOML.
        run_file: where it lies; None for the swarm's.
        data: where this machine has the run's data; empty: as the run file says.
        device: what computes.
        allow_download: may a model be fetched from the hub, though the run file does not say so, or
            is not this machine's own.

    Raises:
        ConfigError: as `load` does; or the swarm's run has data of its own, and `data` is empty.
    """
    if run_file is not None:
        config = load(text, str(run_file))
        # A relative path in a run file is relative to the run file, not to the working directory.
        own = config.trainer.data.path
        data = data or (str(run_file.parent / own) if own else "")
        allow_download = allow_download or config.trainer.model.allow_download
    else:
        config = load(text, "the run's file as published")
        if config.trainer.data.path and not data:
            raise ConfigError(
                f"run {config.name!r} trains on its own text, {config.trainer.data.path!r}: "
                "say where your copy of it is with --data PATH"
            )
    return localised(config, data=data, device=device, allow_download=allow_download)


def localised(
    config: RunConfig, *, data: str, device: str, allow_download: bool = False
) -> RunConfig:
    """The configuration with what is this machine's own.

    Args:
        config: of the run file.
        data: where the data are; empty: as the run file says.
        device: what computes; empty: as chosen by itself.
        allow_download: whether this machine may fetch a model, whatever the run file says.
    """
    trainer = config.trainer
    model = dataclasses.replace(trainer.model, allow_download=allow_download)
    trainer = dataclasses.replace(trainer, model=model)
    if data:
        trainer = dataclasses.replace(trainer, data=dataclasses.replace(trainer.data, path=data))
    if device:
        trainer = dataclasses.replace(trainer, device=device)
    return dataclasses.replace(config, trainer=trainer)


def optimizer(config: RunConfig, trainer: Trainer, threads: int) -> StateOptimizer:
    """The rule that all peers of a run apply to an average.

    Args:
        config: of the run.
        trainer: has the tensors.
        threads: for a step on gradients, while training waits for it.
    """
    if config.round.mode == "diloco":
        return OuterOptimizer(config.outer)
    tensors = [TensorSpec(**dataclasses.asdict(tensor)) for tensor in trainer.tensors()]
    return GradientOptimizer(
        gradient_config(config.trainer.optimizer, config.round.target_batch),
        tensors,
        threads=threads,
    )


def gradient_config(inner: OptimizerConfig, target_batch: int) -> GradientConfig:
    """The step of [optimizer] as all peers take it together in gradient mode.

    Raises:
        ConfigError: a kind that only a single peer can follow.
    """
    if inner.kind == "schedulefree":
        raise ConfigError(
            'kind = "schedulefree" takes steps of one peer\'s own: with mode = "gradient" use '
            '"muon", "adamw" or "sgd"'
        )
    names = {part.name for part in dataclasses.fields(GradientConfig)}
    shared = {n: v for n, v in dataclasses.asdict(inner).items() if n in names}
    return GradientConfig(**shared, step_samples=target_batch)


def _fields(kind: type[Any], without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Names and types of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {
        part.name: hints[part.name] for part in dataclasses.fields(kind) if part.name not in without
    }


def _build(kind: type[_T], table: dict[str, Any], where: str, source: str) -> _T:
    return _make(kind, _values(_fields(kind), table, where, source), where, source)


def _make(kind: type[_T], values: dict[str, Any], where: str, source: str) -> _T:
    """The dataclass itself; what its own checks refuse is a person's mistake."""
    try:
        return kind(**values)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{source}: [{where}] {error}") from error


def _values(
    types: dict[str, Any],
    table: dict[str, Any],
    where: str,
    source: str,
    also: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The table's values, each of its field's type and inside its bounds.

    Args:
        types: type of each allowed field.
        table: as read.
        where: name of the table; empty for the top level.
        source: name of the file.
        also: further names to suggest when a field is unknown.

    Raises:
        ConfigError: unknown field, wrong type, out of bounds.
    """
    at = f"{source}: [{where}]" if where else f"{source}:"
    values = {}
    for name, value in table.items():
        if name not in types:
            known = [*types, *also]
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ConfigError(f"{at} unknown field {_shown(name)}: {remedy}")
        values[name] = _typed(types[name], value, f"{at} {name} = {_shown(value)}")
        low, high = _BOUNDS.get(f"{where}.{name}" if where else name, (-math.inf, math.inf))
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{at} {name} = {value}: use a finite number")
        if isinstance(value, int | float) and not low <= value <= high:
            raise ConfigError(f"{at} {name} = {_shown(value)}: use {low:g} to {high:g}")
    return values


def _typed(kind: Any, value: Any, what: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if kind in _KINDS:
        if type(value) is not kind:  # not isinstance: true is no number
            found = _KINDS.get(type(value), "not allowed")
            raise ConfigError(f"{what} is {found}: {_REMEDIES[kind]}")
        if isinstance(value, str) and "\x00" in value:
            raise ConfigError(f"{what}: a NUL character has no place here")
        return value
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in choices:
            raise ConfigError(f"{what}: use {' or '.join(map(repr, choices))}")
        return value
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise ConfigError(f"{what} is no table: write it as in {{ n_positions = 64 }}")
        _check_plain(value, what)
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or (... not in choices and len(value) != len(choices)):
            shape = "a list" if ... in choices else f"a list of {len(choices)}"
            raise ConfigError(f"{what} is not {shape}: write it as in [0.9, 0.99]")
        return tuple(_typed(choices[0], part, what) for part in value)
    raise TypeError(f"{what}: a run file cannot set a field of type {kind}")


def _check_plain(value: Any, what: str) -> None:
    """Refuse what no configuration of a model holds, at any depth: dates, NaN, NUL characters."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            _check_plain(part, what)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{what}: use finite numbers")
    elif type(value) not in _KINDS:
        raise ConfigError(f"{what}: use numbers, text, true, false, lists and tables of them")
    elif isinstance(value, str):
        _typed(str, value, what)


def _shown(value: object) -> str:
    """A value as the file has it, not longer than a line can bear."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
