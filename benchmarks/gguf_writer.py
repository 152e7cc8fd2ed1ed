"""A version's weights as a GGUF file for llama.cpp: every matrix Q4_0, the tied head too, norms float32.

Source of the format: GGUF version 3 (ggml, docs/gguf.md) and ggml's block_q4_0: a float16 scale, then 16 bytes whose
low nibbles are values 0..15 and whose high nibbles are values 16..31 of the block, each plus 8. llama.cpp rotates
neighbours, so that the rows of q and k are interleaved as by its converter.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.decoder_models import HOME, Decoder

ALIGNMENT_BYTES = 32
F32, Q4_0 = 0, 2
UINT32, FLOAT32, STRING, ARRAY, INT32 = 4, 6, 8, 9, 5
BLOCK = 32
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_of(decoder: Decoder) -> Path:
    """The file, written when it is not there."""
    path = HOME / f"{decoder.checkpoint.name}.q4_0.gguf"
    if not path.is_file():
        temporary = path.with_suffix(".writing")
        config = json.loads((decoder.checkpoint / "config.json").read_text())
        _write(temporary, config, load_file(decoder.checkpoint / "model.safetensors"))
        temporary.rename(path)
    return path


def _write(path: Path, config: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> None:
    prepared = [(_name(name), _data(name, tensor, config)) for name, tensor in tensors.items()]
    fields = list(_fields(config))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(prepared), len(fields)) + b"".join(fields)
    offset, infos = 0, b""
    for name, (shape, kind, data) in prepared:
        infos += _text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        infos += struct.pack("<IQ", kind, offset)
        offset += _aligned(len(data))
    with path.open("wb") as out:
        out.write((head + infos).ljust(_aligned(len(head + infos)), b"\0"))
        for _, (_, _, data) in prepared:
            out.write(data.ljust(_aligned(len(data)), b"\0"))


def _fields(config: dict[str, Any]) -> Iterator[bytes]:
    """Metadata: the architecture, and a vocabulary of placeholders, for tokens go in as numbers."""
    rope = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    integers = {
        "context_length": config["max_position_embeddings"], "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"], "attention.head_count_kv": config["num_key_value_heads"],
        "rope.dimension_count": config["head_dim"], "vocab_size": config["vocab_size"],
    }  # fmt: skip
    count = config["vocab_size"]
    yield _text("general.architecture") + struct.pack("<I", STRING) + _text("llama")
    for name, value in integers.items():
        yield _text(f"llama.{name}") + struct.pack("<II", UINT32, value)
    for name, number in (("rope.freq_base", rope), ("attention.layer_norm_rms_epsilon", config["rms_norm_eps"])):
        yield _text(f"llama.{name}") + struct.pack("<If", FLOAT32, number)
    yield _text("tokenizer.ggml.model") + struct.pack("<I", STRING) + _text("llama")
    tokens = b"".join(_text(f"t{i}") for i in range(count))
    yield _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, count) + tokens
    yield _text("tokenizer.ggml.scores") + struct.pack("<IIQ", ARRAY, FLOAT32, count) + bytes(4 * count)
    kinds = np.ones(count, "<i4")
    yield _text("tokenizer.ggml.token_type") + struct.pack("<IIQ", ARRAY, INT32, count) + kinds.tobytes()
    for name in ("bos", "eos", "unknown"):
        yield _text(f"tokenizer.ggml.{name}_token_id") + struct.pack("<II", UINT32, 0)


def _name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor."""
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_NAMES[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _data(name: str, tensor: NDArray[Any], config: dict[str, Any]) -> tuple[tuple[int, ...], int, bytes]:
    values = np.ascontiguousarray(tensor, np.float32)
    if values.ndim == 1:
        return values.shape, F32, values.tobytes()
    for part, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
        if part in name:
            rows, columns = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return values.shape, Q4_0, _q4_0(values)


def _q4_0(matrix: NDArray[np.float32]) -> bytes:
    blocks = matrix.reshape(-1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scales = extreme / -8
    levels = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    nibbles = np.clip(np.floor(levels + 8.5), 0, 15).astype(np.uint8)
    packed = nibbles[:, : BLOCK // 2] | nibbles[:, BLOCK // 2 :] << 4
    return np.concatenate([scales.astype("<f2").view(np.uint8), packed], axis=1).tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
