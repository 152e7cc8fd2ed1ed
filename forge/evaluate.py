"""Quality of a version: perplexity over token windows, and how far it is from its float32 twin."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.versions import read_version
from forge.checkpoint import Checkpoint
from forge.progress import Progress, silent
from forge.quantise import Float
from forge.reference import Judge, checkpoint_judge, float_cache_judge, shipped_judge, twin_judge
from forge.windows import fit_windows, read_windows
from wire.manifest import DecoderConfig, Dtype

Double = NDArray[np.float64]


def log_probabilities(logits: Float) -> Double:
    """Log softmax over the vocabulary, float64 [rows, vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergences(reference: Double | Float, scores: Double) -> Double:
    """KL(reference || scores) in nats per row, float64 [rows], of log probabilities [rows, vocabulary]."""
    return np.asarray((np.exp(reference) * (reference - scores)).sum(axis=1), np.float64)


def window_losses(judge: Judge, window: list[int]) -> Double:
    """Negative log likelihood of each token after the first, float64 [len(window) - 1]."""
    scores = log_probabilities(judge.logits(window)[:-1])
    return -scores[np.arange(len(window) - 1), window[1:]]


def perplexity(judge: Judge, windows: list[list[int]]) -> float:
    """exp of the mean negative log likelihood over all windows."""
    return float(np.exp(np.mean(np.concatenate([window_losses(judge, window) for window in windows]))))


@dataclass(slots=True)
class _Compared:
    """Figures of one model against another, window by window."""

    losses: list[Double] = field(default_factory=list)
    divergence: list[Double] = field(default_factory=list)
    agreement: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, window: list[int], scores: Double, others: Double) -> None:
        """Log probabilities of both, float64 [len(window), vocabulary]; the losses are the other's."""
        self.losses.append(-others[np.arange(len(window) - 1), window[1:]])
        self.divergence.append(divergences(others, scores))
        self.agreement.append(scores.argmax(axis=1) == others.argmax(axis=1))

    def figures(self, name: str, suffix: str) -> dict[str, float]:
        """Perplexity of the other, KL(other || ours) in nats, and how often the best token is the same."""
        return {
            f"perplexity_{name}": round(float(np.exp(np.mean(np.concatenate(self.losses)))), 4),
            f"kl_nats{suffix}": round(float(np.mean(np.concatenate(self.divergence))), 6),
            f"top1_agreement{suffix}": round(float(np.mean(np.concatenate(self.agreement))), 4),
        }


def evaluate_version(
    directory: Path, windows: Path, limit: int, progress: Progress = silent, *, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Perplexity of the model as shipped and of its float32 twin, mean KL(twin || shipped) in nats, top-1 agreement;
    with `checkpoint` also against that in float32, which is what the precision costs; for an int8 cache also against
    the same model with a float32 cache, which is what the cache costs.
    """
    with tempfile.TemporaryDirectory(prefix="amperage-forge-") as scratch:
        original = None if checkpoint is None else checkpoint_judge(Checkpoint(checkpoint), Path(scratch))
        return _evaluate(directory, read_windows(windows)[:limit], original, progress)


def _evaluate(directory: Path, chosen: list[list[int]], original: Judge | None, progress: Progress) -> dict[str, Any]:
    version = read_version(directory)
    shipped = shipped_judge(directory, version)
    if isinstance(version.config, DecoderConfig):
        chosen = fit_windows(chosen, version.config.vocab_size, version.config.context_tokens)
    others = {"float_twin": (twin_judge(directory, version), "", _Compared())}
    if isinstance(version.config, DecoderConfig) and version.config.kv_cache is not Dtype.F32:
        others["float_cache"] = (float_cache_judge(directory, version), "_of_cache", _Compared())
    if original is not None:
        others["checkpoint"] = (original, "_of_checkpoint", _Compared())
    losses: list[Double] = []
    for number, window in enumerate(chosen):
        progress("evaluate", number, len(chosen))
        ours = log_probabilities(shipped.logits(window))
        losses.append(-ours[np.arange(len(window) - 1), window[1:]])
        for judge, _, compared in others.values():
            compared.add(window, ours, log_probabilities(judge.logits(window)))
    figures: dict[str, Any] = {
        "windows": len(chosen),
        "tokens": sum(len(window) for window in chosen),
        "perplexity": round(float(np.exp(np.mean(np.concatenate(losses)))), 4),
    }
    for name, (_, suffix, compared) in others.items():
        figures |= compared.figures(name, suffix)
    return figures
