from __future__ import annotations

import asyncio
import datetime
import hashlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509

from coordinator_free.tls import ServerCertificate, fetch_pinned
from dht.errors import TimedOut, Unauthenticated, Unreachable


@asynccontextmanager
async def tls_server(certificate: ServerCertificate, folder: Path) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = folder / "server.pem"
    pem.write_bytes(certificate.pem_key + certificate.pem_cert)
    context.load_cert_chain(pem)

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(close, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


def test_a_certificate_is_self_contained_and_vouches_for_no_other() -> None:
    certificate = ServerCertificate.generate()
    parsed = x509.load_pem_x509_certificate(certificate.pem_cert)
    assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.pem_cert.decode())).digest() == (
        certificate.sha256
    )
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["shoal"]
    assert not parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    now = datetime.datetime.now(datetime.UTC)
    assert parsed.not_valid_before_utc < now - datetime.timedelta(days=300)
    assert parsed.not_valid_after_utc > now + datetime.timedelta(days=3000)
    assert "PRIVATE" not in repr(certificate)
    assert ServerCertificate.generate().sha256 != certificate.sha256


async def test_the_promised_certificate_is_fetched(tmp_path: Path) -> None:
    certificate = ServerCertificate.generate()
    async with tls_server(certificate, tmp_path) as port:
        pem = await fetch_pinned("127.0.0.1", port, certificate.sha256, 5.0)
    assert ssl.PEM_cert_to_DER_cert(pem.decode()) == ssl.PEM_cert_to_DER_cert(
        certificate.pem_cert.decode()
    )


async def test_any_other_certificate_is_refused(tmp_path: Path) -> None:
    promised = ServerCertificate.generate()
    async with tls_server(ServerCertificate.generate(), tmp_path) as port:
        with pytest.raises(Unauthenticated, match="another certificate") as refusal:
            await fetch_pinned("127.0.0.1", port, promised.sha256, 5.0, peer_id="12D3Koo")
    assert refusal.value.peer_id == "12D3Koo"


async def test_silence_is_a_timeout() -> None:
    hold = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hold.wait()
        writer.transport.abort()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TimedOut):
            await fetch_pinned("127.0.0.1", port, bytes(32), 0.2)
        hold.set()


async def test_what_does_not_speak_tls_is_unreachable() -> None:
    async def rude(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(rude, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unreachable):
            await fetch_pinned("127.0.0.1", port, bytes(32), 5.0)
    with pytest.raises(Unreachable):
        await fetch_pinned("127.0.0.1", port, bytes(32), 5.0)


@pytest.mark.parametrize("host", ["a" * 70, "nul\0byte", "."])
async def test_a_host_that_is_no_host_is_unreachable(host: str) -> None:
    with pytest.raises(Unreachable):
        await fetch_pinned(host, 443, bytes(32), 5.0)
