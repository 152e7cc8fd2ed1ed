"""What a model must be good for before it is released: figures, bounds on them, and the refusal.

Bounds are written as `kl=0.05,top1=0.85`. The same form, with what was measured, is the `evaluation` of a manifest.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codec.versions import read_version
from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_reference import checkpoint_encoder, shipped_encoder
from forge.evaluate import evaluate_version
from forge.progress import Progress, silent
from forge.quantise import Float
from forge.windows import fit_windows, read_windows
from runtime.golden import read_embeddings
from wire.errors import ArtifactError, Code, ConfigError
from wire.manifest import EncoderConfig, Quality, VersionDocument

WINDOWS = 16
"""How many windows are read unless told otherwise."""
MOST = {"perplexity": "perplexity", "perplexity-ratio": "perplexity to the checkpoint's", "kl": "KL to the checkpoint"}
LEAST = {"top1": "share of tokens whose best token is the checkpoint's", "cosine": "least cosine to the checkpoint"}
FIGURES = {**MOST, **LEAST}
"""Figures by what bounds call them: what they must not exceed, and what they must reach."""
OF_ENCODERS = ("cosine",)
ALONE = ("perplexity",)
"""Figures for which nothing is compared."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is measured, against which checkpoint, and which bounds hold, by figure."""

    windows: Path | None = None
    checkpoint: Path | None = None
    bounds: Mapping[str, float] | None = None
    limit: int = WINDOWS


def parse_bounds(text: str) -> dict[str, float]:
    """Bounds by figure of a text like `kl=0.05,top1=0.85`. Raises ConfigError."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in FIGURES:
            raise ConfigError(f"{name!r} is no figure of quality; write for example kl=0.05 ({', '.join(FIGURES)})")
        try:
            bounds[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"{part.strip()!r} has no number; write for example {name}=0.5") from error
        if not 0 < bounds[name] < float("inf"):
            raise ConfigError(f"{part.strip()!r} bounds nothing; give a number above 0")
    return bounds


def measure_quality(directory: Path, demand: Demand, progress: Progress = silent) -> Quality:
    """Measure a version and hold it against the bounds; without windows and checkpoint nothing is measured.

    Raises ConfigError when what a bound needs is not there, ArtifactError(regression) when one is missed.
    """
    bounds, version = demand.bounds or {}, read_version(directory)
    encodes = isinstance(version.config, EncoderConfig)
    _refuse_unmeasurable(version.model, encodes, demand, bounds)
    if demand.checkpoint is None and demand.windows is None:
        return Quality()
    found = _encoder_figures(directory, version, demand) if encodes else _decoder_figures(directory, demand, progress)
    for name, bound in bounds.items():
        missed = found[name] > bound if name in MOST else found[name] < bound
        if missed:
            than = "above" if name in MOST else "below"
            raise ArtifactError(
                Code.REGRESSION,
                f"{name} ({FIGURES[name]}) is {found[name]:g}, {than} the bound of {bound:g}: nothing was released; "
                "build it in more bits, train it for its precision, or loosen --min-quality",
            )
    perplexity = found.get("perplexity")
    reference = None if perplexity is None else found.get("perplexity-reference")
    told = ",".join(f"{name}={value:g}" for name, value in found.items())
    return Quality(perplexity=perplexity, perplexity_reference=reference, evaluation=told)


def _refuse_unmeasurable(model: str, encodes: bool, demand: Demand, bounds: Mapping[str, float]) -> None:
    wrong = [name for name in bounds if (name in OF_ENCODERS) != encodes]
    if wrong:
        kind = "an encoder" if encodes else "a decoder"
        fitting = ", ".join(name for name in FIGURES if (name in OF_ENCODERS) == encodes)
        raise ConfigError(f"{model} is {kind}, which has no {wrong[0]}; bound one of {fitting}")
    compared = [name for name in bounds if name not in ALONE]
    if compared and demand.checkpoint is None:
        raise ConfigError(f"{compared[0]} is measured against what the version was built from; add --checkpoint FOLDER")
    if not encodes and demand.windows is None and (bounds or demand.checkpoint is not None):
        raise ConfigError("quality is measured on token windows; add --windows FILE, for example one of samples/eval")
    if encodes and demand.windows is not None and demand.checkpoint is None:
        raise ConfigError("an encoder is compared with what it was built from; add --checkpoint FOLDER")


def _decoder_figures(directory: Path, demand: Demand, progress: Progress) -> dict[str, float]:
    assert demand.windows is not None  # noqa: S101  _refuse_unmeasurable asks for them
    measured = evaluate_version(directory, demand.windows, demand.limit, progress, checkpoint=demand.checkpoint)
    figures = {name: measured[name] for name in ("windows", "tokens", "perplexity")}
    if demand.checkpoint is None:
        return figures
    reference = measured["perplexity_checkpoint"]
    return figures | {
        "perplexity-reference": reference,
        "perplexity-ratio": round(measured["perplexity"] / reference, 4),
        "kl": measured["kl_nats_of_checkpoint"],
        "top1": measured["top1_agreement_of_checkpoint"],
    }


def _encoder_figures(directory: Path, version: VersionDocument, demand: Demand) -> dict[str, float]:
    """Of windows, cut to the longest text of the model, or of the golden vectors' texts."""
    assert isinstance(version.config, EncoderConfig)  # noqa: S101  _refuse_unmeasurable tells them apart
    assert demand.checkpoint is not None  # noqa: S101  _refuse_unmeasurable asks for it
    config = version.config
    if demand.windows is None:
        texts: Sequence[Sequence[int]] = [vector.input_ids for vector in read_embeddings(directory, config).vectors]
    else:
        windows = read_windows(demand.windows)[: demand.limit]
        texts = fit_windows(windows, config.vocab_size, config.max_tokens, shortest=1)
    with tempfile.TemporaryDirectory(prefix="amperage-forge-") as scratch:
        reference = checkpoint_encoder(EncoderCheckpoint(demand.checkpoint), Path(scratch)).embed(texts)
    found = shipped_encoder(directory).embed(texts)
    return {"texts": len(texts), "cosine": round(float(_cosines(reference, found).min()), 6)}


def _cosines(a: Float, b: Float) -> Float:
    """Of each row, float32 [rows]."""
    products = np.sum(a * b, axis=1)
    return np.asarray(products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)), np.float32)
