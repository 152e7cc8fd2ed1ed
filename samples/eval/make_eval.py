"""Makes the evaluation texts: windows sampled with a seed from each sample model, at temperature 1.

    .venv/bin/python samples/eval/make_eval.py

Sampling from the full distribution makes a model's own windows an unbiased estimate of its entropy; starting from the
end-of-text token needs no text of anybody's.
"""

import json
import sys
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(SAMPLES.parent))

from tests.reference.llama import ReferenceLlama, sample  # noqa: E402  the project is found first

WINDOWS, LENGTH, SEED, START = 16, 512, 20_260, 0


def make(name: str) -> None:
    """Sample one model and write its file."""
    tokens = sample(ReferenceLlama.load(SAMPLES / name), START, WINDOWS, LENGTH, SEED)
    described = {"model": name, "seed": SEED, "temperature": 1.0, "start": START, "tokens": tokens.tolist()}
    (SAMPLES / "eval" / f"{name}.json").write_text(json.dumps(described, separators=(",", ":")) + "\n")
    sys.stdout.write(f"{name}: {WINDOWS} x {LENGTH} tokens\n")


if __name__ == "__main__":
    for model in ("tales-5m-base", "tales-5m-finetuned-50", "tales-5m-finetuned-400"):
        make(model)
