"""How large the inputs of a decoder's output matrices are while it reads text, by a run of its float32 graph."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import helper

from forge.checkpoint import Checkpoint
from forge.decoder_weights import place_weights
from forge.graph import build_graph
from forge.progress import Progress
from forge.quantise import Float, Precision
from forge.reference import MODEL_FILE, Judge
from forge.weights import writing_weights
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class InputSizes:
    """Root mean squares over all tokens: `attention` float32 [layers, heads * head_size], what leaves the heads, and
    `mlp` float32 [layers, mlp_size], what the down projection takes."""

    attention: Float
    mlp: Float


def measure_inputs(source: Path, windows: list[list[int]], progress: Progress) -> InputSizes:
    """Read `windows` of tokens with the checkpoint `source`. Raises ConfigError when one is not of its tokens."""
    checkpoint = Checkpoint(source)
    a = checkpoint.architecture
    for window in windows:
        if not window or not 0 <= min(window) <= max(window) < a.vocab_size:
            raise ConfigError("the calibration has a window that is empty or not of this model's tokens; make it anew")
    names = [f"model.layers.{i}.{part}" for part in ("attention", "mlp.product") for i in range(a.layers)]
    squares = [np.zeros(width) for width in [a.heads * a.head_size] * a.layers + [a.mlp_size] * a.layers]
    with tempfile.TemporaryDirectory(prefix="amperage-forge-") as folder:
        with writing_weights(Path(folder)) as writer:
            graph = build_graph(a, place_weights(checkpoint, writer, precision=Precision.FLOAT32))
        graph.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
        (Path(folder) / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))
        judge = Judge(Path(folder) / MODEL_FILE, a.layers, a.kv_heads, a.head_size)
        for number, window in enumerate(windows):
            progress("calibrate", number, len(windows))
            for sum_, rows in zip(squares, judge.values(names, window[: a.context_tokens]), strict=True):
                sum_ += np.square(rows, dtype=np.float64).reshape(-1, sum_.size).sum(axis=0)
    tokens = sum(min(len(window), a.context_tokens) for window in windows)
    sizes = [np.sqrt(total / tokens).astype(np.float32) for total in squares]
    return InputSizes(np.stack(sizes[: a.layers]), np.stack(sizes[a.layers :]))
