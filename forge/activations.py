"""How large the activations of an encoder become, by a run of its float32 graph over a few texts."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_graph import attention_source, build_encoder_graph, mlp_source
from forge.encoder_weights import place_encoder
from forge.placer import Placer
from forge.quantise import Float, Precision
from forge.reference import MODEL_FILE, open_judge
from forge.weights import writing_weights


def measure_activations(checkpoint: EncoderCheckpoint, texts: Sequence[Sequence[int]]) -> dict[str, Float]:
    """The largest size of each column, float32 [hidden_size], of what every layer's first matrices are multiplied
    with, over all tokens of `texts`; by the names of these matrices."""
    layers = range(checkpoint.architecture.layers)
    sources = {f"layers.{i}.qkv": attention_source(i) for i in layers}
    sources |= {f"layers.{i}.up": mlp_source(i) for i in layers}
    outputs = list(sources.values())
    with tempfile.TemporaryDirectory(prefix="amperage-forge-") as folder:
        with writing_weights(Path(folder)) as writer:
            weights = place_encoder(checkpoint, Placer(writer, {}, Precision.FLOAT32))
        graph = build_encoder_graph(checkpoint.architecture, weights)
        graph.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
        onnx.save(graph, str(Path(folder) / MODEL_FILE))
        session = open_judge(Path(folder) / MODEL_FILE)
        found = [_largest(session.run(outputs, _feeds(text))) for text in texts]
    return dict(zip(sources, np.max(found, axis=0), strict=True))


def _feeds(text: Sequence[int]) -> dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"]:
    ids = np.asarray([text], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _largest(found: Sequence[Float]) -> list[Float]:
    return [np.abs(rows).max(axis=0) for rows in found]
