"""How much memory a model may use for keys and values, and the slab that follows from it, before anything is loaded.

What the machine and the cgroups have left is shared out when a version loads, and a slab never holds more than its
share (runtime/slab.py), so that a node is not killed for memory in the middle of an answer. When memory is short, fewer
requests run at once before the context becomes shorter: one that waits is late, one that does not fit is refused.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from runtime.cgroup import groups_of, read_text
from runtime.prefix import BLOCK_TOKENS
from runtime.settings import RuntimeSettings
from runtime.slab import Shape, token_bytes
from wire.errors import Code, DeployError
from wire.manifest import DecoderConfig

HEAP_BYTES_PER_WEIGHT_BYTE = 1.5
"""What a session takes for its packed weights and its steps; 1.35 was measured for a 135 M model, and 0.8 for a second
session beside it, 1.46 for one with 8-bit matrices."""
MAPPED_HEAP_BYTES_PER_WEIGHT_BYTE = 0.3
"""The same where the packed weights are mapped from the prepack cache: 0.25."""
SHARE = 0.5
"""Of what is left, for one version: the one that follows it gets as much while it drains."""
PREFIX_SHARE = 0.25
"""Of a budget that is short, for kept prefixes."""
CAPACITY_TOKENS = 256
"""A capacity below what was asked for is a multiple of it."""
SENSIBLE_TOKENS = 512
"""A version that cannot serve one request of so many tokens is not loaded, unless its context is shorter."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """The other models of this process, as far as a load has to leave memory to them."""

    promised_bytes: int = 0
    """What those that are loaded may still take of their budgets."""
    to_come: int = 0
    """How many are to serve and are not loaded."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory at the moment of a load, in bytes."""

    available: int | None
    """What is left; None when nobody says."""
    limit: str
    """Who says so."""
    weights: int = 0
    """What the session will take."""
    sharing: Sharing = Sharing()

    @property
    def left(self) -> int | None:
        """For keys and values, of all who share it."""
        return None if self.available is None else max(0, self.available - self.weights - self.sharing.promised_bytes)

    def __str__(self) -> str:
        if self.left is None:
            return f"{self.limit} says nothing of what is left"
        promised = self.sharing.promised_bytes
        others = f" - {mib(promised)} promised to other models" if promised else ""
        return f"{mib(self.available or 0)} left ({self.limit}) - {mib(self.weights)} for weights{others}"


def heap_bytes(weights: int, sessions: int, *, mapped: bool) -> int:
    """What `sessions` over `weights` bytes will take, with packed weights on the heap or `mapped` from their cache."""
    return int(weights * sessions * (MAPPED_HEAP_BYTES_PER_WEIGHT_BYTE if mapped else HEAP_BYTES_PER_WEIGHT_BYTE))


def available_bytes(root: Path = Path("/")) -> tuple[int | None, str]:
    """What this process may still take, and who bounds it: MemAvailable or the tightest of its cgroups.

    A group's page cache counts as free: the kernel drops it first. None when nothing can be read.
    """
    found: list[tuple[int, str]] = []
    rows = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE))
    if "MemAvailable" in rows:
        found.append((int(rows["MemAvailable"]) * 1024, "MemAvailable"))
    for version, group in groups_of("memory", root):
        limits: tuple[str, ...]
        if version == 2:
            limits, usage, cache = ("memory.max", "memory.high"), "memory.current", "inactive_file"
        else:
            limits, usage, cache = ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"
        used = _number(group / usage)
        stat = dict(re.findall(r"^(\w+) (\d+)$", read_text(group / "memory.stat"), re.MULTILINE))
        for name in limits:
            limit = _number(group / name)
            if limit is not None and used is not None:
                found.append((max(0, limit - used + int(stat.get(cache, 0))), f"{name} of {group.name or 'the root'}"))
    return min(found, default=(None, "/proc/meminfo"))


def check_room(needed: int, available: int | None, limit: str) -> None:
    """Raise DeployError(load_failed) with the arithmetic when what is `available` is less than `needed` bytes."""
    if available is not None and available < needed:
        raise DeployError(
            Code.LOAD_FAILED,
            f"{mib(available)} left ({limit}), {mib(needed)} needed; free memory, or serve fewer models",
        )


def plan_slab(config: DecoderConfig, settings: RuntimeSettings, room: Room) -> tuple[Shape, str]:
    """The slab for a model, and the arithmetic that led to it.

    Raises DeployError(load_failed) with the arithmetic when not one sensible request fits.
    """
    per_token = token_bytes(config)
    context = min(settings.context_tokens, config.context_tokens)
    least = min(SENSIBLE_TOKENS, context)
    full = settings.max_slots * context * per_token
    budget, sum_ = _budget(settings, room, full + settings.prefix_cache_bytes)
    kept = min(settings.prefix_cache_bytes, max(budget - full, int(budget * PREFIX_SHARE)))
    if budget - kept < least * per_token:
        kept = 0
    tokens = min(budget - kept, full) // per_token
    capacity = context if tokens >= context else tokens // CAPACITY_TOKENS * CAPACITY_TOKENS
    if capacity < least:
        raise DeployError(
            Code.LOAD_FAILED, f"no memory for keys and values: {sum_} = {mib(budget)}, {tokens} tokens of {per_token} "
            f"bytes, and one request needs {least}; free memory, serve fewer models, or raise kv_cache_bytes",
        )  # fmt: skip
    blocks = kept // (BLOCK_TOKENS * per_token)
    shape = Shape(settings.max_slots, capacity, blocks, tokens, _bound_by(capacity, context, config))
    return shape, (
        f"{sum_} = {mib(budget)}: {tokens} tokens of {per_token} bytes in {shape.slots} slots of at most {capacity}, "
        f"and {blocks} kept blocks of {BLOCK_TOKENS}"
    )


def _bound_by(capacity: int, context: int, config: DecoderConfig) -> str:
    if capacity < context:
        return "by memory; see kv_cache_bytes"
    return "the model's own" if context == config.context_tokens else "by context_tokens"


def _budget(settings: RuntimeSettings, room: Room, wanted: int) -> tuple[int, str]:
    """Bytes, and what they come from."""
    left, asked = room.left, settings.kv_cache_bytes
    if asked and (left is None or asked <= left):
        return asked, "kv_cache_bytes"
    if left is None:
        return wanted, str(room)
    if asked:
        return left, f"kv_cache_bytes is {mib(asked)}, but {room}"
    models = 1 + room.sharing.to_come
    shared = f" / {models} models" if models > 1 else ""
    return int(left * SHARE / models), f"{SHARE:g} of ({room}){shared}"


def mib(size_bytes: int) -> str:
    """For people."""
    return f"{size_bytes / (1 << 20):.1f} MiB"


def _number(path: Path) -> int | None:
    text = read_text(path).strip()
    return int(text) if text.isdigit() else None
