r"""The state on disk: what lets a run go on after all of its peers were gone.

One file a checkpoint, numbered in the order of writing. Its layout, numbers big-endian, vectors
little-endian float32:

    magic       16 bytes  "shoal checkpoint"
    version      4 bytes  2
    belongs     32 bytes  BLAKE3("shoal checkpoint run\0" | run id | \0 | layout)
    elements     8 bytes  of all vectors together
    lengths      4 + 4    of the two parts that follow
    certificates          a `Heads` message: the one that names the state, and the one before it
    chain                 opaque here; the proof of those certificates (`chain.Chain`)
    vectors               4 * elements bytes: of each fragment, its parameters and its moments
    digest      32 bytes  BLAKE3 over everything before it

safetensors would need the whole file as one object in memory; this is written and read in pieces,
so that a state of any size costs no second copy.

Guarantees: a checkpoint appears whole or not at all, also where the process is killed or the disk
is full, and no older one is removed before a newer one is safe; what is loaded has the digest that
was written and the state root that its certificate names; reading a hostile file allocates no more
than a state of this run needs. Not guaranteed: that a disk keeps what it said it had written.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3
from torch import Tensor

from coordinator_free import certificates, failpoints, wire
from coordinator_free.certificates import Head
from coordinator_free.chain import MAX_CHAIN_BYTES, Chain
from coordinator_free.messages import Certificate, Heads, Kind
from coordinator_free.state import Shape, State
from dht.errors import StateError

logger = logging.getLogger(__name__)

_MAGIC = b"shoal checkpoint"
_VERSION = 2
_HEADER = struct.Struct(">16sI32sQII")
_DIGEST_BYTES = 32
_PIECE_BYTES = 8 << 20
_NAME = re.compile(r"([0-9]{12})\.checkpoint")
_LEFTOVER = ".checkpoint-"  # what a killed writer leaves begins with this


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: parameters and moments.
        certificates: the newest names the state; before it, where there is one, its predecessor.
        chain: opaque bytes that were saved beside them.
    """

    state: State
    certificates: tuple[Certificate, ...]
    chain: bytes = b""

    @property
    def head(self) -> Head:
        """Where a replica with this state stands."""
        return Head.after(self.certificates[-1])


