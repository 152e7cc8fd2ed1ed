"""Judging encoders by mathematics: embeddings of a version, of its float32 twin, and of the checkpoint itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_graph import build_encoder_graph
from forge.encoder_weights import place_encoder
from forge.placer import Placer
from forge.quantise import Float, Precision
from forge.reference import MODEL_FILE, float_twin, open_judge
from forge.weights import writing_weights


class EncoderJudge:
    """A loaded encoder."""

    def __init__(self, model: Path | bytes) -> None:
        self._session = open_judge(model)

    def embed(self, texts: Sequence[Sequence[int]], extra: Mapping[str, Float] | None = None) -> Float:
        """Embeddings float32 [len(texts), dimensions], each text run alone. `extra` are inputs that this
        graph has besides."""
        return np.concatenate([self._embed(np.asarray([tokens], np.int64), extra) for tokens in texts])

    def _embed(
        self, ids: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", extra: Mapping[str, Float] | None
    ) -> Float:
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **(extra or {})}
        return np.asarray(self._session.run(["embeddings"], feeds)[0], np.float32)


def shipped_encoder(directory: Path) -> EncoderJudge:
    """The model as a node runs it."""
    return EncoderJudge(directory / MODEL_FILE)


def twin_encoder(directory: Path) -> EncoderJudge:
    """The float32 twin of a version directory."""
    return EncoderJudge(float_twin(directory).SerializeToString())


def checkpoint_encoder(checkpoint: EncoderCheckpoint, scratch: Path) -> EncoderJudge:
    """The checkpoint itself in float32; `scratch` is an empty directory that must outlive the judge."""
    with writing_weights(scratch) as writer:
        weights = place_encoder(checkpoint, Placer(writer, {}, Precision.FLOAT32))
    graph = build_encoder_graph(checkpoint.architecture, weights)
    (scratch / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))
    return EncoderJudge(scratch / MODEL_FILE)
