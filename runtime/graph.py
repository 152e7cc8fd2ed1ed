"""One loaded graph: its onnxruntime session, arrays by name in, arrays by name out.

Invariants: only its runner's thread calls `run`; another thread may end a run by `stop`. What a request brings was
held against the config before (`check_inputs`), so that a wrong shape is the client's fault and not the model's.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import onnxruntime as ort

from runtime.golden_graph import golden_feeds, read_tensors_golden
from runtime.made import DTYPES, Array
from runtime.session import DECODING, open_sessions
from wire.errors import Code, DeployError, InferenceError
from wire.manifest import GraphConfig
from wire.serving import ExecutionOptions


class Graph:
    """A session. Raises DeployError(load_failed) when onnxruntime refuses the graph.

    `packed` is a directory of the prepack cache, whose graph stands for the version's own.
    """

    def __init__(
        self, directory: Path, config: GraphConfig, options: ExecutionOptions, packed: Path | None = None
    ) -> None:
        self.config, self._directory = config, directory
        self._session: Any = open_sessions(directory, options, packed)[DECODING]
        self._running: Any = None
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; raises what onnxruntime raises, also when `stop` was called."""
        options = ort.RunOptions()
        with self._lock:
            self._running = options
        try:
            names = [tensor.name for tensor in self.config.outputs]
            found = self._session.run(names, dict(feeds), options)
        finally:
            with self._lock:
                self._running = None
        return dict(zip(names, found, strict=True))

    def stop(self) -> None:
        """End the run that runs now, from any thread, at its next node; no fault when there is none."""
        with self._lock:
            if self._running is not None:
                self._running.terminate = True

    def warm_up(self) -> None:
        """Run the first golden inputs: the first request pays for no allocation, and a graph that loads but does not
        keep its config shows here. Raises DeployError(load_failed), ArtifactError, StoreError.
        """
        golden = read_tensors_golden(self._directory, self.config)
        try:
            found = self.run(golden_feeds(golden.runs[0], self.config))
            wrong = [t.name for t in self.config.outputs if found[t.name].dtype != DTYPES[t.datatype]]
            why = f"output {wrong[0]} is of another type" if wrong else ""
        except Exception as error:  # noqa: BLE001  onnxruntime raises a dozen unrelated types
            why = str(error)[:500]
        if why:
            self.close()
            raise DeployError(Code.LOAD_FAILED, f"the graph loads but does not run as its config says: {why}")

    def close(self) -> None:
        """Give the session back now, whoever still holds this object; it cannot run any more."""
        self._session = None


def check_inputs(config: GraphConfig, feeds: Mapping[str, Array]) -> None:
    """Raise InferenceError(bad_request) unless `feeds` are the inputs of the config, in type and size."""
    expected = {tensor.name: tensor for tensor in config.inputs}
    if unknown := feeds.keys() - expected.keys():
        raise _wrong(f"inputs: {min(unknown)!r} is none of this model, which has {', '.join(expected)}")
    sizes: dict[str, int] = {}
    for name, tensor in expected.items():
        if name not in feeds:
            raise _wrong(f"inputs: {name!r} is missing")
        found = feeds[name]
        if found.dtype != DTYPES[tensor.datatype]:
            raise _wrong(f"inputs: {name!r} is {tensor.datatype}; send it so")
        if len(found.shape) != len(tensor.shape):
            raise _wrong(f"inputs: {name!r} has the shape {list(tensor.shape)}, not {list(found.shape)}")
        for size, given in zip(tensor.shape, found.shape, strict=True):
            most = config.largest[size] if isinstance(size, str) else size
            wanted = sizes.setdefault(size, given) if isinstance(size, str) else size
            if given != wanted or given > most:
                raise _wrong(
                    f"inputs: {name!r} has the shape {list(tensor.shape)}, not {list(found.shape)}"
                    + (f"; {size!r} is {most} at most and the same everywhere" if isinstance(size, str) else "")
                )


def _wrong(message: str) -> InferenceError:
    return InferenceError(Code.BAD_REQUEST, message[:500], 400)
