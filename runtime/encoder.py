"""One loaded encoder: its onnxruntime session, and texts of tokens in, embeddings out.

The graph contract is docs/design.md section 6. Texts are padded on the right, as the graph's mask wants it; its
matrices leave the padding out, its attention does not. Invariant: only the batcher's thread calls `encode`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.model import Float
from runtime.session import DECODING, open_sessions
from wire.errors import Code, DeployError
from wire.manifest import EncoderConfig
from wire.serving import ExecutionOptions


class Encoder:
    """A session. Raises DeployError(load_failed) when onnxruntime refuses the graph.

    `packed` is a directory of the prepack cache, whose graph stands for the version's own.
    """

    def __init__(
        self, directory: Path, config: EncoderConfig, options: ExecutionOptions, packed: Path | None = None
    ) -> None:
        self.config = config
        self._session: Any = open_sessions(directory, options, packed)[DECODING]

    def encode(self, texts: Sequence[Sequence[int]]) -> Float:
        """Embeddings of `texts`, float32 [len(texts), dimensions]; tokens must be of the vocabulary."""
        ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
        mask = np.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
            mask[row, : len(text)] = 1
        (found,) = self._session.run(["embeddings"], {"input_ids": ids, "attention_mask": mask})
        embeddings: Float = np.asarray(found, np.float32)
        return embeddings.reshape(len(texts), self.config.dimensions)

    def warm_up(self) -> None:
        """Run once padded and once not: the first request pays for no allocation, and a graph that loads but does not
        keep the contract shows here. Raises DeployError(load_failed).
        """
        longest = min(8, self.config.max_tokens)
        try:
            self.encode([[0] * longest])
            self.encode([[0] * longest, [0]])
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            self.close()
            raise DeployError(
                Code.LOAD_FAILED, f"the graph loads but does not run as its contract says: {str(error)[:500]}"
            ) from error

    def close(self) -> None:
        """Give the session back now, whoever still holds this object; it cannot run any more."""
        self._session = None
