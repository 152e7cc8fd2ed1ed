"""The forge's encoders against references that share no code with it: transformers' embeddings and a numpy forward."""

from pathlib import Path

import numpy as np
import pytest

from codec.versions import read_version
from forge.build import build_version
from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_reference import EncoderJudge, checkpoint_encoder, shipped_encoder, twin_encoder
from forge.golden import embedding_error
from forge.quantise import Precision
from forge.reference import MODEL_FILE
from tests.reference.bert import ReferenceBert

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"
TOLERANCE = 1e-5
"""Largest difference of numbers whose size is about 1, or less: float32 sums in another order."""
INT8_ERROR = 0.001
"""What int8 activations may cost, as wire/golden.py measures it; 0.0001 was seen on x86."""


def fixture_cases() -> list[tuple[str, list[int], np.ndarray]]:
    with np.load(FIXTURES / "embeddings.npz") as stored:
        keys = [key.removesuffix("/ids") for key in stored.files if key.endswith("/ids")]
        return [(key.split("/")[0], stored[f"{key}/ids"].tolist(), stored[f"{key}/embedding"]) for key in keys]


@pytest.mark.parametrize(("name", "ids", "expected"), fixture_cases())
def test_numpy_reference_gives_transformers_embeddings(name: str, ids: list[int], expected: np.ndarray) -> None:
    assert np.abs(ReferenceBert.load(FIXTURES / name).embed(ids) - expected).max() < TOLERANCE


@pytest.mark.parametrize(("name", "ids", "expected"), fixture_cases())
def test_float_graph_gives_transformers_embeddings(
    name: str, ids: list[int], expected: np.ndarray, tmp_path: Path
) -> None:
    judge = checkpoint_encoder(EncoderCheckpoint(FIXTURES / name), tmp_path)
    assert np.abs(judge.embed([ids])[0] - expected).max() < TOLERANCE


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta"])
def test_padded_batch_gives_what_each_text_gives_alone(name: str, tmp_path: Path) -> None:
    judge = checkpoint_encoder(EncoderCheckpoint(FIXTURES / name), tmp_path)
    random = np.random.default_rng(2)
    texts = [random.integers(5, 384, length).tolist() for length in (7, 150, 1, 33, 150, 2)]
    ids, mask = np.full((6, 150), 383), np.zeros((6, 150), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    batched = judge._session.run(["embeddings"], {"input_ids": ids, "attention_mask": mask})[0]
    assert np.abs(batched - judge.embed(texts)).max() < TOLERANCE


def test_padding_costs_the_matrices_no_row(tmp_path: Path) -> None:
    """The product of a layer's first matrix, made an output, has a row per token."""
    import onnx

    checkpoint_encoder(EncoderCheckpoint(FIXTURES / "tiny-bert"), tmp_path)
    model = onnx.load(str(tmp_path / MODEL_FILE), load_external_data=False)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("layers.1.up"))
    onnx.save(model, str(tmp_path / MODEL_FILE))
    mask = np.zeros((2, 9), np.int64)
    mask[0], mask[1, :2] = 1, 1
    feeds = {"input_ids": np.full((2, 9), 7), "attention_mask": mask}
    (rows,) = EncoderJudge(tmp_path / MODEL_FILE)._session.run(["layers.1.up"], feeds)
    assert rows.shape == (11, 128)


def dequantised_reference(directory: Path) -> ReferenceBert:
    """The numpy reference on the weights that a node gets, read from weights.bin with nothing of the forge."""
    columns = read_version(directory).tensors
    blob = (directory / "weights.bin").read_bytes()
    rows = {name: row for row, name in enumerate(columns.name)}

    def raw(name: str) -> bytes:
        row = rows[name]
        return blob[columns.offset[row] : columns.offset[row] + columns.size_bytes(row)]

    def vector(name: str) -> np.ndarray:
        return np.frombuffer(raw(name), np.float32)

    def matrix(name: str) -> np.ndarray:
        if f"{name}.levels" in rows:
            levels = np.frombuffer(raw(f"{name}.levels"), np.int8).reshape(columns.shape[rows[f"{name}.levels"]])
            smoothing = vector(f"{name}.smoothing") if f"{name}.smoothing" in rows else np.ones(1, np.float32)
            return (levels * vector(f"{name}.scales")).T * smoothing
        shape = columns.shape[rows[f"{name}.packed"]]
        levels = np.frombuffer(raw(f"{name}.packed"), np.uint8)
        if columns.dtype[rows[f"{name}.packed"]] == "u4":
            levels = np.stack([levels % 16, levels // 16], axis=1)
        zero = 8 if columns.dtype[rows[f"{name}.packed"]] == "u4" else 128
        blocks = levels.reshape(shape[0], -1, 32).astype(np.float32) - zero
        return (blocks * vector(f"{name}.scales").reshape(shape[0], -1, 1)).reshape(shape)

    source = ReferenceBert.load(FIXTURES / "tiny-bert")
    hidden = source.config["hidden_size"]
    weights = dict(source.weights)
    weights["embeddings.word_embeddings.weight"] = matrix("embeddings.words")
    for i in range(source.config["num_hidden_layers"]):
        stem, qkv = f"encoder.layer.{i}", matrix(f"layers.{i}.qkv")
        for part, name in enumerate(("query", "key", "value")):
            weights[f"{stem}.attention.self.{name}.weight"] = qkv[part * hidden : (part + 1) * hidden]
        weights[f"{stem}.attention.output.dense.weight"] = matrix(f"layers.{i}.output")
        weights[f"{stem}.intermediate.dense.weight"] = matrix(f"layers.{i}.up")
        weights[f"{stem}.output.dense.weight"] = matrix(f"layers.{i}.down")
    return ReferenceBert(source.config, weights, source.mean, source.normalised)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_twin_is_the_dequantised_model_and_kernels_stay_within_int8_noise_of_it(
    precision: Precision, tmp_path: Path
) -> None:
    build_version(FIXTURES / "tiny-bert", tmp_path / "out", ("tiny", "1"), precision=precision)
    reference = dequantised_reference(tmp_path / "out")
    texts = [[int(i) for i in np.random.default_rng(n).integers(5, 384, n)] for n in (4, 30, 140)]
    expected = [reference.embed(text) for text in texts]
    twin = twin_encoder(tmp_path / "out").embed(texts)
    assert max(np.abs(row - other).max() for row, other in zip(expected, twin, strict=True)) < TOLERANCE
    shipped = shipped_encoder(tmp_path / "out").embed(texts)
    errors = [embedding_error(row, other) for row, other in zip(expected, shipped, strict=True)]
    assert 0 < max(errors) < INT8_ERROR
