"""`scripts/results`: make every recipe, measure it, write docs/results.md, docs/results.json and the pictures.

    scripts/results [--train --text FILE --heldout FILE] [--rounds N] [--out FOLDER]
    scripts/results --page       writes page and pictures again, of the figures that are there

Files are written when all is measured: a run that is cut off leaves the last one's.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.decoder_models import ROOT, SAMPLE
from benchmarks.harness import ROUNDS
from benchmarks.results.decoders import measure_decoders
from benchmarks.results.encoders import measure_encoders, sentences_of, words_of
from benchmarks.results.figures import FILE, Results, read_results
from benchmarks.results.making import Maker
from benchmarks.results.page import PAGE, render_page
from benchmarks.results.picture import PICTURES
from benchmarks.results.recipes import ENCODERS, MINILM, RECIPES
from forge.checkpoint import Checkpoint
from forge.evaluate import perplexity
from forge.reference import checkpoint_judge
from forge.windows import read_windows
from runtime.cpu import allowed_threads
from wire.errors import AmperageError, ConfigError

WINDOWS = ROOT / "samples" / "eval" / "tales-5m-base.json"
CALIBRATION_WINDOWS = 8
"""The first ones; the others judge."""
LIBRARIES = ("amperage", "onnxruntime", "numpy", "tokenizers")


def main() -> int:
    """Exit status of the command."""
    arguments = _arguments()
    try:
        found = read_results(arguments.out / FILE) if arguments.page else run(arguments)
    except AmperageError as error:
        print(f"results: {error}", file=sys.stderr)
        return error.exit_status
    write(found, arguments.out)
    return 0


def run(arguments: argparse.Namespace) -> Results:
    """Make and measure everything. Raises ConfigError when --train lacks its texts."""
    if arguments.train and not (arguments.text and arguments.heldout):
        raise ConfigError("--train needs a text to train on and one to judge by; add --text FILE --heldout FILE")
    if not MINILM.is_dir():
        raise ConfigError("all-MiniLM-L6-v2 is not installed; see what scripts/bench --list says, and start again")
    recipes = [recipe for recipe in RECIPES if arguments.train or not recipe.trains]
    windows = read_windows(WINDOWS)
    judged = windows[CALIBRATION_WINDOWS:]
    with tempfile.TemporaryDirectory(prefix="amperage-results-") as folder:
        work = Path(folder)
        places = {
            "calibration": _saved(work / "calibration.json", windows[:CALIBRATION_WINDOWS]),
            "words": work / "words.txt", "text": arguments.text, "heldout": arguments.heldout,
        }  # fmt: skip
        places["words"].write_text("\n\n".join(words_of(windows[:CALIBRATION_WINDOWS])))
        maker = Maker(work, places, _say)
        made = [maker.make(recipe) for recipe in recipes]
        made_encoders = [maker.make(recipe) for recipe in ENCODERS]
        decoders = measure_decoders(made, _saved(work / "judging.json", judged), arguments.rounds, _say)
        encoders = measure_encoders(made_encoders, judged, arguments.rounds, _say)
        (work / "original").mkdir()
        original = perplexity(checkpoint_judge(Checkpoint(SAMPLE), work / "original"), judged)
    return Results(
        date=datetime.now(UTC).date().isoformat(), cpu=_cpu(), threads=allowed_threads(0), rounds=arguments.rounds,
        versions={name: version(name) for name in LIBRARIES}, calibration_windows=CALIBRATION_WINDOWS,
        judging_windows=len(judged), window_tokens=len(judged[0]), original_perplexity=original,
        sentences=len(sentences_of(judged)), decoders=tuple(decoders), encoders=tuple(encoders),
        left_out=tuple(recipe.name for recipe in RECIPES if recipe not in recipes),
    )  # fmt: skip


def write(found: Results, out: Path) -> None:
    """The figures, the page and its pictures below `out`."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(found.model_dump_json(indent=1) + "\n")
    (out / PAGE).write_text(render_page(found))
    for name, draw in PICTURES.items():
        (out / "images" / name).write_bytes(draw(found))
    _say(f"wrote {out / PAGE}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/results", description="Measure every way of making a model small.")
    parser.add_argument("--train", action="store_true", help="also the recipes that train (scripts/train, torch)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to train on, in UTF-8")
    parser.add_argument("--heldout", type=Path, metavar="FILE", help="text that judges the training")
    parser.add_argument("--rounds", type=int, default=11, help=f"rounds of the speeds, at least {ROUNDS}")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="FOLDER", help="where to write")
    parser.add_argument("--page", action="store_true", help="measure nothing, write page and pictures again")
    return parser.parse_args()


def _saved(path: Path, windows: list[list[int]]) -> Path:
    path.write_text(json.dumps({"tokens": windows}))
    return path


def _cpu() -> str:
    """The model's name as Linux says it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else os.uname().machine


def _say(what: str) -> None:
    print(f"results: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
