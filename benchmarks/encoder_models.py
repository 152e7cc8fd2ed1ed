"""The encoder that `scripts/bench encode` runs: random weights of all-MiniLM-L6-v2's shape, and its texts.

Checkpoint and versions stay below .venv/opt/encoders; a later run takes them from there.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.decoder_models import ROOT
from codec.versions import VERSION_FILE, read_version
from forge.build import build_version
from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_graph import EncoderLayer, EncoderWeights, Linear, Norm
from forge.encoder_weights import place_encoder
from forge.graph_builder import CONTRIB, GraphBuilder, Matrix
from forge.placer import Placer
from forge.quantise import Precision
from forge.reference import MODEL_FILE
from forge.weights import Placed, writing_weights
from wire.digest import digest_of
from wire.manifest import EncoderConfig, VersionDocument

HOME = ROOT / ".venv" / "opt" / "encoders"
MINILM: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": 384,
    "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
"""The numbers of all-MiniLM-L6-v2's config.json."""
LONGEST = 256
"""Its max_seq_length."""

Text = list[int]


@dataclass(frozen=True, slots=True)
class EncoderVersion:
    """A version directory."""

    directory: Path
    document: VersionDocument

    @property
    def config(self) -> EncoderConfig:
        """Its sizes."""
        assert isinstance(self.document.config, EncoderConfig)
        return self.document.config


def minilm(precision: Precision) -> EncoderVersion:
    """The version of the random checkpoint, built again whenever the forge makes another graph."""
    sources = sorted((ROOT / "forge").glob("*.py"))
    digest = digest_of(b"".join(path.read_bytes() for path in sources))[:12]
    directory = HOME / f"minilm-{precision}-{digest}"
    if not (directory / VERSION_FILE).is_file():
        Console(stderr=True).print(f"building MiniLM's shape, {precision}")
        build_version(_checkpoint(), directory, ("bench", "1"), precision=precision)
    return EncoderVersion(directory, read_version(directory))


def padded_graph() -> Path:
    """The same weights in float32 under a graph that computes every place of the batch, padding too, as exporters make
    it, with the fused operations that onnxruntime's optimiser makes of one."""
    home = HOME / "minilm-padded"
    if not (home / MODEL_FILE).is_file():
        temporary = home.with_name(f".{home.name}.building")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with writing_weights(temporary) as writer:
            weights = place_encoder(EncoderCheckpoint(_checkpoint()), Placer(writer, {}, Precision.FLOAT32))
        (temporary / MODEL_FILE).write_bytes(_padded(weights).SerializeToString())
        temporary.rename(home)
    return home / MODEL_FILE


def mixed_texts(count: int, seed: int) -> list[Text]:
    """Random tokens in the lengths of queries and passages: two in three about 14 tokens long, one in three about 110,
    both log-normal, at most LONGEST."""
    chance = np.random.default_rng(seed)
    centre = np.where(chance.random(count) < 2 / 3, np.log(14), np.log(110))
    lengths = np.clip(np.exp(centre + 0.5 * chance.standard_normal(count)), 4, LONGEST).astype(int)
    return [[int(token) for token in chance.integers(1000, MINILM["vocab_size"], length)] for length in lengths]


