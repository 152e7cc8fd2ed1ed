"""What a queue of requests answers when it cannot serve one; whatever kind of model it belongs to."""

from wire.errors import Code, InferenceError

LEAST_PATIENCE_S, MOST_PATIENCE_S = 1.0, 60.0
"""Bounds of when a client is told to ask again."""


def server_ending() -> InferenceError:
    """For requests that are open, or come, while the server ends (503)."""
    return InferenceError(Code.NOT_READY, "the server is ending; ask again", 503, retry_after_s=LEAST_PATIENCE_S)


def crowded(open_requests: int, patience_s: float) -> InferenceError:
    """When a queue is full (429); `patience_s` is when what waits is probably done."""
    retry_after_s = min(MOST_PATIENCE_S, max(LEAST_PATIENCE_S, patience_s))
    message = f"{open_requests} requests are open already; ask again later"
    return InferenceError(Code.OVERLOADED, message, 429, retry_after_s)


def model_failed() -> InferenceError:
    """When onnxruntime failed, or gave what is no number (500); the caller writes the reason into the log."""
    return InferenceError(Code.INTERNAL, "the model failed on this request; the runtime's log has the reason", 500)
