"""Continuous batching: one thread per loaded version that decodes all running answers together, token by token.

A step decodes one token of every running answer, or verifies a draft of each, which gives some of them several tokens
(runtime/speculation.py); then it reads one chunk of one waiting prompt, or a few whole prompts that together are no
longer than a chunk. Requests join and leave between any two steps. Invariants: no step begins with a request that was
cancelled, and a step that reads for nobody is cut short; requests get slots (runtime/slots.py) in the order of arrival;
the thread blocks when it has nothing to do. An exception of a step fails the requests that were in it and nothing else.

Kernels for other batch sizes round differently. A request that is `alone` therefore shares no step and no kept block
with others: it is read from its first token in chunks of PREFILL_TOKENS and decoded by steps of one token of one slot,
so that its logits have the same bits whatever else runs.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from runtime.generation import Deliveries, End, Generation, Reason, check_room, deliver_directly
from runtime.keeping import Keeper
from runtime.memory import trim_heap
from runtime.model import PREFILL_TOKENS, Float, Interrupt, Model
from runtime.pace import Pace
from runtime.prefix import BLOCK_TOKENS
from runtime.refusals import crowded, model_failed, server_ending
from runtime.slab import Usage
from runtime.slots import Slots
from runtime.speculation import Speculation
from runtime.stats import Stats
from wire.errors import Code, InferenceError

IDLE_TRIM_S = 5.0
"""How long after the last answer the memory of its slots is given back: a burst does not pay for it, a quiet node does
not keep it."""
PADDING_LIMIT = 1.25
"""Prompts are read together when padding them makes at most this much of the work."""

_log = structlog.get_logger(__name__)


class Engine:
    """Runs the generations of one model."""

    def __init__(  # noqa: PLR0913  # three are named
        self, name: str, model: Model, stats: Stats, *, max_queue: int,
        deliver: Callable[[Deliveries], None] = deliver_directly, speculation: Speculation | None = None,
        keeper: Keeper[Model] | None = None,
    ) -> None:  # fmt: skip
        """`keeper` gives the model back while nobody asks; without one it is kept for ever."""
        self._model, self.stats, self._deliver = model, stats, deliver
        self._slab = model.slab
        self._slots = Slots(model.slab, model.shape)
        self._pace = Pace()
        self._speculation, self._keeper = speculation, keeper
        self._vocab_size = model.config.vocab_size
        self._open_limit = model.shape.slots + max_queue
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._open = 0
        self._closed = False
        self._reading: list[Generation] = []
        """One, or several that one step reads whole."""
        self._interrupt = Interrupt()
        """Of the step that reads them."""
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Requests that wait, are read or run."""
        return self._open

    @property
    def usage(self) -> Usage:
        """Memory for keys and values."""
        return self._slab.usage

    def knows(self, prompt: Sequence[int]) -> bool:
        """Whether something of `prompt` is kept, from any thread, as far as it can tell without waiting."""
        return self._slots.knows(prompt)

    def submit(self, generation: Generation) -> None:
        """Take a request, from any thread.

        Raises InferenceError: bad_request and context_exceeded (400), overloaded (429), not_ready (503) after close.
        """
        if not generation.prompt or not 0 <= min(generation.prompt) <= max(generation.prompt) < self._vocab_size:
            # onnxruntime's gather reads outside the weights for such a token instead of failing
            raise InferenceError(Code.BAD_REQUEST, "prompt: empty, or a token is outside the model's vocabulary", 400)
        biased = max((token for token, _ in generation.sampling.logit_bias), default=0)
        if biased >= self._vocab_size:
            raise InferenceError(Code.BAD_REQUEST, f"logit_bias: token {biased} is outside the model's vocabulary", 400)
        check_room(generation, self._model.shape)
        generation.accepted_s = time.perf_counter()
        with self._changed:
            if self._closed:
                raise server_ending()
            if self._open >= self._open_limit:
                raise crowded(self._open, self._patience_s())
            self._open += 1
            self._waiting.append(generation)
            self._changed.notify()
        self.stats.began(len(generation.prompt))

    def cancel(self, generation: Generation, reason: Reason = Reason.CANCELLED) -> None:
        """Stop working for a request, from any thread: no step begins with it any more, and one that reads it alone
        ends at its next node. STOP means that it has all it wants.
        """
        with self._changed:
            generation.cancelled = reason
            if generation in self._waiting:
                self._waiting.remove(generation)
                self._open -= 1
            elif generation in self._reading and not self._wanted():
                self._interrupt.set()

    def close(self) -> None:
        """Cancel what is open, end the thread and give the model's memory back."""
        with self._changed:
            self._closed = True
            self._interrupt.set()
            self._changed.notify()
        self._thread.join()
        self._model.close()

    def _run(self) -> None:
        while self._await_work():
            if self._keeper is not None and self._keeper.resting and not self._wake(self._keeper):
                continue
            self._drop_cancelled()
            self._advance()
            self._read()
        leaving = [*self._slots.running, *self._waiting, *self._reading]
        self._deliver([(generation, End(Reason.CANCELLED)) for generation in leaving])

    def _await_work(self) -> bool:
        """Block until there is something to do; False when closed."""
        if not self._has_work(IDLE_TRIM_S):
            self._slab.trim()
            trim_heap()  # what steps took
            keeper = self._keeper
            if keeper is not None and not keeper.resting and not self._has_work(max(0.0, keeper.keep_s - IDLE_TRIM_S)):
                keeper.rest(self._model)
            self._has_work(None)
        return not self._closed

    def _has_work(self, patience_s: float | None) -> bool:
        """Wait for something to do, or for the end."""
        with self._changed:
            return self._changed.wait_for(
                lambda: bool(self._closed or self._slots.running or self._reading or self._waiting), patience_s
            )

    def _wake(self, keeper: Keeper[Model]) -> bool:
        """Load the model again; when that fails, so does what waits, and the next request tries it again."""
        try:
            self._model = keeper.wake()
        except InferenceError as error:
            with self._changed:
                waiting = list(self._waiting)
                self._waiting.clear()
                self._open -= len(waiting)
            for _ in waiting:
                self.stats.failed()
            self._deliver([(generation, End(Reason.FAILED, error)) for generation in waiting])
            return False
        self._slab = self._model.slab
        self._slots = Slots(self._slab, self._model.shape)
        return True

    def _drop_cancelled(self) -> None:
        here = [*self._slots.running, *self._reading]
        left: Deliveries = [(g, End(g.cancelled)) for g in here if g.cancelled is not None]
        if left:
            self._finish(left)

    def _advance(self) -> None:
        """A token or more for every running answer."""
        speculation, running = self._speculation, self._slots.running
        drafts = speculation.plan(running) if speculation and running else None
        if speculation is None or drafts is None:
            self._decode()
        else:
            self._verify(drafts, speculation)

    def _decode(self) -> None:
        """One token for every running answer."""
        together = max((g.slot + 1 for g in self._slots.running if not g.alone), default=0)
        if together:
            # slots in between that are alone run along; their own steps write the same position again
            self._step(self._slots.running[:together], alone=False)
        for generation in [g for g in self._slots.running if g.alone]:
            self._step([generation], alone=True)

    def _step(self, rows: list[Generation], *, alone: bool) -> None:
        """One token for those of `rows` that are, or are not, alone."""
        began_s = time.perf_counter()
        tokens, lengths = [g.tokens[-1] for g in rows], [g.length for g in rows]
        wanted = [(row, g) for row, g in enumerate(rows) if g.alone == alone]
        try:
            if alone:
                logits = self._model.prefill(rows[0].slot, tokens, lengths[0], wide=False)[None]
            else:
                logits = self._model.decode(tokens, lengths)
        except Exception as error:  # noqa: BLE001  onnxruntime raises a dozen unrelated types; the thread must go on
            self._fail([generation for _, generation in wanted], error)
            return
        deliveries: Deliveries = []
        for row, generation in wanted:
            generation.length += 1
            self._slots.keep(generation)
            self._sample(generation, logits[row], deliveries)
        span_s = time.perf_counter() - began_s
        self.stats.decoded(len(wanted), span_s)
        if self._speculation and not alone:
            self._speculation.decoded(len(rows), span_s)
        self._finish(deliveries)

    def _verify(self, drafts: list[list[int]], speculation: Speculation) -> None:
        """For each running answer what its draft has in common with what is drawn, and the token where they part."""
        deliveries: Deliveries = []
        for generation, draft in zip(self._slots.running, drafts, strict=True):
            if generation.cancelled is not None:  # while the others' were verified
                continue
            began_s = time.perf_counter()
            try:
                logits = self._model.verify(generation.slot, [generation.tokens[-1], *draft], generation.length)
            except Exception as error:  # noqa: BLE001  as in _step
                deliveries.append((generation, _failure([generation], error)))
                continue
            given = 0
            for row, guess in zip(logits, [*draft, None], strict=True):
                given += 1
                generation.length += 1  # what lies behind a wrong guess is never read, the next step writes there
                if not self._sample(generation, row, deliveries) or generation.tokens[-1] != guess:
                    break
            self._slots.keep(generation)
            span_s = time.perf_counter() - began_s
            self.stats.decoded(given, span_s)
            self.stats.speculated(len(draft), given - 1)
            speculation.verified(len(drafts), 1 + len(draft), given, span_s)
        self._finish(deliveries)

    def _read(self) -> None:
        """One chunk of one prompt, or a few short prompts; the last token of a prompt gives the first of its answer."""
        together = self._reading = self._reading or self._next()
        if not together:
            return
        with self._changed:
            self._interrupt = interrupt = Interrupt()
            if not self._wanted():  # cancelled while others decoded
                return
        began_s = time.perf_counter()
        limit = PREFILL_TOKENS if together[0].alone else self._chunk_tokens()
        chunks = [g.prompt[g.length : g.length + limit] for g in together]
        try:
            if len(together) == 1:
                first = together[0]
                logits = self._model.prefill(first.slot, chunks[0], first.length, interrupt=interrupt)[None]
            else:
                logits = self._model.prefill_together(together[0].slot, chunks, interrupt)
        except Exception as error:  # noqa: BLE001  as in _step
            if self._wanted():  # else it was interrupted
                self._fail(list(together), error)
            return
        deliveries: Deliveries = []
        whole = 0
        for generation, chunk, row in zip(tuple(together), chunks, logits, strict=True):
            generation.length += len(chunk)
            self._slots.keep(generation)
            if generation.length == len(generation.prompt):
                whole += 1
                self._reading.remove(generation)
                self._slots.join(generation)
                if self._speculation and not generation.alone:
                    greedy = generation.sampling.greedy
                    generation.drafter = self._speculation.drafter(generation.tokens, greedy=greedy)
                generation.first_token_s = time.perf_counter()
                self._sample(generation, row, deliveries)
        span_s = time.perf_counter() - began_s
        self._pace.note(sum(map(len, chunks)), span_s)
        self.stats.prefilled(whole, span_s)
        self._finish(deliveries)

    def _chunk_tokens(self) -> int:
        """How many tokens a step may read now."""
        return self._pace.tokens() if self._slots.running else PREFILL_TOKENS

    def _wanted(self) -> bool:
        """Whether anybody waits for what is being read."""
        return not self._closed and any(g.cancelled is None for g in self._reading)

    def _next(self) -> list[Generation]:
        """The next prompt to read, in the slot after the running ones, and those behind it that fit beside it."""
        with self._changed:
            first = self._waiting[0] if self._waiting else None
        if first is None or not self._slots.take(first, 0):
            return []  # or it waits until those that run leave room
        with self._changed:
            if not self._waiting or self._waiting[0] is not first:
                self._slots.give_back(first)  # cancelled just now
                return []
            self._waiting.popleft()
        self._slots.recall(first)
        self.stats.recalled(first.cached)
        together = [first]
        with self._changed:
            while self._waiting and self._fits(together, self._waiting[0]):
                if not self._slots.take(self._waiting[0], len(together)):
                    break
                together.append(self._waiting.popleft())
        return together

    def _fits(self, together: list[Generation], other: Generation) -> bool:
        """Whether one step reads `other` beside `together`, without much padding and without reading anything twice.

        Only prompts of which nothing is kept can be read so: onnxruntime's attention takes several at once only from
        their beginning.
        """
        counts = [len(g.prompt) for g in (*together, other)]
        padded = max(counts) * len(counts)
        if together[0].alone or other.alone:
            return False
        if together[0].length or padded > self._chunk_tokens() or padded > PADDING_LIMIT * sum(counts):
            return False
        beginning = other.prompt[:BLOCK_TOKENS]
        alike = len(other.prompt) > BLOCK_TOKENS and any(g.prompt[:BLOCK_TOKENS] == beginning for g in together)
        return not alike and not self._slots.knows(other.prompt)

    def _sample(self, generation: Generation, logits: Float, deliveries: Deliveries) -> bool:
        """Draw its next token; False when it ended."""
        events = generation.draw(logits)
        deliveries += [(generation, event) for event in events]
        return not isinstance(events[-1], End)

    def _finish(self, deliveries: Deliveries) -> None:
        """Hand out a step's events, the slots of what ended being free already."""
        ready: Deliveries = []
        for generation, event in deliveries:
            generation.held.append(event)
            if isinstance(event, End):
                self._leave(generation, event)
            elif generation.whole:
                continue
            ready += [(generation, held) for held in generation.held]
            generation.held.clear()
        if ready:
            self._deliver(ready)

    def _fail(self, generations: list[Generation], error: Exception) -> None:
        end = _failure(generations, error)
        self._finish([(generation, end) for generation in generations])

    def _leave(self, generation: Generation, end: End) -> None:
        """Free its slot and count how it ended."""
        if generation in self._reading:
            self._reading.remove(generation)
        self._slots.leave(generation)
        with self._changed:
            self._open -= 1
        if end.reason is Reason.FAILED:
            self.stats.failed()
        elif end.reason is not Reason.CANCELLED:
            now_s = time.perf_counter()
            self.stats.ended(now_s - generation.accepted_s, generation.first_token_s - generation.accepted_s)

    def _patience_s(self) -> float:
        """When a slot is probably free for one more: the median request's time for each turn of the queue."""
        typical_s = self.stats.snapshot().latency_p50_s or 1.0
        return typical_s * self._open / self._model.shape.slots


def _failure(generations: list[Generation], error: Exception) -> End:
    """How the requests of a failed step end."""
    _log.error("step failed", requests=len(generations), error=str(error)[:500])
    return End(Reason.FAILED, model_failed())
