"""How benchmarks read their command line: a mistake is one line, and exit status 2."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")


class Parser(ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def several(one: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Reads values by commas, none twice."""

    def read(text: str) -> list[T]:
        return list(dict.fromkeys(one(part.strip()) for part in text.split(",")))

    return read


def one_of(*names: str) -> Callable[[str], str]:
    """Reads one of these words."""

    def read(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return read


def at_least(lowest: int) -> Callable[[str], int]:
    """Reads a whole number, not too small."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return read


def quantity(lowest: float, what: str) -> Callable[[str], float]:
    """Reads a number, not too small, of something that the message names."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not lowest <= value <= 1e9:
            raise ArgumentTypeError(f"{text!r} is not {what} of at least {lowest:g}")
        return value

    return read


def existing_folder(text: str) -> Path:
    """Reads a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"{text} is not a folder")
    return path


def megabytes(text: str) -> float:
    """Reads the size of a vector."""
    try:
        mb = float(text)
    except ValueError:
        mb = 0.0
    if not 0.004 <= mb <= 1e5:
        raise ArgumentTypeError(f"{text!r} is not a number of megabytes, 0.004 at least")
    return mb


def writable(text: str) -> Path:
    """Reads a file that can be written, tried before hours are spent."""
    path = Path(text)
    try:
        path.open("a").close()
    except OSError as error:
        raise ArgumentTypeError(f"{text}: {error.strerror}") from error
    return path
