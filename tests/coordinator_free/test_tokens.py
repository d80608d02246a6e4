from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free.proto import token_pb2
from coordinator_free.tokens import DOMAIN, MAX_BYTES, check, mint
from dht.errors import Unauthenticated
from dht.identity import Identity

RUN = "0123456789abcdef0123456789abcdef01234567"
CERTIFICATE = bytes(range(32))
CALLER = Identity.generate()
CALLEE = Identity.generate()


def test_a_token_names_its_caller() -> None:
    token = mint(CALLER, CALLEE.peer_id, RUN, CERTIFICATE)
    assert len(token) <= MAX_BYTES
    assert check(token, CALLEE.peer_id, RUN, CERTIFICATE) == CALLER.peer_id


def test_a_token_is_for_one_callee_one_run_and_one_session() -> None:
    token = mint(CALLER, CALLEE.peer_id, RUN, CERTIFICATE)
    with pytest.raises(Unauthenticated, match="for another peer"):
        check(token, CALLER.peer_id, RUN, CERTIFICATE)
    with pytest.raises(Unauthenticated, match="for another run"):
        check(token, CALLEE.peer_id, "f" * 40, CERTIFICATE)
    with pytest.raises(Unauthenticated, match="for another session"):
        check(token, CALLEE.peer_id, RUN, bytes(32))


def test_nobody_can_sign_for_another() -> None:
    claims = token_pb2.TokenClaims(
        caller=CALLER.peer_id, callee=CALLEE.peer_id, run_id=RUN, certificate_sha256=CERTIFICATE
    ).SerializeToString()
    for signature in (
        Identity.generate().sign(DOMAIN, claims),
        CALLER.sign(b"shoal/another-purpose", claims),
        bytes(64),
        b"",
    ):
        token = token_pb2.Token(claims=claims, signature=signature).SerializeToString()
        with pytest.raises(Unauthenticated, match="bad signature") as refusal:
            check(token, CALLEE.peer_id, RUN, CERTIFICATE)
        assert refusal.value.peer_id == ""


def test_an_over_long_token_is_refused_unread() -> None:
    with pytest.raises(Unauthenticated, match="513 bytes"):
        check(bytes(513), CALLEE.peer_id, RUN, CERTIFICATE)


@given(junk=st.binary(max_size=MAX_BYTES))
@settings(deadline=None)
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(Unauthenticated):
        check(junk, CALLEE.peer_id, RUN, CERTIFICATE)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(deadline=None)
def test_no_bit_of_a_token_can_be_changed(place: int, bit: int) -> None:
    token = bytearray(mint(CALLER, CALLEE.peer_id, RUN, CERTIFICATE))
    token[place % len(token)] ^= 1 << bit
    with pytest.raises(Unauthenticated):
        check(bytes(token), CALLEE.peer_id, RUN, CERTIFICATE)
