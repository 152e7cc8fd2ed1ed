"""Real versions of the tiny encoder, and an encoder that can be held, for the tests of the runtime."""

import atexit
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from asked import Outcome
from runtime_fixtures import MODEL, PROJECT, Node, Version, ask, base_version, running

from forge.build import build_version
from forge.encoder_reference import shipped_encoder
from forge.quantise import Precision
from runtime.batcher import Batcher, Encoding, Endings, Limits, deliver_directly
from runtime.encoder import Encoder
from runtime.model import Float
from runtime.stats import Stats
from wire.manifest import EncoderConfig
from wire.serving import ExecutionOptions

ENCODER = "tiny"
POISON = 383
"""The last token of the vocabulary, which no random text has."""
TOLERANCE = 1e-4
"""1 - cosine to the embedding of the text alone, as in tests/property/test_runtime_batcher_property.py."""
CHECKPOINT = PROJECT / "tests" / "fixtures" / "parity" / "tiny-bert"


@cache
def encoder_version(precision: Precision = Precision.INT8, version: str = "1.0") -> Version:
    """The tiny encoder as a version, made once per test run; `version` changes its digest alone."""
    home = Path(tempfile.mkdtemp(prefix="amperage-encoder-"))
    atexit.register(shutil.rmtree, home)
    document = build_version(CHECKPOINT, home / "version", (ENCODER, version), precision=precision)
    return Version(home / "version", document)


def encoder_config(version: Version) -> EncoderConfig:
    assert isinstance(version.document.config, EncoderConfig)
    return version.document.config


@contextmanager
def serving_both(home: Path, extra: str = "") -> Iterator[Node]:
    """A runtime process that serves the tiny encoder and the sample LM."""
    with running(home, extra=extra) as node:
        node.order(encoder_version(), ENCODER)
        node.order(base_version())
        for name in (ENCODER, MODEL):
            assert ask(node.admin, "POST", f"/v2/repository/models/{name}/load", {}).status == 200
        yield node


def check_embeddings(rows: list[Any], texts: list[list[int]]) -> None:
    """Embeddings as the forge's own session gives them, each text alone."""
    expected = shipped_encoder(encoder_version().directory).embed(texts)
    found = np.asarray(rows, np.float32)
    assert found.shape == expected.shape
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5
    assert (1 - np.sum(found * expected, axis=1)).max() < TOLERANCE


class HeldEncoder(Encoder):
    """Waits before a batch while it is held, keeps what it ran, and fails on a batch with the token `poison`."""

    def __init__(self, precision: Precision = Precision.FLOAT32) -> None:
        version = encoder_version(precision)
        super().__init__(version.directory, encoder_config(version), ExecutionOptions(threads=1))
        self.held = False
        self.running = threading.Event()
        """Set when a batch begins."""
        self._permits = threading.Semaphore(0)
        self.batches: list[list[int]] = []
        """Lengths of the texts of each batch."""
        self.poison: int | None = None

    def encode(self, texts: Sequence[Sequence[int]]) -> Float:
        self.batches.append([len(text) for text in texts])
        self.running.set()
        if self.held:
            assert self._permits.acquire(timeout=20)
        if any(self.poison in text for text in texts):
            raise RuntimeError("poisoned")
        return super().encode(texts)

    def step(self) -> None:
        """Let one batch run."""
        self._permits.release()

    def free(self) -> None:
        """Let all batches run."""
        self.held = False
        self._permits.release(1000)


@dataclass(slots=True)
class Asked(Outcome):
    """One request to a batcher and what came of it."""

    encoding: Encoding = field(init=False)

    def wait(self) -> Float:
        self.succeed()
        return self.encoding.embeddings


def started(limits: Limits, *encoders: Encoder, deliver: Callable[[Endings], None] = deliver_directly) -> Batcher:
    """A batcher over the replicas."""
    batcher = Batcher("test", encoders[0].config, Stats(), limits, deliver)
    for encoder in encoders:
        batcher.start(encoder)
    return batcher


def ask_batcher(batcher: Batcher, texts: Sequence[Sequence[int]]) -> Asked:
    asked = Asked()
    asked.encoding = Encoding(texts, asked.take)
    batcher.submit(asked.encoding)
    return asked


def random_text(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng([length, seed]).integers(5, POISON, length)]
