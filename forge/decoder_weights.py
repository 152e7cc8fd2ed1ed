"""A checkpoint's matrices, stacked and quantised (or kept in float), placed in weights.bin and handed to the graph."""

import numpy as np

from forge.checkpoint import Checkpoint
from forge.graph import Layer, Weights
from forge.placer import Placer
from forge.progress import Progress, silent
from forge.quantise import Float, Precision
from forge.weights import Placed


def place_weights(checkpoint: Checkpoint, placer: Placer, progress: Progress = silent) -> Weights:
    """Read, transform and place every weight of `checkpoint`."""
    a = checkpoint.architecture
    table = checkpoint.tensor("model.embed_tokens.weight", (a.vocab_size, a.hidden_size))
    embedding = placer.table("model.embed_tokens", table)
    layers = []
    for i in range(a.layers):
        progress("quantise", i, a.layers)
        layers.append(_place_layer(checkpoint, placer, i))
    norm = placer.vector("model.norm", checkpoint.tensor("model.norm.weight", (a.hidden_size,)))
    if a.tied_head:
        head = embedding if placer.precision is not Precision.FLOAT32 else placer.matrix("lm_head", table)
    else:
        head = placer.head("lm_head", checkpoint.tensor("lm_head.weight", (a.vocab_size, a.hidden_size)))
    return Weights(embedding, layers, norm, head)


def _place_layer(checkpoint: Checkpoint, placer: Placer, i: int) -> Layer:
    a, stem, name = checkpoint.architecture, f"model.layers.{i}", f"layers.{i}"
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size

    def read(part: str, rows: int, columns: int) -> Float:
        return checkpoint.tensor(f"{stem}.{part}.weight", (rows, columns))

    def norm(part: str) -> Float:
        return checkpoint.tensor(f"{stem}.{part}.weight", (a.hidden_size,))

    def vector(part: str, size: int) -> Float:
        return checkpoint.tensor(f"{stem}.self_attn.{part}", (size,))

    sizes = {"q": q, "k": kv, "v": kv}
    qkv = np.concatenate([read(f"self_attn.{part}_proj", rows, a.hidden_size) for part, rows in sizes.items()])
    extra: dict[str, Placed] = {}
    if a.qkv_bias:
        bias = np.concatenate([vector(f"{part}_proj.bias", rows) for part, rows in sizes.items()])
        extra["qkv_bias"] = placer.vector(f"{name}.qkv.bias", bias)
    if a.output_bias:
        extra["output_bias"] = placer.vector(f"{name}.output.bias", vector("o_proj.bias", a.hidden_size))
    if a.qk_norm:
        extra["query_norm"] = placer.vector(f"{name}.query_norm", vector("q_norm.weight", a.head_size))
        extra["key_norm"] = placer.vector(f"{name}.key_norm", vector("k_norm.weight", a.head_size))
    gate_up = np.concatenate(
        [read("mlp.gate_proj", a.mlp_size, a.hidden_size), read("mlp.up_proj", a.mlp_size, a.hidden_size)]
    )
    return Layer(
        input_norm=placer.vector(f"{name}.input_norm", norm("input_layernorm")),
        qkv=placer.product(f"{name}.qkv", qkv),
        output=placer.product(f"{name}.output", read("self_attn.o_proj", a.hidden_size, q)),
        post_norm=placer.vector(f"{name}.post_norm", norm("post_attention_layernorm")),
        gate_up=placer.product(f"{name}.gate_up", gate_up),
        down=placer.product(f"{name}.down", read("mlp.down_proj", a.hidden_size, a.mlp_size)),
        **extra,
    )
