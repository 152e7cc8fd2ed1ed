"""Measuring the versions of all-MiniLM-L6-v2: bytes, cosine to the checkpoint's embeddings, sentences per second.

The sentences are those of the judging windows. What int8 is calibrated on are the forge's own texts, which are others.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.decoder_models import SAMPLE
from benchmarks.harness import Subject, measure, rate_of
from benchmarks.releases import release_summary
from benchmarks.results.decoders import Say, disk_bytes
from benchmarks.results.figures import EncoderFigures
from benchmarks.results.making import weights_of
from benchmarks.results.recipes import ENCODER_PRECISIONS, MINILM
from codec.versions import read_version
from forge.build import build_version
from forge.encoder_checkpoint import EncoderCheckpoint
from forge.encoder_reference import checkpoint_encoder, shipped_encoder
from forge.quantise import Float, Precision
from runtime.cpu import allowed_threads
from runtime.encoder import Encoder
from wire.manifest import EncoderConfig
from wire.serving import ExecutionOptions

LEAST_WORDS = 4
SPEED_SENTENCES = 32
"""Of a round, one at a time."""


def measure_encoders(work: Path, windows: Sequence[Sequence[int]], rounds: int, say: Say) -> list[EncoderFigures]:
    """A row per precision."""
    tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [[int(token) for token in tokenizer.encode(sentence).ids] for sentence in sentences_of(windows)]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        reference = checkpoint_encoder(EncoderCheckpoint(MINILM), Path(scratch)).embed(texts)
    directories = {}
    for name in ENCODER_PRECISIONS:
        say(f"building all-MiniLM-L6-v2, {name}")
        directories[name] = work / f"minilm-{name}"
        build_version(MINILM, directories[name], ("minilm", "1"), precision=Precision(name))
    cosines = {name: _cosines(reference, shipped_encoder(path).embed(texts)) for name, path in directories.items()}
    speeds = measure({name: _encoding(path, texts) for name, path in directories.items()}, rounds)
    rows = []
    for name, directory in directories.items():
        speed = speeds[name]
        assert speed is not None
        rows.append(EncoderFigures(
            name=name, commands=(f"build {{source}} --name minilm --version 1 --precision {name} --out {{out}}",),
            weights=weights_of(MINILM), disk_bytes=disk_bytes(directory),
            wire_bytes=release_summary(directory).wire_bytes, speed=speed.median, speed_spread=speed.spread,
            cosine_mean=float(cosines[name].mean()), cosine_least=float(cosines[name].min()),
        ))  # fmt: skip
    return rows


def sentences_of(windows: Sequence[Sequence[int]]) -> list[str]:
    """The sentences of `LEAST_WORDS` words and more in windows of the sample model's tokens."""
    tokenizer = Tokenizer.from_file(str(SAMPLE / "tokenizer.json"))
    texts = (" ".join(tokenizer.decode(list(window)).split()) for window in windows)
    parts = (part.strip() for text in texts for part in re.split(r"(?<=[.!?;])\s", text))
    return [part for part in parts if len(part.split()) >= LEAST_WORDS]


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
