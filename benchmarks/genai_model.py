"""A version as onnxruntime-genai wants it: the graph with the inputs that its builder gives a CPU model.

The builder (models/builders/base.py in its wheel) needs torch, so what it does by default is rebuilt on our graph with
the same weights: `attention_mask`, which the graph sums and measures, instead of `seqlens_k` and
`total_sequence_length`; gate and up are matrices of their own (`fuse_mlp_gate_up` is off); logits are [B, S, vocab]
(`prune_lm_head` is off).
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.decoder_models import HOME, Decoder


def genai_of(decoder: Decoder, threads: int) -> Path:
    """A directory with model.onnx, its weights and genai_config.json."""
    out = HOME / f"{decoder.directory.name}.genai-unfused"
    out.mkdir(exist_ok=True)
    graph = out / "model.onnx"
    if not graph.is_file():
        for entry in decoder.version.files:
            if entry.path.endswith(".bin") and not (out / entry.path).exists():
                os.link(decoder.directory / entry.path, out / entry.path)
        model = onnx.load(str(decoder.directory / "model.onnx"), load_external_data=False)
        _ask_by_mask(model, decoder.config.vocab_size)
        _part_gate_and_up(model.graph)
        graph.write_bytes(model.SerializeToString())
    (out / "genai_config.json").write_text(json.dumps(_config(decoder, threads)))
    return out


def _ask_by_mask(model: Any, vocab_size: int) -> None:
    graph = model.graph
    kept = [entry for entry in graph.input if entry.name not in ("seqlens_k", "total_sequence_length", "logit_rows")]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"]))
    graph.initializer.extend(
        [numpy_helper.from_array(np.asarray([1], np.int64), "mask.axis"),
         numpy_helper.from_array(np.asarray(1, np.int64), "mask.one"),
         numpy_helper.from_array(np.asarray(1, np.int64), "mask.column")]
    )  # fmt: skip
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "mask.axis"], ["mask.sums"], keepdims=0),
        helper.make_node("Sub", ["mask.sums", "mask.one"], ["mask.last"]),
        helper.make_node("Cast", ["mask.last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask.shape"]),
        helper.make_node("Gather", ["mask.shape", "mask.column"], ["mask.width"], axis=0),
        helper.make_node("Cast", ["mask.width"], ["total_sequence_length"], to=TensorProto.INT32),
    ]
    source = next(node.input[0] for node in graph.node if node.output[0] == "head.rows")
    body = [node for node in graph.node if node.output[0] not in ("head.rows", "head.chosen")]
    for node in body:
        if node.output[0] == "logits":
            node.input[0] = source
    del graph.node[:]
    graph.node.extend([*nodes, *body])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "S", vocab_size])
    others = [entry for entry in graph.output if entry.name != "logits"]
    del graph.output[:]
    graph.output.extend([logits, *others])


def _part_gate_and_up(graph: Any) -> None:
    """Two matrices, which are the halves of the rows of ours, instead of one and a Split."""
    initializers = {entry.name: entry for entry in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type == "Split":
            continue
        if not node.output[0].endswith(".gate_up"):
            nodes.append(node)
            continue
        for half, part in enumerate(("gate", "up")):
            names = []
            for name in node.input[1:]:
                initializer = _half(initializers[name], half)
                graph.initializer.append(initializer)
                names.append(initializer.name)
            output = node.output[0].removesuffix("gate_up") + part
            other = helper.make_node("MatMulNBits", [node.input[0], *names], [output], domain=node.domain)
            other.attribute.extend(node.attribute)
            next(attribute for attribute in other.attribute if attribute.name == "N").i //= 2
            nodes.append(other)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _half(initializer: Any, half: int) -> Any:
    """The first or second half of the rows of a tensor in weights.bin."""
    out = TensorProto()
    out.CopyFrom(initializer)
    out.name = f"{initializer.name}.{half}"
    out.dims[0] //= 2
    where = {entry.key: entry for entry in out.external_data}
    length = int(where["length"].value) // 2
    where["length"].value = str(length)
    where["offset"].value = str(int(where["offset"].value) + half * length)
    return out


def _config(decoder: Decoder, threads: int) -> dict[str, Any]:
    config = json.loads((decoder.checkpoint / "config.json").read_text())
    return {
        "model": {
            "type": "llama", "vocab_size": config["vocab_size"], "context_length": config["max_position_embeddings"],
            "bos_token_id": 0, "eos_token_id": config["vocab_size"] - 1, "pad_token_id": 0,
            "decoder": {
                "session_options": {"intra_op_num_threads": threads, "log_severity_level": 3, "provider_options": []},
                "filename": "model.onnx", "head_size": config["head_dim"], "hidden_size": config["hidden_size"],
                "num_attention_heads": config["num_attention_heads"],
                "num_key_value_heads": config["num_key_value_heads"], "num_hidden_layers": config["num_hidden_layers"],
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                           "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                            "present_value_names": "present.%d.value"},
            },
        },
        "search": {"max_length": 2048, "past_present_share_buffer": True, "do_sample": False, "num_beams": 1},
    }  # fmt: skip
