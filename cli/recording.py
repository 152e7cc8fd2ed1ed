"""Commands that make a checkpoint or a version leave beside it which step they were (forge/provenance.py).

A crash between the result and its history leaves a result whose history begins there.
"""

import inspect
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any

from codec.versions import VERSION_FILE
from forge.provenance import Provenance, Step, chain_of, digest_of_file, read_provenance, tools, write_provenance

UNRECORDED = {"as_json", "resume", "save_every", "heldout", "out", "name", "version"}
"""Parameters that change nothing in the result, or that it tells itself."""


def recorded(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command whose first parameter is a checkpoint, and whose parameter `out` is what it makes of that, record
    itself."""

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(run)
        source = next(iter(signature.parameters))

        @wraps(run)
        def run_recorded(**parameters: Any) -> None:
            chain, out = chain_of(parameters[source]), parameters["out"]
            step = _step(command, signature, {k: v for k, v in parameters.items() if k != source})
            run(**parameters)
            made = read_provenance(out) or Provenance()
            write_provenance(out, made.model_copy(update={"source": chain.source, "steps": (*chain.steps, step)}))

        return run_recorded

    return decorate


def _step(command: str, signature: inspect.Signature, parameters: dict[str, Any]) -> Step:
    """What was given beside the defaults; of files and folders their digests, since names say nothing elsewhere."""
    options: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for name, value in parameters.items():
        if name in UNRECORDED or value == signature.parameters[name].default:
            continue
        spelled = name.replace("_", "-")
        if isinstance(value, Path):
            inputs[spelled] = _digest(value)
        elif isinstance(value, list):
            inputs |= {f"{spelled} {number}": _digest(path) for number, path in enumerate(value, 1)}
        else:
            options[spelled] = "true" if value is True else str(value.value if isinstance(value, Enum) else value)
    return Step(command=command, options=options, inputs=inputs, tools=tools())


def _digest(path: Path) -> str:
    """Of a file; of a version its decoded digest. What is not there is for the command to refuse."""
    found = path / VERSION_FILE if path.is_dir() else path
    return digest_of_file(found) if found.is_file() else "0" * 64
