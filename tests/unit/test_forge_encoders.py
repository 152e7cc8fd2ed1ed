"""Building and releasing an encoder; refusing checkpoints that do not fit."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import shuffle_tensor

from codec.versions import read_version
from forge.build import ENCODER_PRECISIONS, build_version
from forge.encoder_checkpoint import read_encoder
from forge.encoder_reference import shipped_encoder
from forge.evaluate import evaluate_version
from forge.golden import embedding_error
from forge.quantise import Precision
from forge.release import make_release
from forge.verify import verify_release
from host.keys import create_key, load_signer
from wire.documents import encode_document
from wire.errors import AmperageError, ConfigError
from wire.golden import EmbeddingSet
from wire.manifest import EncoderConfig, Pooling
from wire.signing import RoleKeys, TrustPolicy

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"
SAMPLES = FIXTURES.parents[2] / "samples"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    folder = tmp_path_factory.mktemp("versions")
    for precision in ENCODER_PRECISIONS:
        build_version(FIXTURES / "tiny-bert", folder / precision, ("tiny", "1.0"), precision=precision)
    return {precision: folder / precision for precision in ENCODER_PRECISIONS}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be spoiled."""
    return Path(shutil.copytree(FIXTURES / "tiny-bert", tmp_path / "tiny"))


def golden_errors(directory: Path) -> tuple[EmbeddingSet, list[float]]:
    golden = EmbeddingSet.model_validate_json((directory / "golden.json").read_bytes())
    found = shipped_encoder(directory).embed([vector.input_ids for vector in golden.vectors])
    rows = [np.asarray(vector.embedding, np.float32) for vector in golden.vectors]
    return golden, [embedding_error(row, other) for row, other in zip(rows, found, strict=True)]


def test_version_says_what_the_runtime_needs_and_building_twice_gives_the_same(
    versions: dict[Precision, Path], tmp_path: Path
) -> None:
    document = read_version(versions[Precision.INT8])
    assert document.config == EncoderConfig(
        layers=2, hidden_size=64, heads=4, vocab_size=384, max_tokens=150, dimensions=64, pooling=Pooling.MEAN,
        normalised=True,
    )  # fmt: skip
    assert {entry.path for entry in document.files} == {"model.onnx", "weights.bin", "tokenizer.json", "golden.json"}
    again = build_version(FIXTURES / "tiny-bert", tmp_path / "again", ("tiny", "1.0"))
    assert again == document, "int8 is the default of encoders"


@pytest.mark.parametrize("precision", ENCODER_PRECISIONS)
def test_good_encoder_passes_its_golden_vectors_with_room(
    precision: Precision, versions: dict[Precision, Path]
) -> None:
    golden, errors = golden_errors(versions[precision])
    assert max(errors) < golden.tolerance / 8
    assert max(len(vector.input_ids) for vector in golden.vectors) == 150, "every position is judged"


@pytest.mark.parametrize("precision", ENCODER_PRECISIONS)
def test_each_matrix_damaged_in_turn_is_caught(
    precision: Precision, versions: dict[Precision, Path], tmp_path: Path
) -> None:
    columns = read_version(versions[precision]).tensors
    kinds = (".packed", ".levels", ".weight", ".positions")
    chosen = [row for row, name in enumerate(columns.name) if name.endswith(kinds)]
    assert len(chosen) >= 2 + 2 * 4
    caught = {}
    spoiled = tmp_path / "spoiled"
    for row in chosen:
        shutil.copytree(versions[precision], spoiled)
        shuffle_tensor(spoiled, row)
        golden, errors = golden_errors(spoiled)
        caught[columns.name[row]] = max(errors) / golden.tolerance
        shutil.rmtree(spoiled)
    assert min(caught.values()) > 1, caught


def test_release_of_an_encoder_verifies_as_a_node_would(versions: dict[Precision, Path], tmp_path: Path) -> None:
    keys = RoleKeys(keys=(create_key(tmp_path / "key.pem"),))
    trust = tmp_path / "trust.json"
    trust.write_bytes(encode_document(TrustPolicy(release=keys, desired=keys)))
    for precision, name in ((Precision.INT8, "int8"), (Precision.FLOAT32, "float32")):
        out = tmp_path / precision
        make_release(versions[precision], out, load_signer(tmp_path / "key.pem"), sequence=1)
        assert verify_release(out, trust, None)[f"{name} full"] == "ok"


