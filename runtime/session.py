"""onnxruntime sessions as this node runs them, and the optimised graphs that they can leave behind.

The options that a probe chose become the library's settings here and nowhere else. Invariant: a session reads one graph
and the one file of weights beside it, both checked before (runtime/version.py, runtime/prepack.py). What steps need is
taken from the C heap: onnxruntime's own arena never gives back what the longest step took (22 MB against 9 for a 135 M
model after 256 tokens), and is no faster (medians 0.95 to 1.06 of each other, on a noisy machine).
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import numpy as np
import onnxruntime as ort

from runtime.integer_graph import Derived, integer_graph
from runtime.providers import CPU, library_devices, missing
from runtime.version import GRAPH_FILE, WEIGHTS_FILE
from wire.errors import Code, DeployError
from wire.serving import ExecutionOptions

ONNXRUNTIME: str = ort.__version__

SPIN_DURATION_US = 1000
"""How long a thread of the pool spins for its next work: over what happens between two steps, and then it sleeps. With
200 a step of a 5 M model took 0.54 ms instead of 0.23, one of a 135 M model 1.07 times as long (medians)."""

STOPPED = {"session.force_spinning_stop": "1"}
"""For the session that reads: its threads sleep as soon as a chunk is read, or they would spin into the decode steps
that follow (eight streams of a 5 M model on two cores: 4,960 tokens/s instead of 4,400)."""

NO_FLASH_VARIABLE = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_environment = threading.Lock()
WEIGHTS_PLACE = "session.model_external_initializers_file_folder_path"
"""Setting that names the directory of the weights where a graph comes as bytes."""

DECODING, READING = "decode", "read"
"""Names of a model's sessions."""


def open_sessions(version: Path, options: ExecutionOptions, packed: Path | None = None) -> dict[str, Any]:
    """The sessions of a model by name: the one that decodes, and the one that reads prompts when it has one.

    They are over the graph of the directory `version`, or over those that `save_sessions` left in `packed`.
    Raises DeployError(load_failed), ArtifactError(corrupt).
    """
    sessions = {}
    for name, config in _configs(options).items():
        graph = _Graph(packed / packed_files(name)[0]) if packed else _graph(version, name, options)
        sessions[name] = _open(graph, options, config)
    return sessions


def save_sessions(version: Path, options: ExecutionOptions, into: Path) -> None:
    """Write the `packed_files` of every session of a model. Raises DeployError(load_failed), ArtifactError(corrupt).

    The graph is as it was optimised for this CPU; the weights are as they were, and once more as the kernels want them.
    """
    for name, config in _configs(options).items():
        graph, weights = packed_files(name)
        entries = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": weights,
        }
        _open(_graph(version, name, options), options, config | entries, into / graph)


def packed_files(name: str) -> tuple[str, str]:
    """File names of a saved session: graph and weights."""
    return f"{name}.onnx", f"{name}.bin"


def _configs(options: ExecutionOptions) -> dict[str, dict[str, str]]:
    configs = {DECODING: options.session_config}
    if options.reading_config is not None:
        configs[READING] = options.session_config | STOPPED | options.reading_config
    return configs


@dataclass(frozen=True, slots=True)
class _Graph:
    """What a session is made of: a file, or with `derived` the bytes of a graph over the weights beside that file."""

    path: Path
    derived: Derived | None = None


def _graph(version: Path, name: str, options: ExecutionOptions) -> _Graph:
    """The graph of a version, or what is derived of it for the session `name`; raises as integer_graph does."""
    path = version / GRAPH_FILE
    if name != READING or options.integer_reading is None:
        return _Graph(path)
    weights = np.memmap(version / WEIGHTS_FILE, np.uint8, "r")
    return _Graph(path, integer_graph(path.read_bytes(), weights, options.integer_reading))


def _open(graph: _Graph, options: ExecutionOptions, config: Mapping[str, str], save_as: Path | None = None) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 3
    settings.enable_cpu_mem_arena = False
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    settings.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if options.spinning:
        settings.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_DURATION_US))
    for key, value in config.items():
        settings.add_session_config_entry(key, value)
    if save_as is not None:
        settings.optimized_model_filepath = str(save_as)
    why = missing(options)
    if why:
        raise DeployError(Code.LOAD_FAILED, f"{why}; probe the version again")
    named = {} if options.library else {"providers": list(dict.fromkeys((options.provider, CPU)))}
    if options.library:
        settings.add_provider_for_devices(list(library_devices(options.library)), {})
    model: str | bytes = str(graph.path)
    if graph.derived is not None:
        model = graph.derived.model
        values = [ort.OrtValue.ortvalue_from_numpy(tensor) for tensor in graph.derived.tensors.values()]
        settings.add_external_initializers(list(graph.derived.tensors), values)
        settings.add_session_config_entry(WEIGHTS_PLACE, str(graph.path.parent))
    with _attention(flash=options.flash_attention):
        try:
            return ort.InferenceSession(model, settings, **named)
        except Exception as error:
            raise DeployError(Code.LOAD_FAILED, f"onnxruntime refuses {graph.path}: {str(error)[:500]}") from error


@contextmanager
def _attention(*, flash: bool) -> Iterator[None]:
    """Which attention the kernels made meanwhile will use: each asks the environment when it is made."""
    with _environment:
        if not flash:
            os.environ[NO_FLASH_VARIABLE] = "1"
        try:
            yield
        finally:
            os.environ.pop(NO_FLASH_VARIABLE, None)
