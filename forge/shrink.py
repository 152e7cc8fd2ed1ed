"""Structured pruning: whole heads and MLP columns leave a checkpoint, so that shapes shrink.

Heads leave as groups that share one key and value head, MLP columns down to a multiple of 32, and every layer loses the
same number, because config.json has one number for all layers. What stays is what matters most: by L1 norms of the
weights (arXiv 1608.08710), or, with text to calibrate on, by L1 norms of the output's weights times the size of what
they are multiplied with (Wanda, arXiv 2306.11695).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.checkpoint import Architecture
from forge.checkpoint_folder import Folder, read_folder, refuse_existing, write_folder
from forge.input_sizes import InputSizes, measure_inputs
from forge.progress import Progress, silent
from forge.quantise import BLOCK, Float
from wire.errors import ConfigError

Indices = NDArray[np.intp]
QUERIES, SHARED, COLUMNS = ("q_proj",), ("k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Shrinking:
    """Shares of heads and of MLP columns to remove; 0 leaves them alone."""

    heads: float = 0.0
    mlp: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.heads < 1 and 0 <= self.mlp < 1 and self.heads + self.mlp > 0):
            raise ConfigError(f"shares {self.heads} of heads, {self.mlp} of columns fit no model; choose below 1")


def shrink_checkpoint(
    source: Path, out: Path, choice: Shrinking, windows: list[list[int]] | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Write the checkpoint `out`: `source` without its least important heads and MLP columns; `windows` of tokens to
    calibrate on. Returns figures.

    Raises ConfigError when nothing or everything would be removed.
    """
    refuse_existing(out)
    folder = read_folder(source)
    smaller = shrunken(folder.architecture, choice)
    inputs = measure_inputs(source, windows, progress) if windows else None
    tensors = dict(folder.tensors)
    for i in range(smaller.layers):
        progress("prune", i, smaller.layers)
        tensors |= _shrink_layer(folder, smaller, i, inputs)
    write_folder(source, out, {**folder.config, **_config(smaller)}, tensors)
    return {
        "parameters_before": sum(values.size for values in folder.tensors.values()),
        "parameters": sum(values.size for values in tensors.values()),
        "heads": smaller.heads, "kv_heads": smaller.kv_heads, "mlp_size": smaller.mlp_size,
        "importance": "activations" if windows else "weights",
    }  # fmt: skip


def shrunken(a: Architecture, choice: Shrinking) -> Architecture:
    """The shape that is left. Raises ConfigError naming a share that removes nothing."""
    groups = max(1, round(a.kv_heads * (1 - choice.heads)))
    columns = max(BLOCK, round(a.mlp_size * (1 - choice.mlp)) // BLOCK * BLOCK) if choice.mlp else a.mlp_size
    if choice.heads and groups == a.kv_heads:
        raise ConfigError(f"{choice.heads} of {a.kv_heads} groups of heads is none; ask for {1 / a.kv_heads:.2f}")
    if choice.mlp and columns >= a.mlp_size:
        raise ConfigError(f"an MLP of {a.mlp_size} columns has none to spare; leave --mlp out")
    return replace(a, heads=a.heads // a.kv_heads * groups, kv_heads=groups, mlp_size=columns)


def _shrink_layer(folder: Folder, smaller: Architecture, i: int, inputs: InputSizes | None) -> dict[str, Float]:
    """The tensors of layer `i` that change."""
    a = folder.architecture
    changed: dict[str, Float] = {}
    if smaller.kv_heads < a.kv_heads:
        groups = _most(_head_importance(folder, i, inputs), smaller.kv_heads)
        shared = _expanded(groups, a.head_size)
        queries = _expanded(groups, a.head_size * (a.heads // a.kv_heads))
        rows = dict.fromkeys(QUERIES, queries) | dict.fromkeys(SHARED, shared)
        changed |= _cut(folder, f"model.layers.{i}.self_attn", rows, ("o_proj", queries))
    if smaller.mlp_size < a.mlp_size:
        kept = _most(_column_importance(folder, i, inputs), smaller.mlp_size)
        rows = dict.fromkeys(COLUMNS, kept)
        changed |= _cut(folder, f"model.layers.{i}.mlp", rows, ("down_proj", kept))
    return changed


def _cut(folder: Folder, stem: str, rows: dict[str, Indices], output: tuple[str, Indices]) -> dict[str, Float]:
    """Matrices, and biases where there are any, with some rows; the one that takes their output with those columns."""
    cut = {}
    for part, kept in rows.items():
        for name in (f"{stem}.{part}.weight", f"{stem}.{part}.bias"):
            if name in folder.tensors:
                cut[name] = folder.tensors[name][kept]
    part, kept = output
    cut[f"{stem}.{part}.weight"] = folder.tensors[f"{stem}.{part}.weight"][:, kept]
    return cut


def _head_importance(folder: Folder, i: int, inputs: InputSizes | None) -> Float:
    """float32 [kv_heads]."""
    a, stem = folder.architecture, f"model.layers.{i}.self_attn"
    output = np.abs(folder.tensors[f"{stem}.o_proj.weight"]).sum(axis=0)
    if inputs is not None:
        return np.asarray((output * inputs.attention[i]).reshape(a.kv_heads, -1).sum(axis=1))
    parts = [np.abs(folder.tensors[f"{stem}.{part}.weight"]).sum(axis=1) for part in (*QUERIES, *SHARED)]
    return _sum_of_shares(part.reshape(a.kv_heads, -1).sum(axis=1) for part in (*parts, output))


def _column_importance(folder: Folder, i: int, inputs: InputSizes | None) -> Float:
    """float32 [mlp_size]."""
    stem = f"model.layers.{i}.mlp"
    output = np.abs(folder.tensors[f"{stem}.down_proj.weight"]).sum(axis=0)
    if inputs is not None:
        return np.asarray(output * inputs.mlp[i])
    parts = [np.abs(folder.tensors[f"{stem}.{part}.weight"]).sum(axis=1) for part in COLUMNS]
    return _sum_of_shares((*parts, output))


def _sum_of_shares(parts: Iterable[Float]) -> Float:
    """Each part as shares of its sum, so that a matrix of large weights does not decide alone."""
    return np.asarray(sum(part / max(float(part.sum()), 1e-30) for part in parts), np.float32)


def _most(importance: Float, count: int) -> Indices:
    """Places of the `count` largest, in ascending order; of equal ones the first."""
    return np.sort(np.argsort(-importance, kind="stable")[:count])


def _expanded(groups: Indices, size: int) -> Indices:
    """Rows of `groups` of `size` rows each."""
    return (groups[:, None] * size + np.arange(size)[None, :]).ravel()


def _config(a: Architecture) -> dict[str, int]:
    """What config.json says anew; a head keeps its size, which no longer follows from the number of heads."""
    return {
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_size,
        "intermediate_size": a.mlp_size,
    }  # fmt: skip
