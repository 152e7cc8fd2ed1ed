"""A checkpoint as a folder of files, read whole and written anew: pruning and training begin and end so.

A folder is written under a temporary name beside its place and renamed at the end, so that whoever finds it finds all
of it; a crash leaves the temporary name, which the next write of that place removes. The same tensors and config give
the same bytes.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save

from forge.checkpoint import Architecture, Checkpoint
from forge.configuration import read_config
from forge.quantise import Float
from wire.errors import ArtifactError, Code, ConfigError

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "modules.json", "sentence_bert_config.json",
)  # fmt: skip
"""Files that go with a checkpoint whatever its weights are."""
MODULES = "*_*/config.json"
"""And those of an encoder's further modules, as sentence-transformers names them."""
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Folder:
    """A checkpoint in memory: config.json, what it says, and float32 tensors by name."""

    config: dict[str, Any]
    architecture: Architecture
    tensors: dict[str, Float]


def read_folder(source: Path) -> Folder:
    """Read all of a decoder's checkpoint. Raises ConfigError or ArtifactError with a remedy when it does not fit."""
    checkpoint = Checkpoint(source)
    tensors = {name: checkpoint.tensor(name, checkpoint.shape(name)) for name in sorted(checkpoint.names)}
    return Folder(read_config(source / "config.json"), checkpoint.architecture, tensors)


def write_folder(
    source: Path,
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Float],
    changed: Mapping[str, str] = NOTHING,
) -> None:
    """Write the checkpoint `out` with the companions of `source`, or with the texts `changed` in their place; tensors
    become float16 where that changes no value of any, else float32.

    Raises ConfigError when `out` exists, ArtifactError(unsupported) when a value is not finite.
    """
    refuse_existing(out)
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise ArtifactError(Code.UNSUPPORTED, f"tensor {name} became NaN or infinite; train with a lower rate")
    fits = all(np.array_equal(to_float16(values), values) for values in tensors.values())
    dtype = np.float16 if fits else np.float32
    temporary = out.with_name(f".{out.name}.writing")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    stored = {name: np.ascontiguousarray(tensors[name], dtype) for name in sorted(tensors)}
    (temporary / "model.safetensors").write_bytes(save(stored, {"format": "pt"}))
    described = {**config, "dtype": np.dtype(dtype).name}
    (temporary / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    for path in (*(source / name for name in COMPANIONS), *source.glob(MODULES)):
        if path.is_file():
            (temporary / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, temporary / path.relative_to(source))
    for name, text in changed.items():
        (temporary / name).write_text(text)
    temporary.rename(out)


def refuse_existing(out: Path) -> None:
    """Raises ConfigError when `out` is there already, before any work is done for it."""
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another place for the checkpoint")


def to_float16(values: Float) -> Float:
    """`values` rounded to what a float16 holds, as float32; infinite where they are too large for one."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
