"""What agent and runtime say to each other: `serving.json` on disk and the bodies of the admin socket.

`serving.json` in the store is the one truth of what serves. The agent writes it (atomic rename); the runtime reads it
at start and whenever `POST /v2/repository/models/{model}/load` nudges it.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from wire.digest import Digest
from wire.documents import Command, Report, SchemaOne
from wire.manifest import Name
from wire.messages import Counter, Text

PREPACK_FACTOR = 2.3
"""Bytes of a prepack cache per byte of int4 weights and session: the weights, and once more as kernels want them, with
sums per block (measured with onnxruntime 1.32: 1.85 to 2.22)."""
INTEGER_PREPACK_FACTOR = 3.4
"""Of a session that reads with 8-bit matrices: 2.95 to 3.0, where no head stays as it is 3.3."""
MODEL_SESSIONS = 2
"""Most that a model has, each with packed weights of its own: one decodes, one reads prompts."""


def prepack_factor(sessions: int) -> float:
    """Bytes of a prepack cache per byte of weights, at most; of two sessions the second reads."""
    return 0.0 if sessions == 0 else PREPACK_FACTOR + (sessions - 1) * INTEGER_PREPACK_FACTOR


class IntegerReading(StrEnum):
    """Which matrices a session that reads prompts has as 8-bit integers, with activations that are (docs/adr/0015)."""

    ALL = "all"
    MLP = "mlp"
    """Attention's stay as they are."""


class ExecutionOptions(Command):
    """How to run a model on this node; chosen by the probe."""

    provider: str = "CPUExecutionProvider"
    library: str | None = None
    """Name of the plug-in library in the settings of the runtime that has the provider; None: it is built in."""
    threads: Annotated[int, Field(ge=1, le=1024)]
    spinning: bool = False
    session_config: dict[str, str] = {}
    flash_attention: bool = True
    """Attention by tiles, which onnxruntime does of itself; False: by whole matrices, with more memory for a step."""
    reading_config: dict[str, str] | None = None
    """Settings of a second session that reads long pieces of prompts, with a packed copy of the weights of its own;
    None: one session does both."""
    reading_tokens: Annotated[int, Field(ge=1, le=4096)] = 32
    """From how many tokens on a piece is long."""
    integer_reading: IntegerReading | None = None
    """The matrices of that session which are 8-bit integers; None: it has those that decode."""


class ServingModel(Command):
    """One model that serves. The directory is `versions/<decoded>` in the store."""

    model: Name
    release: Digest
    version: str
    decoded: Digest
    options: ExecutionOptions
    prepack: Digest | None = None
    """Digest of the prepack cache, or None: served from the store, packed on the heap."""
    cpu: str
    """CPU that options and cache hold for, host description of runtime/cpu.py."""
    onnxruntime: str


class Serving(Command):
    """`serving.json`."""

    schema_: SchemaOne = 1
    models: Annotated[tuple[ServingModel, ...], Field(max_length=64)] = ()


class ProbeVerdict(StrEnum):
    """How a probe ended; everything but PASSED keeps the candidate from serving."""

    PASSED = "passed"
    GOLDEN_MISMATCH = "golden_mismatch"
    LOAD_FAILED = "load_failed"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"


class TrialOutcome(StrEnum):
    """What became of one way to run a version."""

    CHOSEN = "chosen"
    BEATEN = "beaten"
    WRONG = "wrong"
    """Its golden vectors failed."""
    FAILED = "failed"
    """It did not load, or ended the process that tried it."""
    SKIPPED = "skipped"
    """There was no time for it."""


class Trial(Report):
    """One way to run a version that a probe looked at; figures are None where it was not measured."""

    name: Text
    options: ExecutionOptions
    outcome: TrialOutcome
    detail: Text = ""
    tokens_per_s: float | None = None
    read_tokens_per_s: float | None = None
    ratio: float | None = None
    """Its speed over that of the best way before it, measured in turns."""
    golden_error: float | None = None
    heap_bytes: Counter | None = None
    load_s: float | None = None


class ProbeRequest(Command):
    """Body of `POST /v2/repository/models/{model}/probe`; both are directories `versions/<decoded>` of the store."""

    candidate: Digest
    incumbent: Digest | None = None
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 120.0
    prepack: bool = True
    """Whether packed weights of the candidate may be kept on the disk."""


class ProbeReport(Report):
    """Answer to a ProbeRequest; figures are None when the probe did not get that far."""

    schema_: SchemaOne = 1
    verdict: ProbeVerdict
    detail: Text = ""
    golden_rows: Counter = 0
    golden_error: float | None = None
    """Worst row's RMS difference of logits to the reference, as a share of the reference's standard deviation."""
    golden_tolerance: float | None = None
    top1_agreement: float | None = None
    tokens_per_s: float | None = None
    incumbent_tokens_per_s: float | None = None
    load_s: float | None = None
    peak_rss_bytes: Counter | None = None
    options: ExecutionOptions | None = None
    trials: Annotated[tuple[Trial, ...], Field(max_length=64)] = ()
    """Ways that were looked at, in order."""
    prepack: Digest | None = None
    """Of the prepack cache, from which the golden vectors passed, too."""
    prepack_bytes: Counter | None = None
    prepack_detail: Text = ""
    """Why there is none."""
    cpu: str = ""
    onnxruntime: str = ""


class ModelStats(Report):
    """One row of `GET /v2/models/stats`; counters since the load, latencies over the last 256 requests."""

    model: Name
    version: str
    decoded: Digest
    packed: bool = False
    """Whether its weights are mapped from the prepack cache."""
    stale: Text = ""
    """Why it does not run as serving.json says, so that it should be probed again; empty when it does."""
    requests: Counter
    failures: Counter
    prompt_tokens: Counter
    cached_tokens: Counter = 0
    """Of them, those that were copied from the prefix cache instead of read."""
    completion_tokens: Counter
    drafted_tokens: Counter = 0
    accepted_tokens: Counter = 0
    """Of the drafted ones; they are in `completion_tokens`, too."""
    busy_s: Annotated[float, Field(ge=0)]
    """Seconds that the engine thread spent inside steps."""
    active: Counter
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    first_token_p50_s: float | None = None
    tokens_per_s: float | None = None
    kv_budget_bytes: Counter | None = None
    """Bound of the memory for keys and values, kept prefixes included."""
    kv_held_bytes: Counter | None = None
    """What of it is reserved or filled."""


class RuntimeStats(Report):
    """Body of `GET /v2/models/stats` on the admin socket."""

    schema_: SchemaOne = 1
    pid: Counter
    started_s: float
    models: tuple[ModelStats, ...] = ()
