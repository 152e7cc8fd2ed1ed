"""A version as onnxruntime-genai wants it: the graph with the inputs that its builder gives a CPU model.

The builder itself needs torch, so its semantics are rebuilt on our graph with the same weights: `attention_mask`, which
the graph sums and measures, instead of `seqlens_k` and `total_sequence_length`; logits are [B, S, vocab].
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
    out = HOME / f"{decoder.directory.name}.genai"
    out.mkdir(exist_ok=True)
    graph = out / "model.onnx"
    if not graph.is_file():
        for entry in decoder.version.files:
            if entry.path.endswith(".bin") and not (out / entry.path).exists():
                os.link(decoder.directory / entry.path, out / entry.path)
        model = onnx.load(str(decoder.directory / "model.onnx"), load_external_data=False)
        _ask_by_mask(model, decoder.version.config.vocab_size)
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
