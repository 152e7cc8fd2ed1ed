"""The queue of a graph: one thread per replica runs what waits, one request after the other.

What a graph does to several requests at once nobody knows, so that they are not joined: a client that has many rows
sends them in one. Invariants: a job gets one event, its end, unless it was cancelled; a job that was cancelled is not
begun, and one that runs ends at its next node. An exception of a run fails that job and nothing else.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import structlog

from runtime.graph import Graph, check_inputs
from runtime.keeping import Keeper
from runtime.made import Array
from runtime.refusals import crowded, model_failed, server_ending
from runtime.slab import Usage
from runtime.stats import Stats
from wire.errors import InferenceError
from wire.manifest import GraphConfig

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """One request. `sink` gets None when `outputs` are there, or why they are not."""

    feeds: Mapping[str, Array]
    sink: Callable[[InferenceError | None], None]
    outputs: dict[str, Array] = field(default_factory=dict)
    accepted_s: float = 0.0


Deliver = Callable[[list[tuple[Job, InferenceError | None]]], None]


class Runner:
    """Runs the jobs of one model, whose replicas take from one queue once they were started."""

    def __init__(self, name: str, config: GraphConfig, stats: Stats, max_queue: int, deliver: Deliver) -> None:
        self._name, self._config, self.stats = name, config, stats
        self._max_queue, self._deliver = max_queue, deliver
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, Graph] = {}
        self._closed = False
        self._threads: list[threading.Thread] = []

    def start(self, graph: Graph, keeper: Keeper[Graph] | None = None) -> None:
        """Let a replica run what waits, on a thread of its own with the cores of the calling one.

        `keeper` gives it back while nobody asks; without one it is kept for ever.
        """
        thread = threading.Thread(target=self._work, args=(graph, keeper), name=f"runner-{self._name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def open(self) -> int:
        """Jobs that wait or run."""
        return len(self._waiting) + len(self._running)

    @property
    def usage(self) -> Usage:
        """A graph keeps nothing between requests."""
        return Usage()

    def submit(self, job: Job) -> None:
        """Take a job, from any thread.

        Raises InferenceError: bad_request (400), overloaded (429), not_ready (503) after close.
        """
        check_inputs(self._config, job.feeds)
        job.accepted_s = time.perf_counter()
        with self._changed:
            if self._closed:
                raise server_ending()
            if len(self._waiting) >= self._max_queue:
                raise crowded(self.open, self.stats.snapshot().latency_p50_s or 0.0)
            self._waiting.append(job)
            self._changed.notify()
        self.stats.began(0)

    def cancel(self, job: Job) -> None:
        """Stop working for a job, from any thread. No fault when it has ended, whose event may be on its way."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job in self._running:
                self._running.pop(job).stop()

    def close(self) -> None:
        """Cancel what is open, end the threads and give the model's memory back."""
        with self._changed:
            self._closed = True
            leaving = [*self._waiting, *self._running]
            self._waiting.clear()
            for graph in self._running.values():
                graph.stop()
            self._running.clear()
            self._changed.notify_all()
        self._deliver([(job, server_ending()) for job in leaving])
        for thread in self._threads:
            thread.join()

    def _work(self, graph: Graph, keeper: Keeper[Graph] | None) -> None:
        while not self._closed:
            job = self._next(graph, keeper.keep_s if keeper is not None and not keeper.resting else None)
            if job is None:
                if keeper is not None and not self._closed:
                    keeper.rest(graph)
                continue
            if keeper is not None and keeper.resting:
                try:
                    graph = keeper.wake()
                except InferenceError as error:
                    self._end(job, error)
                    continue
            self._run(graph, job)
        graph.close()

    def _next(self, graph: Graph, patience_s: float | None) -> Job | None:
        """Block until there is a job; None when closed, and after `patience_s` without any."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, patience_s)
            if self._closed or not self._waiting:
                return None
            job = self._waiting.popleft()
            self._running[job] = graph
            return job

    def _run(self, graph: Graph, job: Job) -> None:
        began_s = time.perf_counter()
        with self._changed:
            if job not in self._running:
                return
            self._running[job] = graph
        error: InferenceError | None = None
        try:
            job.outputs = graph.run(job.feeds)
        except Exception as fault:  # noqa: BLE001  onnxruntime raises a dozen unrelated types; the thread must go on
            error = self._broken(job, str(fault))
        self.stats.encoded(0, time.perf_counter() - began_s)
        self._end(job, error)

    def _end(self, job: Job, error: InferenceError | None) -> None:
        with self._changed:
            if self._running.pop(job, None) is None:
                return  # cancelled
        if error is not None:
            self.stats.failed()
        else:
            self.stats.ended(time.perf_counter() - job.accepted_s)
        self._deliver([(job, error)])

    def _broken(self, job: Job, reason: str) -> InferenceError:
        if job in self._running:
            _log.error("run failed", model=self._name, error=reason[:500])
        return model_failed()
