"""Who a peer is: one Ed25519 key, and the peer id that is derived from it.

The peer id is libp2p's: the base58 of an *identity* multihash, so the public key is inside the id
and a signature can be checked with nothing but the id of who should have made it. The key file is
libp2p's too, so that the libp2p daemon reads the very same file and ends up with the same id.

Guaranteed: the key is made once, written atomically and only its owner can read it; a signature
made for one purpose (`domain`) is never valid for another. Not guaranteed: that an id belongs to a
particular person or machine. Ids cost nothing, anybody can make a thousand.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from dht.errors import ConfigError

SIGNATURE_BYTES = 64

# Protobuf and multihash framing of libp2p (specs/peer-ids/peer-ids.md). An Ed25519 key always has
# the same lengths, hence the same frame; comparing constant bytes leaves hostile input no parser.
_PRIVATE_FRAME = b"\x08\x01\x12\x40"  # PrivateKey{Type: Ed25519, Data: 64 bytes: seed + public}
_ID_FRAME = b"\x00\x24\x08\x01\x12\x20"  # identity multihash of PublicKey{Ed25519, 32 bytes}
_PRIVATE_BYTES = len(_PRIVATE_FRAME) + 64
_ID_BYTES = len(_ID_FRAME) + 32
_ID_CHARACTERS = 52  # base58 of _ID_BYTES under this frame: always 12D3KooW and 44 more

_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUE = {character: value for value, character in enumerate(_BASE58)}


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and the peer id that belongs to it. Compares and hashes by peer id."""

    _key: Ed25519PrivateKey = field(repr=False, compare=False)
    peer_id: str

    @classmethod
    def generate(cls) -> Identity:
        """Make a new identity that lives in memory only."""
        return cls._of(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Identity:
        """Read an identity file.

        Raises:
            ConfigError: missing, unreadable, malformed, not Ed25519, or others may read it.
        """
        return cls._of(_read_key(Path(path)))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """Read an identity file; make it first (mode 0600, folders 0700) where there is none.

        Raises:
            ConfigError: as `load`, or the file cannot be created.
        """
        path = Path(path)
        if not os.path.lexists(path):
            _write_key(path, Ed25519PrivateKey.generate())
        # Read back even what was just written: two processes that start at once agree on one key.
        return cls.load(path)

    @classmethod
    def _of(cls, key: Ed25519PrivateKey) -> Identity:
        return cls(key, _base58(_ID_FRAME + key.public_key().public_bytes_raw()))

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """Sign `message` for one purpose.

        Args:
            domain: names the purpose, at most 255 bytes.
            message: anything.

        Returns:
            64 bytes, Ed25519 (RFC 8032).
        """
        return self._key.sign(_separated(domain, message))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the identity to a new file (mode 0600).

        Raises:
            ConfigError: the file exists or cannot be created.
        """
        path = Path(path)
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists; an identity is never overwritten")
        _write_key(path, self._key)


def verify(peer_id: str, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the owner of `peer_id` signed `message` for this purpose.

    All arguments may be hostile: whatever is malformed is simply not a valid signature.
    """
    public = public_key(peer_id)
    if public is None or len(signature) != SIGNATURE_BYTES or len(domain) > 255:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, _separated(domain, message))
    except (InvalidSignature, ValueError):
        return False
    return True


def public_key(peer_id: str) -> bytes | None:
    """The 32 bytes of the Ed25519 key inside a peer id, or None where it is not such an id."""
    if len(peer_id) != _ID_CHARACTERS:
        return None
    number = 0
    for character in peer_id:
        value = _BASE58_VALUE.get(character)
        if value is None:
            return None
        number = number * 58 + value
    # The frame's leading zero byte is a "1" in base58, which adds nothing to the number.
    if number >= 1 << (8 * _ID_BYTES):
        return None
    raw = number.to_bytes(_ID_BYTES, "big")
    if not raw.startswith(_ID_FRAME) or _base58(raw) != peer_id:
        return None
    return raw[len(_ID_FRAME) :]


def _separated(domain: bytes, message: bytes) -> bytes:
    # The length in front makes (domain, message) unambiguous: no pair collides with another.
    if len(domain) > 255:
        raise ValueError("a signing domain has at most 255 bytes")
    return b"shoal\x00" + bytes([len(domain)]) + domain + message


def _base58(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    digits = []
    while number:
        number, digit = divmod(number, 58)
        digits.append(_BASE58[digit])
    zeros = len(raw) - len(raw.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(digits))


def _read_key(path: Path) -> Ed25519PrivateKey:
    try:
        # O_NONBLOCK: a named pipe at this path must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as exc:
        raise ConfigError(f"identity file {path} does not exist") from exc
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read the identity file {path}: {_cause(exc)}") from exc
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"identity file {path} is not a regular file; name another path")
        if status.st_mode & 0o077:
            raise ConfigError(
                f"identity file {path} can be used by others (mode {status.st_mode & 0o777:04o}):"
                f" run chmod 600 {path}"
            )
        raw = os.read(descriptor, _PRIVATE_BYTES + 1)
    except OSError as exc:
        raise ConfigError(f"cannot read the identity file {path}: {_cause(exc)}") from exc
    finally:
        os.close(descriptor)
    if raw[:1] == b"\x08" and raw[1:2] not in (b"", b"\x01"):
        raise ConfigError(
            f"identity file {path} holds a key that is not Ed25519: move it away and a new"
            " identity is made"
        )
    if len(raw) != _PRIVATE_BYTES or not raw.startswith(_PRIVATE_FRAME):
        raise ConfigError(
            f"identity file {path} is damaged or not an identity: restore it from a copy, or move"
            " it away and a new identity is made"
        )
    secret = raw[len(_PRIVATE_FRAME) :]
    key = Ed25519PrivateKey.from_private_bytes(secret[:32])
    if key.public_key().public_bytes_raw() != secret[32:]:
        raise ConfigError(
            f"identity file {path} is damaged (its two halves do not belong together): restore it"
            " from a copy, or move it away and a new identity is made"
        )
    return key


def _write_key(path: Path, key: Ed25519PrivateKey) -> None:
    raw = _PRIVATE_FRAME + key.private_bytes_raw() + key.public_key().public_bytes_raw()
    try:
        _make_folders(path.parent)
        # Complete and on disk under a private name (mkstemp: O_EXCL|O_CREAT, 0600), then linked:
        # a crash at any moment leaves either no identity or a whole one, never a torn file.
        descriptor, temporary = tempfile.mkstemp(prefix=".identity-", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return  # somebody else was first; the caller reads theirs
        finally:
            os.unlink(temporary)
        _sync_folder(path.parent)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot create the identity file {path}: {_cause(exc)}") from exc


def _make_folders(folder: Path) -> None:
    # Path.mkdir(parents=True) would give the missing parents the default mode, not 0700.
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(exc: OSError | ValueError) -> str:
    return (exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)).lower()
