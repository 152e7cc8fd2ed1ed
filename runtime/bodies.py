"""Bodies of the OpenAI API as this server understands them, strict and bounded.

A field that would change the answer and is not supported is refused, never ignored; fields that change nothing
(`user`, `metadata`, `store`) are taken. Names and meanings: OpenAI API reference, chat and completions.
"""

from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.sampling import Sampling
from wire.errors import Code, InferenceError

TEXT_LIMIT = 2_000_000
Content = Annotated[str, Field(max_length=TEXT_LIMIT)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(_Body):
    """One part of a message; only text is understood."""

    type: Literal["text"]
    text: Content


class ChatMessage(_Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Annotated[tuple[TextPart, ...], Field(max_length=256)]
    name: Annotated[str, Field(max_length=64)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Body):
    """`response_format`; only plain text is offered."""

    type: Literal["text"]


class _Request(_Body):
    default_tokens: ClassVar[int | None] = None
    """Bound of the answer when `max_tokens` was left out; the context's end bounds it, too."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 22)] | None = None
    """An extension, as other servers have it; 0 means all."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: StopString | Annotated[tuple[StopString, ...], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """An extension for measurements: the end token is an ordinary one."""
    n: Literal[1] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None

    def sampling(self) -> Sampling:
        """How tokens are drawn, OpenAI's defaults for what is absent."""
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=self.top_k or 0,
            seed=None if self.seed is None else self.seed % (1 << 64),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
        )

    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    def wanted_tokens(self) -> int | None:
        """Bound of the answer that must fit the context, None when it was left out."""
        return self.max_tokens


class ChatRequest(_Request):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[tuple[()], Field()] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def wanted_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """Body of POST /v1/completions. A prompt of numbers is tokens."""

    default_tokens: ClassVar[int | None] = 16  # OpenAI's

    prompt: (
        Content
        | Annotated[tuple[Content], Field()]
        | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=1 << 20)]
    )
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: None = None


Body = TypeVar("Body", bound=BaseModel)


def parse_body(model: type[Body], data: bytes) -> Body:
    """`data` as `model`; raises InferenceError(bad_request) that names the first fault."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = "is not supported here; leave it out" if first["type"] == "extra_forbidden" else first["msg"]
        raise InferenceError(Code.BAD_REQUEST, f"{where or 'body'}: {what}"[:500], 400) from error
