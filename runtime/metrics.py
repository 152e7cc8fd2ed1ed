"""Prometheus text of the runtime's counters (exposition format 0.0.4)."""

from collections.abc import Callable

from runtime.registry import Registry
from wire.serving import ModelStats

_COUNTERS: tuple[tuple[str, str, str, Callable[[ModelStats], float | None]], ...] = (
    ("requests_total", "counter", "Requests accepted.", lambda row: row.requests),
    ("failures_total", "counter", "Accepted requests that failed by no fault of the client.", lambda row: row.failures),
    ("prompt_tokens_total", "counter", "Tokens of prompts.", lambda row: row.prompt_tokens),
    ("cached_tokens_total", "counter", "Tokens of prompts that were copied, not read.", lambda row: row.cached_tokens),
    ("completion_tokens_total", "counter", "Tokens generated.", lambda row: row.completion_tokens),
    ("drafted_tokens_total", "counter", "Tokens guessed and verified.", lambda row: row.drafted_tokens),
    ("accepted_tokens_total", "counter", "Guessed tokens that became the answer's.", lambda row: row.accepted_tokens),
    ("busy_seconds_total", "counter", "Seconds that the engine spent inside steps.", lambda row: row.busy_s),
    ("open_requests", "gauge", "Requests waiting or running.", lambda row: row.active),
    ("kv_budget_bytes", "gauge", "Bound of the memory for keys and values.", lambda row: row.kv_budget_bytes),
    ("kv_held_bytes", "gauge", "What of it is reserved or filled.", lambda row: row.kv_held_bytes),
    ("tokens_per_second", "gauge", "Tokens per second of decoding.", lambda row: row.tokens_per_s),
)
_QUANTILES: tuple[tuple[str, str, str, Callable[[ModelStats], float | None]], ...] = (
    ("latency_seconds", "0.5", "Request latency over the last 256.", lambda row: row.latency_p50_s),
    ("latency_seconds", "0.95", "Request latency over the last 256.", lambda row: row.latency_p95_s),
    ("first_token_seconds", "0.5", "Time to the first token over the last 256.", lambda row: row.first_token_p50_s),
)


def render_metrics(registry: Registry) -> str:
    """All metrics; what is unknown is absent."""
    rows = registry.stats()
    lines: list[str] = []
    for name, kind, text, figure in _COUNTERS:
        lines += _head(name, kind, text)
        lines += [_line(name, row, figure(row)) for row in rows if figure(row) is not None]
    for name, quantile, text, figure in _QUANTILES:
        head = _head(name, "gauge", text)
        lines += [] if head[0] in lines else head
        lines += [_line(name, row, figure(row), quantile) for row in rows if figure(row) is not None]
    lines += _head("model_ready", "gauge", "1 when the version of serving.json takes requests.")
    for name, place in registry.places().items():
        lines.append(f'amperage_model_ready{{model="{name}"}} {int(place.current is not None)}')
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP amperage_{name} {text}", f"# TYPE amperage_{name} {kind}"]


def _line(name: str, row: ModelStats, value: float | None, quantile: str | None = None) -> str:
    labels = {"model": row.model, "version": row.version, "decoded": row.decoded[:12]}
    if quantile is not None:
        labels["quantile"] = quantile
    text = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
    return f"amperage_{name}{{{text}}} {value}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
