"""Reading safetensors, one file or several under an index, without torch: a header that anybody may have written.

The format (github.com/huggingface/safetensors) is eight bytes with the header's length, a JSON header, and the tensors'
bytes. Every range is checked against the file before anything is mapped, nothing is allocated from a header's claim,
and what does not fit ends in one sentence that names the tensor and the remedy. Nothing is written.
"""

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from forge.configuration import read_config
from wire.errors import ArtifactError, Code, ConfigError

Float = NDArray[np.float32]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 100 * 1000 * 1000
"""The format's own limit."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that are read, and the bytes of a number."""
OTHER_TYPES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
}
DOWNLOAD = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes `start` to `end` of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Tensors:
    """The weights of a checkpoint; tensors are read one at a time, as float32."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError when they cannot be read."""
        self._place = directory / WEIGHTS
        if self._place.is_file() or not (directory / INDEX).is_file():
            self._entries = read_header(self._place)
        else:
            self._place = directory / INDEX
            self._entries = _read_shards(self._place)
        self.names: frozenset[str] = frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, which must be one of `names`."""
        return self._entries[name].shape

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float:
        """Tensor `name` as float32 of `shape`.

        Raises ArtifactError(unsupported) when it is missing, of another shape or type, or not finite.
        """
        if name not in self._entries:
            _refuse(f"{self._place.name} lacks tensor {name}; export the model anew")
        entry = self._entries[name]
        if entry.dtype not in ITEM_BYTES:
            _refuse(f"tensor {name} is {entry.dtype}; convert it to one of {sorted(ITEM_BYTES)}")
        if entry.shape != shape:
            _refuse(f"tensor {name} has shape {entry.shape}, config.json implies {shape}; fix the config")
        values = _read(entry)
        if not np.isfinite(values).all():
            _refuse(f"tensor {name} holds NaN or infinity; train or convert the model again")
        return values


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file by name. Raises ConfigError when the header does not describe the file."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if not 0 < length <= min(size - LENGTH_BYTES, HEADER_LIMIT_BYTES):
                raise ConfigError(f"{path}: its header claims {length} bytes, the file has {size}; {DOWNLOAD}")
            header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {DOWNLOAD}") from error
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: its header is no JSON object; {DOWNLOAD}")
    first = LENGTH_BYTES + length
    entries = {name: _entry(path, name, said, first) for name, said in header.items() if name != "__metadata__"}
    _check_ranges(path, entries, size)
    return entries


def _read_shards(index: Path) -> dict[str, Entry]:
    """The tensors of all files that an index names."""
    named = read_config(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ConfigError(f"{index}: weight_map is missing or maps no tensors to files; {DOWNLOAD}")
    entries: dict[str, Entry] = {}
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise ConfigError(f"{index} names {file!r}, which is no file beside it; {DOWNLOAD}")
        entries |= read_header(index.parent / file)
    missing = sorted(set(named) - set(entries))
    if missing:
        raise ConfigError(f"{index} names tensor {missing[0]}, which {named[missing[0]]} lacks; {DOWNLOAD}")
    return entries


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return found


def _entry(path: Path, name: str, said: Any, first: int) -> Entry:
    """One tensor of a header whose data begins at `first`."""
    claims = said if isinstance(said, dict) else {}
    dtype, shape, offsets = claims.get("dtype"), claims.get("shape"), claims.get("data_offsets")
    item = (ITEM_BYTES | OTHER_TYPES).get(dtype) if isinstance(dtype, str) else None
    if item is None:
        raise ConfigError(f"{path}: tensor {name} is of the unknown type {dtype!r}; convert it to {sorted(ITEM_BYTES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ConfigError(f"{path}: tensor {name} has no proper shape or offsets; {DOWNLOAD}")
    start, end = offsets
    if end - start != math.prod(shape) * item:
        raise ConfigError(
            f"{path}: tensor {name} has {end - start} bytes, its shape {shape} takes another number; {DOWNLOAD}"
        )
    return Entry(path, str(dtype), tuple(shape), first + start, first + end)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _check_ranges(path: Path, entries: dict[str, Entry], size: int) -> None:
    """Every tensor inside the file, no two in one place."""
    placed = sorted(entries.items(), key=lambda named: (named[1].start, named[1].end))
    for name, entry in placed:
        if entry.end > size:
            raise ConfigError(f"{path}: tensor {name} ends at byte {entry.end}, the file has {size}; {DOWNLOAD}")
    for (name, entry), (other, following) in pairwise(placed):
        if following.start < entry.end:
            raise ConfigError(f"{path}: tensors {name} and {other} overlap; {DOWNLOAD}")


def _read(entry: Entry) -> Float:
    """The tensor in float32; bfloat16 is the upper half of a float32."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    count = math.prod(entry.shape)
    try:
        stored = np.fromfile(entry.path, kinds[entry.dtype], count, offset=entry.start)
    except OSError as error:
        raise ConfigError(f"{entry.path} cannot be read ({error}); {DOWNLOAD}") from error
    if entry.dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # of float64: what is too large is infinite, and refused as such
        return np.ascontiguousarray(stored, np.float32).reshape(entry.shape)


def _refuse(message: str) -> NoReturn:
    raise ArtifactError(Code.UNSUPPORTED, message)
