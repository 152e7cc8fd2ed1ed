"""A small vision model and a small network of matrices as versions, for the tests of graphs."""

import atexit
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from asked import Outcome
from onnx import ModelProto
from onnx_fixtures import INT64, graph, model, node, random, save, value
from runtime_fixtures import Version

from forge.graph_golden import Examples
from forge.graph_import import GraphChoices, import_graph
from forge.quantise import Precision
from runtime.graph import Graph
from runtime.runner import Job, Runner
from wire.errors import InferenceError
from wire.manifest import GraphConfig
from wire.serving import ExecutionOptions

VISION, NETWORK = "vision", "network"
LARGEST = {"batch": 4, "height": 32, "width": 32}


def vision() -> ModelProto:
    """A convolution and a classifier: shares float32 [batch, 10], best int64 [batch]."""
    nodes = [
        node("Conv", "pixels kernel bias", "felt", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), node("Relu", "felt", "lit"),
        node("GlobalAveragePool", "lit", "pooled"), node("Flatten", "pooled", "flat"),
        node("Gemm", "flat head head_bias", "logits", transB=1), node("Softmax", "logits", "shares", axis=-1),
        node("ArgMax", "logits", "best", axis=-1, keepdims=0),
    ]  # fmt: skip
    outputs = [value("shares", ["batch", 10]), value("best", ["batch"], INT64)]
    weights = {"kernel": random(32, 3, 3, 3), "bias": random(32), "head": random(10, 32), "head_bias": random(10)}
    return model(graph(nodes, [value("pixels", ["batch", 3, "height", "width"])], outputs, **weights))


def network() -> ModelProto:
    """An embedding of words, two matrices, and a scale that has a default."""
    nodes = [
        node("Gather", "table words", "rows"), node("MatMul", "rows first", "hidden"), node("Tanh", "hidden", "bent"),
        node("Mul", "bent scale", "scaled"), node("Gemm", "scaled second shift", "y", transB=1),
    ]  # fmt: skip
    inputs = [value("words", ["n"], INT64), value("scale", [])]
    weights = {"table": random(50, 64), "first": random(64, 96) / 8, "second": random(40, 96) / 8, "shift": random(40)}
    whole = graph(nodes, inputs, [value("y", ["n", 40])], scale=np.float32(1.5), **weights)
    return model(whole)


@cache
def graph_version(name: str, precision: Precision | None = None) -> Version:
    """One of both as a version, made once per test run."""
    home = Path(tempfile.mkdtemp(prefix="amperage-graph-"))
    atexit.register(shutil.rmtree, home)
    whole, largest = (vision(), LARGEST) if name == VISION else (network(), {"n": 12})
    source = save(whole, home / "model.onnx")
    choices = GraphChoices(largest, Examples(), precision)
    return Version(home / "version", import_graph(source, home / "version", (name, "1.0"), choices))


def pixels(batch: int = 2, height: int = 16, width: int = 20) -> Any:
    return random(batch, 3, height, width)


class HeldGraph(Graph):
    """Waits before a run while it is held, and fails on inputs of `poison` rows."""

    def __init__(self, name: str = NETWORK) -> None:
        version = graph_version(name)
        config = version.document.config
        assert isinstance(config, GraphConfig)
        super().__init__(version.directory, config, ExecutionOptions(threads=1))
        self.held, self.poison, self.runs = False, 0, 0
        self.running = threading.Event()
        """Set when a run begins."""
        self.freed = threading.Event()
        self.stopped = threading.Event()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.runs += 1
        self.running.set()
        if self.held:
            assert self.freed.wait(20)
        if len(next(iter(feeds.values()))) == self.poison:
            raise RuntimeError("poisoned")
        return super().run(feeds)

    def stop(self) -> None:
        self.stopped.set()
        self.freed.set()
        super().stop()


@dataclass(slots=True)
class AskedGraph(Outcome):
    """One job of a runner and what came of it."""

    job: Job = field(init=False)

    def wait(self) -> dict[str, Any]:
        self.succeed()
        return self.job.outputs


def ask_runner(runner: Runner, words: int) -> AskedGraph:
    """Ask the network for so many words."""
    asked = AskedGraph()
    asked.job = Job({"words": np.arange(words)}, asked.take)
    runner.submit(asked.job)
    return asked


def deliver_directly(endings: Sequence[tuple[Job, InferenceError | None]]) -> None:
    """Call every sink on the runner's thread."""
    for job, error in endings:
        job.sink(error)
