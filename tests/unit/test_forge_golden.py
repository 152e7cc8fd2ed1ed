"""Golden vectors notice each layer damaged in turn, by the judgement of the node and their own tolerance."""

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import tiny_llama
from damages import change_graph, damaged_versions, interleave, see_less, stretch
from encoder_fixtures import encoder_version
from runtime_fixtures import MODEL, PROJECT, Version, base_version

from codec.versions import check_version, read_version
from forge.build import build_version
from forge.golden_choice import VECTORS, choose_rows
from forge.provenance import read_provenance
from forge.quantise import Precision
from runtime.golden import Judgement, read_golden
from runtime.subject import load_subject
from wire.errors import ArtifactError, Code
from wire.manifest import DecoderConfig
from wire.serving import ExecutionOptions


def judge(directory: Path) -> Judgement:
    subject = load_subject(directory, read_version(directory), ExecutionOptions(threads=2))
    try:
        return subject.judge()
    finally:
        subject.close()


@cache
def decoder_version(precision: Precision, home: Path) -> Version:
    document = build_version(PROJECT / "samples" / "tales-5m-base", home, (MODEL, "1.0"), precision=precision)
    return Version(home, document)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the int4 sample, to be damaged."""
    return Path(shutil.copytree(base_version().directory, tmp_path / "copied"))


def unnoticed(directory: Path, kind: str) -> dict[str, float | None]:
    """Errors, as multiples of the tolerance, of what was damaged and passes."""
    passed = {}
    for name in damaged_versions(directory, kind):
        judged = judge(directory)
        if not judged.fault:
            passed[name] = judged.worst_error and judged.worst_error / judged.tolerance
    return passed


@pytest.mark.parametrize("kind", ["zero", "swap"])
def test_each_matrix_damaged_in_turn_is_noticed(kind: str, copied: Path) -> None:
    assert unnoticed(copied, kind) == {}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["zero", "swap", "reorder", "shuffle"])
@pytest.mark.parametrize("precision", [Precision.INT4, Precision.INT8, Precision.TERNARY, Precision.FLOAT32])
def test_each_matrix_of_every_precision_damaged_in_turn_is_noticed(
    precision: Precision, kind: str, tmp_path: Path
) -> None:
    assert unnoticed(decoder_version(precision, tmp_path / "version").directory, kind) == {}


@pytest.mark.parametrize("kind", ["zero", "swap", "reorder", "roll"])
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4, Precision.FLOAT32])
def test_each_matrix_of_an_encoder_damaged_in_turn_is_noticed(precision: Precision, kind: str, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(encoder_version(precision).directory, tmp_path / "copied"))
    assert unnoticed(copied, kind) == {}


@pytest.mark.parametrize(
    ("change", "by"), [(interleave, 0), (stretch, 10), (see_less, 8), (see_less, 64)], ids=lambda value: str(value)[:14]
)
def test_positions_or_windows_of_another_model_are_noticed(
    change: Callable[[onnx.ModelProto, int], None], by: int, copied: Path
) -> None:
    change_graph(copied, lambda model: change(model, by))
    assert "over the tolerance" in judge(copied).fault


def test_bit_that_no_logit_shows_is_for_the_digest_to_notice(copied: Path) -> None:
    """Golden vectors tell right kernels from wrong ones, whose rounding changes more than most bits do."""
    passed = 0
    for _ in damaged_versions(copied, "flip"):
        with pytest.raises(ArtifactError) as refused:
            check_version(read_version(copied), copied)
        assert refused.value.code is Code.DIGEST_MISMATCH
        passed += not judge(copied).fault
    assert passed, "if these are noticed, say so in docs/look-into-an-artifact.md"


def test_rotary_positions_of_another_base_are_twice_the_tolerance_at_least(copied: Path) -> None:
    change_graph(copied, lambda model: stretch(model, 10))
    judged = judge(copied)
    assert judged.worst_error is not None
    assert judged.worst_error > 2 * judged.tolerance  # beside the window the damage that shows least


def test_least_noticed_damage_is_told_and_is_well_over_the_tolerance(tmp_path: Path) -> None:
    provenance = read_provenance(base_version().directory)
    assert provenance is not None
    assert provenance.least_noticed.damage == "a window"  # of 64 tokens; a text has 160
    assert provenance.least_noticed.ratio > 1.5
    encoder = read_provenance(encoder_version().directory)
    assert encoder is not None
    assert encoder.least_noticed.damage.startswith("layer ")
    assert read_provenance(tmp_path) is None


def test_vectors_are_short_but_for_late_ones_and_their_best_token_is_clear() -> None:
    golden = read_golden(base_version().directory, 4096)
    assert len(golden.vectors) == VECTORS
    lengths = [len(vector.input_ids) for vector in golden.vectors]
    assert 128 < max(lengths) <= 160, "a prompt in more than one chunk is judged"
    for vector in golden.vectors:
        second, first = sorted(vector.logits)[-2:]
        assert first - second > 0.1 * vector.deviation


def test_golden_texts_leave_room_in_a_short_context(tmp_path: Path) -> None:
    version = build_version(tiny_llama(tmp_path / "tiny"), tmp_path / "version", (MODEL, "1.0"))
    assert isinstance(version.config, DecoderConfig)
    assert version.config.context_tokens == 128
    assert judge(tmp_path / "version").fault == ""


def test_row_is_chosen_for_the_damage_shown_least_and_never_where_kernels_round_most() -> None:
    reference = np.tile(np.array([5.0, 1, 0, -1], np.float32), (6, 1))
    reference[1, 1] = 4.999  # no clear best token
    seen = np.array([[0.1, 0.9, 0.8, 0.3, 0.1, 0.2], [0.3, 0.2, 0.1, 0.9, 0.1, 0.2]])
    rounding = np.array([0.01, 0.01, 0.01, 0.9, 0.01, 0.01])
    late = np.array([False, False, False, False, True, True])
    chosen = choose_rows(late, reference, rounding, seen)
    assert [(choice.row, choice.damage) for choice in chosen] == [(5, 0), (0, 1), (2, 0), (4, 1)]
