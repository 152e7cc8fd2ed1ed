"""The manifest of an artifact and the version document that a node ends up with.

An artifact is `manifest.json` and one pack. A version is the decoded directory; its `version.json` is the canonical
`VersionDocument`, the same whether it came by a full artifact or by a delta, and the SHA-256 of its bytes is the
*decoded digest* that names the directory.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from wire.digest import Digest, digest_of
from wire.documents import Command, SchemaOne, encode_document

FRAME_BYTES = 120 * 1024
"""Unit of transfer, hash and resume: with topic and header an MQTT packet stays below 128 KiB (AWS IoT's limit)."""

SECTION_LIMIT_BYTES = 1024 * 1024
"""Largest decoded section: the unit of decoding and of memory in flight."""

FILE_LIMIT_BYTES = 1 << 40
INDEX_LIMIT_BYTES = 64 * 1024 * 1024

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", strict=True)]
"""Model and node names: safe as a path component and as an MQTT topic level."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", strict=True)]
"""One path component: a version directory is flat, so nothing can climb out of it."""

TensorName = Annotated[str, StringConstraints(min_length=1, max_length=200, strict=True)]
Size = Annotated[int, Field(ge=0, le=FILE_LIMIT_BYTES)]


class Dtype(StrEnum):
    """Element types of stored tensors; `u4` and `u2` are packed two and four to a byte, low bits first."""

    U2 = "u2"
    U4 = "u4"
    U8 = "u8"
    I8 = "i8"
    I32 = "i32"
    I64 = "i64"
    F16 = "f16"
    BF16 = "bf16"
    F32 = "f32"


BITS: dict[Dtype, int] = {
    Dtype.U2: 2, Dtype.U4: 4, Dtype.U8: 8, Dtype.I8: 8, Dtype.I32: 32, Dtype.I64: 64,
    Dtype.F16: 16, Dtype.BF16: 16, Dtype.F32: 32,
}  # fmt: skip


class Layout(StrEnum):
    """How a stored tensor is split into planes of what compresses alike (codec/planes.py)."""

    BYTES = "bytes"
    """One plane, the bytes as stored: packed nibbles, int8, graph, tokenizer."""
    F16 = "f16"
    """Two planes: high byte (sign, exponent, top mantissa) and low byte."""
    BF16 = "bf16"
    """Two planes: exponent, and sign with mantissa."""
    F32_BF16_GRID = "f32-bf16-grid"
    """float32 whose low 16 bits are zero (scales): the two planes of BF16; the zeros are not sent."""
    F32 = "f32"
    """Four planes: exponent, sign with top mantissa, middle and low mantissa."""


class FileEntry(Command):
    """One file of a version directory."""

    path: FileName
    size_bytes: Size
    sha256: Digest


class TensorColumns(Command):
    """The tensors of all files in columns (a row per tensor), sorted by file and offset."""

    name: tuple[TensorName, ...] = ()
    file: tuple[Annotated[int, Field(ge=0)], ...] = ()
    dtype: tuple[Dtype, ...] = ()
    shape: tuple[tuple[Annotated[int, Field(ge=1, le=1 << 40)], ...], ...] = ()
    offset: tuple[Size, ...] = ()
    layout: tuple[Layout, ...] = ()

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        lengths = {len(column) for column in (self.name, self.file, self.dtype, self.shape, self.offset, self.layout)}
        if len(lengths) > 1:
            raise ValueError("tensor columns differ in length")
        if len(set(self.name)) != len(self.name):
            raise ValueError("two tensors have one name")
        return self

    def size_bytes(self, row: int) -> int:
        """Bytes that tensor `row` occupies in its file."""
        return (math.prod(self.shape[row]) * BITS[self.dtype[row]] + 7) // 8


class DecoderConfig(Command):
    """What the runtime needs to know of a decoder language model beside its graph."""

    kind: Literal["decoder"] = "decoder"
    layers: Annotated[int, Field(ge=1, le=512)]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 20)]
    kv_heads: Annotated[int, Field(ge=1, le=1024)]
    head_size: Annotated[int, Field(ge=1, le=1024)]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 22)]
    context_tokens: Annotated[int, Field(ge=1, le=1 << 22)]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    kv_cache: Annotated[Dtype, Field(exclude_if=lambda dtype: dtype is Dtype.F32)] = Dtype.F32
    """Type of cached keys and values, `f32` or `i8`. `f32` is not written, so that documents of versions without the
    choice keep their digest."""

    @field_validator("kv_cache")
    @classmethod
    def _check_cache(cls, dtype: Dtype) -> Dtype:
        if dtype not in (Dtype.F32, Dtype.I8):
            raise ValueError("keys and values are cached as f32 or i8")
        return dtype


class Pooling(StrEnum):
    """How an encoder makes one vector of a text's token vectors."""

    MEAN = "mean"
    CLS = "cls"
    """The vector of the first token."""


class EncoderConfig(Command):
    """What the runtime needs to know of an encoder beside its graph, which pools and normalises by itself."""

    kind: Literal["encoder"] = "encoder"
    layers: Annotated[int, Field(ge=1, le=512)]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 20)]
    heads: Annotated[int, Field(ge=1, le=1024)]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 22)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 16)]
    """Longest text, with the tokens that the tokenizer adds."""
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)]
    """Numbers of an embedding."""
    pooling: Pooling
    normalised: bool
    """Whether embeddings have the Euclidean length 1."""


