"""What the figures of a run say, in sentences that are made of them and of nothing else."""

from collections.abc import Iterator

from benchmarks.results.figures import DecoderFigures, Results, wire_front
from benchmarks.results.recipes import Series

NEAR = (0.01, 0.05, 0.2)
"""Shares by which the perplexity may be worse than the original's."""


def sentences_on(found: Results) -> Iterator[str]:
    """About the language model's rows."""
    yield from _smallest(found)
    yield _front(found)
    yield from _in_a_budget(found)
    for series in Series:
        if series not in (Series.ROUNDED, Series.CACHE):
            yield from _beside_rounding(found, series)
    yield from _memory(found)
    yield _speed(found)


def sentences_on_encoder(found: Results) -> Iterator[str]:
    """About the sentence encoder's rows."""
    largest = max(row.wire_bytes for row in found.encoders)
    for row in found.encoders:
        if row.wire_bytes < largest:
            yield (
                f"**{row.name}** is {largest / row.wire_bytes:.1f} times smaller on the wire than the largest row; its "
                f"embeddings keep a cosine of {row.cosine_mean:.3f} in the mean and {row.cosine_least:.3f} at least."
            )


def _smallest(found: Results) -> Iterator[str]:
    """The fewest bytes for each loss, and what they are of the largest."""
    largest = max(row.wire_bytes for row in found.decoders)
    told = set()
    for share in NEAR:
        limit = found.original_perplexity * (1 + share)
        fitting = [row for row in found.decoders if row.perplexity <= limit]
        if not fitting:
            continue
        best = min(fitting, key=lambda row: row.wire_bytes)
        if best.name not in told:
            told.add(best.name)
            yield (
                f"Within {100 * share:.0f} % of the original's perplexity **{best.name}** takes the fewest bytes: "
                f"{best.wire_bytes / 1e6:.2f} MB, {largest / best.wire_bytes:.1f} times fewer than the largest row."
            )


def _front(found: Results) -> str:
    on = [row for row, marked in zip(found.decoders, wire_front(found.decoders), strict=True) if marked]
    ordered = sorted(on, key=lambda row: -row.wire_bytes)
    return f"{len(on)} of {len(found.decoders)} are on the front: {', '.join(row.name for row in ordered)}."


def _in_a_budget(found: Results) -> Iterator[str]:
    """What a budget makes of the bytes that a rounded row takes."""
    for row in found.decoders:
        fitting = [one for one in found.decoders if one.series is Series.BUDGET and one.wire_bytes <= row.wire_bytes]
        best = min(fitting, key=lambda one: one.perplexity, default=row)
        if row.series is Series.ROUNDED and best.perplexity < row.perplexity and row.wire_bytes <= 2 * best.wire_bytes:
            yield (
                f"{row.name} takes {row.wire_bytes / 1e6:.2f} MB for a perplexity of {row.perplexity:.1f}; {best.name} "
                f"takes {best.wire_bytes / 1e6:.2f} MB for {best.perplexity:.1f}."
            )


def _beside_rounding(found: Results, series: Series) -> Iterator[str]:
    """How a series stands to rounding alone: how many of its rows no rounded one beats."""
    rounded = [row for row in found.decoders if row.series is Series.ROUNDED]
    rows = [row for row in found.decoders if row.series is series]
    if not rows:
        return
    ahead = [row.name for row in rows if not any(_beats(other, row) for other in rounded)]
    said = f"no rounded row beats {', '.join(ahead)}" if ahead else "rounded ones beat all of them"
    yield f"{series.capitalize()}, {len(rows)} row{'s' if len(rows) > 1 else ''}: {said}."


def _beats(one: DecoderFigures, other: DecoderFigures) -> bool:
    return one.wire_bytes <= other.wire_bytes and one.perplexity <= other.perplexity


def _memory(found: Results) -> Iterator[str]:
    for word, pick in (("least", min), ("most", max)):
        row = pick(found.decoders, key=lambda row: row.ram_bytes)
        yield (
            f"The {word} RAM is that of {row.name}: {row.ram_bytes / 1e6:.1f} MB, "
            f"{row.cache_bytes / 1e6:.1f} MB of it keys and values."
        )


def _speed(found: Results) -> str:
    slow, fast = (pick(found.decoders, key=lambda row: row.speed) for pick in (min, max))
    spread = max(row.speed_spread for row in found.decoders)
    return (
        f"Speeds go from {slow.speed:,.0f} tokens/s ({slow.name}) to {fast.speed:,.0f} ({fast.name}); rounds of one "
        f"version differed by up to {100 * spread:.0f} %, and smaller differences say nothing."
    )
