"""One request to the engine, and the events that come of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from runtime.prefix import Block
from runtime.sampling import Sampler, Sampling, Scored, score
from runtime.slab import Shape
from runtime.speculation import DRAFT_TOKENS, Drafter
from wire.errors import Code, InferenceError


class Reason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class End:
    """Last event of a request; `error` when it failed."""

    reason: Reason
    error: InferenceError | None = None


Event = int | Scored | End
"""A token, with its log probability when that was asked for, or the end."""


@dataclass(slots=True, eq=False)
class Generation:
    """One request; `sink` gets its events, in order, wherever the engine's `deliver` calls it."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    sink: Callable[[Event], None]
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer and are no part of it."""
    alone: bool = False
    """Whether its steps are its own, so that what else runs changes no bit of its logits."""
    top_logprobs: int | None = None
    """How many alternatives come with the log probability of each token; None: tokens come without."""
    whole: bool = False
    """Whether its events are wanted together, when it has ended: nobody is woken for each token then."""
    cancelled: Reason | None = None
    """Set by Engine.cancel: how it is to end at the next step."""
    # the engine's from here on
    sampler: Sampler = field(init=False)
    replica: int = 0
    """Which of the version's engines has it."""
    slot: int = -1
    length: int = 0
    """Tokens of it in the KV cache."""
    cached: int = 0
    """Tokens of the prompt that were copied instead of read."""
    tokens: list[int] = field(init=False)
    """Prompt and answer."""
    kept: Block | None = None
    """Its last block in the prefix cache, and how many tokens that makes."""
    kept_tokens: int = 0
    drafter: Drafter | None = None
    """Guesses how it goes on; None: nobody does."""
    held: list[Event] = field(default_factory=list)
    """Of one that is wanted whole, what was not handed out yet."""
    accepted_s: float = 0.0
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.sampling, self.prompt)
        self.tokens = list(self.prompt)

    @property
    def room(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.prompt) + self.max_tokens

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.room - len(self.tokens)

    @property
    def written(self) -> int:
        """Tokens that its slot may hold: drafts that were wrong lie behind its own."""
        return min(self.room, self.length + (DRAFT_TOKENS if self.drafter is not None else 0))

    def draw(self, logits: NDArray[np.float32]) -> list[Event]:
        """Draw its next token by `logits` float32 [vocab_size]; what there is to tell, an End last when it ended."""
        try:
            token = self.sampler.draw(logits)
        except InferenceError as error:
            return [End(Reason.FAILED, error)]
        self.tokens.append(token)
        if token in self.ends:
            return [End(Reason.STOP)]
        event = token if self.top_logprobs is None else score(logits, token, self.top_logprobs)
        return [event] if self.left > 0 else [event, End(Reason.LENGTH)]


def check_room(generation: Generation, shape: Shape) -> None:
    """Raise InferenceError(context_exceeded, 400) when no slot can hold the prompt and all of the answer."""
    prompt, capacity = len(generation.prompt), shape.capacity
    context = f"the context of {capacity} tokens ({shape.bound_by})"
    if prompt >= capacity:
        message = f"the prompt has {prompt} tokens and does not fit {context}; send at most {capacity - 1}"
    elif generation.room > capacity:
        message = (
            f"the prompt has {prompt} tokens and max_tokens is {generation.max_tokens}, together over {context}; ask "
            f"for at most {capacity - prompt}, or leave max_tokens out"
        )
    else:
        return
    raise InferenceError(Code.CONTEXT_EXCEEDED, message, 400)


Deliveries = list[tuple[Generation, Event]]


def deliver_directly(deliveries: Deliveries) -> None:
    """Call every sink on the engine's thread; a server hands the list to its event loop instead."""
    for generation, event in deliveries:
        generation.sink(event)
