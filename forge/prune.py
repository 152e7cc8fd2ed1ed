"""Unstructured pruning: zeros in a checkpoint's matrices, by size or N of every M. Shapes stay as they are.

A zero stays exactly zero in every precision of the forge, and the codec spends few bits on what is mostly zero. It is
a gain on the wire alone: the runtime has no sparse kernels, memory and speed are those of the dense model.
Embeddings and the head are left alone, because their rows are words of which many are rare.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.checkpoint_folder import read_folder, refuse_existing, write_folder
from forge.progress import Progress, silent
from forge.quantise import Float
from wire.errors import ConfigError

Mask = NDArray[np.bool_]
SPARED = ("embed", "lm_head")
"""Parts of the names of tables that are looked up."""
WIRE_ONLY = "wire only: the runtime has no sparse kernels"
LARGEST_GROUP = 64


class Scope(StrEnum):
    """Over what a share of the smallest weights is taken."""

    GLOBAL = "global"
    MATRIX = "matrix"


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The `share` of the weights that are smallest in size: of all matrices together, or of each."""

    share: float
    scope: Scope = Scope.GLOBAL

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(f"a share of {self.share} cannot be pruned; choose one between 0 and 1")


@dataclass(frozen=True, slots=True)
class Threshold:
    """Every weight that is smaller in size than `limit`."""

    limit: float

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ConfigError(f"a threshold of {self.limit} prunes nothing; choose one over 0")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Of every `group` weights that follow each other along the input, all but the `kept` largest."""

    kept: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group <= LARGEST_GROUP:
            raise ConfigError(f"{self.kept}:{self.group} is no pattern; choose for example 2:4 or 4:8")


Rule = Magnitude | Threshold | Pattern


def prune_checkpoint(source: Path, out: Path, rule: Rule, progress: Progress = silent) -> dict[str, Any]:
    """Write the checkpoint `out`: `source` with weights set to zero after `rule`. Returns figures.

    Raises ConfigError or ArtifactError with a remedy.
    """
    refuse_existing(out)
    folder = read_folder(source)
    names = matrices_of(folder.tensors)
    keep = masks({name: folder.tensors[name] for name in names}, rule, progress)
    pruned = {name: np.where(keep[name], folder.tensors[name], np.float32(0)) for name in names}
    write_folder(source, out, folder.config, {**folder.tensors, **pruned})
    weights = sum(values.size for values in pruned.values())
    zeros = sum(int(np.count_nonzero(values == 0)) for values in pruned.values())
    return {
        "matrices": len(names), "weights": weights, "zeros": zeros, "sparsity": round(zeros / weights, 6),
        "gain": WIRE_ONLY,
    }  # fmt: skip


def matrices_of(tensors: Mapping[str, Float]) -> list[str]:
    """Names of the matrices that may be pruned, in order."""
    return [name for name in sorted(tensors) if tensors[name].ndim == 2 and not any(part in name for part in SPARED)]


def masks(matrices: Mapping[str, Float], rule: Rule, progress: Progress = silent) -> dict[str, Mask]:
    """By name, bool [rows, columns]: True where a weight is kept. Of equal sizes the first ones go first, so that the
    same checkpoint is always pruned alike. Raises ConfigError when a pattern does not fit a matrix."""
    if isinstance(rule, Magnitude) and rule.scope is Scope.GLOBAL:
        sizes = np.concatenate([np.abs(values).ravel() for values in matrices.values()])
        kept = _largest(sizes, rule.share)
        ends = np.cumsum([values.size for values in matrices.values()])
        parts = np.split(kept, ends[:-1])
        return {name: part.reshape(values.shape) for (name, values), part in zip(matrices.items(), parts, strict=True)}
    found = {}
    for number, (name, values) in enumerate(matrices.items()):
        progress("prune", number, len(matrices))
        found[name] = _mask(name, np.abs(values), rule)
    return found


def _mask(name: str, sizes: Float, rule: Rule) -> Mask:
    if isinstance(rule, Threshold):
        return np.asarray(sizes >= rule.limit)
    if isinstance(rule, Magnitude):
        return _largest(sizes.ravel(), rule.share).reshape(sizes.shape)
    rows, columns = sizes.shape
    if columns % rule.group:
        raise ConfigError(f"tensor {name} has {columns} columns, no multiple of {rule.group}; choose another pattern")
    groups = sizes.reshape(rows, -1, rule.group)
    order = np.argsort(groups, axis=2, kind="stable")
    kept = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(kept, order[:, :, rule.group - rule.kept :], True, axis=2)
    return kept.reshape(rows, columns)


def _largest(sizes: Float, share: float) -> Mask:
    """bool [n]: False for the `share` of `sizes` [n] that is smallest, rounded to whole weights."""
    count = round(sizes.size * share)
    if count == 0:
        return np.ones(sizes.shape, np.bool_)
    limit = np.partition(sizes, count - 1)[count - 1]
    kept = np.asarray(sizes >= limit)
    kept[np.flatnonzero(sizes == limit)[: count - np.count_nonzero(sizes < limit)]] = False
    return kept
