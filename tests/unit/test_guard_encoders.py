"""Golden embeddings refuse what is wrong in any way to serve, and what does not fit the model."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import HeldEncoder, encoder_config, encoder_version

from runtime.golden import judge_encoder, read_embeddings
from runtime.model import Float
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, StoreError
from wire.golden import EmbeddingSet


class Wrong(HeldEncoder):
    """Gives something else for a text alone, or for the texts of a batch."""

    alone = batched = 0.0

    def encode(self, texts: Sequence[Sequence[int]]) -> Float:
        rows = super().encode(texts).copy()
        rows[-1, 0] += self.alone if len(texts) == 1 else self.batched
        return rows


@pytest.fixture
def encoder() -> Wrong:
    return Wrong()


def golden() -> EmbeddingSet:
    version = encoder_version()
    return read_embeddings(version.directory, encoder_config(version))


def test_right_encoder_has_no_fault(encoder: Wrong) -> None:
    judged = judge_encoder(encoder, golden())
    assert judged.fault == ""
    assert judged.worst_error is not None
    assert judged.worst_error < judged.tolerance
    assert judged.top1_agreement is None


def test_embedding_that_is_wrong_alone_is_a_fault(encoder: Wrong) -> None:
    encoder.alone = 0.2
    assert "over the tolerance" in judge_encoder(encoder, golden()).fault


def test_embedding_that_is_wrong_in_a_batch_is_a_fault(encoder: Wrong) -> None:
    encoder.batched = 0.2
    assert "over the tolerance" in judge_encoder(encoder, golden()).fault


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_embedding_that_is_not_finite_is_a_fault(encoder: Wrong, number: float) -> None:
    encoder.batched = number
    judged = judge_encoder(encoder, golden())
    assert "not finite" in judged.fault
    assert judged.worst_error is None


@pytest.mark.parametrize(
    "change", [{"input_ids": (384,)}, {"input_ids": (-1,)}, {"input_ids": (5,) * 151}, {"embedding": (1.0,) * 63}]
)
def test_golden_embeddings_that_do_not_fit_the_model_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    good = golden()
    vectors = (*good.vectors[1:], good.vectors[0].model_copy(update=change))
    (tmp_path / "golden.json").write_bytes(encode_document(good.model_copy(update={"vectors": vectors})))
    with pytest.raises(ArtifactError, match="does not fit") as refused:
        read_embeddings(tmp_path, encoder_config(encoder_version()))
    assert refused.value.code is Code.CORRUPT


def test_golden_embeddings_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"golden\.json"):
        read_embeddings(tmp_path, encoder_config(encoder_version()))
