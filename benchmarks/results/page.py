"""docs/results.md of the figures of one run: its tables, and what they say in sentences that follow from them."""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from benchmarks.decoder_models import SAMPLE
from benchmarks.results.figures import Cost, DecoderFigures, EncoderFigures, Results, wire_front
from benchmarks.results.recipes import ENCODERS, MINILM, RECIPES, STUDENT
from benchmarks.results.sentences import sentences_on, sentences_on_encoder

PAGE = "results.md"
WIDTH = 120
INTRODUCTION = """
# Results

Every way of making a model small that [Make a model small](make-a-model-small.md) describes, measured in one run. \
`scripts/results{trained}` wrote this page, its pictures and [results.json](results.json); change none by hand.

{found.date}, {found.cpu}, {found.threads} threads, {libraries}.
"""
METHODS = """
How it was measured; MB are millions of bytes:

- **Quality**: of the {total} windows of {found.window_tokens} tokens in `samples/eval/tales-5m-base.json` the first \
{found.calibration_windows} calibrate where a recipe calibrates, the last {found.judging_windows} judge every row. KL \
and the same best token are against `samples/tales-5m-base` in float32, for students too; its perplexity is \
{found.original_perplexity:.2f}. Perplexity counts the original's tokens, also where a recipe changes the tokens: all \
rows read the same bytes, and **bits per byte** is the same figure for each of these.
- **disk** is the version directory, **wire** the full artifact, pack and manifest. **bits per weight** are those on \
the wire, graph and tokenizer included, for each weight of the checkpoint that the version was built of.
- **RAM** is what loading and running the version added to a process of its own, with keys and values of its whole \
context: anonymous memory and the pages of the version's files that are mapped, the interpreter not counted.
- **tokens/s**: one stream, the median of {found.rounds} rounds in which all versions took turns, all with the same \
settings (a probe may choose better ones for each); spread is (largest - smallest) / median.
- **{front}**: no other row has as few bytes on the wire and as low a perplexity, and less of one.
"""
ENCODER_METHODS = """
all-MiniLM-L6-v2. Fewer tokens are those that the text of the calibrating windows uses, and then the first ones of the \
vocabulary. The cosine is that of the embeddings of {found.sentences} sentences, those of the judging windows, \
to the checkpoint's own in float32. Speeds are of one sentence at a time.
"""
SIZES: dict[str, Callable[[Cost], str]] = {
    "disk, MB": lambda row: megabytes(row.disk_bytes),
    "wire, MB": lambda row: megabytes(row.wire_bytes),
    "bits per weight": lambda row: f"{row.bits_per_weight:.2f}",
}
SPREAD = "spread"
DECODER_COLUMNS: dict[str, Callable[[DecoderFigures], str]] = {
    "recipe": lambda row: row.name,
    **SIZES,
    "RAM, MB": lambda row: megabytes(row.ram_bytes),
    "perplexity": lambda row: f"{row.perplexity:.2f}",
    "bits per byte": lambda row: f"{row.bits_per_byte:.3f}",
    "KL, nats": lambda row: _known(row.kl_nats, ".4f"),
    "same best token": lambda row: _known(row.top1_agreement, ".3f"),
    "tokens/s": lambda row: f"{row.speed:,.0f}",
    SPREAD: lambda row: f"{row.speed_spread:.0%}",
}
ENCODER_COLUMNS: dict[str, Callable[[EncoderFigures], str]] = {
    "encoder": lambda row: row.name,
    **SIZES,
    "cosine, mean": lambda row: f"{row.cosine_mean:.4f}",
    "cosine, least": lambda row: f"{row.cosine_least:.4f}",
    "sentences/s": lambda row: f"{row.speed:,.0f}",
    SPREAD: lambda row: f"{row.speed_spread:.0%}",
}
FRONT, MARK = "front", "●"
"""Heading and mark of rows that nothing beats in both bytes on the wire and perplexity."""


def render_page(found: Results) -> str:
    """The page as Markdown."""
    return "\n".join([*_head(found), *_decoders(found), *_encoders(found), *_commands(found)]) + "\n"


def megabytes(size_bytes: int) -> str:
    """Millions of bytes."""
    return f"{size_bytes / 1e6:.2f}"


def _known(figure: float | None, form: str) -> str:
    return "" if figure is None else format(figure, form)


def _head(found: Results) -> list[str]:
    libraries = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    trained = " --train --text FILE --heldout FILE" if not found.left_out else ""
    return [*_filled(INTRODUCTION, trained=trained, found=found, libraries=libraries), ""]


def _decoders(found: Results) -> list[str]:
    marks = [MARK if marked else "" for marked in wire_front(found.decoders)]
    cells = ([tell(row) for tell in DECODER_COLUMNS.values()] for row in found.decoders)
    missing = [f"Not made in this run: {', '.join(found.left_out)}.", ""] if found.left_out else []
    total = found.calibration_windows + found.judging_windows
    return [
        "## The language model",
        "",
        "![MB on the wire and perplexity of every recipe](images/results-wire.png)",
        "",
        *(line for sentence in sentences_on(found) for line in _filled(f"- {sentence}")),
        "",
        *_table([*DECODER_COLUMNS, FRONT], ([*row, mark] for row, mark in zip(cells, marks, strict=True))),
        "",
        *missing,
        "![MB of memory and perplexity of every recipe](images/results-ram.png)",
        "",
        *_filled(METHODS, total=total, found=found, front=FRONT),
        "",
    ]


def _encoders(found: Results) -> list[str]:
    return [
        "## The sentence encoder",
        "",
        *(line for sentence in sentences_on_encoder(found) for line in _filled(f"- {sentence}")),
        "",
        *_table([*ENCODER_COLUMNS], ([tell(row) for tell in ENCODER_COLUMNS.values()] for row in found.encoders)),
        "",
        *_filled(ENCODER_METHODS, found=found),
        "",
    ]


def _commands(found: Results) -> list[str]:
    """What was run for each row, `amperage forge` left out."""
    sources = {SAMPLE: "`samples/tales-5m-base`", STUDENT: "`samples/tales-3m-distilled`", MINILM: "all-MiniLM-L6-v2"}
    checkpoints = {(recipe.name, recipe.steps): sources[recipe.source] for recipe in (*RECIPES, *ENCODERS)}
    rows = (
        [
            row.name, checkpoints.get((row.name, row.commands), ""),
            " → ".join(f"`{_plain(step)}`" for step in row.commands),
        ]
        for row in (*found.decoders, *found.encoders)
    )  # fmt: skip
    return [
        "## The commands",
        "",
        "Each is a command of `amperage forge` and takes what the one before it wrote.",
        "",
        *_table(["row", "checkpoint", "commands"], rows),
    ]


def _plain(step: str) -> str:
    """A step without its places for what comes in and goes out, and with names for the files it reads."""
    for place in (" {source}", " {out}", " --out", " --name tales --version 1", " --name minilm --version 1"):
        step = step.replace(place, "")
    return re.sub(r"\{(\w+)\}", lambda place: place[1].upper(), step)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [" | ".join(cells) for cells in (headings, ["---"] * len(headings), *rows)]
    return [f"| {line} |" for line in lines]


def _filled(template: str, **places: object) -> list[str]:
    """The lines of a template, its places filled, and broken anew at the page's width."""
    return [
        part
        for line in template.strip().splitlines()
        for part in textwrap.wrap(
            line.format(**places), WIDTH, subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False, break_on_hyphens=False,
        ) or [""]
    ]  # fmt: skip
