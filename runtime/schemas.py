"""Bodies of the OpenAI routes: what is read of a request, and the shapes of answers.

Fields that this server does not act on are ignored when that is harmless and refused (400) when the answer would be
another than was asked for (`n` above 1, tools, response formats).
"""

import time
import uuid
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.sampling import SamplingParameters
from wire.errors import Code, InferenceError

DEFAULT_MAX_TOKENS = 256


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Message(_Body):
    """One message; content parts other than text are refused."""

    role: Annotated[str, Field(max_length=64)]
    content: str | list[dict[str, Any]] | None = None

    def text(self) -> str:
        """The content as text."""
        if isinstance(self.content, str):
            return self.content
        parts = self.content or []
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in parts):
            raise InferenceError(Code.BAD_REQUEST, "only text content is understood; drop images and audio", 400)
        return "".join(part["text"] for part in parts)


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool = False


class GenerationBody(_Body):
    """What chat and plain completions share."""

    model: Annotated[str, Field(max_length=256)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]] | None, Field(max_length=1024)] = None
    seed: Annotated[int | None, Field(ge=0, lt=1 << 63)] = None
    stop: str | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | int | None = None

    def check_supported(self) -> None:
        """Raise InferenceError(bad_request) for what would change the answer and is not built."""
        wanted = {
            "n": self.n not in (None, 1), "tools": bool(self.tools), "logprobs": bool(self.logprobs),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
        }  # fmt: skip
        for name, asked in wanted.items():
            if asked:
                raise InferenceError(Code.BAD_REQUEST, f"{name} is not supported; leave it out", 400)

    def token_limit(self) -> int:
        """Tokens to produce at most."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_MAX_TOKENS

    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, vocab_size: int) -> SamplingParameters:
        """Sampling parameters with OpenAI's defaults."""
        bias = tuple(sorted((self.logit_bias or {}).items()))
        if any(not 0 <= token < vocab_size for token, _ in bias):
            raise InferenceError(Code.BAD_REQUEST, f"logit_bias names a token outside 0..{vocab_size - 1}", 400)
        return SamplingParameters(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            seed=self.seed,
        )

    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[int], Field(min_length=1, max_length=1 << 20)]


def parse_body(kind: type[GenerationBody], data: bytes) -> GenerationBody:
    """The typed body. Raises InferenceError(bad_request) naming the field."""
    try:
        body = kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise InferenceError(Code.BAD_REQUEST, f"{where}: {first['msg']}", 400) from error
    body.check_supported()
    return body


class AnswerShape:
    """Builds the JSON of one answer, whole or in chunks, for chat or for plain completions."""

    def __init__(self, *, chat: bool, model: str, fingerprint: str) -> None:
        self.chat = chat
        self._kind = "chat.completion" if chat else "text_completion"
        prefix = "chatcmpl" if chat else "cmpl"
        self._common = {
            "id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def whole(self, text: str, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """A complete answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {**self._common, "object": self._kind, "choices": [choice], "usage": usage}

    def chunk(self, text: str | None, *, reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """A chunk of a stream: `text` may be None for the role and for the end."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self.chat:
            delta = {"role": "assistant", "content": ""} if first else {} if text is None else {"content": text}
            choice["delta"] = delta
        else:
            choice["text"] = text or ""
        return {**self._common, "object": f"{self._kind}.chunk" if self.chat else self._kind, "choices": [choice]}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The extra chunk of `include_usage`."""
        kind = f"{self._kind}.chunk" if self.chat else self._kind
        return {**self._common, "object": kind, "choices": [], "usage": usage}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens, "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
