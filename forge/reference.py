"""Judging by mathematics: the float32 twin of a model, and one way to run either.

The twin of a version directory has the same graph with every quantised matrix dequantised to float32, so that its
logits are what the shipped weights mean; the kernels for them (int8 activations, another rounding on every CPU) are
judged by it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from forge.checkpoint import Checkpoint
from forge.decoder_weights import place_weights
from forge.graph import CACHE_ATTRIBUTES, FLOAT_ATTENTION_INPUTS, build_graph
from forge.placer import Placer
from forge.quantise import BlockMatrix, Float, Precision
from forge.weights import writing_weights
from wire.errors import ConfigError
from wire.manifest import DecoderConfig, VersionDocument

MODEL_FILE = "model.onnx"


class Judge:
    """A loaded decoder that returns logits of whole prompts."""

    def __init__(self, model: Path | bytes, layers: int, kv_heads: int, head_size: int) -> None:
        self._session = open_judge(model)
        self._layers, self._kv_heads, self._head_size = layers, kv_heads, head_size
        types = {entry.type for entry in self._session.get_inputs()}
        self._cache_dtype = np.int8 if "tensor(int8)" in types else np.float32

    def logits(
        self, ids: Sequence[int], rows: Sequence[int] | None = None, extra: Mapping[str, Float] | None = None
    ) -> Float:
        """Logits float32 [len(rows), vocabulary] of the prompt `ids` in one forward; all rows by default."""
        return self.values(["logits"], ids, rows, extra)[0]

    def values(
        self, names: Sequence[str], ids: Sequence[int], rows: Sequence[int] | None = None,
        extra: Mapping[str, Float] | None = None,
    ) -> list[Float]:  # fmt: skip
        """What the graph's outputs `names` are for the prompt `ids`, float32; logits of all rows by default. `extra`
        are inputs that this graph has besides."""
        length = len(ids)
        empty = np.zeros((1, self._kv_heads, length, self._head_size), self._cache_dtype)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": np.asarray([ids], np.int64),
            "seqlens_k": np.asarray([length - 1], np.int32),
            "total_sequence_length": np.asarray(length, np.int32),
            "logit_rows": np.asarray(range(length) if rows is None else rows, np.int64),
            **(extra or {}),
        }
        for i in range(self._layers):
            feeds[f"past_key_values.{i}.key"] = feeds[f"past_key_values.{i}.value"] = empty
        return [np.asarray(found, np.float32) for found in self._session.run(list(names), feeds)]


def open_judge(model: Path | bytes) -> Any:
    """A session on every core that this process may use."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def shipped_judge(directory: Path, version: VersionDocument) -> Judge:
    """The model as a node runs it: int4 kernels of this CPU."""
    return Judge(directory / MODEL_FILE, *shape_of(version))


def twin_judge(directory: Path, version: VersionDocument) -> Judge:
    """The float32 twin of a version directory."""
    return Judge(float_twin(directory).SerializeToString(), *shape_of(version))


def float_cache_judge(directory: Path, version: VersionDocument) -> Judge:
    """The model as a node runs it, but with a float32 cache: what an int8 cache is judged by."""
    model = onnx.load(str(directory / MODEL_FILE), load_external_data=False)
    load_external_data_for_model(model, str(directory))
    _cache_in_float(model)
    return Judge(model.SerializeToString(), *shape_of(version))


def checkpoint_judge(checkpoint: Checkpoint, scratch: Path) -> Judge:
    """The checkpoint itself in float32; `scratch` is an empty directory that must outlive the judge."""
    with writing_weights(scratch) as writer:
        graph = build_graph(checkpoint.architecture, place_weights(checkpoint, Placer(writer, {}, Precision.FLOAT32)))
    (scratch / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))
    a = checkpoint.architecture
    return Judge(scratch / MODEL_FILE, a.layers, a.kv_heads, a.head_size)


def float_twin(directory: Path) -> ModelProto:
    """The graph of `directory` with MatMulNBits and GatherBlockQuantized replaced by MatMul and Gather in float32, and
    with a float32 cache."""
    model = onnx.load(str(directory / MODEL_FILE), load_external_data=False)
    load_external_data_for_model(model, str(directory))
    _cache_in_float(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    kept: dict[str, TensorProto] = dict(stored)
    nodes = []
    rounded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            continue
        if node.op_type == "MatMulIntegerToFloat":
            levels, scales = (numpy_helper.to_array(kept.pop(node.input[i])) for i in (1, 3))
            kept[node.input[1]] = numpy_helper.from_array(levels * scales[None, :], node.input[1])
            nodes.append(helper.make_node("MatMul", [rounded[node.input[0]], node.input[1]], node.output))
            continue
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            nodes.append(node)
            continue
        gathers = node.op_type == "GatherBlockQuantized"
        packed, scales = node.input[0 if gathers else 1], node.input[2]
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        matrix = _dequantised(stored[packed], stored[scales], bits)
        name = f"{packed}.float"
        kept[name] = numpy_helper.from_array(matrix if gathers else np.ascontiguousarray(matrix.T), name)
        kept.pop(packed, None)
        kept.pop(scales, None)
        inputs = [name, node.input[1]] if gathers else [node.input[0], name]
        nodes.append(helper.make_node("Gather" if gathers else "MatMul", inputs, list(node.output), name=node.name))
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept.values())
    return model


def _cache_in_float(model: ModelProto) -> None:
    """Let every GroupQueryAttention cache float32; nothing to do where it does."""
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            del node.input[FLOAT_ATTENTION_INPUTS:]
            kept = [attribute for attribute in node.attribute if attribute.name not in CACHE_ATTRIBUTES]
            del node.attribute[:]
            node.attribute.extend(kept)


def _dequantised(packed: TensorProto, scales: TensorProto, bits: int) -> Float:
    blocks = numpy_helper.to_array(scales)
    rows = blocks.shape[0]
    return BlockMatrix(numpy_helper.to_array(packed).reshape(rows, -1), blocks.reshape(rows, -1), bits).dequantise()


def shape_of(version: VersionDocument) -> tuple[int, int, int]:
    """layers, kv_heads and head_size; ConfigError when it is no decoder."""
    config = version.config
    if not isinstance(config, DecoderConfig):
        raise ConfigError(f"{version.model} is an {config.kind}; only decoders have logits to judge")
    return config.layers, config.kv_heads, config.head_size