class Datatype(StrEnum):
    """Element types of a graph's inputs and outputs, by their names in the Open Inference Protocol."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    FP32 = "FP32"
    FP64 = "FP64"


SizeName = Annotated[str, StringConstraints(min_length=1, max_length=64, strict=True)]
DimensionSize = Annotated[int, Field(ge=1, le=1 << 24)]


class GraphTensor(Command):
    """An input or output of a graph; a size that is a name may differ from request to request."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128, strict=True)]
    datatype: Datatype
    shape: Annotated[tuple[DimensionSize | SizeName, ...], Field(max_length=8)]


class GraphConfig(Command):
    """What the runtime needs to know of a graph that it serves as it is: tensors in, tensors out."""

    kind: Literal["graph"] = "graph"
    inputs: Annotated[tuple[GraphTensor, ...], Field(min_length=1, max_length=16)]
    outputs: Annotated[tuple[GraphTensor, ...], Field(min_length=1, max_length=16)]
    largest: dict[SizeName, DimensionSize] = {}
    """The largest that each named size of an input may be. A name means one size in a request. Outputs may have names
    of their own, for sizes that the graph computes."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for tensors in (self.inputs, self.outputs):
            if len({tensor.name for tensor in tensors}) != len(tensors):
                raise ValueError("two inputs or two outputs have one name")
        named = {size for tensor in self.inputs for size in tensor.shape if isinstance(size, str)}
        if named != self.largest.keys():
            raise ValueError("largest must bound the named sizes of the inputs, and nothing else")
        return self


def _kind_of(config: Any) -> str:
    """Decoders may leave their kind out."""
    kind = config.get("kind", "decoder") if isinstance(config, dict) else getattr(config, "kind", "decoder")
    return str(kind)[:64]


ModelConfig = Annotated[
    Annotated[DecoderConfig, Tag("decoder")]
    | Annotated[EncoderConfig, Tag("encoder")]
    | Annotated[GraphConfig, Tag("graph")],
    Discriminator(_kind_of),
]


class VersionDocument(Command):
    """`version.json`: identity, files and tensors of one decoded version."""

    schema_: SchemaOne = 1
    model: Name
    version: Annotated[str, StringConstraints(min_length=1, max_length=64, strict=True)]
    config: ModelConfig
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=256)]
    tensors: TensorColumns

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        names = [entry.path for entry in self.files]
        if len(set(names)) != len(names) or "version.json" in names:
            raise ValueError("file names must differ and leave version.json free")
        rows = range(len(self.tensors.name))
        ends = [(self.tensors.file[i], self.tensors.offset[i], self.tensors.size_bytes(i)) for i in rows]
        for file, offset, size in ends:
            if file >= len(self.files) or offset + size > self.files[file].size_bytes:
                raise ValueError("a tensor lies outside its file")
        for (file, offset, size), (next_file, next_offset, _) in pairwise(ends):
            if (next_file, next_offset) < (file, offset + size):
                raise ValueError("tensors overlap or are not sorted by file and offset")
        return self

    def decoded_digest(self) -> str:
        """SHA-256 of `version.json`, the name of the version directory."""
        return digest_of(encode_document(self))


@dataclass(frozen=True, slots=True)
class Stream:
    """What sections encode: one tensor, or one whole file that holds no tensors. `name` is the tensor's, or ''."""

    file: int
    path: str
    name: str
    offset: int
    size_bytes: int
    dtype: Dtype
    layout: Layout


