"""What the numbers of a configuration must keep to, whoever wrote it: most often a stranger.

Guarantees: one line of `ConfigError` for whatever is given in place of a number, none of it long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from dht.errors import ConfigError

Bounds = Mapping[str, tuple[float, float]]


def check_bounds(what: str, config: object, bounds: Bounds) -> None:
    """Refuse fields that are no numbers, or out of bounds.

    Args:
        what: the configuration's name, for the message.
        config: has the fields.
        bounds: lowest and highest value of each field, both allowed.

    Raises:
        ConfigError: names the field, its value and the remedy.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        # NaN is in no bounds, and whole numbers of any size compare with floats.
        if not is_number(value) or not low <= value <= high:
            raise ConfigError(f"{what}.{name} = {shown(value)}: use {low:g} to {high:g}")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it compares with numbers; true and false are meant as something else."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value, not longer than a line can bear."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print the longest
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
