"""A proof of who is calling, bound to who is called and to the connection's certificate.

A server shows its certificate, whose fingerprint stands in its signed record; the caller has none,
and shows a token instead: its peer id, the callee's, the run and the fingerprint of the callee's
certificate, signed with its Ed25519 identity. Guarantees that nobody can be impersonated, and that
a token is worthless to anybody but its callee: a hostile callee cannot call a third peer with it.
It is worthless as soon as that certificate is, which is made anew at each start of the callee.

There is no time in it, so rounds go on whatever the clocks of the machines say. Not guaranteed:
that the caller belongs to the run (that is the roster's business), or that a token is used once:
the callee, who alone sees it inside TLS, could only replay it to itself.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from coordinator_free.proto import token_pb2
from dht.errors import Unauthenticated
from dht.identity import Identity, verify

DOMAIN: Final = b"shoal/token/v1"
MAX_BYTES: Final = 512


def mint(identity: Identity, callee: str, run_id: str, certificate_sha256: bytes) -> bytes:
    """Make a token for calls to one peer.

    Args:
        identity: who calls.
        callee: peer id of who is called.
        run_id: the run that the call is about.
        certificate_sha256: of the certificate that the callee has shown, 32 bytes.

    Returns:
        A serialised `Token`, at most `MAX_BYTES` long.
    """
    claims = token_pb2.TokenClaims(
        caller=identity.peer_id,
        callee=callee,
        run_id=run_id,
        certificate_sha256=certificate_sha256,
    ).SerializeToString(deterministic=True)
    token = token_pb2.Token(claims=claims, signature=identity.sign(DOMAIN, claims))
    return token.SerializeToString(deterministic=True)


def check(token: bytes, callee: str, run_id: str, certificate_sha256: bytes) -> str:
    """Find out who calls.

    Args:
        token: what the caller sent; any bytes.
        callee: our own peer id.
        run_id: the run that we serve.
        certificate_sha256: of our own certificate.

    Returns:
        The caller's peer id.

    Raises:
        Unauthenticated: over-long, malformed, for another callee, run or certificate, or not signed
            by the caller that it names. The error's `peer_id` is empty: nothing was proven.
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
    if claims.certificate_sha256 != certificate_sha256:
        raise Unauthenticated("", "a token for another session of this peer")
    if not verify(claims.caller, DOMAIN, sealed.claims, sealed.signature):
        raise Unauthenticated("", "a token with a bad signature")
    return claims.caller
