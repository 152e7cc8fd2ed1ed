"""Which blocks of prompts and answers are kept, so that a request does not read again what another has read.

A block is BLOCK_TOKENS tokens after everything before them: its key is a digest of its parent's key and its tokens, so
that equal keys mean equal prefixes. Invariants: a block outlives its children and whoever holds it; rows are given to
one block at a time; what nobody refers to goes first, the longest unused of it. Pure bookkeeping: the model keeps the
keys and values of row i in its own memory, and dies with it, so that a version never sees another's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

BLOCK_TOKENS = 16
"""Tokens of a block: a hit saves whole blocks only, and each costs the bookkeeping of one."""
KEY_BYTES = 16


@dataclass(slots=True, eq=False)
class Block:
    """One kept block; `row` is where its keys and values are."""

    key: bytes
    row: int
    parent: "Block | None"
    references: int = 0
    """Its children, and the requests whose last kept block it is."""
    used: int = 0


class PrefixCache:
    """Kept blocks by key, at most `rows` of them. One thread uses it."""

    def __init__(self, rows: int) -> None:
        self._blocks: dict[bytes, Block] = {}
        self._idle: set[Block] = set()
        """Blocks without references: what may be evicted."""
        self._free = list(range(rows - 1, -1, -1))
        self._clock = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, tokens: Sequence[int]) -> list[Block]:
        """The kept blocks that `tokens` begin with, in order, the last of them held for the caller."""
        found: list[Block] = []
        key = b""
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = _key(key, tokens[start : start + BLOCK_TOKENS])
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        if found:
            self._hold(found[-1])
        return found

    def knows(self, tokens: Sequence[int]) -> bool:
        """Whether `match` would find anything."""
        return len(tokens) >= BLOCK_TOKENS and _key(b"", tokens[:BLOCK_TOKENS]) in self._blocks

    def extend(self, parent: Block | None, tokens: Sequence[int]) -> tuple[Block, bool] | None:
        """The block of `tokens` after `parent`, and whether it is new, so that its row must be filled.

        The caller's hold moves from `parent` to it. None when every row is in use: the hold stays where it is.
        """
        key = _key(parent.key if parent is not None else b"", tokens)
        block = self._blocks.get(key)
        fresh = block is None
        if block is None:
            row = self._free.pop() if self._free else self._evict()
            if row is None:
                return None
            block = self._blocks[key] = Block(key, row, parent)
            if parent is not None:
                parent.references += 1
        self._hold(block)
        self.release(parent)
        return block, fresh

    def release(self, block: Block | None) -> None:
        """Give back a hold that `match` or `extend` gave."""
        if block is None:
            return
        self._clock += 1
        block.used = self._clock
        self._drop_reference(block)

    def _hold(self, block: Block) -> None:
        block.references += 1
        self._idle.discard(block)

    def _drop_reference(self, block: Block) -> None:
        block.references -= 1
        if block.references == 0:
            self._idle.add(block)

    def _evict(self) -> int | None:
        """The row of the block that was not used for longest, which is forgotten."""
        if not self._idle:
            return None
        block = min(self._idle, key=lambda idle: idle.used)
        self._idle.remove(block)
        del self._blocks[block.key]
        if block.parent is not None:
            block.parent.used = max(block.parent.used, block.used)
            self._drop_reference(block.parent)
        return block.row


def _key(parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(parent + np.asarray(tokens, np.int64).tobytes(), digest_size=KEY_BYTES).digest()
