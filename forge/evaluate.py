"""Quality of a version: perplexity over token windows, and how far it is from its float32 twin."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.versions import read_version
from forge.progress import Progress
from forge.quantise import Float
from forge.reference import Judge, shipped_judge, twin_judge
from wire.errors import ConfigError

WINDOWS_LIMIT_BYTES = 16 * 1024 * 1024
Double = NDArray[np.float64]


def read_windows(path: Path) -> list[list[int]]:
    """Token windows from a JSON file with the key `tokens`: lists of token ids."""
    try:
        with path.open("rb") as source:
            windows = json.loads(source.read(WINDOWS_LIMIT_BYTES))["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no token windows ({error}); use a file like samples/eval/*.json") from error
    return [[int(token) for token in window] for window in windows]


def log_probabilities(logits: Float) -> Double:
    """Log softmax over the vocabulary, float64 [rows, vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def window_losses(judge: Judge, window: list[int]) -> Double:
    """Negative log likelihood of each token after the first, float64 [len(window) - 1]."""
    scores = log_probabilities(judge.logits(window)[:-1])
    return -scores[np.arange(len(window) - 1), window[1:]]


def perplexity(judge: Judge, windows: list[list[int]]) -> float:
    """exp of the mean negative log likelihood over all windows."""
    return float(np.exp(np.mean(np.concatenate([window_losses(judge, window) for window in windows]))))


def evaluate_version(directory: Path, windows: Path, limit: int, progress: Progress | None = None) -> dict[str, Any]:
    """Perplexity of the int4 model and of its float32 twin, mean KL(twin || int4) in nats, top-1 agreement."""
    version = read_version(directory)
    chosen = read_windows(windows)[:limit]
    shipped, twin = shipped_judge(directory, version), twin_judge(directory, version)
    losses: list[Double] = []
    twin_losses: list[Double] = []
    divergence: list[Double] = []
    agreement: list[NDArray[np.bool_]] = []
    for number, window in enumerate(chosen):
        if progress is not None:
            progress("evaluate", number, len(chosen))
        ours, theirs = log_probabilities(shipped.logits(window)), log_probabilities(twin.logits(window))
        rows = np.arange(len(window) - 1)
        losses.append(-ours[rows, window[1:]])
        twin_losses.append(-theirs[rows, window[1:]])
        divergence.append((np.exp(theirs) * (theirs - ours)).sum(axis=1))
        agreement.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
    return {
        "windows": len(chosen),
        "tokens": sum(len(window) for window in chosen),
        "perplexity": round(float(np.exp(np.mean(np.concatenate(losses)))), 4),
        "perplexity_float_twin": round(float(np.exp(np.mean(np.concatenate(twin_losses)))), 4),
        "kl_nats": round(float(np.mean(np.concatenate(divergence))), 6),
        "top1_agreement": round(float(np.mean(np.concatenate(agreement))), 4),
    }
