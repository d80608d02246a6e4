"""The run file as text: TOML in, TOML out, and the commented one that `shoal init` writes.

Knows nothing of what the fields mean (`peer.config` does), and so loads in milliseconds, without
torch. Guarantees: what `dump` writes, `parse` reads back as the same values; errors are one line
with the file's name.
"""

from __future__ import annotations

import json
import math
import tomllib
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from dht.errors import ConfigError

MAX_BYTES = 32 * 1024  # a signed run travels in one DHT record
MAX_DEPTH = 32  # deeper than any run file needs, and far from where Python's own functions give up

Tables = dict[str, Any]


def starter() -> str:
    """The commented run file with all defaults."""
    return files("peer").joinpath("run.toml").read_text(encoding="utf-8")


def write_starter(path: Path) -> None:
    """Write the commented run file.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter())
    except FileExistsError as error:
        raise ConfigError(
            f"{path} exists and is left as it is: name another file, as in 'shoal init other.toml'"
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"cannot write {path}: there is no folder {path.parent}; make it first, or name a file "
            "elsewhere"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; name a file where you may write"
        ) from error


def read(path: Path) -> str:
    """The text of a run file.

    Raises:
        ConfigError: it is missing, unreadable, empty, too long or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no run file {path}: 'shoal init {path}' writes one to start from"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"cannot read the run file {path}: it is a folder; name a file, as in "
            f"{path / 'run.toml'}"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path}: {error.strerror}") from error
    if not raw.strip():
        raise ConfigError(
            f"the run file {path} is empty: remove it, and 'shoal init {path}' writes one to start "
            "from"
        )
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is longer than {MAX_BYTES // 1024} KiB: is it a run file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: is it a run file?") from error


def parse(text: str, source: str) -> Tables:
    """Tables and values of a run file.

    Args:
        text: TOML.
        source: what to call it in an error.

    Raises:
        ConfigError: it is not TOML, nested too deeply, or has numbers of more than 64 bits.
    """
    try:
        tables = tomllib.loads(text)
        _check(tables, source, "", 0)
        return tables
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply: is it a run file?") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{source} is not valid TOML: {str(error)[:200]}; text needs quotes, as in "
            'name = "my run"'
        ) from error
    except ValueError as error:  # Python's own limit, of thousands of digits
        raise ConfigError(f"{source} has a number of too many digits: is it a run file?") from error


def _check(value: Any, source: str, name: str, depth: int) -> None:
    """Refuse what TOML bears and Python chokes on later, in `repr` or `float`.

    Whole numbers have 64 bits in TOML; `tomllib` takes more.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source} is nested too deeply: is it a run file?")
    if isinstance(value, dict):
        for key, part in value.items():
            _check(part, source, key, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check(part, source, name, depth + 1)
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise ConfigError(f"{source}: {shown!r} has more than 64 bits: use a smaller number")


def published(text: str, data: str) -> str:
    """The run file as it is signed and shown to everybody.

    The text as it was written, comments and all, unless the run has data of its own: a path on this
    machine means nothing on another and is nobody's business, so only its last part stays, and
    every joiner gives the place of its own copy.

    Args:
        text: TOML that `peer.config.load` accepts.
        data: where this machine has the run's own data; empty for none.
    """
    if not data:
        return text
    tables = parse(text, "the run file")
    tables.setdefault("data", {})["path"] = PurePath(data).name
    return dump(tables)


def dump(tables: Tables) -> str:
    """TOML text of `tables`: plain values first, then one level of tables."""
    lines = [
        f"{key} = {_value(value)}" for key, value in tables.items() if not isinstance(value, dict)
    ]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_value(part)}" for key, part in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # JSON's escapes are a subset of TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(part) for part in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_value(part)}' for key, part in value.items())} }}"
    raise TypeError(f"a run file holds no {type(value).__name__}")
