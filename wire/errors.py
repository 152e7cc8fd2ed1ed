"""Every error that crosses a process boundary, with a stable code and a retry rule.

AmperageError
├── ConfigError     settings or command line; exit status 78 (EX_CONFIG of sysexits.h), never retried
├── TransferError   link, broker, depot; transient
├── ArtifactError   bytes that are not what was signed; permanent
├── StoreError      disk full, read-only, corrupt; needs an operator
├── DeployError     a release that this node must not serve; permanent for the release
└── InferenceError  one request; carries an HTTP status

`code` is a wire string: it appears in reports, journals and HTTP bodies, and is never renamed.
"""

from enum import StrEnum
from typing import ClassVar


class Retry(StrEnum):
    """What a caller may do with a failure, so that nobody guesses."""

    NEVER = "never"
    LATER = "later"
    OPERATOR = "operator"


class Code(StrEnum):
    """Stable names of faults. Values are never renamed or reused."""

    BAD_SETTINGS = "bad_settings"
    # transfer
    BROKER_UNREACHABLE = "broker_unreachable"
    DOCUMENT_MISSING = "document_missing"
    FETCH_STALLED = "fetch_stalled"
    FRAME_MISMATCH = "frame_mismatch"
    RUNTIME_UNREACHABLE = "runtime_unreachable"
    # artifact
    BAD_DOCUMENT = "bad_document"
    BAD_INDEX = "bad_index"
    BAD_MANIFEST = "bad_manifest"
    BAD_SECTION = "bad_section"
    BAD_SIGNATURE = "bad_signature"
    BASE_MISMATCH = "base_mismatch"
    DIGEST_MISMATCH = "digest_mismatch"
    UNKNOWN_SIGNER = "unknown_signer"
    UNSUPPORTED = "unsupported"
    # store
    CORRUPT = "corrupt"
    IO_ERROR = "io_error"
    NO_SPACE = "no_space"
    # deploy
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    CANCELLED = "cancelled"
    DEADLINE_PASSED = "deadline_passed"
    DECODER_CRASHED = "decoder_crashed"
    GOLDEN_MISMATCH = "golden_mismatch"
    ILLEGAL_TRANSITION = "illegal_transition"
    LOAD_FAILED = "load_failed"
    PROBE_CRASHED = "probe_crashed"
    PROBE_OUT_OF_MEMORY = "probe_out_of_memory"
    PROBE_TIMEOUT = "probe_timeout"
    REGRESSION = "regression"
    STALE_GENERATION = "stale_generation"
    SUPERSEDED = "superseded"
    UNFIT_NODE = "unfit_node"
    WRONG_NODE = "wrong_node"
    # inference
    BAD_REQUEST = "bad_request"
    CONTEXT_EXCEEDED = "context_exceeded"
    INTERNAL = "internal"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_READY = "not_ready"
    OVERLOADED = "overloaded"


class AmperageError(Exception):
    """Root of the tree. `message` says what was seen and what the operator does next."""

    retry: ClassVar[Retry] = Retry.NEVER
    exit_status: ClassVar[int] = 1

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ConfigError(AmperageError):
    """Settings that cannot be used; systemd must not restart into them (RestartPreventExitStatus=78)."""

    exit_status: ClassVar[int] = 78

    def __init__(self, message: str, code: Code = Code.BAD_SETTINGS) -> None:
        super().__init__(code, message)


class TransferError(AmperageError):
    """The link, the broker or the depot failed; trying again later can succeed."""

    retry: ClassVar[Retry] = Retry.LATER


class ArtifactError(AmperageError):
    """Bytes that are not what was signed, or that break a format; the same bytes will always fail."""


class StoreError(AmperageError):
    """The node's disk refused; an operator has to make room or replace it."""

    retry: ClassVar[Retry] = Retry.OPERATOR


class DeployError(AmperageError):
    """This release must not serve on this node."""


class InferenceError(AmperageError):
    """One request failed; `http_status` is what the client sees."""

    def __init__(self, code: Code, message: str, http_status: int, retry_after_s: float | None = None) -> None:
        super().__init__(code, message)
        self.http_status = http_status
        self.retry_after_s = retry_after_s