class CheckpointStore:
    """The checkpoints of one run, in a folder that this process alone writes to.

    Args:
        folder: made at the first save.
        run_id: of the run; a file of another one is never loaded.
        shape: of the run's states.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, *, run_id: str, shape: Shape, keep: int = 3) -> None:
        self.folder = folder
        self._shape = shape
        self._keep = keep
        self._belongs = blake3(
            b"shoal checkpoint run\0" + run_id.encode() + b"\0" + shape.layout.encode()
        ).digest()
        # A write that was killed: nobody else writes here.
        with contextlib.suppress(OSError):
            for path in folder.glob(f"{_LEFTOVER}*"):
                path.unlink(missing_ok=True)

    def save(self, state: State, chain_end: Sequence[Certificate], chain: bytes = b"") -> Path:
        """Write one checkpoint, then remove those that are too many. Blocks; call it in a thread.

        Args:
            state: to write.
            chain_end: the certificate that names it, after its predecessor if there is one.
            chain: opaque bytes to keep beside it, at most `MAX_CHAIN_BYTES`.

        Raises:
            StateError: it cannot be written; the older ones are as they were.
            ValueError: the certificate names another state, or something is over-long.
        """
        if chain_end[-1].outcome.state_root != state.root or state.shape != self._shape:
            raise ValueError("a state and the certificate that should name it differ")
        if len(chain) > MAX_CHAIN_BYTES:
            raise ValueError(f"a chain of {len(chain)} bytes is too large for a checkpoint")
        named = wire.encode(Heads(certificates=tuple(chain_end)))
        elements = self._shape.elements
        header = _HEADER.pack(_MAGIC, _VERSION, self._belongs, elements, len(named), len(chain))
        try:
            self._make_folder()
            files = self._files()
            path = self.folder / f"{files[-1][0] + 1 if files else 1:012d}.checkpoint"
            descriptor, temporary = tempfile.mkstemp(prefix=_LEFTOVER, dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb", buffering=0) as file:  # mkstemp: mode 0600
                    _reserve(file, _size(elements, len(named), len(chain)))
                    hasher = blake3()
                    for piece in _pieces(header, named, chain, *state.vectors()):
                        hasher.update(piece)
                        _write_all(file, piece)
                    failpoints.reach("checkpoint.write")
                    _write_all(file, memoryview(hasher.digest()))
                    os.fsync(file.fileno())
                os.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            _sync_folder(self.folder)
        except OSError as error:
            raise StateError(
                f"cannot write a checkpoint into {self.folder}: {error.strerror}"
            ) from error
        for _, old in self._files()[: -self._keep]:
            with contextlib.suppress(OSError):
                old.unlink()
        return path

    def newest(
        self, usable: Callable[[Checkpoint], bool] = lambda checkpoint: True
    ) -> Checkpoint | None:
        """The one that got furthest of those that are whole; None where there is none.

        Blocks. A file that cannot be used is named in a warning and left where it is.

        Args:
            usable: whether it is worth anything to the caller; may raise `ValueError`.
        """
        found: list[tuple[tuple[int, int, bytes], int, Path]] = []
        for number, path in self._files():
            try:
                with self._open(path) as file:
                    named, _ = self._read_beginning(file)
                    found.append((Head.after(named[-1]).rank, number, path))
            except (OSError, ValueError) as error:
                logger.warning("checkpoints.unusable file=%s reason=%s", path, _reason(error))
        for _, _, path in sorted(found, reverse=True):
            try:
                checkpoint = self._load(path)
                if not usable(checkpoint):
                    raise ValueError("its certificates give this peer no vote")
            except (OSError, ValueError) as error:
                logger.warning("checkpoints.unusable file=%s reason=%s", path, _reason(error))
                continue
            logger.info("checkpoints.loaded file=%s round=%d", path, checkpoint.head.round)
            return checkpoint
        return None

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for parent in list(self.folder.parents)[:2]:  # `runs` and the peer's own folder
                _sync_folder(parent)

    def _files(self) -> list[tuple[int, Path]]:
        """Number and path of each, in the order of writing."""
        try:
            names = [(_NAME.fullmatch(entry.name), entry) for entry in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.warning("checkpoints.unreadable folder=%s reason=%s", self.folder, error)
            return []
        return sorted((int(name[1]), path) for name, path in names if name is not None)

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[BinaryIO]:
        # Neither a link out of the folder nor a pipe that never delivers.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("it is no file")
            yield file

    def _read_beginning(self, file: BinaryIO) -> tuple[tuple[Certificate, ...], int]:
        """The certificates, unchecked as yet, and the length of the chain after them."""
        raw = file.read(_HEADER.size)
        if len(raw) != _HEADER.size:
            raise ValueError("it is too short")
        magic, version, belongs, elements, named_bytes, chain_bytes = _HEADER.unpack(raw)
        if magic != _MAGIC:
            raise ValueError("it is no checkpoint")
        if version != _VERSION:
            raise ValueError(f"it has format {version}, this program reads {_VERSION}")
        if belongs != self._belongs or elements != self._shape.elements:
            raise ValueError("it belongs to another run or another model")
        if named_bytes > wire.MAX_MESSAGE_BYTES or chain_bytes > MAX_CHAIN_BYTES:
            raise ValueError("a part of it is over-long")
        if os.fstat(file.fileno()).st_size != _size(elements, named_bytes, chain_bytes):
            raise ValueError("it has another length than it says")
        heads = wire.decode(_read_exactly(file, named_bytes))
        if not isinstance(heads, Heads) or not 1 <= len(heads.certificates) <= 2:
            raise ValueError("it names no state")
        return heads.certificates, chain_bytes

    def _load(self, path: Path) -> Checkpoint:
        with self._open(path) as file:
            named, chain_bytes = self._read_beginning(file)
            before = file.tell()
            file.seek(0)
            hasher = blake3(_read_exactly(file, before))
            chain = _read_exactly(file, chain_bytes)
            hasher.update(chain)
            vectors = self._shape.empty()
            for piece in _pieces(*itertools.chain(*vectors)):
                _read_into(file, piece)
                hasher.update(piece)
            if file.read(_DIGEST_BYTES) != hasher.digest():
                raise ValueError("its digest is wrong: it was damaged")
        state = State.of(self._shape, vectors)
        if state.root != named[-1].outcome.state_root:
            raise ValueError("its state is not the one that its certificate names")
        return Checkpoint(state=state, certificates=named, chain=chain)


class Keeper:
    """Saves the newest state every so often, beside everything else.

    At most one save is under way; what comes meanwhile waits for nobody and is saved only if it is
    still the newest at the end. Only states that let this peer revive the run are worth a file:
    those with a certificate, or one before it, in whose roster it is (`certificates.has_vote`).

    Args:
        store: where to.
        me: own peer id.
        every: save after so many rounds; 0 for never.
        saved: what is on disk already.
    """

    def __init__(
        self, store: CheckpointStore, *, me: str, every: int, saved: Checkpoint | None = None
    ) -> None:
        self._store = store
        self._me = me
        self._every = every
        self._newest: tuple[State, Chain] | None = None
        self._saved_root = saved.state.root if saved is not None else b""
        self._saving: Future[None] | None = None
        self._closing = False
        self._thread = ThreadPoolExecutor(1, "shoal-checkpoints")
        self._complaint = ""
        self.round: int | None = saved.head.round if saved is not None else None
        """Of the newest checkpoint on disk; None for none."""

    def note(self, state: State, chain: Chain) -> None:
        """This state was reached, as this chain proves. Never blocks."""
        newest = chain.newest
        if self._newest is not None and self._newest[0].root == state.root:
            return  # only the roster changed, perhaps to one without this peer
        if not certificates.has_vote(chain.links, self._me):
            return
        self._newest = (state, chain)
        due = self._every and newest.outcome.round % self._every == 0
        if due and newest.outcome.kind == Kind.AVERAGE:
            self.save()

    def save(self) -> None:
        """Begin to save the newest state, unless that is on disk or a save is under way."""
        busy = self._saving is not None and not self._saving.done()
        if not self._every or busy or self._newest is None:
            return
        if self._newest[0].root != self._saved_root:
            self._saving = self._thread.submit(self._save, *self._newest)

    @property
    def saving(self) -> bool:
        """Whether a state is being written, or about to be as the last one. From any thread."""
        return self._closing or (self._saving is not None and not self._saving.done())

    def close(self) -> None:
        """Save what is newer than the last file. Blocks."""
        self._closing = True
        try:
            if self._saving is not None:
                self._saving.result()
            self.save()
            self._thread.shutdown(wait=True)
        finally:
            self._closing = False

    def _save(self, state: State, chain: Chain) -> None:
        round = chain.newest.outcome.round
        try:
            path = self._store.save(state, chain.links[-2:], chain.to_bytes())
        except (StateError, ValueError) as error:
            # Once for each reason: a disk that is full stays so for a while.
            log = logger.info if str(error) == self._complaint else logger.warning
            self._complaint = str(error)
            log("checkpoints.not_saved round=%d reason=%s; training goes on", round, error)
            return
        self._complaint = ""
        self._saved_root, self.round = state.root, round
        logger.info("checkpoints.saved file=%s round=%d", path, round)


def _size(elements: int, named_bytes: int, chain_bytes: int) -> int:
    return _HEADER.size + named_bytes + chain_bytes + 4 * elements + _DIGEST_BYTES


def _pieces(*parts: bytes | Tensor) -> Iterator[memoryview]:
    """The memory of all parts, shared, in pieces."""
    for part in parts:
        raw = memoryview(part) if isinstance(part, bytes) else part.numpy().view(np.uint8).data
        for start in range(0, len(raw), _PIECE_BYTES):
            yield raw[start : start + _PIECE_BYTES]


def _reserve(file: BinaryIO, size: int) -> None:
    """Have the room, or fail before anything is written."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    while piece:
        piece = piece[file.write(piece) :]


def _read_into(file: BinaryIO, piece: memoryview) -> None:
    while piece:
        count = file.readinto(piece)  # type: ignore[attr-defined]  # a raw file has it
        if not count:
            raise ValueError("it ended early")
        piece = piece[count:]


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    raw = bytearray(count)
    _read_into(file, memoryview(raw))
    return bytes(raw)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
