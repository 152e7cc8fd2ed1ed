"""Execution providers of onnxruntime: those built into it, and plug-in libraries.

A library is code of somebody else. Invariant: it is loaded only when options name it, which happens in a process of its
own until it has proved itself there (runtime/probe.py), and in the server when it was chosen. onnxruntime keeps what it
loaded for the whole process, so what is known of libraries is kept here, too.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import onnxruntime as ort

from wire.errors import Code, DeployError
from wire.serving import ExecutionOptions

CPU = "CPUExecutionProvider"
_REMOTE = {"AzureExecutionProvider"}
"""Calls a service over the network, which a node's runtime has none of."""

_lock = threading.Lock()
_paths: dict[str, Path] = {}
_devices: dict[str, tuple[Any, ...]] = {}


def built_in() -> tuple[str, ...]:
    """Names of the providers beside the CPU's that this build of onnxruntime has and that run here."""
    return tuple(name for name in ort.get_available_providers() if name != CPU and name not in _REMOTE)


def know_libraries(paths: Mapping[str, Path]) -> None:
    """Tell where the libraries of the settings are, by their names; loads none."""
    with _lock:
        _paths.update(paths)


def missing(options: ExecutionOptions) -> str:
    """Why `options` cannot run here for want of their provider; empty when they can. Loads their library."""
    if options.library is not None:
        try:
            library_devices(options.library)
        except DeployError as error:
            return error.message
        return ""
    known = options.provider == CPU or options.provider in built_in()
    return "" if known else f"this onnxruntime has no {options.provider[:64]}"


def library_devices(name: str) -> tuple[Any, ...]:
    """The devices that the library `name` offers, all of one provider; it is loaded when this is asked first.

    Raises DeployError(load_failed) when the settings name no such library, it cannot be loaded, or it offers none.
    """
    with _lock:
        if name not in _devices:
            _devices[name] = _load(name)
        return _devices[name]


def _load(name: str) -> tuple[Any, ...]:
    path = _paths.get(name)
    if path is None:
        raise DeployError(Code.LOAD_FAILED, f"runtime.toml names no provider library {name[:64]!r}")
    before = {device.ep_name for device in ort.get_ep_devices()}
    try:
        ort.register_execution_provider_library(name, str(path))
    except Exception as error:
        raise DeployError(Code.LOAD_FAILED, f"provider library {path}: {str(error)[:500]}") from error
    offered = [device for device in ort.get_ep_devices() if device.ep_name not in before]
    if not offered:
        raise DeployError(Code.LOAD_FAILED, f"provider library {path} offers no device on this machine")
    return tuple(device for device in offered if device.ep_name == offered[0].ep_name)
