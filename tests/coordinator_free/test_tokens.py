from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free.proto import token_pb2
from coordinator_free.tokens import DOMAIN, MAX_BYTES, MAX_TTL_S, check, mint
from dht.errors import Unauthenticated
from dht.identity import Identity

RUN = "0123456789abcdef0123456789abcdef01234567"
NOW = 1_800_000_000.0
CALLER = Identity.generate()
CALLEE = Identity.generate()


def test_a_fresh_token_names_its_caller() -> None:
    token = mint(CALLER, CALLEE.peer_id, RUN, NOW)
    assert len(token) <= MAX_BYTES
    assert check(token, CALLEE.peer_id, RUN, NOW) == CALLER.peer_id
    assert check(token, CALLEE.peer_id, RUN, NOW + 59) == CALLER.peer_id


def test_a_token_is_for_one_callee_one_run_and_one_minute() -> None:
    token = mint(CALLER, CALLEE.peer_id, RUN, NOW)
    with pytest.raises(Unauthenticated, match="for another peer"):
        check(token, CALLER.peer_id, RUN, NOW)
    with pytest.raises(Unauthenticated, match="for another run"):
        check(token, CALLEE.peer_id, "f" * 40, NOW)
    with pytest.raises(Unauthenticated, match="expired 0 s ago"):
        check(token, CALLEE.peer_id, RUN, NOW + 60)
    with pytest.raises(Unauthenticated, match="expired 40 s ago"):
        check(token, CALLEE.peer_id, RUN, NOW + 100)


def test_a_long_lived_token_is_refused_though_it_is_signed() -> None:
    check(mint(CALLER, CALLEE.peer_id, RUN, NOW, MAX_TTL_S), CALLEE.peer_id, RUN, NOW)
    token = mint(CALLER, CALLEE.peer_id, RUN, NOW, MAX_TTL_S + 1)
    with pytest.raises(Unauthenticated, match="valid for more than 300 s") as refusal:
        check(token, CALLEE.peer_id, RUN, NOW)
    assert refusal.value.peer_id == CALLER.peer_id


@pytest.mark.parametrize("expiry", [math.nan, math.inf, -math.inf])
def test_an_expiry_that_is_no_time_is_refused(expiry: float) -> None:
    token = mint(CALLER, CALLEE.peer_id, RUN, NOW, expiry)
    with pytest.raises(Unauthenticated, match="without an expiry"):
        check(token, CALLEE.peer_id, RUN, NOW)


def test_nobody_can_sign_for_another() -> None:
    claims = token_pb2.TokenClaims(
        caller=CALLER.peer_id, callee=CALLEE.peer_id, run_id=RUN, expires_at=NOW + 60
    ).SerializeToString()
    for signature in (
        Identity.generate().sign(DOMAIN, claims),
        CALLER.sign(b"shoal/another-purpose", claims),
        bytes(64),
        b"",
    ):
        token = token_pb2.Token(claims=claims, signature=signature).SerializeToString()
        with pytest.raises(Unauthenticated, match="bad signature") as refusal:
            check(token, CALLEE.peer_id, RUN, NOW)
        assert refusal.value.peer_id == ""


def test_an_over_long_token_is_refused_unread() -> None:
    with pytest.raises(Unauthenticated, match="513 bytes"):
        check(bytes(513), CALLEE.peer_id, RUN, NOW)


@given(junk=st.binary(max_size=MAX_BYTES))
@settings(deadline=None)
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(Unauthenticated):
        check(junk, CALLEE.peer_id, RUN, NOW)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(deadline=None)
def test_no_bit_of_a_token_can_be_changed(place: int, bit: int) -> None:
    token = bytearray(mint(CALLER, CALLEE.peer_id, RUN, NOW))
    token[place % len(token)] ^= 1 << bit
    with pytest.raises(Unauthenticated):
        check(bytes(token), CALLEE.peer_id, RUN, NOW)
