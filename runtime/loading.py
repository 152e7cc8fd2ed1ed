"""From an entry of serving.json to a version in memory that answers: checked, mapped, warmed up.

Runs on worker threads, one load at a time. Invariant: what cannot run as the entry says runs from the store and says
why it is to be probed again; what is not whole does not run at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from runtime.batcher import Batcher, Limits
from runtime.budget import Room, Sharing, available_bytes, check_room, heap_bytes, plan_slab
from runtime.cores import Cores, confined, core_groups, group_threads, own_cores
from runtime.encoder import Encoder
from runtime.engine import Engine
from runtime.graph import Graph
from runtime.keeping import Keeper
from runtime.loaded import Loaded, LoadedDecoder, LoadedEncoder, LoadedGraph, LoadedText, foreign
from runtime.model import Model
from runtime.prepack import PrepackCache, load_model
from runtime.providers import know_libraries, missing
from runtime.replicas import Replicas
from runtime.runner import Runner
from runtime.settings import RuntimeSettings
from runtime.slab import Shape
from runtime.speculation import Speculation
from runtime.stats import Stats
from runtime.text import Text
from runtime.version import TOKENIZER_FILE, file_digest, open_version, weights_bytes
from wire.manifest import DecoderConfig, EncoderConfig, GraphConfig, VersionDocument
from wire.serving import ExecutionOptions, Serving, ServingModel

_log = structlog.get_logger(__name__)


Deliver = Callable[[Sequence[tuple[Any, Any]]], None]
"""Takes what happened to requests, in order: pairs of a request, whose `sink` is called, and its event."""

Made = TypeVar("Made", Model, Encoder, Graph)


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be loaded."""

    entry: ServingModel
    document: VersionDocument
    directory: Path
    old: LoadedText | None
    """What it follows, when that takes text, too."""
    deliver: Deliver
    groups: list[Cores]
    """Each gets a replica."""

    def text(self) -> Text:
        """Its tokenizer and template; the tokenizer is taken over from `old` when it is the same."""
        old, digest = self.old, file_digest(self.document, TOKENIZER_FILE)
        same = old is not None and file_digest(old.document, TOKENIZER_FILE) == digest
        return Text(self.directory, self.document.config, shared=old.text if old and same else None)


