"""The queue of a graph: one event per job, bounded, cancelled at the next node, and given back while nobody asks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from graph_fixtures import NETWORK, AskedGraph, HeldGraph, ask_runner, deliver_directly, graph_version, network
from onnx_fixtures import run_plainly
from runtime_fixtures import wait_for

from runtime.graph import Graph, check_inputs
from runtime.keeping import Keeper
from runtime.made import make_input
from runtime.runner import Job, Runner
from runtime.stats import Stats
from wire.errors import Code, DeployError, InferenceError
from wire.golden import InputValues
from wire.manifest import Datatype, GraphConfig, GraphTensor
from wire.serving import ExecutionOptions


@contextmanager
def started(*graphs: HeldGraph, queue: int = 4, keep: Keeper[Graph] | None = None) -> Iterator[Runner]:
    runner = Runner(NETWORK, graphs[0].config, Stats(), queue, deliver_directly)
    for graph in graphs:
        runner.start(graph, keep)
    try:
        yield runner
    finally:
        for graph in graphs:
            graph.freed.set()
        runner.close()


def test_jobs_get_what_the_model_gives() -> None:
    with started(HeldGraph(), HeldGraph()) as runner:
        asked = [ask_runner(runner, words) for words in (3, 7, 1)]
        for job, words in zip(asked, (3, 7, 1), strict=True):
            expected = run_plainly(network(), {"words": np.arange(words)})[0]
            np.testing.assert_allclose(job.wait()["y"], expected, rtol=1e-4, atol=1e-5)
    figures = runner.stats.snapshot()
    assert (figures.requests, figures.failures, runner.open) == (3, 0, 0)
    assert figures.busy_s > 0


def test_queue_that_is_full_refuses_and_what_waits_is_run() -> None:
    graph = HeldGraph()
    graph.held = True
    with started(graph, queue=2) as runner:
        first = ask_runner(runner, 1)
        assert graph.running.wait(20)
        waiting = [ask_runner(runner, 2), ask_runner(runner, 3)]
        with pytest.raises(InferenceError) as refused:
            ask_runner(runner, 4)
        assert (refused.value.code, refused.value.http_status) == (Code.OVERLOADED, 429)
        graph.held = False
        graph.freed.set()
        assert [len(asked.wait()["y"]) for asked in (first, *waiting)] == [1, 2, 3]


def test_job_that_was_cancelled_is_not_begun_and_one_that_runs_is_stopped() -> None:
    graph = HeldGraph()
    graph.held = True
    with started(graph) as runner:
        running = ask_runner(runner, 1)
        assert graph.running.wait(20)
        waiting, last = ask_runner(runner, 2), ask_runner(runner, 3)
        runner.cancel(waiting.job)
        graph.held = False
        runner.cancel(running.job)
        assert graph.stopped.is_set()
        assert len(last.wait()["y"]) == 3
        assert graph.runs == 2
        assert not running.ended.is_set()
        assert not waiting.ended.is_set()


def test_run_that_fails_ends_its_job_alone() -> None:
    graph = HeldGraph()
    graph.poison = 5
    with started(graph) as runner:
        good, bad = ask_runner(runner, 2), ask_runner(runner, 5)
        assert bad.fault().code is Code.INTERNAL
        assert len(good.wait()["y"]) == 2
        assert runner.stats.snapshot().failures == 1


def test_close_ends_what_is_open_and_takes_no_more() -> None:
    graph = HeldGraph()
    graph.held = True
    with started(graph) as runner:
        asked: list[AskedGraph] = [ask_runner(runner, 1), ask_runner(runner, 2)]
        assert graph.running.wait(20)
        runner.close()
        assert {job.fault().code for job in asked} == {Code.NOT_READY}
        with pytest.raises(InferenceError, match="ending"):
            ask_runner(runner, 1)


def test_graph_rests_while_nobody_asks_and_wakes_for_the_next_job() -> None:
    keeper: Keeper[Graph] = Keeper(NETWORK, HeldGraph, 0.01)
    with started(HeldGraph(), keep=keeper) as runner:
        wait_for("rest", lambda: keeper.resting)
        assert len(ask_runner(runner, 2).wait()["y"]) == 2


CONFIG = GraphConfig(
    inputs=(
        GraphTensor(name="a", datatype=Datatype.FP32, shape=("n", 3)),
        GraphTensor(name="b", datatype=Datatype.INT64, shape=("n",)),
    ),
    outputs=(GraphTensor(name="y", datatype=Datatype.FP32, shape=("n",)),), largest={"n": 4},
)  # fmt: skip
GOOD = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(2, np.int64)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"c": np.zeros(1)}, "'c' is none"),
        ({"a": np.zeros((2, 3))}, "'a' is FP32"),
        ({"a": np.zeros((2, 3, 1), np.float32)}, "has the shape"),
        ({"a": np.zeros((2, 4), np.float32)}, "has the shape"),
        ({"a": np.zeros((5, 3), np.float32), "b": np.zeros(5, np.int64)}, "'n' is 4 at most"),
        ({"b": np.zeros(3, np.int64)}, "the same everywhere"),
    ],
)
def test_inputs_that_are_not_those_of_the_config_are_refused(change: dict[str, Any], said: str) -> None:
    check_inputs(CONFIG, GOOD)
    with pytest.raises(InferenceError, match=said) as refused:
        check_inputs(CONFIG, GOOD | change)
    assert refused.value.http_status == 400
    with pytest.raises(InferenceError, match="'b' is missing"):
        check_inputs(CONFIG, {"a": GOOD["a"]})


def test_graph_of_another_type_than_its_config_says_is_not_loaded() -> None:
    version = graph_version(NETWORK)
    config = version.document.config
    assert isinstance(config, GraphConfig)
    wrong = config.model_copy(update={"outputs": (config.outputs[0].model_copy(update={"datatype": Datatype.FP64}),)})
    with pytest.raises(DeployError, match="another type"):
        Graph(version.directory, wrong, ExecutionOptions(threads=1)).warm_up()


def test_made_numbers_never_change() -> None:
    """Golden runs of versions that are out there depend on them."""
    floats = make_input(InputValues(shape=(2, 2), seed=7, low=-1, high=1), Datatype.FP32)
    assert floats.tolist() == [[0.2501908540725708, 0.7944275140762329], [0.5513713359832764, -0.5495857000350952]]
    whole = make_input(InputValues(shape=(6,), seed=7, low=0, high=10), Datatype.INT64)
    assert whole.tolist() == [6, 8, 7, 2, 3, 8]
    assert make_input(InputValues(shape=(3,), seed=1, high=2), Datatype.BOOL).dtype == np.bool_


def test_cancelling_twice_or_late_is_no_fault() -> None:
    with started(HeldGraph()) as runner:
        asked = ask_runner(runner, 1)
        asked.wait()
        runner.cancel(asked.job)
        runner.cancel(asked.job)
        runner.cancel(Job({}, asked.take))
        assert ask_runner(runner, 2).wait()["y"].shape[0] == 2
    figures = runner.stats.snapshot()
    assert (figures.requests, figures.failures, runner.open) == (2, 0, 0)
