"""The decoders that `scripts/bench decode` and `serve` run: random weights of SmolLM2-135M's shape, and the sample LM.

Each is a checkpoint and the version that the forge builds of it, kept below .venv/opt/decoders, so that ours and the
peers run the same weights. A crash leaves a temporary name beside it, which the next run replaces.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import save_file

from codec.versions import VERSION_FILE, read_version
from forge.build import build_version
from forge.cache_scales import Int8Cache
from forge.prune import Rule, prune_checkpoint
from forge.quantise import BLOCK
from forge.shrink import Shrinking, shrink_checkpoint
from wire.digest import digest_of
from wire.manifest import DecoderConfig, VersionDocument

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "tales-5m-base"
HOME = ROOT / ".venv" / "opt" / "decoders"

SMOLLM: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 576,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
"""The numbers of SmolLM2-135M's config.json."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A checkpoint, and the version built of it."""

    name: str
    checkpoint: Path
    directory: Path
    version: VersionDocument

    @property
    def config(self) -> DecoderConfig:
        """Its sizes."""
        assert isinstance(self.version.config, DecoderConfig)
        return self.version.config


def smollm(cache: Int8Cache | None = None, longest: int = BLOCK) -> Decoder:
    """Random weights of SmolLM2-135M's shape, with the sample's tokenizer and made-up words for its further tokens."""
    checkpoint = HOME / "smollm-135m-of-chance"
    if not checkpoint.is_dir():
        temporary = checkpoint.with_name(f".{checkpoint.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        Console(stderr=True).print("making random weights of SmolLM2-135M's shape")
        save_file(dict(random_tensors()), temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(SMOLLM))
        (temporary / "tokenizer.json").write_text(_tokenizer(SMOLLM["vocab_size"]))
        temporary.rename(checkpoint)
    return _built("smollm-135m", checkpoint, cache, longest)


def sample(cache: Int8Cache | None = None, longest: int = BLOCK) -> Decoder:
    """The sample LM."""
    return _built("tales-5m", SAMPLE, cache, longest)


def opened(directory: Path) -> Decoder:
    """The decoder of a version directory that was built elsewhere."""
    return Decoder(directory.name, directory, directory, read_version(directory))


def pruned(model: Callable[[], Decoder], choice: Shrinking | Rule) -> Decoder:
    """A decoder whose checkpoint was pruned after `choice`."""
    whole = model()
    kind = "of-fewer-columns-and-heads" if isinstance(choice, Shrinking) else "with-zeros"
    checkpoint = HOME / f"{whole.checkpoint.name}-{kind}-{_digest_of_forge()}"
    if not checkpoint.is_dir():
        if isinstance(choice, Shrinking):
            shrink_checkpoint(whole.checkpoint, checkpoint, choice)
        else:
            prune_checkpoint(whole.checkpoint, checkpoint, choice)
    return _built(f"{whole.name}-{kind}", checkpoint)


def random_tensors() -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Tensors by their names in a checkpoint, normal with the spread that such models start from."""
    hidden, mlp = SMOLLM["hidden_size"], SMOLLM["intermediate_size"]
    key_value = SMOLLM["num_key_value_heads"] * SMOLLM["head_dim"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden), "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
    }  # fmt: skip
    chance = np.random.default_rng(135)

    def matrix(rows: int, columns: int) -> NDArray[np.float16]:
        return (chance.standard_normal((rows, columns), np.float32) * np.float32(0.02)).astype(np.float16)

    yield "model.embed_tokens.weight", matrix(SMOLLM["vocab_size"], hidden)
    for layer in range(SMOLLM["num_hidden_layers"]):
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", np.ones(hidden, np.float16)
    yield "model.norm.weight", np.ones(hidden, np.float16)


def _tokenizer(size: int) -> str:
    """The sample's tokenizer.json with a word of its own for every token up to `size`, so that all give text."""
    tokenizer: dict[str, Any] = json.loads((SAMPLE / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    vocabulary |= {f"\u0120word{token}": token for token in range(len(vocabulary), size)}
    return json.dumps(tokenizer)


def _built(name: str, checkpoint: Path, cache: Int8Cache | None = None, longest: int = BLOCK) -> Decoder:
    """Built again whenever the forge makes another graph."""
    kind = f"{checkpoint.name}{'-int8-cache' if cache else ''}{f'-blocks-of-{longest}' if longest != BLOCK else ''}"
    directory = HOME / f"{kind}-{_digest_of_forge()}"
    if not (directory / VERSION_FILE).is_file():
        HOME.mkdir(parents=True, exist_ok=True)
        Console(stderr=True).print(f"building {name}")
        build_version(checkpoint, directory, (name, "1"), cache=cache, longest=longest)
    return Decoder(name, checkpoint, directory, read_version(directory))


def _digest_of_forge() -> str:
    sources = sorted((ROOT / "forge").glob("*.py"))
    return digest_of(b"".join(path.read_bytes() for path in sources))[:12]
