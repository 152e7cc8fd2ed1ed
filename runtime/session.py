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
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import onnxruntime as ort

from runtime.providers import CPU, library_devices, missing
from runtime.version import GRAPH_FILE
from wire.errors import Code, DeployError
from wire.serving import ExecutionOptions

ONNXRUNTIME: str = ort.__version__

SPIN_DURATION_US = 200
"""How long a thread of the pool spins for the next kernel of a step; between steps and when idle it sleeps."""

NO_FLASH_VARIABLE = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_environment = threading.Lock()

DECODING, READING = "decode", "read"
"""Names of a model's sessions."""


def open_sessions(version: Path, options: ExecutionOptions, packed: Path | None = None) -> dict[str, Any]:
    """The sessions of a model by name: the one that decodes, and the one that reads prompts when it has one.

    They are over the graph of the directory `version`, or over those that `save_sessions` left in `packed`.
    Raises DeployError(load_failed).
    """
    return {
        name: _open(packed / packed_files(name)[0] if packed else version / GRAPH_FILE, options, config)
        for name, config in _configs(options).items()
    }


def save_sessions(version: Path, options: ExecutionOptions, into: Path) -> None:
    """Write the `packed_files` of every session of a model. Raises DeployError(load_failed).

    The graph is as it was optimised for this CPU; the weights are as they were, and once more as the kernels want them.
    """
    for name, config in _configs(options).items():
        graph, weights = packed_files(name)
        entries = {
            "session.save_external_prepacked_constant_initializers": "1",
            "session.optimized_model_external_initializers_file_name": weights,
        }
        _open(version / GRAPH_FILE, options, config | entries, into / graph)


def packed_files(name: str) -> tuple[str, str]:
    """File names of a saved session: graph and weights."""
    return f"{name}.onnx", f"{name}.bin"


def _configs(options: ExecutionOptions) -> dict[str, dict[str, str]]:
    configs = {DECODING: options.session_config}
    if options.reading_config is not None:
        configs[READING] = options.session_config | options.reading_config
    return configs


def _open(graph: Path, options: ExecutionOptions, config: Mapping[str, str], save_as: Path | None = None) -> Any:
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
    with _attention(flash=options.flash_attention):
        try:
            return ort.InferenceSession(str(graph), settings, **named)
        except Exception as error:
            raise DeployError(Code.LOAD_FAILED, f"onnxruntime refuses {graph}: {str(error)[:500]}") from error


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
