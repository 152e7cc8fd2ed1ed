"""What one run of `scripts/results` found, as docs/results.json keeps it; page and pictures are made of this alone.

Sizes are bytes, speeds per second, spreads (largest - smallest) / median of the rounds.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from benchmarks.results.recipes import Series
from wire.errors import ConfigError

FILE = "results.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Cost(_Frozen):
    """What every version costs."""

    name: str
    series: Series
    commands: tuple[str, ...]
    weights: int
    disk_bytes: int
    wire_bytes: int
    speed: float
    """Tokens of an answer, or sentences."""
    speed_spread: float

    @property
    def bits_per_weight(self) -> float:
        """On the wire, everything counted that a node fetches."""
        return 8 * self.wire_bytes / self.weights


class DecoderFigures(Cost):
    """A row of the language models."""

    ram_bytes: int
    cache_bytes: int
    """Keys and values, which `ram_bytes` holds too."""
    perplexity: float
    bits_per_byte: float
    kl_nats: float | None
    top1_agreement: float | None


class EncoderFigures(Cost):
    """A row of the sentence encoder."""

    cosine_mean: float
    cosine_least: float


class Results(_Frozen):
    """All of a run."""

    date: str
    cpu: str
    threads: int
    rounds: int
    versions: dict[str, str]
    calibration_windows: int
    judging_windows: int
    window_tokens: int
    original_perplexity: float
    sentences: int
    decoders: tuple[DecoderFigures, ...]
    encoders: tuple[EncoderFigures, ...]
    left_out: tuple[str, ...] = ()
    """Recipes that this run was not asked to make."""


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each point is on the Pareto front of two figures of which less is better: nothing is as good in both and
    better in one."""
    return [not any(_beats(other, point) for other in points) for point in points]


def wire_front(rows: Sequence[DecoderFigures]) -> list[bool]:
    """The front of bytes on the wire and perplexity."""
    return front([(row.wire_bytes, row.perplexity) for row in rows])


def read_results(path: Path) -> Results:
    """The figures of the last run. Raises ConfigError when there are none."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no results ({error}); make them with scripts/results") from error


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other
