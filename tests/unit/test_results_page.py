"""docs/results.md is what scripts/results makes of its recipes: none without a run, marks and pictures by figures."""

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint_fixtures import PROJECT, tiny_llama

from benchmarks.results.decoders import measure_decoders
from benchmarks.results.figures import FILE, Results, front, read_results
from benchmarks.results.labels import Box, Sheet, between
from benchmarks.results.making import Maker
from benchmarks.results.page import DECODER_COLUMNS, ENCODER_COLUMNS, FRONT, MARK, PAGE, render_page
from benchmarks.results.picture import PICTURES
from benchmarks.results.quality import judge_version, respelled
from benchmarks.results.recipes import ENCODERS, RECIPES, Recipe, Series, built
from benchmarks.results.sentences import sentences_on
from forge.build import build_version
from forge.quantise import Precision
from forge.trim import trim_checkpoint
from wire.errors import ConfigError

DOCS = PROJECT / "docs"
COMMITTED = read_results(DOCS / FILE)
TEXT = (DOCS / PAGE).read_text()


def table_with(heading: str) -> list[dict[str, str]]:
    """Rows of the page's table that begins with `heading`, by column."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"]
    start = next(number for number, cells in enumerate(lines) if cells[0] == heading)
    rows = []
    for cells in lines[start + 2 :]:
        if len(cells) != len(lines[start]):
            break
        rows.append(dict(zip(lines[start], cells, strict=True)))
    return rows


def test_every_recipe_was_run_as_it_stands_in_the_list() -> None:
    for rows, recipes in ((COMMITTED.decoders, RECIPES), (COMMITTED.encoders, ENCODERS)):
        assert [(row.name, row.series, row.commands) for row in rows] == [
            (recipe.name, recipe.series, recipe.steps) for recipe in recipes
        ], "the recipes changed: run scripts/results --train again"
        assert len({recipe.name for recipe in recipes}) == len(recipes)


def test_page_is_what_its_figures_make() -> None:
    assert render_page(COMMITTED) == TEXT, "write it with scripts/results --page"
    assert list(table_with("recipe")[0]) == [*DECODER_COLUMNS, FRONT]
    assert [row["recipe"] for row in table_with("recipe")] == [recipe.name for recipe in RECIPES]
    assert list(table_with("encoder")[0]) == [*ENCODER_COLUMNS]
    assert [row["encoder"] for row in table_with("encoder")] == [recipe.name for recipe in ENCODERS]


def test_marks_follow_from_the_figures_that_the_page_shows() -> None:
    rows = [(float(row["wire, MB"]), float(row["perplexity"]), row[FRONT]) for row in table_with("recipe")]
    for wire, perplexity, mark in rows:
        others = [(other, found) for other, found, _ in rows]
        if mark == MARK:
            assert not any(other < wire and found < perplexity for other, found in others)
        else:
            assert mark == ""
            assert sum(other <= wire and found <= perplexity for other, found in others) > 1


def test_pictures_are_there_and_every_label_finds_a_place() -> None:
    for name, draw in PICTURES.items():
        assert f"(images/{name})" in TEXT
        assert (DOCS / "images" / name).read_bytes().startswith(b"\x89PNG")
        assert draw(COMMITTED).startswith(b"\x89PNG")


def test_sentences_name_the_rows_that_the_figures_name() -> None:
    worse = [row.model_copy(update={"perplexity": 60.0, "wire_bytes": 3_000_000}) for row in COMMITTED.decoders]
    best = worse[2].model_copy(update={"perplexity": 50.0, "wire_bytes": 1_000_000})
    said = " ".join(sentences_on(made_of([*worse[:2], best, *worse[3:]])))
    assert f"**{best.name}** takes the fewest bytes: 1.00 MB, 3.0 times" in said
    assert f"1 of {len(worse)} are on the front: {best.name}." in said


def made_of(rows: list) -> Results:
    return COMMITTED.model_copy(update={"decoders": tuple(rows), "original_perplexity": 50.0})


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    marked = {point for point, is_on in zip(points, front(points), strict=True) if is_on}
    for point in set(points):
        beaten = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        assert (point in marked) != beaten


@given(st.lists(st.tuples(st.integers(100, 900), st.integers(100, 600)), min_size=1, max_size=10))
@example([(100, 100)] * 5)
@settings(max_examples=25, deadline=None)
def test_labels_cover_neither_points_nor_lines_nor_each_other(points: list[tuple[int, int]]) -> None:
    line = between((0, 350), (1000, 350))
    sheet = Sheet(Box(0, 0, 1000, 700), points, 8, list(line))
    boxes = [label.box for label in sheet.place_all([(70, 12)] * len(points))]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert not any(box.holds(place) for place in (*points, *line))
        assert box.left >= 0
        assert box.right <= 1000


def test_full_picture_refuses_a_label() -> None:
    with pytest.raises(ConfigError, match="make the picture larger"):
        Sheet(Box(0, 0, 50, 20), [(25, 10)], 8).place(0, (70, 12))


def test_figures_that_are_missing_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make them with scripts/results"):
        read_results(tmp_path / FILE)


def test_recipe_is_made_and_measured(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 256}
    (source / "config.json").write_text(json.dumps(config))
    pruning = "prune {source} {out} --magnitude 0.9"
    recipes = [
        Recipe("zeros", Series.PRUNED, (pruning, built("int4")), source),
        Recipe("dense", Series.ROUNDED, (built("int4"),), source),
        Recipe("zeros in ternary", Series.PRUNED, (pruning, built("ternary")), source),
    ]
    (tmp_path / "work").mkdir()
    maker = Maker(tmp_path / "work", {}, lambda _: None)
    made = [maker.make(recipe) for recipe in recipes]
    assert len(list((tmp_path / "work").iterdir())) == 4, "three versions, of which two share the pruning"
    windows = tmp_path / "windows.json"
    windows.write_text(json.dumps({"tokens": [list(range(3, 40))]}))
    zeros, dense = measure_decoders(made[:2], windows, 5, lambda _: None)
    assert dense.weights == 4096 * 64 + 64 + 2 * (12 * 32 * 32 + 3 * 96 * 64 + 2 * 64)
    assert dense.wire_bytes > zeros.wire_bytes
    assert dense.disk_bytes > dense.wire_bytes
    assert dense.cache_bytes == 2 * 2 * 2 * 16 * 256 * 4
    assert dense.ram_bytes > dense.cache_bytes
    assert dense.perplexity > 1000
    assert dense.bits_per_byte > 1
    assert dense.kl_nats is not None
    assert dense.kl_nats > 1
    assert dense.speed > 0


def test_version_with_fewer_tokens_is_judged_on_the_same_bytes(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    trim_checkpoint(source, tmp_path / "fewer", 400)
    for folder in ("source", "fewer"):
        build_version(tmp_path / folder, tmp_path / f"{folder}-version", ("tiny", "1"), precision=Precision.FLOAT32)
    windows = tmp_path / "windows.json"
    window = [0, *range(200, 230), 2000, 4000]
    windows.write_text(json.dumps({"tokens": [window]}))
    whole, own = (Tokenizer.from_file(str(tmp_path / folder / "tokenizer.json")) for folder in ("source", "fewer"))
    spelled = respelled(window, whole, own)
    assert len(spelled) > len(window)
    assert own.decode(spelled) == whole.decode(window)
    before, after = (judge_version(tmp_path / f"{folder}-version", windows) for folder in ("source", "fewer"))
    assert before.bits_per_byte / math.log2(before.perplexity) == after.bits_per_byte / math.log2(after.perplexity)
    assert before.kl_nats is not None
    assert after.kl_nats is None
