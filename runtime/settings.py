"""Settings of the runtime: one TOML file, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from host.settings import FilePath, Settings


class RuntimeSettings(Settings):
    """`runtime.toml`."""

    store: FilePath
    public_socket: FilePath = Path("/run/amperage/inference.sock")
    admin_socket: FilePath = Path("/run/amperage/admin.sock")
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of a model's kernels; 0 means as many as affinity and the cgroup's quota allow."""
    slots: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests of one model that decode together; each keeps `context_tokens` of KV cache."""
    context_tokens: Annotated[int, Field(ge=16, le=1 << 20)] = 2048
    """Upper bound of prompt and answer together, below what the model itself allows."""
    queue: Annotated[int, Field(ge=0, le=10_000)] = 64
    """Requests that may wait for a slot before new ones are refused with 429."""
    request_limit_bytes: Annotated[int, Field(ge=1024, le=64 << 20)] = 1 << 20
    probe_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """Address space of the probe child; 0 means what the unit allows."""
    body_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    """A client that sends its request more slowly is cut off."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