class Loader:
    """Loads versions by one set of settings, and owns the prepack cache, which is None where they name no place."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        know_libraries(settings.provider_libraries)
        self._cache = PrepackCache(settings.cache) if settings.cache is not None else None

    def load(self, entry: ServingModel, deliver: Deliver, old: Loaded | None, sharing: Sharing) -> Loaded:
        """Check, load and warm up one version, a replica in each group of cores; blocks.

        `old` is the version that it follows, whose tokenizer is taken over when it is the same. Raises ArtifactError,
        StoreError, DeployError.
        """
        directory = self._settings.store / "versions" / entry.decoded
        groups = core_groups(self._settings.core_groups, own_cores())
        document, _ = open_version(directory, entry.decoded)
        order = _Order(entry, document, directory, old if isinstance(old, LoadedText) else None, deliver, groups)
        if isinstance(document.config, EncoderConfig):
            loaded: Loaded = self._encoder(order, document.config)
        elif isinstance(document.config, GraphConfig):
            loaded = self._graph(order, document.config)
        else:
            loaded = self._decoder(order, document.config, sharing)
        _log.info("model loaded", model=entry.model, decoded=entry.decoded, packed=loaded.packed)
        if loaded.stale:
            why = loaded.stale
            _log.warning("model does not run as it was proved; it is to be probed again", model=entry.model, why=why)
        return loaded

    def _decoder(self, order: _Order, config: DecoderConfig, sharing: Sharing) -> LoadedDecoder:
        entry, stats, max_queue = order.entry, Stats(), self._settings.max_queue
        text = order.text()
        shape = self._shape(len(order.groups), entry, order.document, config, sharing)
        engines: list[Engine] = []

        def start(model: Model, keeper: Keeper[Model] | None) -> None:
            speculation = Speculation() if self._settings.speculation else None
            engines.append(
                Engine(
                    entry.model, model, stats, max_queue=max_queue, deliver=order.deliver, speculation=speculation,
                    keeper=keeper,
                )
            )  # fmt: skip

        try:
            stale = self._start(order, partial(Model, order.directory, config, shape), start)
        except BaseException:
            Replicas(engines, stats).close()
            raise
        return LoadedDecoder(
            entry=entry, document=order.document, text=text, config=config, engine=Replicas(engines, stats),
            capacity=shape.capacity, packed=entry.prepack is not None and not stale, stale=stale,
        )  # fmt: skip

    def _encoder(self, order: _Order, config: EncoderConfig) -> LoadedEncoder:
        entry, settings, text = order.entry, self._settings, order.text()
        capacity = min(settings.context_tokens, config.max_tokens)
        limits = Limits(
            capacity, settings.encoder_batch_tokens, settings.max_queue, settings.encoder_queue_tokens,
            settings.encoder_wait_s,
        )  # fmt: skip
        batcher = Batcher(entry.model, config, Stats(), limits, order.deliver)
        try:
            stale = self._start(order, partial(Encoder, order.directory, config), batcher.start)
        except BaseException:
            batcher.close()
            raise
        return LoadedEncoder(
            entry=entry, document=order.document, text=text, config=config, engine=batcher,
            capacity=capacity, packed=entry.prepack is not None and not stale, stale=stale,
        )  # fmt: skip

    def _graph(self, order: _Order, config: GraphConfig) -> LoadedGraph:
        entry = order.entry
        runner = Runner(entry.model, config, Stats(), self._settings.max_queue, order.deliver)
        try:
            stale = self._start(order, partial(Graph, order.directory, config), runner.start)
        except BaseException:
            runner.close()
            raise
        packed = entry.prepack is not None and not stale
        return LoadedGraph(
            entry=entry, document=order.document, config=config, engine=runner, packed=packed, stale=stale
        )

    def _start(
        self, order: _Order, make: Callable[[ExecutionOptions, Path | None], Made],
        start: Callable[[Made, Keeper[Made] | None], None],
    ) -> str:  # fmt: skip
        """Make, warm up and start a replica in each group of cores, where its threads and memory stay; returns why they
        do not run as the entry says, or nothing.
        """
        entry, groups = order.entry, order.groups
        chosen, lacking = entry.options, missing(entry.options)
        if lacking:  # as any node can run it
            chosen = ExecutionOptions(threads=chosen.threads)
        stale = foreign(entry) or lacking
        for group in groups:
            threads = min(chosen.threads, group_threads(self._settings.threads, group, len(groups)))
            options = chosen.model_copy(update={"threads": threads})
            with confined(group):
                load = partial(load_model, self._cache, entry, build=partial(make, options))
                model, stale = load(stale)
                keep_s = self._settings.keep_alive_s
                again = partial(_load_again, order, partial(load, stale))
                start(model, Keeper(entry.model, again, keep_s) if keep_s else None)
        return stale

    def sweep(self, serving: Serving) -> tuple[str, ...]:
        """Remove prepack caches that no version needs; returns what was removed. Raises StoreError."""
        return self._cache.sweep(self._settings.store, serving) if self._cache is not None else ()

    def _shape(  # each bounds the memory
        self, replicas: int, entry: ServingModel, document: VersionDocument, config: DecoderConfig, sharing: Sharing
    ) -> Shape:
        """The slab of one of `replicas`, which share the budget of the model."""
        weights = replicas * _heap_bytes(entry, document)
        budgets = ("kv_cache_bytes", "prefix_cache_bytes")
        each = self._settings.model_copy(update={name: getattr(self._settings, name) // replicas for name in budgets})
        sharing = replace(sharing, to_come=(1 + sharing.to_come) * replicas - 1)
        shape, arithmetic = plan_slab(config, each, Room(*available_bytes(), weights, sharing))
        _log.info("memory for keys and values", model=entry.model, replicas=replicas, arithmetic=arithmetic)
        return shape


def _heap_bytes(entry: ServingModel, document: VersionDocument) -> int:
    """What one replica will take for weights and steps."""
    sessions = 1 if entry.options.reading_config is None else 2
    return heap_bytes(weights_bytes(document), sessions, mapped=entry.prepack is not None and not foreign(entry))


def _load_again(order: _Order, load: Callable[[], tuple[Made, str]]) -> Made:
    """One replica of what rested. Raises DeployError when others took its memory meanwhile, and what `load` raises."""
    check_room(_heap_bytes(order.entry, order.document), *available_bytes())
    model, stale = load()
    if stale:
        _log.warning("model does not run as it was proved", model=order.entry.model, why=stale)
    return model