def test_perplexity_of_an_encoder_is_refused(versions: dict[Precision, Path]) -> None:
    with pytest.raises(ConfigError, match="only decoders have logits"):
        evaluate_version(versions[Precision.INT8], SAMPLES / "eval" / "tales-5m-base.json", 1)


def test_encoder_in_two_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not built as ternary"):
        build_version(FIXTURES / "tiny-bert", tmp_path / "out", ("m", "1"), precision=Precision.TERNARY)


def test_checkpoint_without_modules_gets_the_mean_of_all_positions_unnormalised(tiny: Path) -> None:
    (tiny / "modules.json").unlink()
    architecture = read_encoder(tiny)
    assert (architecture.pooling, architecture.normalised, architecture.max_tokens) == (Pooling.MEAN, False, 160)


def test_positions_of_roberta_begin_after_the_padding() -> None:
    architecture = read_encoder(FIXTURES / "tiny-roberta")
    assert (architecture.first_position, architecture.max_tokens, architecture.pooling) == (2, 160, Pooling.CLS)


def refuse(source: Path, tmp_path: Path) -> AmperageError:
    with pytest.raises(AmperageError) as refused:
        build_version(source, tmp_path / "out", ("m", "1"))
    assert not (tmp_path / "out").exists()
    return refused.value


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("position_embedding_type", "relative_key", "relative_key"),
        ("is_decoder", True, "decoder"),
        ("hidden_act", "relu", "relu"),
        ("num_attention_heads", 5, "num_attention_heads"),
        ("hidden_size", "many", "many"),
        ("vocab_size", 300, "word_embeddings"),
    ],
)
def test_config_that_does_not_fit_is_refused_with_its_field(
    tiny: Path, tmp_path: Path, field: str, value: object, said: str
) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, field: value}))
    assert said in refuse(tiny, tmp_path).message


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "Dense"),
        ("modules.json", ["Pooling"], "no list of modules"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls_token"),
        ("sentence_bert_config.json", [], "no JSON object"),
    ],
)
def test_modules_that_are_not_read_are_refused(
    tiny: Path, tmp_path: Path, file: str, content: object, said: str
) -> None:
    (tiny / file).write_text(json.dumps(content))
    assert said in refuse(tiny, tmp_path).message


def test_matrix_of_another_shape_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    assert "intermediate.dense.weight" in refuse(tiny, tmp_path).message


def test_int8_version_on_the_scales_of_another_differs_only_where_its_weights_do(
    versions: dict[Precision, Path], tiny: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    tensors[name] = (tensors[name].astype(np.float32) * 0.97).astype(np.float16)
    save_file(tensors, tiny / "model.safetensors")
    base = versions[Precision.INT8]
    document = build_version(tiny, tmp_path / "tuned", ("tiny", "2.0"), scales_of=base)
    columns = document.tensors
    old, new = (base / "weights.bin").read_bytes(), (tmp_path / "tuned" / "weights.bin").read_bytes()
    spans = [(offset, offset + columns.size_bytes(row)) for row, offset in enumerate(columns.offset)]
    changed = [name for name, (start, end) in zip(columns.name, spans, strict=True) if old[start:end] != new[start:end]]
    assert changed == ["layers.1.down.levels"]


def test_checkpoint_of_a_model_with_a_head_is_read_below_its_prefix(tiny: Path, tmp_path: Path) -> None:
    plain = build_version(tiny, tmp_path / "plain", ("m", "1"))
    tensors = {f"bert.{name}": tensor for name, tensor in load_file(tiny / "model.safetensors").items()}
    save_file({**tensors, "cls.predictions.bias": np.zeros(384, np.float16)}, tiny / "model.safetensors")
    assert build_version(tiny, tmp_path / "headed", ("m", "1")) == plain
