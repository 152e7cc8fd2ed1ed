"""Realistic damage to the weights or the graph of a version, for tests of what golden vectors notice."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from codec.versions import read_version
from wire.manifest import VersionDocument

DATA = (".packed", ".levels", ".weight")
"""Endings of what a matrix holds, whatever its precision."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The bytes of a version's weights, to be damaged, and where each tensor is."""

    version: VersionDocument
    values: np.ndarray

    def tensor(self, name: str) -> np.ndarray:
        columns = self.version.tensors
        row = columns.name.index(name)
        values = self.values[columns.offset[row] : columns.offset[row] + columns.size_bytes(row)]
        return values.view(np.float32) if columns.dtype[row] == "f32" else values

    def all_of(self, matrix: str) -> list[str]:
        """The tensors that make the matrix."""
        stem = matrix.rpartition(".")[0]
        return [f"{stem}.{part}" for part in ("scales", "smoothing") if f"{stem}.{part}" in self.version.tensors.name]

    def neighbour(self, name: str) -> str:
        """The tensor of that name one layer on, or back from the last."""
        layer = int(re.findall(r"layers\.(\d+)\.", name)[0])
        other = layer + 1 if layer + 1 < self.version.config.layers else layer - 1
        return name.replace(f"layers.{layer}.", f"layers.{other}.")


def zero(weights: Weights, name: str) -> None:
    """The matrix is zero; of blocks their scales, since a level of zero is not stored as zero."""
    parts = weights.all_of(name) if name.endswith(".packed") else [name]
    for part in parts:
        weights.tensor(part)[:] = 0


def swap(weights: Weights, name: str) -> None:
    """The matrix and the next layer's have changed places."""
    for part in [name, *weights.all_of(name)]:
        ours, theirs = weights.tensor(part), weights.tensor(weights.neighbour(part))
        ours[:], theirs[:] = theirs.copy(), ours.copy()


def reorder(weights: Weights, name: str) -> None:
    """What is packed in a byte is in the other order."""
    packed = weights.tensor(name)
    if weights.version.tensors.dtype[weights.version.tensors.name.index(name)] == "u2":
        packed[:] = (packed & 0x33) << 2 | (packed & 0xCC) >> 2
    packed[:] = packed << 4 | packed >> 4


def shuffle(weights: Weights, name: str) -> None:
    """The elements are anywhere."""
    values = weights.tensor(name)
    values[:] = np.random.default_rng(0).permutation(values)


def roll(weights: Weights, name: str) -> None:
    """Every scale is that of the block before."""
    scales = weights.tensor(name)
    scales[:] = np.roll(scales, 1)


def flip(weights: Weights, name: str) -> None:
    """One bit of one scale's exponent."""
    weights.tensor(name).view(np.uint32)[weights.tensor(name).size // 2] ^= np.uint32(1 << 26)


DAMAGES: dict[str, Callable[[Weights, str], None]] = {
    "zero": zero, "swap": swap, "reorder": reorder, "shuffle": shuffle, "roll": roll, "flip": flip,
}  # fmt: skip


def targets(version: VersionDocument, kind: str) -> list[str]:
    """The tensors of a version that a kind of damage is for."""
    endings = {"reorder": (".packed",), "roll": (".scales",), "flip": (".scales",)}.get(kind, DATA)
    names = [name for name in version.tensors.name if name.endswith(endings) and "norm" not in name]
    return [name for name in names if kind != "swap" or "layers." in name]


def damaged_versions(directory: Path, kind: str) -> Iterator[str]:
    """Damage the matrices of the version in `directory` one after the other; the last one stays damaged."""
    version, path = read_version(directory), directory / "weights.bin"
    right = path.read_bytes()
    for name in targets(version, kind):
        weights = Weights(version, np.frombuffer(right, np.uint8).copy())
        DAMAGES[kind](weights, name)
        path.write_bytes(weights.values.tobytes())
        yield name
    path.write_bytes(right)


def change_graph(directory: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Write the graph of a version anew."""
    path = directory / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def see_less(model: onnx.ModelProto, window: int) -> None:
    """Every layer looks back no further than `window` positions."""
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(helper.make_attribute("local_window_size", window))


def interleave(model: onnx.ModelProto, _: int = 0) -> None:
    """Rotary positions turn neighbours instead of halves."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "rotary_interleaved":
                attribute.i = 1


def stretch(model: onnx.ModelProto, times: int) -> None:
    """Rotary positions have another base."""
    for tensor in model.graph.initializer:
        if tensor.name == "rotary.inverse_frequency":
            right = onnx.numpy_helper.to_array(tensor)
            steps = np.linspace(0, 1, right.size, endpoint=False).reshape(right.shape)
            tensor.CopyFrom(onnx.numpy_helper.from_array((right * times**-steps).astype(np.float32), tensor.name))
