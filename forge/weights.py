"""Writing weights.bin: tensors at aligned offsets, so that a node maps them as they are.

Tensors of 64 KiB and more start on a 64 KiB boundary (the largest page size of arm64 kernels), smaller ones on 64
bytes (a cache line). The gaps are zero and cost nothing on the wire.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from wire.manifest import Dtype, Layout, TensorColumns

WEIGHTS_FILE = "weights.bin"
LARGE_BYTES = 64 * 1024
LARGE_ALIGNMENT = 64 * 1024
SMALL_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a tensor lies in weights.bin."""

    name: str
    offset: int
    size_bytes: int
    dtype: Dtype
    shape: tuple[int, ...]
    layout: Layout

    def initializer(self, name: str, onnx_type: int, shape: tuple[int, ...]) -> TensorProto:
        """An ONNX initializer on this range; several may share it under names and shapes of their own."""
        tensor = TensorProto(name=name, data_type=onnx_type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", self.offset), ("length", self.size_bytes)):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        return tensor


@dataclass(slots=True)
class WeightsWriter:
    """Appends tensors to an open weights.bin."""

    sink: BinaryIO
    placed: list[Placed] = field(default_factory=list)
    _end: int = 0

    def add(
        self, name: str, data: NDArray[Any], layout: Layout, *, dtype: Dtype = Dtype.F32,
        shape: tuple[int, ...] | None = None,
    ) -> Placed:  # fmt: skip
        """Append `data`; `dtype` and `shape` say what it is when its numpy type cannot (packed nibbles)."""
        raw = np.ascontiguousarray(data).tobytes()
        alignment = LARGE_ALIGNMENT if len(raw) >= LARGE_BYTES else SMALL_ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        self.sink.write(b"\0" * (offset - self._end) + raw)
        self._end = offset + len(raw)
        placed = Placed(name, offset, len(raw), dtype, shape or data.shape, layout)
        self.placed.append(placed)
        return placed

    def columns(self, file: int) -> TensorColumns:
        """All tensors as manifest columns, in the order of their offsets; `file` is the index of weights.bin."""
        return TensorColumns(
            name=tuple(p.name for p in self.placed),
            file=(file,) * len(self.placed),
            dtype=tuple(p.dtype for p in self.placed),
            shape=tuple(p.shape for p in self.placed),
            offset=tuple(p.offset for p in self.placed),
            layout=tuple(p.layout for p in self.placed),
        )


@contextmanager
def writing_weights(directory: Path) -> Iterator[WeightsWriter]:
    """A writer of `directory`/weights.bin."""
    with (directory / WEIGHTS_FILE).open("wb") as sink:
        yield WeightsWriter(sink)
