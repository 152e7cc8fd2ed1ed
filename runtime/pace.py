"""How much of a prompt one step may read while answers wait for their next token."""

from runtime.model import PREFILL_TOKENS
from runtime.prefix import BLOCK_TOKENS

PAUSE_S = 0.2
"""Longest wait that reading should put between two tokens of an answer."""
LEAST_TOKENS = 32
"""Of a step: fewer take hardly less time."""
_NEWEST = 0.25
"""Weight of the newest step in the mean."""


class Pace:
    """The time that a token of a prompt takes here, from the steps that were."""

    def __init__(self) -> None:
        self._token_s = 0.0

    def note(self, tokens: int, span_s: float) -> None:
        """A step read `tokens` in `span_s`."""
        token_s = span_s / tokens
        self._token_s += (token_s - self._token_s) * (_NEWEST if self._token_s else 1.0)

    def tokens(self) -> int:
        """Whole blocks that PAUSE_S is enough for, from LEAST_TOKENS to PREFILL_TOKENS."""
        if not self._token_s:
            return PREFILL_TOKENS
        blocks = int(PAUSE_S / self._token_s) // BLOCK_TOKENS
        return max(LEAST_TOKENS, min(PREFILL_TOKENS, blocks * BLOCK_TOKENS))
