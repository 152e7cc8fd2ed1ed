"""Settings of the runtime: one TOML file, checked whole before anything starts."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from host.settings import FilePath, Settings


class RuntimeSettings(Settings):
    """`runtime.toml`."""

    store: FilePath
    """Root of the agent's store; the runtime only reads it."""
    cache: FilePath | None = None
    """Where packed weights are kept, so that they are mapped; absent: they are packed onto the heap at every load."""
    public_socket: FilePath = Path("/run/amperage/inference.sock")
    admin_socket: FilePath = Path("/run/amperage/admin.sock")
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of one model; 0 means as many as affinity and cgroup quota allow."""
    core_groups: Literal["numa"] | Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Cores of each replica of a model, as lists like "0-39"; "numa" is one per NUMA node; empty is one replica on all.
    Slots and queue are per replica, threads and memory are shared out."""
    reading_session: bool = True
    """Whether the probe may choose a second session that reads prompts faster (1.4 to 1.8 times) and has the weights
    once more; false where memory is short."""
    providers: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    """Execution providers beside the CPU's that a probe tries, by their names in onnxruntime; absent: all it has."""
    provider_libraries: dict[str, FilePath] = {}
    """Plug-in libraries with execution providers that a probe tries, by names of your own. Each is loaded in a process
    of its own there, and by the server only once it was right and faster."""
    max_slots: Annotated[int, Field(ge=1, le=64)] = 4
    """Requests of one model that are decoded together; each has a slot of KV cache."""
    max_queue: Annotated[int, Field(ge=0, le=10_000)] = 64
    """Requests of one model that may wait for a slot; more are refused with 429."""
    context_tokens: Annotated[int, Field(ge=16, le=1 << 20)] = 4096
    """Upper bound of prompt and answer together, and of an encoder's text; a model with a shorter context keeps its
    own."""
    kv_cache_bytes: Annotated[int, Field(ge=0)] = 0
    """Memory per model for keys and values, kept prefixes included; 0 means half of what is left when it loads."""
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 128 << 20
    """Memory per model for what prompts began with, for the next that begins alike; 0 turns it off."""
    speculation: bool = True
    """Whether an answer that repeats its prompt or itself may get several tokens in one step. What repeats nothing
    keeps its speed, and no answer's distribution changes."""
    encoder_batch_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 256
    """Tokens of texts that an encoder reads in one step; more gain little and make whoever comes meanwhile wait."""
    encoder_queue_tokens: Annotated[int, Field(ge=1 << 10, le=1 << 24)] = 1 << 18
    """Tokens of texts that may wait for an encoder, and that one request may have; more are refused with 429."""
    encoder_wait_s: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How long a text may wait for others to be read with while the encoder is free."""
    keep_alive_s: Annotated[float, Field(ge=0)] = 0.0
    """How long after its last request a model keeps its memory, language models at least 5 s; the next request loads it
    again. 0 is for ever."""
    request_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """From the last byte of a request to the last byte of its answer."""
    shutdown_grace_s: Annotated[float, Field(ge=0, le=3600)] = 20.0
    """How long open answers may go on after SIGTERM."""
    probe_memory_bytes: Annotated[int, Field(ge=0)] = 0
    """Address space of a probe child; 0 means a bound that follows from the size of the candidate."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
