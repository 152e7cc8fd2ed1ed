"""Which request holds which slot of a model's slab, and what of it is kept for requests that begin alike.

Invariants: running answers hold slots 0..k-1; prompts being read hold slots at or above k, so that an answer that
leaves is replaced by the last one without touching them; whoever holds a slot has memory for all that it may become.
Whole blocks of what was read or generated are kept at once, so that the next request copies them, whether or not their
donor still runs; and what a request leaves in its slot is there for the next one in it that begins alike, to the token
and without a copy. Only the engine's thread calls anything here but `knows`.
"""

from collections.abc import Sequence

from runtime.generation import Generation
from runtime.prefix import BLOCK_TOKENS, PrefixCache
from runtime.slab import Shape, Slab

READ_ANEW = 2
"""Last tokens of a prompt that are always read. One would do, but kernels for a single row round differently, so that a
request that comes again would get another answer."""


class Slots:
    """The slots of one slab. `running` has the answers in the order of their slots."""

    def __init__(self, slab: Slab, shape: Shape) -> None:
        self._slab, self._count = slab, shape.slots
        self._prefixes, self._forgets = PrefixCache(shape.kept_blocks), shape.kept_blocks == 0
        self.running: list[Generation] = []
        self._left: dict[int, list[int]] = {}
        """Tokens whose keys and values the last request in a slot has left there; of slots in use it says nothing."""

    def knows(self, prompt: Sequence[int]) -> bool:
        """Whether something of `prompt` is kept, from any thread, as far as it can tell without waiting."""
        return self._prefixes.knows(prompt[:-1])

    def take(self, generation: Generation, number: int) -> bool:
        """Give a prompt the slot that is `number` after the running ones; False while there is none or no memory."""
        slot = len(self.running) + number
        if slot >= self._count or not self._slab.reserve(slot, generation.room):
            return False
        generation.slot = slot
        return True

    def give_back(self, generation: Generation) -> None:
        """Take the slot from a prompt of which nothing was read."""
        self._slab.free(generation.slot, 0)

    def recall(self, generation: Generation) -> None:
        """Go on behind what its slot has of its prompt, or copy what is kept where that is more; but for the last
        tokens, whose logits are wanted."""
        if generation.alone or self._forgets:
            return
        wanted = generation.prompt[:-1]
        here = min(_alike(self._left.get(generation.slot, []), wanted), self._slab.remains(generation.slot))
        blocks = self._prefixes.match(wanted)
        generation.kept_tokens = len(blocks) * BLOCK_TOKENS
        if blocks:
            generation.kept = blocks[-1]
        if generation.kept_tokens > here:
            self._slab.recall([block.row for block in blocks], generation.slot)
        known = max(here, generation.kept_tokens)
        if known >= BLOCK_TOKENS:  # the first words of many are the same
            generation.length = generation.cached = min(known, len(generation.prompt) - READ_ANEW)

    def keep(self, generation: Generation) -> None:
        """Keep the blocks that became whole; none while every row is in use by others."""
        while generation.kept_tokens + BLOCK_TOKENS <= generation.length:
            start = generation.kept_tokens
            found = self._prefixes.extend(generation.kept, generation.tokens[start : start + BLOCK_TOKENS])
            if found is None:
                return
            generation.kept, fresh = found
            generation.kept_tokens += BLOCK_TOKENS
            if fresh:
                self._slab.keep(generation.kept.row, generation.slot, start)

    def join(self, generation: Generation) -> None:
        """From reading to running, in the first slot that is free by now."""
        slot = len(self.running)
        if generation.slot != slot:
            self._move(generation, slot, generation.length)
        self.running.append(generation)

    def leave(self, generation: Generation) -> None:
        """Free the slot; the last running answer moves into the gap."""
        self._slab.free(generation.slot, generation.written)
        self._left[generation.slot] = generation.tokens[: generation.length]
        if generation in self.running:
            last = self.running.pop()
            if last is not generation:
                self._move(last, generation.slot, last.written)
                self.running[generation.slot] = last
        self._prefixes.release(generation.kept)

    def _move(self, generation: Generation, slot: int, length: int) -> None:
        """To another slot, with the first `length` tokens of its own, which the old one then still has."""
        self._slab.move(generation.slot, slot, length)
        self._left[generation.slot] = generation.tokens[: generation.length]
        generation.slot = slot


def _alike(some: list[int], others: list[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(some), len(others))
    while low < high:
        middle = (low + high + 1) // 2
        if some[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
