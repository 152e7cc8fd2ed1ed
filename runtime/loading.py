"""From an entry of serving.json to a version in memory that answers: checked, mapped, warmed up.

Runs on worker threads, one load at a time. Invariant: what cannot run as the entry says runs from the store and says
why it is to be probed again; what is not whole does not run at all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import structlog

from runtime.budget import LOADED_BYTES_PER_WEIGHT_BYTE, Room, Sharing, available_bytes, plan_slab
from runtime.cores import confined, core_groups, group_threads, own_cores
from runtime.cpu import detect_cpu
from runtime.engine import Engine
from runtime.generation import Deliveries
from runtime.model import Model
from runtime.prepack import PrepackCache, load_model
from runtime.replicas import Replicas
from runtime.session import ONNXRUNTIME
from runtime.settings import RuntimeSettings
from runtime.slab import Shape
from runtime.speculation import Speculation
from runtime.stats import Stats
from runtime.text import Text
from runtime.version import TOKENIZER_FILE, file_digest, open_version, weights_bytes
from wire.manifest import VersionDocument
from wire.serving import Serving, ServingModel

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Loaded:
    """One version in memory. `users` counts requests that hold it."""

    entry: ServingModel
    document: VersionDocument
    text: Text
    engine: Replicas
    capacity: int
    packed: bool
    """Its weights are mapped from the prepack cache."""
    stale: str
    """Why it does not run as `entry` says, empty when it does."""
    users: int = 0
    replaced: bool = False

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of its answers."""
        return f"amperage-{self.entry.decoded[:12]}"

    def runs_as(self, entry: ServingModel) -> bool:
        """True when loading `entry` would change nothing; a cache that could not be used may be there again."""
        mine, other = ((e.decoded, e.options, e.prepack, e.cpu, e.onnxruntime) for e in (self.entry, entry))
        return mine == other and (self.packed or entry.prepack is None or bool(_foreign(entry)))


class Loader:
    """Loads versions by one set of settings, and owns the prepack cache, which is None where they name no place."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._cache = PrepackCache(settings.cache) if settings.cache is not None else None

    def load(
        self, entry: ServingModel, deliver: Callable[[Deliveries], None], old: Loaded | None, sharing: Sharing
    ) -> Loaded:
        """Check, load and warm up one version, a replica in each group of cores; blocks.

        `old` is the version that it follows, whose tokenizer is taken over when it is the same. Raises ArtifactError,
        StoreError, DeployError.
        """
        directory = self._settings.store / "versions" / entry.decoded
        groups = core_groups(self._settings.core_groups, own_cores())
        document, _ = open_version(directory, entry.decoded)
        shape = self._shape(len(groups), entry, document, sharing)
        same = old is not None and file_digest(old.document, TOKENIZER_FILE) == file_digest(document, TOKENIZER_FILE)
        text = Text(directory, document.config, shared=old.text if old and same else None)
        stale = _foreign(entry)
        stats, max_queue = Stats(), self._settings.max_queue
        engines: list[Engine] = []
        try:
            for group in groups:
                threads = min(entry.options.threads, group_threads(self._settings.threads, group, len(groups)))
                options = entry.options.model_copy(update={"threads": threads})
                build = partial(Model, directory, document.config, shape, options)
                with confined(group):
                    model, stale = load_model(self._cache, entry, stale, build)
                    speculation = Speculation() if self._settings.speculation else None
                    engines.append(
                        Engine(entry.model, model, stats, max_queue=max_queue, deliver=deliver, speculation=speculation)
                    )
        except BaseException:
            Replicas(engines, stats).close()
            raise
        packed = entry.prepack is not None and not stale
        _log.info("model loaded", model=entry.model, decoded=entry.decoded, packed=packed)
        if stale:
            _log.warning("model does not run as it was proved; it is to be probed again", model=entry.model, why=stale)
        return Loaded(entry, document, text, Replicas(engines, stats), shape.capacity, packed, stale)

    def sweep(self, serving: Serving) -> tuple[str, ...]:
        """Remove prepack caches that no version needs; returns what was removed. Raises StoreError."""
        return self._cache.sweep(self._settings.store, serving) if self._cache is not None else ()

    def _shape(self, replicas: int, entry: ServingModel, document: VersionDocument, sharing: Sharing) -> Shape:
        """The slab of one of `replicas`, which share the budget of the model."""
        sessions = replicas * (1 if entry.options.reading_config is None else 2)
        weights = int(sessions * LOADED_BYTES_PER_WEIGHT_BYTE * weights_bytes(document))
        budgets = ("kv_cache_bytes", "prefix_cache_bytes")
        each = self._settings.model_copy(update={name: getattr(self._settings, name) // replicas for name in budgets})
        sharing = replace(sharing, to_come=(1 + sharing.to_come) * replicas - 1)
        shape, arithmetic = plan_slab(document.config, each, Room(*available_bytes(), weights, sharing))
        _log.info("memory for keys and values", model=entry.model, replicas=replicas, arithmetic=arithmetic)
        return shape


def _foreign(entry: ServingModel) -> str:
    """Why options and cache of `entry` were chosen for something else than this; empty when they were not."""
    here, there = (str(detect_cpu()), ONNXRUNTIME), (entry.cpu, entry.onnxruntime)
    if here == there:
        return ""
    return "options were chosen for {} with onnxruntime {}, this is {} with {}".format(*there, *here)
