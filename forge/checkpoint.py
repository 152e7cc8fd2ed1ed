"""Reading a Hugging Face checkpoint (config.json, safetensors, tokenizer) of a decoder without torch.

What tells the families apart is in one table: Mistral's and Qwen's windows, Qwen2's biases, Qwen3's norms of queries
and keys. SmolLM is a Llama. Nothing is written. Whatever does not fit ends in one sentence that names the tensor or the
field and the remedy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.configuration import Configuration, architectures_of, read_config
from forge.rotary import Rotary, read_rotary
from forge.tensors import Tensors
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Family:
    """What a family has beyond a Llama."""

    qkv_bias: bool | None = False
    """Of queries, keys and values; None: as `attention_bias` says, and then the output's too."""
    qk_norm: bool = False
    windows: str = ""
    """Field that switches `sliding_window` on; `sliding_window` itself where it is enough."""
    head_size: int | None = None
    """Where the config leaves `head_dim` out; None: hidden_size / heads."""


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias=None),
    "MistralForCausalLM": Family(windows="sliding_window"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="use_sliding_window"),
    "Qwen3ForCausalLM": Family(qkv_bias=None, qk_norm=True, windows="use_sliding_window", head_size=128),
}
HEAD_MULTIPLE = 8
"""onnxruntime's GroupQueryAttention asks for it."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a decoder; see the Hugging Face `LlamaConfig` for the source of the names."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    vocab_size: int
    context_tokens: int
    rms_epsilon: float
    rotary: Rotary
    tied_head: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    windows: tuple[int, ...]
    """Per layer, how many positions back it looks, its own included; 0 is all of them."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys pass an RMS norm per head before they are turned."""


class Checkpoint(Tensors):
    """An open checkpoint of a decoder."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when `directory` is no checkpoint that this version can import."""
        self.architecture = read_architecture(directory / "config.json")
        super().__init__(directory)


def read_architecture(path: Path) -> Architecture:
    """Parse config.json. Raises ConfigError naming the field."""
    fields = read_config(path)
    names = architectures_of(fields)
    family = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if family is None:
        raise ConfigError(f"architecture {', '.join(names) or 'none'} is not supported; use one of {sorted(FAMILIES)}")
    config = Configuration(path, fields)
    if config.flag("mlp_bias"):
        raise ConfigError(f"{path}: mlp_bias asks for biases, which this importer does not read; use a model without")
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{path}: hidden_act {activation!r} is not supported; use a model with silu")
    return _architecture(config, family)


def _architecture(config: Configuration, family: Family) -> Architecture:
    layers, vocab_size = config.count("num_hidden_layers", most=512), config.count("vocab_size")
    context = config.count("max_position_embeddings")
    bos = config.tokens("bos_token_id", vocab_size)
    bias = config.flag("attention_bias") and family.qkv_bias is None
    return Architecture(
        hidden_size=config.count("hidden_size", most=1 << 20),
        layers=layers,
        **_heads(config, family),
        mlp_size=config.count("intermediate_size", most=1 << 24),
        vocab_size=vocab_size,
        context_tokens=context,
        rms_epsilon=config.number("rms_norm_eps"),
        rotary=read_rotary(config),
        tied_head=config.flag("tie_word_embeddings"),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.tokens("eos_token_id", vocab_size),
        windows=tuple(window if window < context else 0 for window in _windows(config, family, layers)),
        qkv_bias=bias or bool(family.qkv_bias),
        output_bias=bias,
        qk_norm=family.qk_norm,
    )


def _heads(config: Configuration, family: Family) -> dict[str, int]:
    """heads, kv_heads and head_size, which must fit each other."""
    hidden, heads = config.count("hidden_size", most=1 << 20), config.count("num_attention_heads", most=1024)
    kv_heads = config.count("num_key_value_heads", default=heads, most=1024)
    if heads % kv_heads:
        raise config.refusal("num_key_value_heads", f"no divisor of num_attention_heads {heads}")
    if config.fields.get("head_dim") is None and family.head_size is None and hidden % heads:
        raise config.refusal("num_attention_heads", f"no divisor of hidden_size {hidden}")
    head_size = config.count("head_dim", default=family.head_size or max(hidden // heads, 1), most=1024)
    if head_size % HEAD_MULTIPLE:
        raise config.refusal("head_dim", f"not taken: heads of {head_size} are no multiple of {HEAD_MULTIPLE}")
    return {"heads": heads, "kv_heads": kv_heads, "head_size": head_size}


def _windows(config: Configuration, family: Family, layers: int) -> list[int]:
    """Of each layer; 0 where it sees everything."""
    if not family.windows or not config.fields.get(family.windows) or config.fields.get("sliding_window") is None:
        return [0] * layers
    window = config.count("sliding_window")
    if family.windows == "sliding_window":
        return [window] * layers
    kinds: Any = config.fields.get("layer_types")
    if kinds is None:
        first = config.fields.get("max_window_layers", 0)
        if type(first) is not int:
            raise config.refusal("max_window_layers", "no whole number")
        return [window if i >= first else 0 for i in range(layers)]
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise config.refusal("layer_types", f"no list of {layers} out of {sorted(known)}")
    return [known[kind] for kind in kinds]
