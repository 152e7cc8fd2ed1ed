"""Texts as tokens, and the batches that training draws of them: which, is a function of seed and step alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Corpus:
    """`tokens` int32 [n]: all texts end to end."""

    tokens: NDArray[np.int32]

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    def batch(self, seed: int, step: int, rows: int, length: int) -> Tensor:
        """int64 [rows, length] of step `step`: pieces at random places, the same whenever it is asked for."""
        starts = np.random.default_rng((seed, step)).integers(0, self.tokens.size - length + 1, rows)
        return torch.from_numpy(np.stack([self.tokens[start : start + length] for start in starts]).astype(np.int64))

    def windows(self, length: int, count: int) -> Tensor:
        """int64 [at most count, length]: the first pieces, without overlap."""
        most = min(count, self.tokens.size // length)
        return torch.from_numpy(self.tokens[: most * length].reshape(most, length).astype(np.int64))


def read_corpus(tokenizer: Path, texts: Sequence[Path], shortest: int) -> Corpus:
    """Tokenise `texts`, each whole. Raises ConfigError when one cannot be read or there are fewer than `shortest`
    tokens."""
    encode = Tokenizer.from_file(str(tokenizer))
    parts = []
    for path in texts:
        try:
            parts.append(np.asarray(encode.encode(path.read_text(encoding="utf-8")).ids, np.int32))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as text ({error}); name a text file in UTF-8") from error
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    if tokens.size < shortest:
        raise ConfigError(f"the texts have {tokens.size} tokens, {shortest} are needed; add text or shorten --length")
    return Corpus(tokens)
