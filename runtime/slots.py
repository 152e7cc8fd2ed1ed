"""Which request holds which slot of a model's slab, and what of it is kept for requests that begin alike.

Invariants: running answers hold slots 0..k-1; prompts being read hold slots at or above k, so that an answer that
leaves is replaced by the last one without touching them; whoever holds a slot has memory for all that it may become.
Whole blocks of what was read or generated are kept at once, so that the next request copies them, whether or not their
donor still runs. Only the engine's thread calls anything here but `knows`.
"""

from collections.abc import Sequence

from runtime.generation import Generation
from runtime.prefix import BLOCK_TOKENS, PrefixCache
from runtime.slab import Shape, Slab


class Slots:
    """The slots of one slab. `running` has the answers in the order of their slots."""

    def __init__(self, slab: Slab, shape: Shape) -> None:
        self._slab, self._count = slab, shape.slots
        self._prefixes = PrefixCache(shape.kept_blocks)
        self.running: list[Generation] = []

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
        """Copy what is kept of its prompt but the last token, whose logits are wanted."""
        if generation.alone:
            return
        blocks = self._prefixes.match(generation.prompt[:-1])
        if blocks:
            self._slab.recall([block.row for block in blocks], generation.slot)
            generation.kept = blocks[-1]
            generation.length = generation.kept_tokens = generation.cached = len(blocks) * BLOCK_TOKENS

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
            self._slab.move(generation.slot, slot, generation.length)
            generation.slot = slot
        self.running.append(generation)

    def leave(self, generation: Generation) -> None:
        """Free the slot; the last running answer moves into the gap."""
        self._slab.free(generation.slot, generation.written)
        if generation in self.running:
            last = self.running.pop()
            if last is not generation:
                self._slab.move(last.slot, generation.slot, last.written)
                last.slot = generation.slot
                self.running[generation.slot] = last
        self._prefixes.release(generation.kept)
