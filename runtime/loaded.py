"""One version in memory, by its kind: what a request holds from its first token to its last byte."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from runtime.batcher import Batcher
from runtime.cpu import detect_cpu
from runtime.replicas import Replicas
from runtime.runner import Runner
from runtime.session import ONNXRUNTIME
from runtime.slab import Usage
from runtime.stats import Stats
from runtime.text import Text
from wire.manifest import DecoderConfig, EncoderConfig, GraphConfig, VersionDocument
from wire.serving import ServingModel


class Worker(Protocol):
    """What runs a version's requests on threads of its own."""

    stats: Stats

    @property
    def open(self) -> int:
        """Requests that were accepted and have not ended."""

    @property
    def usage(self) -> Usage:
        """Memory for keys and values, all 0 where there are none."""

    def close(self) -> None:
        """End what is open, the threads, and give the model's memory back."""


@dataclass(slots=True, eq=False, kw_only=True)
class Loaded:
    """One version in memory. `users` counts requests that hold it."""

    answers: ClassVar[str]
    """What it answers, for a client that asked for something else."""

    entry: ServingModel
    document: VersionDocument
    engine: Worker
    packed: bool
    """Its weights are mapped from the prepack cache."""
    stale: str
    """Why it does not run as `entry` says, empty when it does."""
    users: int = 0
    replaced: bool = False

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of its answers."""
        return f"amperage-{self.entry.decoded[:12]}"

    def runs_as(self, entry: ServingModel) -> bool:
        """True when loading `entry` would change nothing; a cache that could not be used may be there again."""
        mine, other = ((e.decoded, e.options, e.prepack, e.cpu, e.onnxruntime) for e in (self.entry, entry))
        return mine == other and (self.packed or entry.prepack is None or bool(foreign(entry)))


@dataclass(slots=True, eq=False, kw_only=True)
class LoadedText(Loaded):
    """A version that takes text."""

    text: Text
    capacity: int
    """Tokens of the longest request."""


@dataclass(slots=True, eq=False, kw_only=True)
class LoadedTensors(Loaded):
    """A version that takes tensors."""


@dataclass(slots=True, eq=False, kw_only=True)
class LoadedDecoder(LoadedText):
    """A decoder and its engines."""

    answers: ClassVar[str] = "/v1/chat/completions and /v1/completions"

    config: DecoderConfig
    engine: Replicas


@dataclass(slots=True, eq=False, kw_only=True)
class LoadedEncoder(LoadedText, LoadedTensors):
    """An encoder and its batcher."""

    answers: ClassVar[str] = "/v1/embeddings and /v2/models/MODEL/infer"

    config: EncoderConfig
    engine: Batcher


@dataclass(slots=True, eq=False, kw_only=True)
class LoadedGraph(LoadedTensors):
    """A graph that is served as it is, and its runner."""

    answers: ClassVar[str] = "/v2/models/MODEL/infer"

    config: GraphConfig
    engine: Runner


def foreign(entry: ServingModel) -> str:
    """Why options and cache of `entry` were chosen for something else than this; empty when they were not."""
    here, there = (str(detect_cpu()), ONNXRUNTIME), (entry.cpu, entry.onnxruntime)
    if here == there:
        return ""
    return "options were chosen for {} with onnxruntime {}, this is {} with {}".format(*there, *here)
