"""Reading a Hugging Face checkpoint (config.json, safetensors, tokenizer) of the Llama family without torch.

Nothing is written. Whatever does not fit ends in one sentence that names the tensor or the field and the remedy.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from wire.errors import ArtifactError, Code, ConfigError

Float = NDArray[np.float32]

CONFIG_LIMIT_BYTES = 1 << 20
SUPPORTED = {"LlamaForCausalLM"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a Llama decoder; see the Hugging Face `LlamaConfig` for the source of the names."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    vocab_size: int
    context_tokens: int
    rms_epsilon: float
    rope_theta: float
    tied_head: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


class Tensors:
    """The open weights of a checkpoint; tensors are read one at a time, as float32."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when they cannot be read."""
        self.weights = directory / "model.safetensors"
        try:
            self._file: Any = safe_open(self.weights, framework="np")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.weights} cannot be read ({error}); download the checkpoint again") from error
        self.names: frozenset[str] = frozenset(self._file.keys())  # type: ignore[no-untyped-call]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, which must be one of `names`."""
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float:
        """Tensor `name` as float32 of `shape`.

        Raises ArtifactError(unsupported) when it is missing, of another shape, or not finite.
        """
        if name not in self.names:
            raise ArtifactError(Code.UNSUPPORTED, f"{self.weights.name} lacks tensor {name}; export the model anew")
        try:
            stored = self._file.get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise ArtifactError(
                Code.UNSUPPORTED, f"tensor {name} cannot be read ({error}); convert it to float16 or float32"
            ) from error
        if stored.shape != shape:
            raise ArtifactError(
                Code.UNSUPPORTED, f"tensor {name} has shape {stored.shape}, config.json implies {shape}; fix the config"
            )
        values = np.ascontiguousarray(stored, np.float32)
        if not np.isfinite(values).all():
            raise ArtifactError(
                Code.UNSUPPORTED, f"tensor {name} holds NaN or infinity; train or convert the model again"
            )
        return values


class Checkpoint(Tensors):
    """An open checkpoint of a decoder."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when `directory` is no checkpoint that this version can import."""
        self.architecture = read_architecture(directory / "config.json")
        super().__init__(directory)


def read_json(path: Path) -> Any:
    """What a JSON file of a checkpoint holds, bounded. Raises ConfigError."""
    try:
        with path.open("rb") as source:
            return json.loads(source.read(CONFIG_LIMIT_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); point at a folder with {path.name}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ConfigError."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object; take it from the same export")
    return config


def read_architecture(path: Path) -> Architecture:
    """Parse config.json. Raises ConfigError naming the field."""
    config = read_config(path)
    names = config.get("architectures") or []
    if not set(names) & SUPPORTED:
        raise ConfigError(f"architecture {', '.join(names) or 'none'} is not supported; use one of {sorted(SUPPORTED)}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ConfigError(f"{path} asks for biases, which this importer does not read; use a checkpoint without")
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default") if rope else (config.get("rope_scaling") or {}).get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"rotary scaling {kind!r} is not supported; use a checkpoint with default rotary positions")
    try:
        return _architecture(config, float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: field {error} is missing or wrong; take config.json from the same export"
        ) from error


def _architecture(config: dict[str, Any], rope_theta: float) -> Architecture:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    eos = config.get("eos_token_id")
    return Architecture(
        hidden_size=hidden,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=int(config.get("head_dim") or hidden // heads),
        mlp_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        context_tokens=int(config["max_position_embeddings"]),
        rms_epsilon=float(config["rms_norm_eps"]),
        rope_theta=rope_theta,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (int(eos),)),
    )
