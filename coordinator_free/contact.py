"""Where and as whom a peer can be dialled.

A `Contact` is what is left of a verified peer record once everything but the dialling is stripped
away. It guarantees nothing about the partner by itself: the certificate's fingerprint is believed
because the record that carried it was signed by `peer_id`, and `transport.Client` refuses to talk
to an endpoint that shows any other certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

SHA256_BYTES = 32
MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class Contact:
    """One dialable gRPC endpoint.

    Attributes:
        peer_id: base58 libp2p peer id of whoever must answer.
        hosts: addresses or names, best first; tried in this order. Empty: cannot be dialled.
        port: TCP port, the same on every host.
        certificate_sha256: SHA-256 of the DER certificate that the endpoint must show, 32 bytes.

    Raises:
        ValueError: a field that no correct peer record can hold.
    """

    peer_id: str
    hosts: tuple[str, ...]
    port: int
    certificate_sha256: bytes

    def __post_init__(self) -> None:
        if not self.peer_id:
            raise ValueError("contact without a peer id")
        if not 1 <= self.port <= MAX_PORT:
            raise ValueError(f"contact port {self.port} is outside 1..{MAX_PORT}")
        if len(self.certificate_sha256) != SHA256_BYTES:
            raise ValueError(
                f"contact certificate digest has {len(self.certificate_sha256)} bytes, "
                f"not {SHA256_BYTES}"
            )
