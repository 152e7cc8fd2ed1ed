"""One request on the event loop's side: the engine's tokens become pieces of text, until they end or must end.

Invariants: a request holds its version from before its prompt is tokenised until it has ended, whatever way it ends;
a request that nobody waits for, that is over its time or that met a stop string is cancelled in the engine.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from runtime.generation import End, Event, Generation, Reason
from runtime.loaded import LoadedDecoder
from runtime.refusals import server_ending
from runtime.registry import Registry
from runtime.sampling import Sampling
from runtime.text import Message
from runtime.transcript import Piece, Transcript
from wire.errors import Code, InferenceError

INLINE_CHARACTERS = 2_000
"""A longer prompt is tokenised on another thread, so that it does not hold up everybody's tokens."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to answer. The prompt is a conversation, a text, or tokens."""

    model: str
    prompt: Sequence[Message] | str | Sequence[int]
    sampling: Sampling
    stops: tuple[str, ...] = ()
    streamed: bool = False
    """Whether pieces are wanted as they come; else one at the end, or where a stop string may end it, is enough."""
    max_tokens: int | None = None
    default_tokens: int | None = None
    """Bound of the answer without `max_tokens`, if the context has so much left."""
    ignore_eos: bool = False
    deterministic: bool = False
    top_logprobs: int | None = None
    """How many alternatives come with the log probability of each token; None: none of both."""


class Answer:
    """An answer in the making; an async context manager, whose end lets go of the version."""

    def __init__(self, registry: Registry, wanted: Wanted, timeout_s: float) -> None:
        self._registry, self.wanted, self._timeout_s = registry, wanted, timeout_s
        self.version: LoadedDecoder
        """Known once entered."""
        self._inbox: deque[Event] = deque()
        self._wake = asyncio.Event()
        self._generation: Generation | None = None
        self._expired = self._abandoned = self._over = False
        self._timer: asyncio.TimerHandle | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finish_reason = Reason.CANCELLED
        """Reason.STOP or LENGTH once `pieces` is at its end; CANCELLED when the client left."""

    async def __aenter__(self) -> Self:
        """Hold the version, tokenise and queue; raises InferenceError when the request cannot be taken."""
        self.version = self._registry.acquire(self.wanted.model, LoadedDecoder)
        try:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._expire)
            tokens = await self._tokens() or self._beginning()
            self.prompt_tokens = len(tokens)
            generation = Generation(
                tokens, self._max_tokens(), self.wanted.sampling, self._take, self._ends(), self.wanted.deterministic,
                self.wanted.top_logprobs, whole=not (self.wanted.streamed or self.wanted.stops),
            )  # fmt: skip
            self.version.engine.submit(generation)
            self._generation = generation
        except BaseException:
            self._let_go()
            raise
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._let_go()

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not read anew; known once the first piece came."""
        return self._generation.cached if self._generation is not None else 0

    def abandon(self) -> None:
        """The client is gone: `pieces` ends and the engine stops working for it."""
        self._abandoned = True
        self._wake.set()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces as they come, never empty; tokens that came meanwhile are in one piece.

        Raises InferenceError when the model failed or the time is over.
        """
        transcript = Transcript(self.version.text.vocabulary, self.wanted.stops)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._abandoned:
                return
            end = self._drain(transcript)
            piece = transcript.take()
            if piece.text or piece.scores:
                yield piece
            if end is not None:
                self._conclude(end)
                return
            if self._expired:
                self.version.engine.stats.failed()
                raise InferenceError(
                    Code.DEADLINE_PASSED, f"no whole answer within {self._timeout_s:g} s; ask for fewer tokens", 504
                )

    def _drain(self, transcript: Transcript) -> End | None:
        while self._inbox:
            event = self._inbox.popleft()
            if isinstance(event, End):
                self._over = True
                self.completion_tokens += event.reason is Reason.STOP  # the end token was generated too
                transcript.finish()
                return End(Reason.STOP) if transcript.stopped else event
            self.completion_tokens += 1
            transcript.feed(event)
            if transcript.stopped:
                return End(Reason.STOP)
        return None

    def _conclude(self, end: End) -> None:
        if end.error is not None:
            raise end.error
        if end.reason is Reason.CANCELLED:
            raise server_ending()
        self.finish_reason = end.reason

    async def _tokens(self) -> list[int]:
        text, prompt = self.version.text, self.wanted.prompt
        if isinstance(prompt, str):
            return await _run(len(prompt), lambda: text.encode(prompt, special=True))
        messages = [message for message in prompt if isinstance(message, dict)]
        if messages:
            size = sum(len(message["content"]) for message in messages)
            return await _run(size, lambda: text.encode(text.render(messages), special=False))
        return [token for token in prompt if isinstance(token, int)]

    def _max_tokens(self) -> int:
        left = max(1, self.version.capacity - self.prompt_tokens)
        return self.wanted.max_tokens or min(left, self.wanted.default_tokens or left)

    def _ends(self) -> frozenset[int]:
        """Tokens that end the answer. A stop string that is a special token's name is one: it never becomes text."""
        named = map(self.version.text.vocabulary.special, self.wanted.stops)
        ends = () if self.wanted.ignore_eos else self.version.config.eos_token_ids
        return frozenset([*ends, *(token for token in named if token is not None)])

    def _beginning(self) -> list[int]:
        """What stands for an empty prompt."""
        token = self.version.config.bos_token_id
        if token is None:
            raise InferenceError(Code.BAD_REQUEST, "the prompt is empty; send some text", 400)
        return [token]

    def _take(self, event: Event) -> None:
        self._inbox.append(event)
        self._wake.set()

    def _expire(self) -> None:
        self._expired = True
        self._wake.set()

    def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._generation is not None and not self._over:
            self.version.engine.cancel(self._generation, self.finish_reason)
        self._registry.release(self.version)


async def _run(characters: int, work: Callable[[], list[int]]) -> list[int]:
    return work() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(work)
