"""Payloads of the MQTT topics: reports, commands and the binary frame message."""

import base64
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from wire.bitmap import Bitmap
from wire.digest import Digest
from wire.documents import Command, Report, SchemaOne
from wire.errors import ArtifactError, Code
from wire.manifest import FRAME_BYTES, Name

Counter = Annotated[int, Field(ge=0)]
BootId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$", strict=True)]
Text = Annotated[str, StringConstraints(max_length=2000, strict=True)]


class State(StrEnum):
    """Where a release is on a node (docs/design.md section 5; the table is agent/lifecycle.py)."""

    ADMITTED = "admitted"
    FETCHING = "fetching"
    DECODING = "decoding"
    PROBING = "probing"
    STAGED = "staged"
    ACTIVATING = "activating"
    SOAKING = "soaking"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Status(Report):
    """Retained on `status`; the last will is the same with online = False."""

    schema_: SchemaOne = 1
    node: Name
    online: bool
    boot_id: BootId
    session: Counter
    """Counts connects of this boot, so that a late will can be told from a new life."""


class DesiredModel(Command):
    """One model that the node should run."""

    model: Name
    release: Digest
    """SHA-256 of the signed release document."""


class Desired(Command):
    """Payload of the signed desired state (role `desired`); models that are absent are to be unloaded."""

    schema_: SchemaOne = 1
    node: Name
    generation: Annotated[int, Field(ge=1)]
    models: Annotated[tuple[DesiredModel, ...], Field(max_length=64)]


class ModelReport(Report):
    """Where one model stands: the last release tried, and what serves."""

    model: Name
    release: Digest
    version: str
    state: State
    reason: str | None = None
    """A wire/errors.py Code when the state is failed, rolled_back or cancelled."""
    detail: Text | None = None
    variant: str | None = None
    artifact: Digest | None = None
    delta: bool | None = None
    frames_verified: Counter | None = None
    frames_total: Counter | None = None
    serving: Digest | None = None
    """Decoded digest of the version that answers now."""
    serving_version: str | None = None


class Rejection(Report):
    """A command that was refused; typed, so that a controller need not read logs."""

    topic: Text
    code: str
    detail: Text


