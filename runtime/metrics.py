"""Prometheus text exposition (format 0.0.4) of the models' counters."""

from wire.serving import ModelStats

_COUNTERS = {
    "requests": ("amperage_requests_total", "Requests that ended."),
    "failures": ("amperage_request_failures_total", "Requests that the server failed."),
    "prompt_tokens": ("amperage_prompt_tokens_total", "Tokens of prompts."),
    "completion_tokens": ("amperage_completion_tokens_total", "Tokens produced."),
    "busy_s": ("amperage_engine_busy_seconds_total", "Seconds that the engine spent in steps."),
}
_GAUGES = {
    "active": ("amperage_active_requests", "Requests that have not ended."),
    "latency_p50_s": ("amperage_request_latency_p50_seconds", "Median latency of the last 256 requests."),
    "latency_p95_s": ("amperage_request_latency_p95_seconds", "95th percentile of the last 256 requests."),
    "first_token_p50_s": ("amperage_first_token_p50_seconds", "Median time to the first token."),
    "tokens_per_s": ("amperage_decode_tokens_per_second", "Median decode speed of a request."),
}


def render_metrics(models: list[ModelStats]) -> str:
    """The exposition; a figure that is not known has no sample."""
    lines: list[str] = []
    for kind, fields in (("counter", _COUNTERS), ("gauge", _GAUGES)):
        for field, (name, text) in fields.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for model in models:
                value = getattr(model, field)
                if value is not None:
                    lines.append(f'{name}{{model="{model.model}",version="{_escape(model.version)}"}} {value}')
    return "\n".join(lines) + "\n"


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
