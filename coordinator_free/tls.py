"""TLS without certificate authorities: the fingerprint is in the server's signed peer record.

Each process makes a self-signed certificate for itself at start and keeps the key in memory. A
client first fetches the certificate that an endpoint shows, compares its SHA-256 with the record's,
and only then hands it to gRPC as the one trusted root. Guarantees that a channel made with what
`fetch_pinned` returned ends at the holder of that certificate's private key, so at whoever signed
the record. Dates and names inside the certificate mean nothing, but gRPC insists on checking them:
the name is always "shoal" and the dates are wide enough for a wrong clock.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ssl
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from dht.errors import TimedOut, Unauthenticated, Unreachable

SERVER_NAME: Final = "shoal"
_BACKDATED: Final = datetime.timedelta(days=365)
_LIFETIME: Final = datetime.timedelta(days=3650)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerCertificate:
    """A self-signed ECDSA P-256 certificate and its private key. Never written to disk.

    Attributes:
        pem_cert: the certificate, PEM.
        pem_key: the private key, PEM (PKCS #8, not encrypted).
        sha256: SHA-256 of the certificate's DER encoding, 32 bytes, for the peer record.
    """

    pem_cert: bytes
    pem_key: bytes = field(repr=False)
    sha256: bytes

    @classmethod
    def generate(cls) -> ServerCertificate:
        """Make a fresh one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
        today = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - _BACKDATED)
            .not_valid_after(today + _LIFETIME)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), False)
            # Trusted as itself alone: it must not be able to vouch for another certificate.
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .sign(key, hashes.SHA256())
        )
        return cls(
            pem_cert=certificate.public_bytes(Encoding.PEM),
            pem_key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            sha256=certificate.fingerprint(hashes.SHA256()),
        )


async def fetch_pinned(
    host: str, port: int, sha256: bytes, timeout_s: float, *, peer_id: str = ""
) -> bytes:
    """Fetch the certificate of an endpoint, and believe it only if it is the expected one.

    Args:
        host: name or address.
        port: TCP port.
        sha256: SHA-256 of the expected certificate's DER encoding, 32 bytes.
        timeout_s: for connecting and the TLS handshake together.
        peer_id: who is expected there; for the errors.

    Returns:
        The certificate, PEM.

    Raises:
        Unauthenticated: the endpoint shows another certificate.
        TimedOut: no handshake within the time: filtered, stopped or overloaded.
        Unreachable: no connection, or what listens there does not speak TLS.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # compared below, with what the peer itself has signed
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(
                host, port, ssl=context, server_hostname=SERVER_NAME
            )
    except TimeoutError as exc:
        raise TimedOut(peer_id, f"no TLS handshake from {host} port {port}") from exc
    except (OSError, ValueError) as exc:  # ValueError: a host name that no resolver accepts
        raise Unreachable(peer_id, f"cannot connect to {host} port {port}: {exc}") from exc
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        # Not close(): a polite TLS shutdown would wait for the other side, perhaps for ever.
        writer.transport.abort()
    if der is None or hashlib.sha256(der).digest() != sha256:
        raise Unauthenticated(peer_id, f"{host} port {port} shows another certificate")
    return ssl.DER_cert_to_PEM_cert(der).encode()
