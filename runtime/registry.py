"""What serves: loaded versions by model name, swapped without a gap.

A new version is loaded and warmed beside the old one; then one assignment sends new requests to it, and the old one
drains with the requests that it has. A failed load changes nothing. `serving.json` is the only order that is taken.
"""

import ctypes
import gc
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from runtime.engine import Engine, Finished, Generation
from runtime.model import Decoder
from runtime.sampling import SamplingParameters
from runtime.settings import RuntimeSettings
from runtime.stats import StatsRecorder
from runtime.text import TextCodec
from wire.documents import parse_document
from wire.errors import AmperageError, Code, DeployError, InferenceError
from wire.serving import ModelStats, Serving, ServingModel

log = structlog.get_logger()

SERVING_FILE = "serving.json"
SERVING_LIMIT_BYTES = 1 << 20
VERSIONS = "versions"
DRAIN_TIMEOUT_S = 600.0
WARM_UP_TOKENS = 4


@dataclass(slots=True)
class Served:
    """One loaded version."""

    order: ServingModel
    engine: Engine
    text: TextCodec
    stats: StatsRecorder
    decoder: Decoder
    loaded_s: float = field(default_factory=time.time)

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of its answers."""
        return f"amperage-{self.order.decoded[:12]}"

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together."""
        return self.decoder.capacity

    def snapshot(self) -> ModelStats:
        """Its figures."""
        return self.stats.snapshot(self.decoder.version, self.order.decoded, self.engine.active())


class Registry:
    """Loaded models; `get` is for any thread, loads are one at a time."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings
        self._served: dict[str, Served] = {}
        self._faults: dict[str, str] = {}
        self._loading = threading.Lock()

    def get(self, model: str) -> Served:
        """The version that new requests go to. Raises InferenceError: model_not_found (404), not_ready (503)."""
        served = self._served.get(model)
        if served is not None:
            return served
        if model in self._faults:
            raise InferenceError(Code.NOT_READY, f"model {model} could not be loaded: {self._faults[model]}", 503, 5.0)
        known = ", ".join(sorted(self._served)) or "none yet"
        raise InferenceError(Code.MODEL_NOT_FOUND, f"no model {model} is served here; there are: {known}", 404)

    def served(self) -> list[Served]:
        """Everything that serves, by model name."""
        return [served for _, served in sorted(self._served.items())]

    def faults(self) -> dict[str, str]:
        """Models that serving.json names but that could not be loaded, with the reason."""
        return dict(self._faults)

    def load_all(self) -> None:
        """Load what serving.json names; a model that fails is remembered as such and the others serve."""
        for order in self._read_serving().models:
            try:
                self.load(order.model)
            except DeployError as error:
                self._faults[order.model] = error.message
                log.warning("load_failed", model=order.model, version=order.version, reason=error.message)

    def load(self, model: str) -> ServingModel:
        """Make serving.json's version of `model` answer new requests; returns once it does.

        Raises DeployError(load_failed) and keeps the version that serves.
        """
        with self._loading:
            order = next((entry for entry in self._read_serving().models if entry.model == model), None)
            if order is None:
                raise DeployError(Code.LOAD_FAILED, f"{SERVING_FILE} names no model {model}; write it before the nudge")
            current = self._served.get(model)
            if (
                current is not None
                and current.order.decoded == order.decoded
                and current.order.options == order.options
            ):
                current.order = order
                return order
            started_s = time.monotonic()
            fresh = self._open(order)
            self._served = {**self._served, model: fresh}  # one assignment: a reader sees the old or the new
            self._faults.pop(model, None)
            seconds = round(time.monotonic() - started_s, 3)
            log.info("version_loaded", model=model, version=order.version, decoded=order.decoded, seconds=seconds)
        if current is not None:
            self._retire(current)
        return order

    def unload(self, model: str) -> None:
        """Stop serving `model` and let its requests end. Raises InferenceError(model_not_found)."""
        with self._loading:
            served = self.get(model)
            self._served = {name: other for name, other in self._served.items() if name != model}
        self._retire(served)

    def close(self) -> None:
        """Let every request end; for the end of the process."""
        leaving, self._served = list(self._served.values()), {}
        for served in leaving:
            served.engine.drain(self._settings.body_timeout_s)

    def _open(self, order: ServingModel) -> Served:
        directory = self._settings.store / VERSIONS / order.decoded
        settings = self._settings
        decoder = Decoder(directory, order.options, slots=settings.slots, capacity=settings.context_tokens)
        if decoder.version.decoded_digest() != order.decoded:
            raise DeployError(Code.LOAD_FAILED, f"version.json is not that of {order.decoded[:12]}…; deploy it again")
        stats = StatsRecorder()
        served = Served(order, Engine(decoder, stats, queue_limit=settings.queue), TextCodec(directory), stats, decoder)
        _warm_up(served)
        return served

    def _retire(self, old: Served) -> None:
        name = f"drain-{old.order.model}-{old.order.version}"
        threading.Thread(target=_drain, args=(old,), name=name, daemon=True).start()

    def _read_serving(self) -> Serving:
        path: Path = self._settings.store / SERVING_FILE
        try:
            with path.open("rb") as source:
                return parse_document(Serving, source.read(SERVING_LIMIT_BYTES + 1), limit_bytes=SERVING_LIMIT_BYTES)
        except FileNotFoundError:
            return Serving()
        except (OSError, AmperageError) as error:
            raise DeployError(Code.LOAD_FAILED, f"{path.name} cannot be used: {error}") from error


def _warm_up(served: Served) -> None:
    """A few tokens through the real engine: pages are touched and kernels chosen before the first client waits."""
    done = threading.Event()
    failures: list[str] = []

    def sink(item: int | Finished) -> None:
        if isinstance(item, Finished):
            failures.append(item.detail)
            done.set()

    prompt = [served.decoder.version.config.bos_token_id or 0] * WARM_UP_TOKENS
    parameters = SamplingParameters(temperature=0.0)
    served.engine.submit(Generation(prompt, WARM_UP_TOKENS, parameters, sink))
    done.wait()
    if failures[0]:
        raise DeployError(Code.LOAD_FAILED, f"version {served.order.version} fails its first tokens: {failures[0]}")
    served.stats.reset()


def _drain(old: Served) -> None:
    drained = old.engine.drain(DRAIN_TIMEOUT_S)
    log.info("version_drained", model=old.order.model, version=old.order.version, complete=drained)
    del old
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed arenas otherwise: a leak look-alike after swaps
