"""Measuring the versions of all-MiniLM-L6-v2: bytes, cosine to the checkpoint's embeddings, sentences per second.

The sentences are those of the judging windows. What int8 is calibrated on are the forge's own texts, which are others.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.decoder_models import SAMPLE
from benchmarks.harness import Subject, measure, rate_of
from benchmarks.results.decoders import Say, costs
from benchmarks.results.figures import EncoderFigures
from benchmarks.results.making import Made
from benchmarks.results.recipes import MINILM
from codec.versions import read_version
from forge.build import TOKENIZER_FILE
from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_reference import checkpoint_encoder, shipped_encoder
from forge.quantise import Float
from forge.vocabulary import open_tokenizer
from runtime.cpu import allowed_threads
from runtime.encoder import Encoder
from wire.manifest import EncoderConfig
from wire.serving import ExecutionOptions

LEAST_WORDS = 4
SPEED_SENTENCES = 32
"""Of a round, one at a time."""


def measure_encoders(
    made: Sequence[Made], windows: Sequence[Sequence[int]], rounds: int, say: Say
) -> list[EncoderFigures]:
    """A row per version, in their order."""
    sentences = sentences_of(windows)
    with tempfile.TemporaryDirectory(prefix="amperage-results-") as scratch:
        reference = checkpoint_encoder(EncoderCheckpoint(MINILM), Path(scratch)).embed(_texts(MINILM, sentences))
    say("measuring encoders")
    texts = {one.recipe.name: _texts(one.directory, sentences) for one in made}
    speeds = measure({one.recipe.name: _encoding(one.directory, texts[one.recipe.name]) for one in made}, rounds)
    rows = []
    for one in made:
        cosines = _cosines(reference, shipped_encoder(one.directory).embed(texts[one.recipe.name]))
        fields = {"cosine_mean": float(cosines.mean()), "cosine_least": float(cosines.min())}
        rows.append(EncoderFigures.model_validate(costs(one, speeds[one.recipe.name]) | fields))
    return rows


def sentences_of(windows: Sequence[Sequence[int]]) -> list[str]:
    """The sentences of `LEAST_WORDS` words and more in windows of the sample model's tokens."""
    texts = (" ".join(text.split()) for text in words_of(windows))
    parts = (part.strip() for text in texts for part in re.split(r"(?<=[.!?;])\s", text))
    return [part for part in parts if len(part.split()) >= LEAST_WORDS]


def words_of(windows: Sequence[Sequence[int]]) -> list[str]:
    """The text of windows of the sample model's tokens."""
    tokenizer = open_tokenizer(SAMPLE / TOKENIZER_FILE)
    return [tokenizer.decode(list(window)) for window in windows]


def _texts(folder: Path, sentences: Sequence[str]) -> list[list[int]]:
    """In tokens of the checkpoint or version in `folder`."""
    tokenizer = open_tokenizer(folder / TOKENIZER_FILE)
    return [[int(token) for token in tokenizer.encode(sentence).ids] for sentence in sentences]


def _cosines(reference: Float, found: Float) -> Float:
    """float32 [texts]."""
    product = (reference * found).sum(axis=1)
    return np.asarray(product / np.linalg.norm(reference, axis=1) / np.linalg.norm(found, axis=1), np.float32)


def _encoding(directory: Path, texts: list[list[int]]) -> Subject:
    """Sentences per second, one at a time."""
    config = read_version(directory).config
    assert isinstance(config, EncoderConfig)
    encoder = Encoder(directory, config, ExecutionOptions(threads=allowed_threads(0)))

    def work() -> None:
        for text in texts[:SPEED_SENTENCES]:
            encoder.encode([text[: config.max_tokens]])

    return rate_of(work, SPEED_SENTENCES)
