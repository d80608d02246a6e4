"""Training and validation tokens.

The default corpus is the Python standard library's own source: real text that lies on every machine
that can run a peer, so a first run needs no download. Otherwise a UTF-8 text file, or a folder of
them.

The corpus is cut into strips, and the tail of each strip is held out: validation sees every part of
the corpus, and no held-out token is ever trained on.

Guaranteed: a pure function of the files' names and contents; no byte is in both parts. Not
guaranteed: that two machines have the same corpus (another Python, another standard library):
compare `digest`. Nor are repeated passages looked for, such as a licence at the head of each file.
Everything is held in memory, hence a limit on size.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.tokens import ByteTokenizer, Tokenizer

TEXT_SUFFIXES = frozenset({".md", ".org", ".py", ".rst", ".tex", ".text", ".txt"})
"""What is read from a folder; a file that is named itself may have any suffix."""

MAX_BYTES = 2 << 30
STDLIB_MAX_BYTES = 8_000_000
# Tests repeat themselves, and the rest is tables or bundled packages rather than text.
_STDLIB_SKIPPED = frozenset(
    (
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    )
)

_STRIPS = 32
_MIN_STRIP = 1 << 16


class DataError(ValueError):
    """The data cannot be used: one line, what is wrong and how to mend it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text a run trains on.

    Args:
        path: a UTF-8 text file, or a folder searched recursively for `TEXT_SUFFIXES` (hidden files
            and folders are skipped); "" for the source of Python's standard library.
        validation_fraction: held out, in (0, 0.5].

    Raises:
        DataError: a value out of range.
    """

    path: str = ""
    validation_fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction <= 0.5:
            raise DataError(
                f"data validation_fraction = {self.validation_fraction} must be above 0 and at"
                " most 0.5"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenData:
    """A corpus as token ids.

    Args:
        train: (N,) uint8 or int32 on the CPU.
        validation: (M,) of the same dtype, from held-out regions.
        vocabulary: every id is below it.
        digest: hex, of both parts: peers with equal digests train and validate on the same text.
    """

    train: Tensor
    validation: Tensor
    vocabulary: int
    digest: str


def load(config: DataConfig, tokenizer: Tokenizer | None = None) -> TokenData:
    """Read, tokenise and split a corpus.

    Args:
        config: which corpus.
        tokenizer: bytes if None.

    Raises:
        DataError: missing, unreadable, empty, binary, not UTF-8 or too large.
    """
    tokenizer = tokenizer or ByteTokenizer()
    documents = _folder_or_file(Path(config.path).expanduser()) if config.path else _stdlib()
    parts = [tokenizer.encode(text) for text in documents if text]
    if not parts:
        raise DataError(
            f"{config.path or 'the standard library'}: there is no text in it; give a text file or"
            " a folder of them that are not empty"
        )
    train, validation = _split(np.concatenate(parts), config.validation_fraction)
    hasher = hashlib.blake2b(digest_size=16)
    for part in (train, validation):
        hasher.update(f"{part.dtype.str} {part.size} ".encode())
        hasher.update(part.data)
    return TokenData(
        train=_tensor(train),
        validation=_tensor(validation),
        vocabulary=tokenizer.vocabulary,
        digest=hasher.hexdigest(),
    )


def _split(
    tokens: npt.NDArray[np.generic], fraction: float
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    strips = np.array_split(tokens, min(_STRIPS, max(1, tokens.size // _MIN_STRIP)))
    cuts = [strip.size - max(1, round(strip.size * fraction)) for strip in strips]
    train = np.concatenate([strip[:cut] for strip, cut in zip(strips, cuts, strict=True)])
    validation = np.concatenate([strip[cut:] for strip, cut in zip(strips, cuts, strict=True)])
    return train, validation


def _tensor(tokens: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(tokens if tokens.dtype == np.uint8 else tokens.astype(np.int32))


def _stdlib() -> Iterable[bytes]:
    """The standard library's modules by path, up to the limit."""
    root = Path(sysconfig.get_paths()["stdlib"])
    total = 0
    for file in _walk(root, frozenset({".py"}), _STDLIB_SKIPPED):
        text = _read(file)
        total += len(text)
        if total > STDLIB_MAX_BYTES:
            return
        yield text
    if not total:
        raise DataError(f"{root} holds no Python source: give a text file or folder as data path")


def _folder_or_file(path: Path) -> Iterable[bytes]:
    if not path.exists():
        raise DataError(f"{path} does not exist: give a text file or a folder of them")
    files = [path]
    if path.is_dir():
        files = _walk(path, TEXT_SUFFIXES)
        if not files:
            raise DataError(f"{path} holds no file ending in {' '.join(sorted(TEXT_SUFFIXES))}")
    elif not path.is_file():
        raise DataError(
            f"{path} is neither a file nor a folder: give a text file or a folder of them"
        )
    total = 0
    for file in files:
        text = _read(file, room=MAX_BYTES - total)
        _refuse_binary(file, text)
        total += len(text)
        yield text


def _walk(
    root: Path, suffixes: frozenset[str], skipped: frozenset[str] = frozenset()
) -> list[Path]:
    """Files by path below `root`, links to folders not followed, hidden ones left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and name[0] != "."]
        found += [
            Path(folder, name)
            for name in names
            if name[0] != "." and Path(name).suffix.lower() in suffixes
        ]
    # By parts, not by string: the same order whatever separator the system has.
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _read(file: Path, room: int = MAX_BYTES) -> bytes:
    try:
        if file.stat().st_size > room:
            raise DataError(f"{file}: more than {MAX_BYTES >> 30} GiB of text do not fit in memory")
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def _refuse_binary(file: Path, text: bytes) -> None:
    if (at := text.find(0)) >= 0:
        raise DataError(f"{file} is not text: zero byte at offset {at}; give text in UTF-8")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 at offset {error.start}: convert it (iconv -t utf-8)"
        ) from error
