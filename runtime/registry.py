"""Which versions are loaded, which of them takes new requests, and how one follows another.

`serving.json` of the store says what should serve. Everything but the loading itself happens on the event loop's
thread, so a switch is one assignment between two requests. Invariants: a version that does not load leaves the one that
serves untouched; a version that was replaced is closed when its last request has ended, never before.
"""

import asyncio
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog

from host.files import read_bounded
from runtime.budget import Sharing
from runtime.loaded import Loaded
from runtime.loading import Deliver, Loader
from runtime.memory import trim_heap
from runtime.settings import RuntimeSettings
from wire.documents import parse_document
from wire.errors import AmperageError, Code, InferenceError
from wire.serving import ModelStats, Serving

Kind = TypeVar("Kind", bound=Loaded)

SERVING_FILE = "serving.json"
SERVING_LIMIT_BYTES = 1 << 20

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Place:
    """What is known of one model name."""

    current: Loaded | None = None
    draining: list[Loaded] = field(default_factory=list)
    error: AmperageError | None = None
    """Why the version that serving.json names does not serve."""
    loading: bool = False


class Registry:
    """The models of this process."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._loader = Loader(settings)
        self._places: dict[str, Place] = {}
        self._one_load = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self.started = False
        """True once everything that serving.json named at the start was tried."""
        self.fault: AmperageError | None = None
        """Why serving.json could not be read at the start."""

    async def start(self) -> None:
        """Load what serving.json names; what fails is remembered and reported, and the process lives."""
        try:
            serving = await asyncio.to_thread(read_serving, self._settings.store)
            for entry in serving.models:
                self._places.setdefault(entry.model, Place(loading=True))  # the agent may have been faster
            for entry in serving.models:
                with suppress(AmperageError):
                    await self.load(entry.model)
        except AmperageError as error:
            self.fault = error
            _log.error("serving.json cannot be used", code=error.code, error=error.message)
        self.started = True
        await self.sweep()

    async def load(self, model: str) -> Loaded:
        """Make new requests for `model` go to what serving.json names, and let the version before drain.

        Raises AmperageError when it cannot be loaded; what served goes on serving.
        """
        async with self._one_load:
            place = self._places.setdefault(model, Place())
            place.loading = True
            try:
                loaded = await self._replace(model, place)
            except AmperageError as error:
                place.error = error
                _log.error("model not loaded", model=model, code=error.code, error=error.message)
                if place.current is None and error.code is Code.MODEL_NOT_FOUND:
                    del self._places[model]
                raise
            finally:
                place.loading = False
        if self.started:
            await self.sweep()
        return loaded

    async def unload(self, model: str) -> None:
        """Forget `model`; open requests end first. No fault when it is not loaded."""
        async with self._one_load:
            place = self._places.get(model)
            if place is None:
                return
            old, place.current, place.error = place.current, None, None
            if old is not None:
                self._retire(place, old)
            if not place.draining:
                self._places.pop(model, None)
        await self.sweep()

    async def sweep(self) -> None:
        """Remove prepack caches that nothing needs any more."""
        try:
            serving = await asyncio.to_thread(read_serving, self._settings.store)
            removed = await asyncio.to_thread(self._loader.sweep, serving)
        except AmperageError as error:
            _log.warning("prepack caches cannot be removed", code=error.code, error=error.message)
        else:
            if removed:
                _log.info("prepack caches removed", caches=list(removed))

    def acquire(self, model: str, kind: type[Kind]) -> Kind:
        """The version that takes new requests, held until `release`; raises InferenceError (404, 503, and 400 when it
        is of another kind).
        """
        place = self._places.get(model)
        if place is None or (place.current is None and not place.loading and place.error is None):
            if not self.started:
                raise InferenceError(Code.NOT_READY, "models are being loaded; ask again", 503, retry_after_s=1.0)
            known = ", ".join(sorted(name for name, other in self._places.items() if other.current)) or "none"
            raise InferenceError(Code.MODEL_NOT_FOUND, f"no model {model[:64]!r} here; loaded: {known}", 404)
        if place.current is None:
            reason = f"does not load: {place.error}" if place.error else "is being loaded; ask again"
            raise InferenceError(Code.NOT_READY, f"{model} {reason}"[:1000], 503, retry_after_s=1.0)
        version = place.current
        if not isinstance(version, kind):
            raise InferenceError(
                Code.BAD_REQUEST, f"{model} answers {version.answers}; ask it there, or another model here", 400
            )
        version.users += 1
        return version

    @contextmanager
    def holding(self, model: str, kind: type[Kind]) -> Iterator[Kind]:
        """The version that takes new requests, held while the block runs; raises as `acquire` does."""
        version = self.acquire(model, kind)
        try:
            yield version
        finally:
            self.release(version)

    def release(self, version: Loaded) -> None:
        """A request that held `version` has ended."""
        version.users -= 1
        if version.replaced and version.users == 0:
            self._close_later(self._places.get(version.entry.model), version)

    def places(self) -> dict[str, Place]:
        """Models by name, with what loads, serves, drains or failed."""
        return dict(self._places)

    def ready(self) -> bool:
        """True when everything that was tried serves."""
        return self.started and self.fault is None and all(place.current is not None for place in self._places.values())

    def stats(self) -> tuple[ModelStats, ...]:
        """A row per loaded version: what serves before what drains."""
        return tuple(_row(version) for version in self._loaded())

    async def close(self) -> None:
        """Cancel everything and give all memory back."""
        for version in list(self._loaded()):
            await asyncio.to_thread(version.engine.close)
        if self._closing:
            await asyncio.wait(self._closing)

    def _loaded(self) -> Iterator[Loaded]:
        for place in self._places.values():
            if place.current is not None:
                yield place.current
            yield from place.draining

    async def _replace(self, model: str, place: Place) -> Loaded:
        serving = await asyncio.to_thread(read_serving, self._settings.store)
        entry = next((entry for entry in serving.models if entry.model == model), None)
        if entry is None:
            raise InferenceError(Code.MODEL_NOT_FOUND, f"{SERVING_FILE} names no model {model[:64]!r}", 404)
        old = place.current
        if old is not None and old.runs_as(entry):
            place.error = None
            return old
        deliver = delivery_to(asyncio.get_running_loop())
        sharing = self._sharing(serving, model)
        fresh = await asyncio.to_thread(self._loader.load, entry, deliver, old, sharing)
        place.current, place.error = fresh, None
        _log.info("model serves", model=model, version=entry.version, decoded=entry.decoded)
        if old is not None:
            self._retire(place, old)
        return fresh

    def _sharing(self, serving: Serving, model: str) -> Sharing:
        """What the other models mean for the memory of `model`. Its own version before is not counted: it takes no new
        requests once this one serves, and its share was half of what was left.
        """
        others = [version for version in self._loaded() if version.entry.model != model]
        known = {version.entry.model for version in others} | {model}
        to_come = sum(entry.model not in known for entry in serving.models)
        return Sharing(sum(version.engine.usage.promised for version in others), to_come)

    def _retire(self, place: Place, old: Loaded) -> None:
        old.replaced = True
        place.draining.append(old)
        if old.users == 0:
            self._close_later(place, old)

    def _close_later(self, place: Place | None, version: Loaded) -> None:
        task = asyncio.get_running_loop().create_task(self._close(place, version))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, place: Place | None, version: Loaded) -> None:
        await asyncio.to_thread(version.engine.close)
        if place is not None:
            place.draining.remove(version)
            if place.current is None and not place.draining and not place.loading and place.error is None:
                self._places.pop(version.entry.model, None)
        _log.info("model dropped", model=version.entry.model, decoded=version.entry.decoded)
        gc.collect()
        await asyncio.to_thread(trim_heap)


def read_serving(store: Path) -> Serving:
    """`serving.json` of a store; a store without one serves nothing. Raises ArtifactError, StoreError."""
    try:
        data = read_bounded(store / SERVING_FILE, SERVING_LIMIT_BYTES)
    except FileNotFoundError:
        return Serving()
    return parse_document(Serving, data, limit_bytes=SERVING_LIMIT_BYTES)


def delivery_to(loop: asyncio.AbstractEventLoop) -> Deliver:
    """Hands a step's events to `loop` in one call, so that a step costs the engine's thread one wake-up."""

    def dispatch(deliveries: Sequence[tuple[Any, Any]]) -> None:
        for request, event in deliveries:
            request.sink(event)

    def deliver(deliveries: Sequence[tuple[Any, Any]]) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits for the events any more
            loop.call_soon_threadsafe(dispatch, deliveries)

    return deliver


def _row(version: Loaded) -> ModelStats:
    figures, usage = version.engine.stats.snapshot(), version.engine.usage
    return ModelStats(
        model=version.entry.model, version=version.entry.version, decoded=version.entry.decoded,
        packed=version.packed, stale=version.stale[:2000], requests=figures.requests, failures=figures.failures,
        prompt_tokens=figures.prompt_tokens, cached_tokens=figures.cached_tokens,
        completion_tokens=figures.completion_tokens, drafted_tokens=figures.drafted_tokens,
        accepted_tokens=figures.accepted_tokens, busy_s=figures.busy_s,
        active=version.engine.open, latency_p50_s=figures.latency_p50_s, latency_p95_s=figures.latency_p95_s,
        first_token_p50_s=figures.first_token_p50_s, tokens_per_s=figures.tokens_per_s,
        kv_budget_bytes=usage.budget or None, kv_held_bytes=usage.held if usage.budget else None,
    )  # fmt: skip
