"""Tokens one by one: the bytes that each stands for, and how it is written where it has to be text.

A token may be half a character, so that only its bytes are sure. Joined, the bytes of an answer's tokens are those of
its text, but for the space before the first word of SentencePiece.
"""

import json
import re
from functools import lru_cache

from tokenizers import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """The tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special}
        parts = _decoder_parts(tokenizer)
        self._byte_level, self._byte_fallback = "ByteLevel" in parts, "ByteFallback" in parts
        self.drops_first_space = self._decoded("▁a") == "a"
        """Whether a space that an answer begins with is no part of its text, as in SentencePiece."""
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def special(self, content: str) -> int | None:
        """The special token that is written `content`, when there is one."""
        return next((token for token, name in self._special.items() if name == content), None)

    def written(self, token: int) -> str:
        """The token's text; bytes that are no whole character as `\\xe6`, and tokens without bytes by their names."""
        data = self.bytes_of(token)
        if data is not None:
            return data.decode(errors="backslashreplace")
        return self._special.get(token, f"token_id:{token}")

    def _bytes_of(self, token: int) -> bytes | None:
        """What `token` adds to the text; None of a special token, which adds nothing, and of no token at all."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._special:
            return None
        if self._byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        fallback = _FALLBACK.fullmatch(piece) if self._byte_fallback else None
        if fallback:
            return bytes([int(fallback[1], 16)])
        return self._decoded("a", piece)[1:].encode()  # after another token, because of the first space

    def _decoded(self, *pieces: str) -> str:
        decoder = self._tokenizer.decoder
        return decoder.decode(list(pieces)) if decoder is not None else "".join(pieces)


def _decoder_parts(tokenizer: Tokenizer) -> set[str]:
    """Types of what the tokenizer's decoder is put together from."""
    if tokenizer.decoder is None:
        return set()
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return {part["type"] for part in (decoder, *decoder.get("decoders", ()))}


def _byte_characters() -> dict[str, int]:
    """Characters that stand for bytes in byte-level vocabularies: visible ones for themselves, the others in order from
    U+0100 on (GPT-2, encoder.py).
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(unseen)}


_BYTES = _byte_characters()
