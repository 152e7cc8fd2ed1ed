"""Perplexity of a checkpoint on a text or on token windows, with the numpy reference in float32.

    .venv/bin/python samples/eval/measure.py MODEL_DIRECTORY TEXT.txt|WINDOWS.json [WINDOWS]

A text is tokenised whole and cut into windows of 512 tokens without overlap; the first token of a window is not scored.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402  the project is found first
from tokenizers import Tokenizer  # noqa: E402

from tests.reference.llama import ReferenceLlama  # noqa: E402

LENGTH = 512


def windows_of(directory: Path, source: Path, count: int) -> list[list[int]]:
    """The first `count` windows of a text or of a windows file."""
    if source.suffix == ".json":
        return [list(window) for window in json.loads(source.read_text())["tokens"][:count]]
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(source.read_text()).ids
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)][:count]


def perplexity(directory: Path, windows: list[list[int]]) -> float:
    """exp of the mean negative log likelihood."""
    model = ReferenceLlama.load(directory)
    losses = []
    for window in windows:
        logits = model.logits(window)[:-1].astype(np.float64)
        peak = logits.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
        losses.append(normaliser - logits[np.arange(len(window) - 1), window[1:]])
    return float(np.exp(np.mean(np.concatenate(losses))))


if __name__ == "__main__":
    folder, text = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = windows_of(folder, text, int(sys.argv[3]) if len(sys.argv) > 3 else 32)
    sys.stdout.write(f"{folder.name} on {text.name}: {perplexity(folder, chosen):.2f} ({len(chosen)} windows)\n")