class Reported(Report):
    """Retained on `reported`."""

    schema_: SchemaOne = 1
    node: Name
    boot_id: BootId
    generation: Counter
    """Highest generation of desired state that was accepted."""
    models: tuple[ModelReport, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    """The latest refusals, newest last, at most 16."""
    frames_refused: Counter = 0
    """Frames of this boot whose hash did not match."""


class Numbered(Report):
    """Base of reports that are kept until acknowledged."""

    schema_: SchemaOne = 1
    node: Name
    boot_id: BootId
    seq: Annotated[int, Field(ge=1)]
    first: Annotated[int, Field(ge=1)]
    """Lowest seq of this boot that the node still held: what lies between the last ack and it was dropped."""
    time_s: float
    """Node's wall clock, seconds since 1970."""


class Event(Numbered):
    """One lifecycle transition."""

    model: Name
    release: Digest
    version: str
    before: State | None
    after: State
    reason: str | None = None
    detail: Text | None = None
    data: dict[str, float | int | str | bool] = {}


class Method(StrEnum):
    """How an energy figure came about."""

    MEASURED = "measured"
    ESTIMATED = "estimated"


class EnergyFigure(Report):
    """Energy of a window; absent when unknown, never zero for unknown."""

    source: Text
    """For example `xgene-hwmon:CPU power+IO power`, `powercap:package-0`, `estimate:busy-time`."""
    method: Method
    energy_j: Annotated[float, Field(ge=0)]
    power_w: Annotated[float, Field(ge=0)]
    coverage: Annotated[float, Field(ge=0, le=1)]
    """Share of the window with samples."""
    samples: Counter


class HealthFigures(Report):
    """What the machine says of itself; a figure that the machine does not give is None."""

    cpu_busy: float | None = None
    """Share of all cores' time, 0..1."""
    load_1min: float | None = None
    memory_available_bytes: Counter | None = None
    memory_total_bytes: Counter | None = None
    memory_pressure_10s: float | None = None
    """`some avg10` of /proc/pressure/memory, per cent."""
    temperature_c: float | None = None
    disk_free_bytes: Counter | None = None
    link_rx_bytes: Counter | None = None
    """Bytes received over MQTT in the window."""
    link_tx_bytes: Counter | None = None
    link_reconnects: Counter = 0
    agent_restarts: Counter = 0
    runtime_restarts: Counter = 0
    agent_pss_bytes: Counter | None = None
    runtime_pss_bytes: Counter | None = None


class InferenceFigures(Report):
    """One model's window; latencies are of requests that ended in it, None when there were none."""

    model: Name
    decoded: Digest
    version: str
    requests: Counter
    failures: Counter
    prompt_tokens: Counter
    completion_tokens: Counter
    busy_s: Annotated[float, Field(ge=0)]
    latency_p50_s: float | None = None
    latency_p95_s: float | None = None
    first_token_p50_s: float | None = None
    tokens_per_s: float | None = None
    energy: EnergyFigure | None = None


class Telemetry(Numbered):
    """One window of a node."""

    window_s: Annotated[float, Field(gt=0)]
    health: HealthFigures
    inference: tuple[InferenceFigures, ...] = ()
    energy: EnergyFigure | None = None


class Ack(Command):
    """Everything up to `seq` of each boot is committed at the fleet."""

    schema_: SchemaOne = 1
    acks: Annotated[dict[BootId, Counter], Field(max_length=64)]


class Want(Command):
    """A node's missing frames; renewed every WANT_RENEW_S, void after WANT_VOID_S."""

    schema_: SchemaOne = 1
    node: Name
    artifact: Digest
    frames: Annotated[int, Field(ge=1, le=1 << 24)]
    missing: Annotated[str, StringConstraints(max_length=4 << 20, strict=True)]
    """Base64 of the packed Bitmap of `frames` bits; all clear means done, the depot forgets the node."""
    seen_epoch: Counter = 0
    seen_seq: Counter = 0
    """Last frame message received of the depot that the node follows; (0, 0) means none yet."""
    silent: bool = False
    """Nothing came from that depot for a whole renewal: another one may serve the node."""
    credit: Annotated[int, Field(ge=1, le=4096)]
    """Frames that may be published beyond `seen_seq`."""

    def missing_frames(self) -> Bitmap:
        """The bitmap in `missing`; raises ArtifactError(bad_document) when it does not fit `frames`."""
        try:
            packed = base64.b64decode(self.missing, validate=True)
        except ValueError as error:
            raise ArtifactError(Code.BAD_DOCUMENT, "want refused: its bitmap is not base64") from error
        return Bitmap(self.frames, packed)

    def seen_by(self, epoch: int) -> tuple[int, int]:
        """`seen` for the depot of `epoch`; the other depots of a node that hears nothing take it for a new one."""
        return (0, 0) if self.silent and self.seen_epoch != epoch else (self.seen_epoch, self.seen_seq)

    @staticmethod
    def encode_missing(missing: Bitmap) -> str:
        """The `missing` field for a bitmap."""
        return base64.b64encode(missing.pack()).decode()


WANT_RENEW_S = 5.0
WANT_VOID_S = 15.0

_FRAME = struct.Struct("<2sBBIQI")
_FRAME_MAGIC = b"AF"
FRAME_MESSAGE_LIMIT_BYTES = _FRAME.size + FRAME_BYTES


@dataclass(frozen=True, slots=True)
class FrameMessage:
    """Payload of a frames topic: magic `AF`, schema u8 = 1, reserved u8 = 0, epoch u32, seq u64, frame u32, bytes."""

    epoch: int
    """Random per start of the depot, never 0."""
    seq: int
    """Counts frame messages of this artifact and epoch from 1."""
    frame: int
    data: bytes

    def encode(self) -> bytes:
        """The payload."""
        return _FRAME.pack(_FRAME_MAGIC, 1, 0, self.epoch, self.seq, self.frame) + self.data

    @classmethod
    def parse(cls, payload: bytes) -> "FrameMessage":
        """Raises ArtifactError(bad_document) on anything but a whole frame message."""
        if not _FRAME.size < len(payload) <= FRAME_MESSAGE_LIMIT_BYTES:
            raise ArtifactError(Code.BAD_DOCUMENT, f"frame message of {len(payload)} bytes refused")
        magic, schema, reserved, epoch, seq, frame = _FRAME.unpack_from(payload)
        if magic != _FRAME_MAGIC or schema != 1 or reserved != 0 or epoch == 0:
            raise ArtifactError(Code.BAD_DOCUMENT, "frame message of an unknown form refused; upgrade this node")
        return cls(epoch, seq, frame, payload[_FRAME.size :])
