"""Judging a loaded model by the golden vectors of its version (wire/golden.py).

Every way to serve is judged, because onnxruntime has different kernels for them: a prompt as chunks of prefill, by each
session that may read it, and its last token once more as a decode step; a text alone, and all texts as one batch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from host.files import read_bounded
from runtime.encoder import Encoder
from runtime.model import PREFILL_TOKENS, Float, Model
from wire.documents import parse_document
from wire.errors import ArtifactError, Code, StoreError
from wire.golden import (
    GOLDEN_FILE,
    GOLDEN_LIMIT_BYTES,
    EmbeddingSet,
    EmbeddingVector,
    GoldenSet,
    GoldenVector,
    TensorSet,
)
from wire.manifest import EncoderConfig

Golden = TypeVar("Golden", GoldenSet, EmbeddingSet, TensorSet)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the golden vectors say; `worst_error` is None when a logit or an embedding was not finite."""

    rows: int
    worst_error: float | None
    tolerance: float
    top1_agreement: float | None
    """None of an encoder."""
    fault: str
    """Why the model is refused, empty when it is right."""


def read_golden(directory: Path, vocab_size: int) -> GoldenSet:
    """`golden.json` of a decoder; raises ArtifactError, StoreError."""
    path = directory / GOLDEN_FILE
    golden = read_golden_file(GoldenSet, directory)
    for vector in golden.vectors:
        numbers = (*vector.input_ids, *vector.columns, vector.argmax)
        if len(vector.columns) != len(vector.logits) or not 0 <= min(numbers) <= max(numbers) < vocab_size:
            raise ArtifactError(Code.CORRUPT, f"{path} does not fit the model's vocabulary; build the version again")
    return golden


def read_embeddings(directory: Path, config: EncoderConfig) -> EmbeddingSet:
    """`golden.json` of an encoder; raises ArtifactError, StoreError."""
    path = directory / GOLDEN_FILE
    golden = read_golden_file(EmbeddingSet, directory)
    for vector in golden.vectors:
        known = 0 <= min(vector.input_ids) <= max(vector.input_ids) < config.vocab_size
        if not known or len(vector.input_ids) > config.max_tokens or len(vector.embedding) != config.dimensions:
            raise ArtifactError(Code.CORRUPT, f"{path} does not fit the model; build the version again")
    return golden


def read_golden_file(kind: type[Golden], directory: Path) -> Golden:
    """`golden.json` as it stands; raises ArtifactError, StoreError."""
    path = directory / GOLDEN_FILE
    try:
        data = read_bounded(path, GOLDEN_LIMIT_BYTES)
    except FileNotFoundError as error:
        raise StoreError(Code.CORRUPT, f"{path} is missing; build the version again with golden vectors") from error
    return parse_document(kind, data, limit_bytes=GOLDEN_LIMIT_BYTES)


def judge_encoder(encoder: Encoder, golden: EmbeddingSet) -> Judgement:
    """Encode every golden text alone, and all of them together."""
    texts = [vector.input_ids for vector in golden.vectors]
    found = [*(encoder.encode([text])[0] for text in texts), *encoder.encode(texts)]
    errors = [_distance(vector, row) for vector, row in zip(golden.vectors * 2, found, strict=True)]
    worst = max(errors) if all(math.isfinite(error) for error in errors) else None
    return Judgement(len(texts), worst, golden.tolerance, None, fault_of(worst, golden.tolerance))


def judge_model(model: Model, golden: GoldenSet) -> Judgement:
    """Run every golden vector on slot 0 of `model`."""
    errors: list[float] = []
    agreed = 0
    for vector in golden.vectors:
        rows = run_prompt(model, list(vector.input_ids))
        errors += [_row_error(vector, row) for row in rows]
        agreed += all(int(row.argmax()) == vector.argmax for row in rows)
    finite = all(math.isfinite(error) for error in errors)
    worst = max(errors) if finite else None
    agreement = agreed / len(golden.vectors)
    fault = fault_of(worst, golden.tolerance)
    if not fault and agreement < golden.min_top1_agreement:
        fault = f"top-1 agreement {agreement:.2f} is below {golden.min_top1_agreement:g}"
    return Judgement(len(golden.vectors), worst, golden.tolerance, agreement, fault)


def run_prompt(model: Model, tokens: list[int]) -> list[Float]:
    """Logits of the last token, float32 [vocab_size]: by each way of prefill, and again by a decode step."""
    rows: list[Float] = []
    for wide in (True, False) if model.reads_apart else (False,):
        for start in range(0, len(tokens), PREFILL_TOKENS):
            read = model.prefill(0, tokens[start : start + PREFILL_TOKENS], start, wide=wide)
        rows.append(read.copy())
    return [*rows, model.decode([tokens[-1]], [len(tokens) - 1])[0].copy()]


def _distance(vector: EmbeddingVector, row: Float) -> float:
    """As wire/golden.py defines it; not finite when any number of the row is not."""
    expected = np.asarray(vector.embedding)
    return float(np.sum(np.square(row.astype(np.float64) - expected)) / (2 * np.sum(np.square(expected))))


def _row_error(vector: GoldenVector, row: Float) -> float:
    """RMS difference as a share of the reference's deviation; not finite when any logit of the row is not."""
    if not np.isfinite(row).all():
        return math.nan
    difference = row[list(vector.columns)].astype(np.float64) - np.asarray(vector.logits)
    return float(np.sqrt(np.mean(np.square(difference))) / vector.deviation)


def fault_of(worst: float | None, tolerance: float) -> str:
    """Why a model with this worst error is refused, empty when it is right; None: a number was not finite."""
    if worst is None:
        return "a number of the golden vectors is not finite"
    if worst > tolerance:
        return f"golden error {worst:.3g} is over the tolerance of {tolerance:g}"
    return ""
