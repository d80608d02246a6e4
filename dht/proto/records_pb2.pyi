from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    KIND_PEER: _ClassVar[Kind]
    KIND_RUN: _ClassVar[Kind]
KIND_UNSPECIFIED: Kind
KIND_PEER: Kind
KIND_RUN: Kind

class Sealed(_message.Message):
    __slots__ = ("schema", "kind", "owner", "body", "signature")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    schema: int
    kind: Kind
    owner: str
    body: bytes
    signature: bytes
    def __init__(self, schema: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., owner: _Optional[str] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("run_id", "maddrs", "hosts", "port", "certificate_sha256", "can_reduce", "upload_bps", "download_bps", "round", "samples", "head", "leaving", "expires_at")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MADDRS_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    CAN_REDUCE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BPS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_BPS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    maddrs: _containers.RepeatedScalarFieldContainer[str]
    hosts: _containers.RepeatedScalarFieldContainer[str]
    port: int
    certificate_sha256: bytes
    can_reduce: bool
    upload_bps: float
    download_bps: float
    round: int
    samples: int
    head: bytes
    leaving: bool
    expires_at: float
    def __init__(self, run_id: _Optional[str] = ..., maddrs: _Optional[_Iterable[str]] = ..., hosts: _Optional[_Iterable[str]] = ..., port: _Optional[int] = ..., certificate_sha256: _Optional[bytes] = ..., can_reduce: _Optional[bool] = ..., upload_bps: _Optional[float] = ..., download_bps: _Optional[float] = ..., round: _Optional[int] = ..., samples: _Optional[int] = ..., head: _Optional[bytes] = ..., leaving: _Optional[bool] = ..., expires_at: _Optional[float] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("run_file", "created_at")
    RUN_FILE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    run_file: bytes
    created_at: float
    def __init__(self, run_file: _Optional[bytes] = ..., created_at: _Optional[float] = ...) -> None: ...