def _checkpoint() -> Path:
    directory = HOME / "minilm-random"
    if not directory.is_dir():
        temporary = directory.with_name(f".{directory.name}.writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(dict(_tensors()), temporary / "model.safetensors")
        (temporary / "config.json").write_text(json.dumps(MINILM))
        (temporary / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}))
        kinds = ("Transformer", "Pooling", "Normalize")
        modules = [{"path": f"{i}_{kind}", "type": f"models.{kind}"} for i, kind in enumerate(kinds)]
        (temporary / "modules.json").write_text(json.dumps(modules))
        (temporary / "1_Pooling").mkdir()
        (temporary / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
        words = {f"w{number}": number for number in range(MINILM["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106  it is a word
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(temporary / "tokenizer.json"))
        temporary.rename(directory)
    return directory


def _tensors() -> Iterator[tuple[str, NDArray[np.float16]]]:
    hidden, mlp = MINILM["hidden_size"], MINILM["intermediate_size"]
    chance = np.random.default_rng(22)

    def values(*shape: int) -> NDArray[np.float16]:
        return (chance.standard_normal(shape, np.float32) * np.float32(0.05)).astype(np.float16)

    for name, rows in (("word", MINILM["vocab_size"]), ("position", 512), ("token_type", 2)):
        yield f"embeddings.{name}_embeddings.weight", values(rows, hidden)
    norms = ["embeddings.LayerNorm"]
    for layer in range(MINILM["num_hidden_layers"]):
        stem = f"encoder.layer.{layer}"
        linear = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        linear |= {"attention.output.dense": (hidden, hidden)}
        linear |= {"intermediate.dense": (mlp, hidden), "output.dense": (hidden, mlp)}
        for name, shape in linear.items():
            yield f"{stem}.{name}.weight", values(*shape)
            yield f"{stem}.{name}.bias", values(shape[0])
        norms += [f"{stem}.attention.output.LayerNorm", f"{stem}.output.LayerNorm"]
    for name in norms:
        yield f"{name}.weight", np.ones(hidden, np.float16)
        yield f"{name}.bias", values(hidden)


def _padded(weights: EncoderWeights) -> ModelProto:
    b, hidden = GraphBuilder(), MINILM["hidden_size"]
    for name, value in (("one", 1), ("zero", 0)):
        b.constant(name, value, np.int64)
    b.constant("axis_1", [1], np.int64)
    b.constant("flat", [-1], np.int64)
    b.node("Shape", ["input_ids"], ["shape"])
    b.node("Gather", ["shape", "one"], ["longest"], axis=0)
    b.node("Range", ["zero", "longest", "one"], ["range"])
    b.node("Cast", ["attention_mask"], ["mask"], to=TensorProto.INT32)
    b.node("ReduceSum", ["mask", "axis_1"], ["lengths"], keepdims=0)
    word = b.embed("words", "input_ids", weights.words)
    b.node("Gather", [b.vector("positions.table", weights.positions), "range"], ["positions"])
    b.node("Add", [word, "positions"], ["embedded"])
    norm = [b.vector("norm.weight", weights.norm.weight), b.vector("norm.bias", weights.norm.bias)]
    rows = b.node("LayerNormalization", ["embedded", *norm], ["norm"], epsilon=1e-12)
    for i, layer in enumerate(weights.layers):
        rows = _padded_layer(b, f"layers.{i}", rows, layer)
    b.node("Cast", ["mask"], ["weight"], to=TensorProto.FLOAT)
    b.node("Unsqueeze", ["weight", "flat"], ["weights"])
    b.node("Mul", [rows, "weights"], ["weighted"])
    b.node("ReduceSum", ["weighted", "axis_1"], ["summed"], keepdims=0)
    b.node("LpNormalization", ["summed"], ["embeddings"], axis=-1, p=2)
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["B", "S"]) for n in ("input_ids", "attention_mask")]
    return b.model("padded", inputs, [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["B", hidden])])


def _multiply(b: GraphBuilder, name: str, source: str, linear: Linear) -> str:
    assert isinstance(linear.matrix, Matrix)  # in float32
    return b.matmul(name, source, linear.matrix)


def _padded_layer(b: GraphBuilder, name: str, rows: str, layer: EncoderLayer) -> str:
    def norm(part: str, sources: list[str], norm: Norm, bias: Placed) -> str:
        inputs = [*sources, b.vector(f"{part}.weight", norm.weight), b.vector(f"{part}.shift", norm.bias)]
        inputs.append(b.vector(f"{part}.bias", bias))
        return b.node("SkipLayerNormalization", inputs, [part], CONTRIB, epsilon=1e-12)

    qkv = _multiply(b, f"{name}.qkv", rows, layer.qkv)
    parts = [f"{name}.{part}" for part in ("query", "key", "value")]
    b.node("Split", [qkv], parts, axis=-1, num_outputs=3)
    bias = b.vector(f"{name}.qkv.bias", layer.qkv.bias)
    mixed = b.node(
        "MultiHeadAttention", [*parts, bias, "lengths"], [f"{name}.mixed"], CONTRIB,
        num_heads=MINILM["num_attention_heads"],
    )  # fmt: skip
    added = _multiply(b, f"{name}.output", mixed, layer.output)
    rows = norm(f"{name}.attention_norm", [added, rows], layer.attention_norm, layer.output.bias)
    up = _multiply(b, f"{name}.up", rows, layer.up)
    active = b.node("BiasGelu", [up, b.vector(f"{name}.up.bias", layer.up.bias)], [f"{name}.active"], CONTRIB)
    added = _multiply(b, f"{name}.down", active, layer.down)
    return norm(f"{name}.mlp_norm", [added, rows], layer.mlp_norm, layer.down.bias)
