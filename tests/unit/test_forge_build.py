"""Building, judging and releasing the real sample; refusing checkpoints that do not fit."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import write_small_tokenizer

from codec.versions import read_version
from forge.build import build_version, parameters_of
from forge.evaluate import evaluate_version
from forge.golden import row_error
from forge.reference import shipped_judge
from forge.release import make_release
from forge.verify import verify_release
from host.keys import create_key, load_signer
from wire.documents import encode_document
from wire.errors import AmperageError, ArtifactError, Code, ConfigError
from wire.golden import GoldenSet
from wire.manifest import VersionDocument
from wire.signing import RoleKeys, TrustPolicy

PROJECT = Path(__file__).resolve().parents[2]
SAMPLES = PROJECT / "samples"
TINY = PROJECT / "tests" / "fixtures" / "parity" / "tiny-llama"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base and the lightly fine-tuned sample, the latter on the base's scales."""
    folder = tmp_path_factory.mktemp("versions")
    build_version(SAMPLES / "tales-5m-base", folder / "base", ("tales", "1.0"))
    build_version(SAMPLES / "tales-5m-finetuned-50", folder / "tuned", ("tales", "2.0"), scales_of=folder / "base")
    return {"base": folder / "base", "tuned": folder / "tuned"}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint with a tokenizer, to be spoiled."""
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    shutil.copyfile(SAMPLES / "tales-5m-base" / "tokenizer.json", folder / "tokenizer.json")
    return folder


def golden_errors(directory: Path) -> tuple[GoldenSet, list[float]]:
    golden = GoldenSet.model_validate_json((directory / "golden.json").read_bytes())
    judge = shipped_judge(directory, read_version(directory))
    rows = [judge.logits(vector.input_ids, [len(vector.input_ids) - 1])[0] for vector in golden.vectors]
    return golden, [row_error(vector, row) for vector, row in zip(golden.vectors, rows, strict=True)]


def test_building_twice_gives_the_same_digest(versions: dict[str, Path], tmp_path: Path) -> None:
    again = build_version(SAMPLES / "tales-5m-base", tmp_path / "again", ("tales", "1.0"))
    assert again.decoded_digest() == read_version(versions["base"]).decoded_digest()
    assert parameters_of(again) == 5_475_584


def test_embedding_and_head_share_one_tensor_on_aligned_offsets(versions: dict[str, Path]) -> None:
    columns = read_version(versions["base"]).tensors
    assert [name for name in columns.name if "embed" in name or "head" in name] == [
        "model.embed_tokens.packed",
        "model.embed_tokens.scales",
    ]
    large = [row for row in range(len(columns.name)) if columns.size_bytes(row) >= 64 * 1024]
    assert large
    assert all(columns.offset[row] % (64 * 1024) == 0 for row in large)
    assert all(offset % 64 == 0 for offset in columns.offset)


def test_attention_multiplies_scores_by_nothing(versions: dict[str, Path]) -> None:
    graph = onnx.load(str(versions["base"] / "model.onnx"), load_external_data=False).graph
    attentions = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    scales = [a.f for node in attentions for a in node.attribute if a.name == "scale"]
    assert scales == [1.0] * len(attentions)  # the kernel of one row takes no other (docs/adr/0019)
    assert attentions


def test_int4_costs_little_perplexity_on_the_models_own_windows(versions: dict[str, Path]) -> None:
    figures = evaluate_version(versions["base"], SAMPLES / "eval" / "tales-5m-base.json", 4)
    assert figures["perplexity"] < 55  # 51.2 in float32 over 16 windows
    assert abs(figures["perplexity"] / figures["perplexity_float_twin"] - 1) < 0.005
    assert figures["kl_nats"] < 0.002
    assert figures["top1_agreement"] > 0.97


def test_good_model_passes_its_golden_vectors_with_room(versions: dict[str, Path]) -> None:
    golden, errors = golden_errors(versions["base"])
    assert max(errors) < golden.tolerance / 3


def test_release_verifies_as_a_node_would_and_delta_is_small(versions: dict[str, Path], tmp_path: Path) -> None:
    public = create_key(tmp_path / "key.pem")
    signer = load_signer(tmp_path / "key.pem")
    summary = make_release(versions["tuned"], tmp_path / "r", signer, sequence=2, base_dir=versions["base"])
    assert summary.delta_wire_bytes is not None
    assert summary.delta_wire_bytes < summary.wire_bytes / 6
    assert summary.wire_bytes < summary.raw_bytes
    assert summary.tensor_wire_bytes <= 1.01 * summary.tensor_entropy_bytes
    keys = RoleKeys(keys=(public,))
    trust = tmp_path / "trust.json"
    trust.write_bytes(encode_document(TrustPolicy(release=keys, desired=keys)))
    figures = verify_release(tmp_path / "r", trust, versions["base"])
    assert figures["int4-block32 full"] == "ok"
    assert list(figures.values()).count("ok") == 2


def test_release_of_another_key_is_not_verified(versions: dict[str, Path], tmp_path: Path) -> None:
    create_key(tmp_path / "ours.pem")
    stranger = create_key(tmp_path / "stranger.pem")
    make_release(versions["base"], tmp_path / "r", load_signer(tmp_path / "ours.pem"), sequence=1)
    keys = RoleKeys(keys=(stranger,))
    trust = tmp_path / "trust.json"
    trust.write_bytes(encode_document(TrustPolicy(release=keys, desired=keys)))
    with pytest.raises(ArtifactError) as refused:
        verify_release(tmp_path / "r", trust, None)
    assert refused.value.code is Code.UNKNOWN_SIGNER


def test_version_changed_after_the_build_is_not_released(versions: dict[str, Path], tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(versions["base"], changed)
    (changed / "chat_template.jinja").write_text("something else")
    create_key(tmp_path / "key.pem")
    with pytest.raises(ArtifactError, match="chat_template"):
        make_release(changed, tmp_path / "r", load_signer(tmp_path / "key.pem"), sequence=1)
    assert not (tmp_path / "r").exists()


def refuse(source: Path, tmp_path: Path) -> AmperageError:
    with pytest.raises(AmperageError) as refused:
        build_version(source, tmp_path / "out", ("m", "1"))
    assert not (tmp_path / "out").exists()
    return refused.value


def respoil(source: Path, change: "dict[str, np.ndarray | None]") -> None:
    tensors = load_file(source / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, source / "model.safetensors")


def test_missing_tensor_is_named(tiny: Path, tmp_path: Path) -> None:
    respoil(tiny, {"model.layers.1.mlp.up_proj.weight": None})
    assert "model.layers.1.mlp.up_proj.weight" in refuse(tiny, tmp_path).message


def test_tensor_with_nan_is_named(tiny: Path, tmp_path: Path) -> None:
    respoil(tiny, {"model.norm.weight": np.full(64, np.nan, np.float16)})
    assert "model.norm.weight" in refuse(tiny, tmp_path).message


def test_tensor_of_another_shape_is_named(tiny: Path, tmp_path: Path) -> None:
    respoil(tiny, {"lm_head.weight": np.zeros((160, 63), np.float16)})
    assert "lm_head.weight" in refuse(tiny, tmp_path).message


def test_truncated_safetensors_are_refused(tiny: Path, tmp_path: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert isinstance(refuse(tiny, tmp_path), ConfigError)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("architectures", ["MambaForCausalLM"], "MambaForCausalLM"),
        ("attention_bias", True, "q_proj.bias"),
        ("mlp_bias", True, "mlp_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("num_hidden_layers", 0, "num_hidden_layers"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("head_dim", 20, "head_dim"),
        ("vocab_size", -1, "vocab_size"),
        ("rms_norm_eps", None, "rms_norm_eps"),
        ("eos_token_id", 160, "eos_token_id"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "yarn"),
        ("hidden_size", "many", "wrong"),
    ],
)
def test_config_that_does_not_fit_is_refused_with_its_field(
    tiny: Path, tmp_path: Path, field: str, value: object, said: str
) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, field: value}))
    assert said in refuse(tiny, tmp_path).message


def test_untied_checkpoint_with_one_kv_head_is_built(tiny: Path, tmp_path: Path) -> None:
    vocabulary = 160
    config = json.loads((tiny / "config.json").read_text())
    assert config["vocab_size"] == vocabulary
    write_small_tokenizer(tiny)
    assert Tokenizer.from_file(str(tiny / "tokenizer.json")).get_vocab_size() <= vocabulary
    document: VersionDocument = build_version(tiny, tmp_path / "out", ("tiny", "1"))
    assert "lm_head.packed" in document.tensors.name
    golden, errors = golden_errors(tmp_path / "out")
    assert max(errors) < golden.tolerance
