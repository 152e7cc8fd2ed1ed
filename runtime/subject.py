"""A version under measurement, by its kind: how the probe judges it and how fast it is."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

from runtime.cpu import detect_cpu
from runtime.encoder import Encoder
from runtime.golden import Judgement, judge_encoder, judge_model, read_embeddings, read_golden
from runtime.golden_graph import golden_feeds, judge_graph, read_tensors_golden
from runtime.graph import Graph
from runtime.model import PREFILL_TOKENS, Model
from runtime.slab import Shape
from runtime.text import Text
from runtime.ways import FLOAT_ACTIVATIONS, Way, other_attention, reading_sessions
from wire.errors import Code, DeployError
from wire.golden import EmbeddingSet, GoldenSet, TensorSet
from wire.manifest import DecoderConfig, EncoderConfig, GraphConfig, VersionDocument
from wire.serving import ExecutionOptions

MEASURED_TOKENS = 24
MEASURED_PROMPT_TOKENS = 2 * PREFILL_TOKENS


class Subject(Protocol):
    """A loaded version."""

    directory: Path
    document: VersionDocument
    options: ExecutionOptions
    """How it runs."""

    def judge(self) -> Judgement:
        """By its golden vectors."""

    def tokens_per_s(self) -> float:
        """The speed that a request sees when it is alone."""

    def read_tokens_per_s(self, piece_tokens: int = PREFILL_TOKENS) -> float:
        """The speed of reading a long prompt, so many tokens at a time."""

    def reading_ways(self, *, apart: bool) -> list[tuple[Way, ...]]:
        """Other ways to read prompts that are worth a trial, of each group the first that is better; `apart`: by a
        session of their own, too."""

    def again(self, options: ExecutionOptions, packed: Path | None = None) -> Self:
        """The same version, loaded once more, over the graph that a prepack cache has in `packed` when given."""

    def close(self) -> None:
        """Give its memory back."""


@dataclass(slots=True)
class DecoderSubject:
    """A decoder with one slot."""

    directory: Path
    document: VersionDocument
    options: ExecutionOptions
    config: DecoderConfig
    golden: GoldenSet
    packed: Path | None = None
    has_read: bool = field(init=False, default=False)
    """Whether there is a prompt to go on from."""
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        """Raises DeployError(load_failed)."""
        capacity = max(len(vector.input_ids) for vector in self.golden.vectors) + MEASURED_TOKENS + 1
        if capacity > self.config.context_tokens:
            raise DeployError(Code.LOAD_FAILED, "a golden prompt is as long as the context; build the version again")
        capacity = min(self.config.context_tokens, max(capacity, MEASURED_PROMPT_TOKENS + MEASURED_TOKENS + 1))
        self.model = Model(self.directory, self.config, Shape(1, capacity), self.options, self.packed)

    def judge(self) -> Judgement:
        """By logits."""
        return judge_model(self.model, self.golden)

    def tokens_per_s(self) -> float:
        """Speed of one stream behind what `read_tokens_per_s` reads: after a short prompt attention costs nothing."""
        if not self.has_read:
            self.read_tokens_per_s()
        length = min(MEASURED_PROMPT_TOKENS, self.model.shape.capacity - MEASURED_TOKENS - 1)
        token = self.golden.vectors[0].input_ids[0]
        began_s = time.perf_counter()
        for step in range(MEASURED_TOKENS):
            token = int(self.model.decode([token], [length + step])[0].argmax())
        return MEASURED_TOKENS / (time.perf_counter() - began_s)

    def read_tokens_per_s(self, piece_tokens: int = PREFILL_TOKENS) -> float:
        """Speed of reading a prompt of two chunks, whatever it says, in pieces."""
        count = min(MEASURED_PROMPT_TOKENS, self.model.shape.capacity - 1)
        prompt = ([token for vector in self.golden.vectors for token in vector.input_ids] * count)[:count]
        began_s = time.perf_counter()
        for start in range(0, count, piece_tokens):
            self.model.prefill(0, prompt[start : start + piece_tokens], start)
        self.has_read = True
        return count / (time.perf_counter() - began_s)

    def reading_ways(self, *, apart: bool) -> list[tuple[Way, ...]]:
        """With the other attention, and by a session with other kernels or matrices where that may be right."""
        reads_so = FLOAT_ACTIVATIONS.items() <= self.options.session_config.items()
        if not apart or reads_so or self.model.shape.capacity <= self.options.reading_tokens:
            return [(other_attention(self.options),)]
        return [(other_attention(self.options),), *reading_sessions(detect_cpu())]

    def again(self, options: ExecutionOptions, packed: Path | None = None) -> Self:
        """Raises DeployError(load_failed)."""
        return replace(self, options=options, packed=packed)

    def close(self) -> None:
        """Session and slab."""
        self.model.close()


@dataclass(slots=True)
class _Whole(ABC):
    """What does one thing: all of it is reading, and what `tokens_per_s` chose holds."""

    directory: Path
    document: VersionDocument
    options: ExecutionOptions
    packed: Path | None = field(default=None, kw_only=True)

    @abstractmethod
    def tokens_per_s(self) -> float:
        """By its kind."""

    def read_tokens_per_s(self, piece_tokens: int = PREFILL_TOKENS) -> float:
        """It has one figure."""
        del piece_tokens
        return self.tokens_per_s()

    def reading_ways(self, *, apart: bool) -> list[tuple[Way, ...]]:
        """None."""
        del apart
        return []

    def again(self, options: ExecutionOptions, packed: Path | None = None) -> Self:
        """Raises DeployError(load_failed)."""
        return replace(self, options=options, packed=packed)


@dataclass(slots=True)
class EncoderSubject(_Whole):
    """An encoder."""

    config: EncoderConfig
    golden: EmbeddingSet
    encoder: Encoder = field(init=False)

    def __post_init__(self) -> None:
        """Raises DeployError(load_failed)."""
        self.encoder = Encoder(self.directory, self.config, self.options, self.packed)

    def judge(self) -> Judgement:
        """By embeddings."""
        return judge_encoder(self.encoder, self.golden)

    def tokens_per_s(self) -> float:
        """Speed of the golden texts, one after the other."""
        began_s = time.perf_counter()
        for vector in self.golden.vectors:
            self.encoder.encode([vector.input_ids])
        return sum(len(vector.input_ids) for vector in self.golden.vectors) / (time.perf_counter() - began_s)

    def close(self) -> None:
        """The session."""
        self.encoder.close()


@dataclass(slots=True)
class GraphSubject(_Whole):
    """A graph that is served as it is; its speed is in runs per second."""

    config: GraphConfig
    golden: TensorSet
    graph: Graph = field(init=False)

    def __post_init__(self) -> None:
        """Raises DeployError(load_failed)."""
        self.graph = Graph(self.directory, self.config, self.options, self.packed)

    def judge(self) -> Judgement:
        """By outputs."""
        return judge_graph(self.graph.run, self.config, self.golden)

    def tokens_per_s(self) -> float:
        """Runs per second over the golden inputs, one after the other."""
        feeds = [golden_feeds(run, self.config) for run in self.golden.runs]
        began_s = time.perf_counter()
        for inputs in feeds:
            self.graph.run(inputs)
        return len(feeds) / (time.perf_counter() - began_s)

    def close(self) -> None:
        """The session."""
        self.graph.close()


def load_subject(directory: Path, document: VersionDocument, options: ExecutionOptions) -> Subject:
    """Load a version with its golden vectors. Raises ArtifactError, StoreError, DeployError."""
    config = document.config
    if isinstance(config, EncoderConfig):
        return EncoderSubject(directory, document, options, config, read_embeddings(directory, config))
    if isinstance(config, GraphConfig):
        return GraphSubject(directory, document, options, config, read_tensors_golden(directory, config))
    return DecoderSubject(directory, document, options, config, read_golden(directory, config.vocab_size))


def check_text(directory: Path, document: VersionDocument) -> None:
    """A template that never ends must do so in the probe, where there is a time-out, and not in the server.

    Raises DeployError(load_failed) when the tokenizer does not fit the model. A graph has no text.
    """
    if isinstance(document.config, GraphConfig):
        return
    text = Text(directory, document.config)
    if isinstance(document.config, DecoderConfig):
        tokens = text.encode(text.render([{"role": "user", "content": "Good evening"}]), special=True)
    else:
        tokens = text.encode("Good evening", special=True)
    if max(tokens, default=0) >= document.config.vocab_size:
        raise DeployError(Code.LOAD_FAILED, "the tokenizer has words that the model has not; build the version again")
