"""Golden vectors: inputs, and the reference logits, embeddings or outputs that a right model must come close to.

`golden.json` is a file of the version directory: a GoldenSet for decoders, an EmbeddingSet for encoders, a TensorSet
for graphs. References come from the fp32 forward of the weights as shipped (dequantised), so a node's kernels are
judged against mathematics, not against another machine's kernels.
"""

from typing import Annotated, Literal

from pydantic import Field

from wire.documents import Command, SchemaOne

GOLDEN_FILE = "golden.json"
GOLDEN_LIMIT_BYTES = 4 * 1024 * 1024


class GoldenVector(Command):
    """One prompt; `logits[j]` belongs to `columns[j]` of the vocabulary, at the prompt's last position."""

    input_ids: Annotated[tuple[int, ...], Field(min_length=1, max_length=512)]
    columns: Annotated[tuple[int, ...], Field(min_length=1, max_length=4096)]
    logits: Annotated[tuple[float, ...], Field(min_length=1, max_length=4096)]
    deviation: Annotated[float, Field(gt=0)]
    """Standard deviation of the whole reference row, the unit of `tolerance`."""
    argmax: int


class GoldenSet(Command):
    """`golden.json`. A row passes when RMS(logits - reference) / deviation <= tolerance and everything is finite."""

    schema_: SchemaOne = 1
    tolerance: Annotated[float, Field(gt=0, le=1)]
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)]
    vectors: Annotated[tuple[GoldenVector, ...], Field(min_length=1, max_length=64)]


class EmbeddingVector(Command):
    """One text and its embedding."""

    input_ids: Annotated[tuple[int, ...], Field(min_length=1, max_length=512)]
    embedding: Annotated[tuple[float, ...], Field(min_length=1, max_length=4096)]


class EmbeddingSet(Command):
    """`golden.json` of an encoder. A text passes when |found - reference|^2 / (2 |reference|^2) <= tolerance and
    everything is finite; of normalised embeddings this is 1 - cosine."""

    schema_: SchemaOne = 1
    kind: Literal["embeddings"] = "embeddings"
    tolerance: Annotated[float, Field(gt=0, le=1)]
    vectors: Annotated[tuple[EmbeddingVector, ...], Field(min_length=1, max_length=64)]


class InputValues(Command):
    """One input of a golden run: numbers as they are, or made from `seed` (forge and runtime by runtime/made.py)."""

    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=1 << 24)], ...], Field(max_length=8)]
    values: Annotated[tuple[float, ...], Field(max_length=1 << 16)] | None = None
    """Row by row; whole numbers and 0 or 1 are floats here, too."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    low: float = 0.0
    high: float = 1.0
    """Made numbers are `low` or more and less than `high`."""


class OutputValues(Command):
    """Some numbers of one output: `values[j]` stands at `positions[j]`, counted row by row."""

    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 32)], ...], Field(max_length=16)]
    positions: Annotated[tuple[Annotated[int, Field(ge=0, le=1 << 48)], ...], Field(max_length=4096)]
    values: Annotated[tuple[float, ...], Field(max_length=4096)]
    deviation: Annotated[float, Field(gt=0)]
    """Standard deviation of the whole output, the unit of `tolerance`; its RMS where it hardly varies."""


class TensorRun(Command):
    """One run of a graph: its inputs and outputs by name."""

    inputs: Annotated[dict[str, InputValues], Field(min_length=1, max_length=16)]
    outputs: Annotated[dict[str, OutputValues], Field(min_length=1, max_length=16)]


class TensorSet(Command):
    """`golden.json` of a graph. An output passes when its shape is right, everything at `positions` is finite and
    RMS(found - reference) / deviation <= tolerance."""

    schema_: SchemaOne = 1
    kind: Literal["tensors"] = "tensors"
    tolerance: Annotated[float, Field(gt=0, le=1)]
    runs: Annotated[tuple[TensorRun, ...], Field(min_length=1, max_length=64)]
