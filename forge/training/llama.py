"""The forward pass of a Llama decoder in torch, written as functions of named parameters, so that gradients flow.

Names and shapes are those of the Hugging Face checkpoint. It computes what the forge's float32 graph computes: RMS
norm, rotary positions on the two halves of a head (RoPE, arXiv 2104.09864), grouped queries (arXiv 2305.13245), SwiGLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from forge.checkpoint import Architecture
from wire.errors import ConfigError

Parameters = Mapping[str, Tensor]
"""By their names in the checkpoint."""

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
LAYER_MATRICES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass gives: `logits` [B, S, vocabulary], `hidden` after each layer [B, S, hidden_size]."""

    logits: Tensor
    hidden: tuple[Tensor, ...]


def shapes_of(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by its name in the checkpoint."""
    queries, keys = a.heads * a.head_size, a.kv_heads * a.head_size
    heights = (queries, keys, keys, a.hidden_size, a.mlp_size, a.mlp_size, a.hidden_size)
    rows = dict(zip(LAYER_MATRICES, heights, strict=True))
    columns = dict.fromkeys(LAYER_MATRICES, a.hidden_size) | {"self_attn.o_proj": queries, "mlp.down_proj": a.mlp_size}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (a.vocab_size, a.hidden_size), FINAL_NORM: (a.hidden_size,)}
    for i in range(a.layers):
        shapes |= {f"model.layers.{i}.{part}.weight": (rows[part], columns[part]) for part in LAYER_MATRICES}
        shapes |= {f"model.layers.{i}.{part}.weight": (a.hidden_size,) for part in LAYER_NORMS}
    if not a.tied_head:
        shapes[HEAD] = (a.vocab_size, a.hidden_size)
    return shapes


def refuse_other_families(a: Architecture, names: frozenset[str]) -> None:
    """Raises ConfigError for parameters that this forward pass would leave out."""
    spare = sorted(names - set(shapes_of(a)) - {HEAD})
    if spare:
        raise ConfigError(f"tensor {spare[0]} is not of a plain Llama, and training knows no other; choose a Llama")


def forward(a: Architecture, parameters: Parameters, ids: Tensor) -> Outputs:
    """Run the decoder over `ids` int64 [B, S]."""
    cosine, sine = _rotary(a, ids.shape[1])
    states = functional.embedding(ids, parameters[EMBEDDING])
    hidden = []
    for i in range(a.layers):
        stem = f"model.layers.{i}"
        normed = _norm(states, parameters[f"{stem}.input_layernorm.weight"], a.rms_epsilon)
        states = states + _attention(a, parameters, f"{stem}.self_attn", normed, (cosine, sine))
        normed = _norm(states, parameters[f"{stem}.post_attention_layernorm.weight"], a.rms_epsilon)
        gate = functional.silu(functional.linear(normed, parameters[f"{stem}.mlp.gate_proj.weight"]))
        product = gate * functional.linear(normed, parameters[f"{stem}.mlp.up_proj.weight"])
        states = states + functional.linear(product, parameters[f"{stem}.mlp.down_proj.weight"])
        hidden.append(states)
    normed = _norm(states, parameters[FINAL_NORM], a.rms_epsilon)
    return Outputs(functional.linear(normed, parameters[EMBEDDING if a.tied_head else HEAD]), tuple(hidden))


def _norm(states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(states, (states.shape[-1],), weight, epsilon)


def _attention(
    a: Architecture, parameters: Parameters, stem: str, normed: Tensor, tables: tuple[Tensor, Tensor]
) -> Tensor:
    batch, length, _ = normed.shape

    def heads(part: str, count: int) -> Tensor:
        projected = functional.linear(normed, parameters[f"{stem}.{part}.weight"])
        return projected.view(batch, length, count, a.head_size).transpose(1, 2)

    queries = _turned(heads("q_proj", a.heads), tables)
    keys = _turned(heads("k_proj", a.kv_heads), tables)
    attended = functional.scaled_dot_product_attention(
        queries, keys, heads("v_proj", a.kv_heads), is_causal=True, enable_gqa=a.heads != a.kv_heads
    )
    joined = attended.transpose(1, 2).reshape(batch, length, a.heads * a.head_size)
    return functional.linear(joined, parameters[f"{stem}.o_proj.weight"])


def _rotary(a: Architecture, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_size], both halves alike."""
    frequencies = torch.from_numpy(a.rotary.inverse_frequencies(a.head_size))
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _turned(states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * tables[0] + torch.cat((-second, first), dim=-1) * tables[1]
