"""A short proof of who is calling, bound to who is called.

A server shows its certificate, whose fingerprint stands in its signed record; the caller has none,
and shows a token instead: its peer id, the callee's, the run and an expiry, signed with its Ed25519
identity. Guarantees that nobody can be impersonated, and that a token is worthless to anybody but
its callee: a hostile callee cannot call a third peer with it.

Not guaranteed: that the caller belongs to the run (that is the roster's business), or that a token
is used once: within its lifetime the callee, who alone sees it inside TLS, could only replay it to
itself. Clocks must agree to within the lifetime, one minute by default.
"""

from __future__ import annotations

import math
from typing import Final

from google.protobuf.message import DecodeError

from coordinator_free.proto import token_pb2
from dht.errors import Unauthenticated
from dht.identity import Identity, verify

DOMAIN: Final = b"shoal/token/v1"
MAX_BYTES: Final = 512
MAX_TTL_S: Final = 300.0
TTL_S: Final = 60.0


def mint(identity: Identity, callee: str, run_id: str, now: float, ttl_s: float = TTL_S) -> bytes:
    """Make a token for calls to one peer.

    Args:
        identity: who calls.
        callee: peer id of who is called.
        run_id: the run that the call is about.
        now: unix seconds.
        ttl_s: seconds until it is worthless; servers refuse more than `MAX_TTL_S`.

    Returns:
        A serialised `Token`, at most `MAX_BYTES` long.
    """
    claims = token_pb2.TokenClaims(
        caller=identity.peer_id, callee=callee, run_id=run_id, expires_at=now + ttl_s
    ).SerializeToString(deterministic=True)
    token = token_pb2.Token(claims=claims, signature=identity.sign(DOMAIN, claims))
    return token.SerializeToString(deterministic=True)


def check(token: bytes, callee: str, run_id: str, now: float) -> str:
    """Find out who calls.

    Args:
        token: what the caller sent; any bytes.
        callee: our own peer id.
        run_id: the run that we serve.
        now: unix seconds.

    Returns:
        The caller's peer id.

    Raises:
        Unauthenticated: over-long, malformed, for another callee or run, expired, valid for more
            than `MAX_TTL_S`, or not signed by the caller that it names. The error's `peer_id` is
            empty where nothing was proven; a token of wrong lifetime has a good signature.
    """
    if len(token) > MAX_BYTES:
        raise Unauthenticated("", f"a token of {len(token)} bytes, more than {MAX_BYTES}")
    try:
        sealed = token_pb2.Token.FromString(token)
        claims = token_pb2.TokenClaims.FromString(sealed.claims)
    except DecodeError as exc:
        raise Unauthenticated("", "a malformed token") from exc
    if claims.callee != callee:
        raise Unauthenticated("", "a token for another peer")
    if claims.run_id != run_id:
        raise Unauthenticated("", "a token for another run")
    if not math.isfinite(claims.expires_at):
        raise Unauthenticated("", "a token without an expiry")
    if not verify(claims.caller, DOMAIN, sealed.claims, sealed.signature):
        raise Unauthenticated("", "a token with a bad signature")
    if claims.expires_at <= now:
        late_s = now - claims.expires_at
        raise Unauthenticated(
            claims.caller, f"a token that expired {late_s:.0f} s ago; are both clocks right?"
        )
    if claims.expires_at > now + MAX_TTL_S:
        raise Unauthenticated(
            claims.caller,
            f"a token valid for more than {MAX_TTL_S:.0f} s; are both clocks right?",
        )
    return claims.caller
