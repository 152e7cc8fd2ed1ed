"""Bodies of the OpenAI API as this server understands them, strict and bounded.

A field that would change the answer and is not supported is refused, never ignored; fields that change nothing
(`user`, `metadata`, `store`) are taken. Names and meanings: OpenAI API reference, chat, completions and embeddings.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from runtime.sampling import Sampling
from wire.errors import Code, InferenceError

TEXT_LIMIT = 2_000_000
INPUTS_LIMIT = 2048
"""Texts of one request for embeddings, as OpenAI has it."""
Content = Annotated[str, Field(max_length=TEXT_LIMIT)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
BIASES = 1024
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class StrictBody(BaseModel):
    """Part of a request: nothing that is not known, and no other types than those that are written."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(StrictBody):
    """One part of a message; only text is understood."""

    type: Literal["text"]
    text: Content


class ChatMessage(StrictBody):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Annotated[tuple[TextPart, ...], Field(max_length=256)]
    name: Annotated[str, Field(max_length=64)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(StrictBody):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(StrictBody):
    """`response_format`; only plain text is offered."""

    type: Literal["text"]


class _Request(StrictBody):
    default_tokens: ClassVar[int | None] = None
    """Bound of the answer when `max_tokens` was left out; the context's end bounds it, too."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 22)] | None = None
    """An extension, as other servers have it; 0 means all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """An extension, as other servers have it."""
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """An extension, as other servers have it; 1 does nothing."""
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=BIASES)] | None = (
        None
    )
    """The engine knows which tokens there are."""
    stop: StopString | Annotated[tuple[StopString, ...], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """An extension for measurements: the end token is an ordinary one."""
    deterministic: bool = False
    """An extension: the same request gets the same tokens whatever else runs, at the price of steps of its own."""
    n: Literal[1] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None

    def sampling(self) -> Sampling:
        """How tokens are drawn, OpenAI's defaults for what is absent; a deterministic request always has a seed."""
        seed = 0 if self.seed is None and self.deterministic else self.seed
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=self.top_k or 0,
            seed=None if seed is None else seed % (1 << 64),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
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
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[tuple[()], Field()] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    def wanted_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """How many alternatives come with each token's log probability; None when none are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


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
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def wanted_logprobs(self) -> int | None:
        """As ChatRequest.wanted_logprobs."""
        return self.logprobs


Token = Annotated[int, Field(ge=0, le=1 << 31)]
Tokens = Annotated[tuple[Token, ...], Field(min_length=1, max_length=1 << 16)]


def _kind_of_input(given: Any) -> str:
    """Which form an input has, so that a refusal speaks of that form."""
    if not isinstance(given, list | tuple):
        return "text"
    first = given[0] if given else ""
    return "tokens" if isinstance(first, int) else "token_lists" if isinstance(first, list | tuple) else "texts"


class EmbeddingRequest(StrictBody):
    """Body of POST /v1/embeddings. An input of numbers is tokens, which are taken as they are."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    input: Annotated[
        Annotated[Content, Tag("text")]
        | Annotated[tuple[Content, ...], Field(min_length=1, max_length=INPUTS_LIMIT), Tag("texts")]
        | Annotated[Tokens, Tag("tokens")]
        | Annotated[tuple[Tokens, ...], Field(min_length=1, max_length=INPUTS_LIMIT), Tag("token_lists")],
        Discriminator(_kind_of_input),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


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
