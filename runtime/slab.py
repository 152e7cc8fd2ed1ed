"""The memory of one model for keys and values: a slot per running request, and blocks kept for other requests.

Slots are address space; memory is what the requests in them may hold, and that is reserved before a request gets one
(`reserve`), at most `Shape.tokens` in all, so that no step ever asks for memory that is not there. A slot that was left
keeps its pages for the next request until they are needed elsewhere or nobody asks for a while (`trim`). Only the
engine's thread calls anything here.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.prefix import BLOCK_TOKENS
from wire.errors import Code, DeployError
from wire.manifest import DecoderConfig, Dtype

_MAP_NORESERVE = 0x4000  # mman.h of x86 and arm64; in Python's mmap from 3.13 on
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a slab."""

    slots: int
    capacity: int
    """Tokens of the longest request: prompt and answer."""
    kept_blocks: int = 0
    """Blocks of BLOCK_TOKENS tokens kept beside the slots."""
    tokens: int = 0
    """Tokens that all slots may hold together, at least `capacity`; 0 means that each may be full."""
    bound_by: str = "the model's own"
    """What `capacity` comes from, for whoever asks for more."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of keys and values, kept blocks included."""

    budget: int = 0
    held: int = 0
    """What of it is reserved for requests, or was written and not given back."""
    promised: int = 0
    """What may still be taken beside the pages that are there, at most."""

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.budget + other.budget, self.held + other.held, self.promised + other.promised)


def cache_dtype(config: DecoderConfig) -> np.dtype[Any]:
    """numpy's type of cached keys and values."""
    return np.dtype(np.int8 if config.kv_cache is Dtype.I8 else np.float32)


def token_bytes(config: DecoderConfig) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.layers * config.kv_heads * config.head_size * cache_dtype(config).itemsize


class Slab:
    """Keys and values. Raises DeployError(load_failed) when the machine refuses the address space."""

    def __init__(self, config: DecoderConfig, shape: Shape) -> None:
        dtype = cache_dtype(config)
        self._row_bytes = config.head_size * dtype.itemsize
        whole = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes)
        parts, rows = 2 * config.layers, -(-shape.capacity // whole) * whole
        self._map, self._slots = _allocate((parts, shape.slots, config.kv_heads, rows, config.head_size), dtype)
        kept = (shape.kept_blocks, parts, config.kv_heads, BLOCK_TOKENS, config.head_size)
        _, self._kept = _allocate(kept, dtype)
        self._kept_rows = 0
        """Rows that were ever filled; the cache takes the first ones first."""
        self._page_row_bytes = mmap.PAGESIZE * parts * config.kv_heads
        """A page of every head of every part."""
        self._limit = self._pages(shape.tokens or shape.slots * rows)
        self._reserved = [0] * shape.slots
        """Pages per head of a part that the request in each slot may fill."""
        self._written = [0] * shape.slots
        """Those that whoever had the slot before has filled and that were not given back."""

    @property
    def usage(self) -> Usage:
        """From any thread."""
        kept, pages = self._kept[: self._kept_rows].nbytes, sum(self._written)
        return Usage(
            self._limit * self._page_row_bytes + self._kept.nbytes,
            self._held() * self._page_row_bytes + kept,
            max(0, self._limit - pages) * self._page_row_bytes + self._kept.nbytes - kept,
        )

    def parts(self, slot: int, count: int) -> list[NDArray[Any]]:
        """Keys, then values, of each layer: contiguous [count, kv_heads, rows, head_size] of the slots from `slot`."""
        return [part[slot : slot + count] for part in self._slots]

    def reserve(self, slot: int, tokens: int) -> bool:
        """Make sure that the free `slot` can hold `tokens` (at most the capacity); False while others hold too much."""
        self._reserved[slot] = self._pages(tokens)
        self._settle()
        if self._held() <= self._limit:
            return True
        self._reserved[slot] = 0
        return False

    def free(self, slot: int, length: int) -> None:
        """The request in `slot`, which holds `length` tokens, has ended."""
        self._reserved[slot] = 0
        self._written[slot] = max(self._written[slot], self._pages(length))

    def remains(self, slot: int) -> int:
        """Tokens from the first on for which the memory of `slot` was not given back since they were written."""
        return self._written[slot] * mmap.PAGESIZE // self._row_bytes

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the `length` tokens of slot `source` to the free slot `target`, with what is reserved for them."""
        self._slots[:, target, :, :length] = self._slots[:, source, :, :length]
        self._reserved[target] = self._reserved[source]
        self.free(source, length)
        self._settle()

    def keep(self, row: int, slot: int, start: int) -> None:
        """Copy the block of `slot` that begins at token `start` to kept row `row`."""
        self._kept[row] = self._slots[:, slot, :, start : start + BLOCK_TOKENS]
        self._kept_rows = max(self._kept_rows, row + 1)

    def recall(self, rows: Sequence[int], slot: int) -> None:
        """Copy kept rows to the beginning of `slot`, one after the other."""
        for number, row in enumerate(rows):
            start = number * BLOCK_TOKENS
            self._slots[:, slot, :, start : start + BLOCK_TOKENS] = self._kept[row]

    def trim(self) -> None:
        """Give the machine every page back that nothing is reserved for."""
        for slot, (reserved, written) in enumerate(zip(self._reserved, self._written, strict=True)):
            if written > reserved:
                self._give_back(slot, reserved)
                self._written[slot] = reserved

    def close(self) -> None:
        """Let go of all memory; it goes when the last binding to it does."""
        self._written = [0] * len(self._written)
        self._map = None
        self._slots = self._kept = np.zeros((0, 0, 0, 0, 0), np.float32)

    def _held(self) -> int:
        """Pages that are there or may come."""
        return sum(map(max, self._reserved, self._written))

    def _settle(self) -> None:
        if self._held() > self._limit:
            self.trim()

    def _give_back(self, slot: int, first: int) -> None:
        """Pages of `slot` from `first` on; they are zero when they are touched again (madvise(2))."""
        assert self._map is not None  # noqa: S101  what was closed has no pages
        parts, slots, heads, rows, _ = self._slots.shape
        run_bytes, kept_bytes = rows * self._row_bytes, first * mmap.PAGESIZE
        if first == 0:  # its heads lie side by side
            heads, run_bytes = 1, heads * run_bytes
        for run in range(parts * heads):
            part, head = divmod(run, heads)
            start = ((part * slots + slot) * heads + head) * run_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start + kept_bytes, run_bytes - kept_bytes)

    def _pages(self, tokens: int) -> int:
        return -(-tokens * self._row_bytes // mmap.PAGESIZE)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[mmap.mmap | None, NDArray[Any]]:
    """Address space whose pages come when they are written, one by one. numpy's own asks for huge pages, so that a few
    tokens in every slot would commit all of it (735 MB instead of 18 in a slab of 4 x 4096 tokens of a 135 M model);
    huge pages are worth at most 4 % of a step after 1,900 tokens, and nothing before.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return None, np.zeros(shape, dtype)
    try:
        memory = mmap.mmap(-1, size, flags=_MAP_FLAGS)
    except (OSError, OverflowError) as error:
        raise DeployError(
            Code.LOAD_FAILED, f"the machine refuses {size >> 20} MiB of address space for keys and values ({error}); "
            "lower max_slots, context_tokens or prefix_cache_bytes",
        ) from error  # fmt: skip
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory, np.frombuffer(memory, dtype).reshape(shape)
