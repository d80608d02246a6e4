from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FOUND: _ClassVar[Kind]
    AVERAGE: _ClassVar[Kind]
    REGROUP: _ClassVar[Kind]
    GATHER: _ClassVar[Kind]
FOUND: Kind
AVERAGE: Kind
REGROUP: Kind
GATHER: Kind

class Member(_message.Message):
    __slots__ = ("peer_id", "session", "hosts", "port", "certificate_sha256", "can_reduce")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    CAN_REDUCE_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    session: int
    hosts: _containers.RepeatedScalarFieldContainer[str]
    port: int
    certificate_sha256: bytes
    can_reduce: bool
    def __init__(self, peer_id: _Optional[str] = ..., session: _Optional[int] = ..., hosts: _Optional[_Iterable[str]] = ..., port: _Optional[int] = ..., certificate_sha256: _Optional[bytes] = ..., can_reduce: _Optional[bool] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("peer_id", "samples", "omitted")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    OMITTED_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    samples: int
    omitted: int
    def __init__(self, peer_id: _Optional[str] = ..., samples: _Optional[int] = ..., omitted: _Optional[int] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("start", "stop", "reducer")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    REDUCER_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    reducer: str
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., reducer: _Optional[str] = ...) -> None: ...

class Kept(_message.Message):
    __slots__ = ("start", "stop", "holders")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    holders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., holders: _Optional[_Iterable[str]] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("peer_id", "up_bps", "down_bps")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    UP_BPS_FIELD_NUMBER: _ClassVar[int]
    DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    up_bps: int
    down_bps: int
    def __init__(self, peer_id: _Optional[str] = ..., up_bps: _Optional[int] = ..., down_bps: _Optional[int] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("height", "round", "ballot", "attempt", "previous", "base", "receivers", "contributions", "slices", "kept", "numel", "chunk_elements", "codec", "exchange_s", "stall_s", "links", "expected_s", "assistants")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    RECEIVERS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    NUMEL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_S_FIELD_NUMBER: _ClassVar[int]
    STALL_S_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_S_FIELD_NUMBER: _ClassVar[int]
    ASSISTANTS_FIELD_NUMBER: _ClassVar[int]
    height: int
    round: int
    ballot: int
    attempt: int
    previous: bytes
    base: bytes
    receivers: _containers.RepeatedScalarFieldContainer[str]
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    slices: _containers.RepeatedCompositeFieldContainer[Slice]
    kept: _containers.RepeatedCompositeFieldContainer[Kept]
    numel: int
    chunk_elements: int
    codec: str
    exchange_s: float
    stall_s: float
    links: _containers.RepeatedCompositeFieldContainer[View]
    expected_s: float
    assistants: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, height: _Optional[int] = ..., round: _Optional[int] = ..., ballot: _Optional[int] = ..., attempt: _Optional[int] = ..., previous: _Optional[bytes] = ..., base: _Optional[bytes] = ..., receivers: _Optional[_Iterable[str]] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., slices: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ..., kept: _Optional[_Iterable[_Union[Kept, _Mapping]]] = ..., numel: _Optional[int] = ..., chunk_elements: _Optional[int] = ..., codec: _Optional[str] = ..., exchange_s: _Optional[float] = ..., stall_s: _Optional[float] = ..., links: _Optional[_Iterable[_Union[View, _Mapping]]] = ..., expected_s: _Optional[float] = ..., assistants: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("height", "round", "kind", "previous", "plan", "vector_root", "state_root", "samples", "contributions", "roster")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VECTOR_ROOT_FIELD_NUMBER: _ClassVar[int]
    STATE_ROOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    height: int
    round: int
    kind: Kind
    previous: bytes
    plan: bytes
    vector_root: bytes
    state_root: bytes
    samples: int
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    roster: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, height: _Optional[int] = ..., round: _Optional[int] = ..., kind: _Optional[_Union[Kind, str]] = ..., previous: _Optional[bytes] = ..., plan: _Optional[bytes] = ..., vector_root: _Optional[bytes] = ..., state_root: _Optional[bytes] = ..., samples: _Optional[int] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., roster: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("peer_id", "signature")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    signature: bytes
    def __init__(self, peer_id: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("outcome", "ballot", "provisional", "signatures")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    PROVISIONAL_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    ballot: int
    provisional: bool
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, outcome: _Optional[_Union[Outcome, _Mapping]] = ..., ballot: _Optional[int] = ..., provisional: _Optional[bool] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...

class Lead(_message.Message):
    __slots__ = ("height", "ballot", "closing", "lost", "ended")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    closing: bool
    lost: _containers.RepeatedScalarFieldContainer[str]
    ended: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., closing: _Optional[bool] = ..., lost: _Optional[_Iterable[str]] = ..., ended: _Optional[_Iterable[str]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("height", "ballot", "head", "samples", "up_bps", "down_bps", "views")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    UP_BPS_FIELD_NUMBER: _ClassVar[int]
    DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    head: bytes
    samples: int
    up_bps: int
    down_bps: int
    views: _containers.RepeatedCompositeFieldContainer[View]
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., head: _Optional[bytes] = ..., samples: _Optional[int] = ..., up_bps: _Optional[int] = ..., down_bps: _Optional[int] = ..., views: _Optional[_Iterable[_Union[View, _Mapping]]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("height", "ballot", "samples")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    samples: int
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("height", "ballot")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ...) -> None: ...

class Promise(_message.Message):
    __slots__ = ("height", "ballot", "accepted_ballot", "accepted", "plan", "report")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_BALLOT_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    accepted_ballot: int
    accepted: Outcome
    plan: Plan
    report: Report
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., accepted_ballot: _Optional[int] = ..., accepted: _Optional[_Union[Outcome, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("height", "ballot", "plan", "complete", "vector_root", "state_root", "lost", "held", "absent")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_ROOT_FIELD_NUMBER: _ClassVar[int]
    STATE_ROOT_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    plan: bytes
    complete: bool
    vector_root: bytes
    state_root: bytes
    lost: _containers.RepeatedScalarFieldContainer[str]
    held: _containers.RepeatedCompositeFieldContainer[Run]
    absent: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., plan: _Optional[bytes] = ..., complete: _Optional[bool] = ..., vector_root: _Optional[bytes] = ..., state_root: _Optional[bytes] = ..., lost: _Optional[_Iterable[str]] = ..., held: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., absent: _Optional[_Iterable[str]] = ...) -> None: ...

class Propose(_message.Message):
    __slots__ = ("height", "ballot", "outcome", "holders")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    outcome: Outcome
    holders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., holders: _Optional[_Iterable[str]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("height", "ballot", "outcome", "signature")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    outcome: bytes
    signature: bytes
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., outcome: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("height", "ballot", "promised")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    BALLOT_FIELD_NUMBER: _ClassVar[int]
    PROMISED_FIELD_NUMBER: _ClassVar[int]
    height: int
    ballot: int
    promised: int
    def __init__(self, height: _Optional[int] = ..., ballot: _Optional[int] = ..., promised: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("certificate", "holders")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    certificate: Certificate
    holders: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, certificate: _Optional[_Union[Certificate, _Mapping]] = ..., holders: _Optional[_Iterable[str]] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("member", "height")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    member: Member
    height: int
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., height: _Optional[int] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("height",)
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    height: int
    def __init__(self, height: _Optional[int] = ...) -> None: ...

class Assist(_message.Message):
    __slots__ = ("member", "up_bps", "down_bps")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    UP_BPS_FIELD_NUMBER: _ClassVar[int]
    DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    member: Member
    up_bps: int
    down_bps: int
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., up_bps: _Optional[int] = ..., down_bps: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("height",)
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    height: int
    def __init__(self, height: _Optional[int] = ...) -> None: ...

class Heads(_message.Message):
    __slots__ = ("certificates",)
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedCompositeFieldContainer[Certificate]
    def __init__(self, certificates: _Optional[_Iterable[_Union[Certificate, _Mapping]]] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("lead", "ready", "prepare", "promise", "plan", "report", "propose", "accepted", "refused", "commit", "join", "leave", "hello", "heads", "assist", "progress")
    LEAD_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    PROMISE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    PROPOSE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    ASSIST_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    lead: Lead
    ready: Ready
    prepare: Prepare
    promise: Promise
    plan: Plan
    report: Report
    propose: Propose
    accepted: Accepted
    refused: Refused
    commit: Commit
    join: Join
    leave: Leave
    hello: Hello
    heads: Heads
    assist: Assist
    progress: Progress
    def __init__(self, lead: _Optional[_Union[Lead, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., promise: _Optional[_Union[Promise, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., propose: _Optional[_Union[Propose, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., join: _Optional[_Union[Join, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., heads: _Optional[_Union[Heads, _Mapping]] = ..., assist: _Optional[_Union[Assist, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ...) -> None: ...

class FetchState(_message.Message):
    __slots__ = ("state_root", "leaves")
    STATE_ROOT_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    state_root: bytes
    leaves: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, state_root: _Optional[bytes] = ..., leaves: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchOutcome(_message.Message):
    __slots__ = ("vector_root",)
    VECTOR_ROOT_FIELD_NUMBER: _ClassVar[int]
    vector_root: bytes
    def __init__(self, vector_root: _Optional[bytes] = ...) -> None: ...

class FetchChunks(_message.Message):
    __slots__ = ("start", "stop", "plan")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    plan: bytes
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., plan: _Optional[bytes] = ...) -> None: ...

class FetchChain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("state", "outcome", "chunks", "chain")
    STATE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    state: FetchState
    outcome: FetchOutcome
    chunks: FetchChunks
    chain: FetchChain
    def __init__(self, state: _Optional[_Union[FetchState, _Mapping]] = ..., outcome: _Optional[_Union[FetchOutcome, _Mapping]] = ..., chunks: _Optional[_Union[FetchChunks, _Mapping]] = ..., chain: _Optional[_Union[FetchChain, _Mapping]] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("plan", "slice", "chunk", "contributors", "codec", "elements", "part")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    slice: int
    chunk: int
    contributors: bytes
    codec: str
    elements: int
    part: int
    def __init__(self, plan: _Optional[bytes] = ..., slice: _Optional[int] = ..., chunk: _Optional[int] = ..., contributors: _Optional[bytes] = ..., codec: _Optional[str] = ..., elements: _Optional[int] = ..., part: _Optional[int] = ...) -> None: ...
