"""Ways to run a version: what may be changed about how onnxruntime runs it, and how a change is judged. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.cpu import Cpu
from wire.serving import ExecutionOptions, IntegerReading

READING_TOKENS_LEAST = 4
"""Where a session that reads is no longer asked whether it is better at shorter pieces, too."""
PROMPT_SHARE = 0.8
"""Tokens of a typical request that are read; the rest are generated."""

FLOAT_ACTIVATIONS = {"mlas.qnbit.force_fp32": "1"}
"""Session settings by which x86 reads prompts 1.4 times as fast: int4 weights are spread to float32 in the cache and
multiplied there (docs/adr/0009). onnxruntime has the setting on x86 only."""


class Figure(StrEnum):
    """What two ways are compared by."""

    DECODE = "decode"
    READ = "read"
    BOTH = "both"
    PIECES = "pieces"
    """Reading in the shortest pieces of which either says that they are long."""

    def of(self, decode: float, read: float) -> float:
        """Tokens per second of generating, of reading, or of a request that does both."""
        if self is Figure.DECODE:
            return decode
        return read if self in (Figure.READ, Figure.PIECES) else 1 / (PROMPT_SHARE / read + (1 - PROMPT_SHARE) / decode)


@dataclass(frozen=True, slots=True)
class Way:
    """One change of the options."""

    name: str
    figure: Figure
    change: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    """Session settings that are added."""

    def applied(self, options: ExecutionOptions) -> ExecutionOptions:
        """`options` with the change."""
        config = {**options.session_config, **self.config}
        return options.model_copy(update={**self.change, "session_config": config})


WITHOUT_KLEIDIAI = Way("without KleidiAI", Figure.BOTH, config={"mlas.disable_kleidiai": "1"})
BFLOAT16 = Way("bfloat16 products", Figure.BOTH, config={"mlas.enable_gemm_fastmath_arm64_bfloat16": "1"})
FLOAT_EVERYWHERE = Way("float activations", Figure.BOTH, config=FLOAT_ACTIVATIONS)
SPINNING = Way("spinning threads", Figure.DECODE, {"spinning": True})
WHOLE_ATTENTION = Way("attention by whole matrices", Figure.BOTH, {"flash_attention": False})
TILED_ATTENTION = Way("attention by tiles", Figure.BOTH, {"flash_attention": True})
READING_SESSION = Way("a session that reads", Figure.READ, {"reading_config": FLOAT_ACTIVATIONS})
INTEGER_READING = tuple(
    Way(f"a session that reads by integers: {what}", Figure.READ, {"reading_config": {}, "integer_reading": what})
    for what in IntegerReading
)
"""The second rounds less and is for models that the first would hurt."""


def usual(cpu: Cpu, threads: int) -> ExecutionOptions:
    """How a version runs before anything was tried. Attention by whole matrices has a kernel for the one row of a step
    on x86 (docs/adr/0019); elsewhere it is as onnxruntime has it of itself."""
    return ExecutionOptions(threads=threads, flash_attention=cpu.machine != "x86_64")


def other_attention(options: ExecutionOptions) -> Way:
    """The attention that `options` have not."""
    return WHOLE_ATTENTION if options.flash_attention else TILED_ATTENTION


def kernel_ways(cpu: Cpu) -> list[Way]:
    """Other kernels that this CPU has; what onnxruntime ignores on it is not listed."""
    if cpu.machine != "aarch64":
        return []
    return [WITHOUT_KLEIDIAI, *([BFLOAT16] if "bf16" in cpu.features else [])]


def reading_sessions(cpu: Cpu) -> list[tuple[Way, ...]]:
    """Sessions that read prompts in other ways, of each group the first that is better.

    x86 without VNNI adds products of 8 bits in 16, which can overflow (docs/adr/0012): none has 8-bit matrices there.
    """
    x86 = cpu.machine == "x86_64"
    whole = not x86 or any(name in cpu.features for name in ("avx_vnni", "avx512_vnni", "amx_int8"))
    return [*([(READING_SESSION,)] if x86 else []), *([INTEGER_READING] if whole else [])]


def remedies(cpu: Cpu) -> list[Way]:
    """Ways that may be right where the usual one is not, because they round less (onnxruntime issue 29849)."""
    return [WITHOUT_KLEIDIAI] if cpu.machine == "aarch64" else [FLOAT_EVERYWHERE]


def fewer_threads(options: ExecutionOptions) -> Way | None:
    """Half of them, None when there is one: more than the memory feeds only wait for each other."""
    half = options.threads // 2
    change = {"threads": half, "spinning": options.spinning and half > 1}
    return Way(f"{half} thread{'s' if half > 1 else ''}", Figure.BOTH, change) if half else None


def shorter_pieces(options: ExecutionOptions) -> Way | None:
    """Half of what is a long piece to the session that reads; None where there is none, or hardly anything is left."""
    half = options.reading_tokens // 2
    if options.reading_config is None or half < READING_TOKENS_LEAST:
        return None
    return Way(f"it reads pieces of {half}, too", Figure.PIECES, {"reading_tokens": half})
