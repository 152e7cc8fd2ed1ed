"""Log probabilities as OpenAI's two completion APIs write them (API reference, `logprobs` of a choice).

They are natural logarithms of the model's own distribution, before penalties, temperature and filters
(runtime/sampling.py). A token that is no whole character is written as its bytes in hexadecimal.
"""

from collections.abc import Sequence
from typing import Any

from runtime.transcript import Placed
from runtime.vocabulary import Vocabulary

LEAST = -9999.0
"""What OpenAI writes for a token that is next to impossible; JSON has no infinity."""


def chat_logprobs(vocabulary: Vocabulary, scores: Sequence[Placed]) -> dict[str, Any]:
    """`logprobs` of a chat's choice. The bytes of special tokens are null: they add nothing to the text."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = vocabulary.bytes_of(token)
        return {
            "token": vocabulary.written(token), "logprob": max(logprob, LEAST),
            "bytes": None if data is None else list(data),
        }  # fmt: skip

    content = [
        entry(s.scored.token, s.scored.logprob) | {"top_logprobs": [entry(*other) for other in s.scored.top]}
        for s in scores
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(vocabulary: Vocabulary, scores: Sequence[Placed]) -> dict[str, Any]:
    """`logprobs` of a completion's choice; offsets are characters of its `text`.

    The token that was drawn is among its alternatives, in addition to as many as were asked for.
    """

    def name(token: int) -> str:
        written, data = vocabulary.written(token), vocabulary.bytes_of(token)
        return written if data is None or data == written.encode() else f"bytes:{written}"

    top = [
        {name(token): max(logprob, LEAST) for token, logprob in ((s.scored.token, s.scored.logprob), *s.scored.top)}
        for s in scores
    ]
    return {
        "tokens": [name(s.scored.token) for s in scores],
        "token_logprobs": [max(s.scored.logprob, LEAST) for s in scores], "top_logprobs": top,
        "text_offset": [s.offset for s in scores],
    }  # fmt: skip