def streams_of(version: VersionDocument) -> tuple[Stream, ...]:
    """The streams of a version in pack order: by file, then offset. Bytes of a file outside its tensors are zero."""
    columns = version.tensors
    rows_by_file: dict[int, list[int]] = {}
    for row, file in enumerate(columns.file):
        rows_by_file.setdefault(file, []).append(row)
    streams: list[Stream] = []
    for file, entry in enumerate(version.files):
        rows = rows_by_file.get(file)
        if rows is None:
            streams.append(Stream(file, entry.path, "", 0, entry.size_bytes, Dtype.U8, Layout.BYTES))
            continue
        streams.extend(
            Stream(file, entry.path, columns.name[r], columns.offset[r], columns.size_bytes(r), columns.dtype[r],
                   columns.layout[r])
            for r in rows
        )  # fmt: skip
    return tuple(streams)


class Requirements(Command):
    """What a node must have before byte one is fetched."""

    ram_bytes: Size
    disk_bytes: Size
    cpu_features: tuple[str, ...] = ()


class Quality(Command):
    """Figures that the forge measured; absent means not measured."""

    bits_per_weight: float | None = None
    perplexity: float | None = None
    perplexity_reference: float | None = None
    evaluation: str | None = None


class Manifest(Command):
    """`manifest.json`: everything about one artifact; its SHA-256 is the artifact's name on the wire."""

    schema_: SchemaOne = 1
    decoded: Digest
    version: VersionDocument
    base: Digest | None = None
    """Decoded digest of the version that a delta applies to; None for a full artifact."""
    operations: Annotated[str, StringConstraints(pattern=r"^[fscd]*$", max_length=100_000, strict=True)]
    """One letter per stream: f = full, s = full and sparse (a mask, and the items that it sets),
    c = copied from the base, d = difference to the base's stream of that name."""
    index_size_bytes: Annotated[int, Field(ge=1, le=INDEX_LIMIT_BYTES)]
    index_frames: tuple[Digest, ...]
    pack_size_bytes: Size
    golden: Digest
    requirements: Requirements
    quality: Quality = Quality()
    provenance: dict[str, str] = {}

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.version.decoded_digest() != self.decoded:
            raise ValueError("decoded is not the digest of version")
        if len(self.operations) != len(streams_of(self.version)):
            raise ValueError("operations must have one letter per stream")
        if self.base is None and set(self.operations) - {"f", "s"}:
            raise ValueError("a full artifact cannot copy or subtract")
        if len(self.index_frames) != -(-self.index_size_bytes // FRAME_BYTES):
            raise ValueError("index_frames does not cover index_size_bytes")
        if self.pack_size_bytes < self.index_size_bytes:
            raise ValueError("pack is smaller than its index")
        if self.golden not in {entry.sha256 for entry in self.version.files}:
            raise ValueError("golden vectors are not among the files")
        return self

    @property
    def frame_count(self) -> int:
        """Frames of the pack: index frames first, then data frames; each part's last frame may be short."""
        return len(self.index_frames) + -(-(self.pack_size_bytes - self.index_size_bytes) // FRAME_BYTES)

    def frame_range(self, frame: int) -> tuple[int, int]:
        """Byte range [start, end) of `frame` in the pack."""
        index_frames = len(self.index_frames)
        if frame < index_frames:
            start = frame * FRAME_BYTES
            return start, min(start + FRAME_BYTES, self.index_size_bytes)
        start = self.index_size_bytes + (frame - index_frames) * FRAME_BYTES
        return start, min(start + FRAME_BYTES, self.pack_size_bytes)
