"""Logits of decoders as this CPU computes them: `python -m benchmarks.kernel_logits CASES.json OUT.npz`.

A program of its own, so that `scripts/test-arm --python` runs it on an emulated CPU. CASES.json is an object of
{"directory", "session_config", "prompts"} by name. OUT.npz holds float32 [rows, vocabulary] by name: for each prompt
the rows of its prefixes by prefill (2, 4, 8, ... tokens, and the whole), then of every token by decode steps.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from codec.versions import read_version
from runtime.model import Float, Model
from runtime.slab import Shape
from wire.manifest import DecoderConfig
from wire.serving import ExecutionOptions


def prefixes(length: int) -> list[int]:
    """How many tokens are read by prefill: powers of two, and all."""
    return [*(2**power for power in range(1, length.bit_length()) if 2**power < length), length]


def positions(length: int) -> list[int]:
    """The position in the prompt of each row that a prompt of `length` tokens gives."""
    return [*(count - 1 for count in prefixes(length)), *range(length)]


def logits_of(case: dict[str, Any]) -> Float:
    """float32 [rows, vocabulary], the rows of one prompt after those of the other."""
    directory = Path(case["directory"])
    options = ExecutionOptions(threads=1, session_config=case["session_config"])
    config = read_version(directory).config
    assert isinstance(config, DecoderConfig)
    model = Model(directory, config, Shape(1, max(map(len, case["prompts"])) + 1), options)
    rows = []
    for prompt in case["prompts"]:
        rows += [model.prefill(0, prompt[:count], 0).copy() for count in prefixes(len(prompt))]
        rows += [model.decode([token], [place])[0].copy() for place, token in enumerate(prompt)]
    return np.stack(rows)


def main(cases: Path, out: Path) -> None:
    """Run every case, and say which."""
    found: dict[str, Any] = {}
    for name, case in json.loads(cases.read_text()).items():
        print(f"  {name}", file=sys.stderr, flush=True)
        found[name] = logits_of(case)
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
