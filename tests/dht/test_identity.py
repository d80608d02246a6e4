from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht.errors import ConfigError
from dht.identity import Identity, public_key, verify

ED25519_FRAME = b"\x08\x01\x12\x40"


def test_peer_id_is_that_of_libp2p() -> None:
    # Test vector of libp2p's specs/peer-ids/peer-ids.md, "Ed25519".
    public = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
    peer_id = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
    assert public_key(peer_id) == public


def test_file_is_libp2ps_private_key(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    identity = Identity.load_or_create(path)
    raw = path.read_bytes()
    assert raw[:4] == ED25519_FRAME
    assert raw[36:] == public_key(identity.peer_id)
    assert identity.peer_id.startswith("12D3KooW")


def test_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "identity"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(path) == first == Identity.load(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["identity"]


def test_generated_identities_differ_and_hide_their_key() -> None:
    one, other = Identity.generate(), Identity.generate()
    assert one != other
    assert "PrivateKey" not in repr(one)


def test_save_never_overwrites(tmp_path: Path) -> None:
    identity = Identity.generate()
    identity.save(tmp_path / "identity")
    assert Identity.load(tmp_path / "identity") == identity
    with pytest.raises(ConfigError, match="never overwritten"):
        Identity.generate().save(tmp_path / "identity")


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halves_swapped(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + raw[36:] + raw[4:36])


def rsa(path: Path) -> None:
    path.write_bytes(b"\x08\x00\x12\x40" + b"r" * 64)


def group_readable(path: Path) -> None:
    path.chmod(0o640)


def world_readable(path: Path) -> None:
    path.chmod(0o604)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (damaged, "damaged"),
        (longer, "damaged"),
        (empty, "damaged"),
        (halves_swapped, "do not belong together"),
        (rsa, "not Ed25519"),
        (group_readable, "chmod 600"),
        (world_readable, "chmod 600"),
        (a_folder, "regular file"),
        (a_pipe, "regular file"),
        (Path.unlink, "does not exist"),
    ],
)
def test_unusable_file_is_one_line_that_says_how_to_mend_it(
    tmp_path: Path, spoil: object, says: str
) -> None:
    path = tmp_path / "identity"
    Identity.load_or_create(path)
    assert callable(spoil)
    spoil(path)
    with pytest.raises(ConfigError, match=says) as caught:
        Identity.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_uncreatable_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot"):
        Identity.load_or_create(tmp_path / "file" / "identity")


def test_a_dangling_link_is_not_silently_replaced(tmp_path: Path) -> None:
    (tmp_path / "identity").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="does not exist"):
        Identity.load_or_create(tmp_path / "identity")


def test_signature_holds_for_its_owner_domain_and_message_only(identity: Identity) -> None:
    signature = identity.sign(b"record", b"message")
    assert len(signature) == 64
    assert verify(identity.peer_id, b"record", b"message", signature)
    assert not verify(identity.peer_id, b"token", b"message", signature)
    assert not verify(identity.peer_id, b"record", b"massage", signature)
    assert not verify(Identity.generate().peer_id, b"record", b"message", signature)
    # The boundary between domain and message is part of what is signed.
    assert not verify(identity.peer_id, b"recordm", b"essage", signature)


@given(st.text(max_size=80), st.binary(max_size=80))
def test_hostile_ids_and_signatures_are_false_not_errors(peer_id: str, signature: bytes) -> None:
    assert not verify(peer_id, b"record", b"message", signature)


@given(st.binary(min_size=38, max_size=38))
def test_only_one_spelling_of_an_id_is_accepted(raw: bytes) -> None:
    peer_id = Identity.generate().peer_id
    position = raw[0] % len(peer_id)
    mangled = peer_id[:position] + chr(raw[1]) + peer_id[position + 1 :]
    key = public_key(mangled)
    assert key is None or mangled == peer_id or key != public_key(peer_id)
    assert public_key("1" + peer_id) is None
    assert public_key(peer_id + "1") is None
    assert public_key("z" * 52) is None
