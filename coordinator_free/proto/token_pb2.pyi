from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class TokenClaims(_message.Message):
    __slots__ = ("caller", "callee", "run_id", "certificate_sha256")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    CALLEE_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    caller: str
    callee: str
    run_id: str
    certificate_sha256: bytes
    def __init__(self, caller: _Optional[str] = ..., callee: _Optional[str] = ..., run_id: _Optional[str] = ..., certificate_sha256: _Optional[bytes] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("claims", "signature")
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    claims: bytes
    signature: bytes
    def __init__(self, claims: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...
