"""Tiny random checkpoints of a Llama, for tests of what turns one checkpoint into another."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PROJECT = Path(__file__).resolve().parents[1]
TOKENIZER = PROJECT / "samples" / "tales-5m-base" / "tokenizer.json"
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, MLP, VOCABULARY = 64, 2, 4, 2, 16, 96, 4096


def tiny_llama(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of two layers with the sample's tokenizer, in `folder`, which is new."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": MLP, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    chance = np.random.default_rng(seed)
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
    }  # fmt: skip

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return (chance.standard_normal(shape) * 0.1).astype(np.float16)

    ones = np.ones(HIDDEN, np.float16)
    tensors = {"model.embed_tokens.weight": normal((VOCABULARY, HIDDEN)), "model.norm.weight": ones}
    for i in range(LAYERS):
        tensors |= {f"model.layers.{i}.{name}.weight": normal(shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = ones
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_small_tokenizer(checkpoint: Path) -> None:
    """The sample's tokenizer with as many words as the tiny vocabulary has."""
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads(TOKENIZER.read_text())
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)[:size]
    tokenizer["model"] |= {"vocab": {word: i for i, word in enumerate(words)}, "merges": []}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
