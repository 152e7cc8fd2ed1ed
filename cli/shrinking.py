"""`amperage forge prune`, `trim-vocabulary`, `distil`, `train-quantised`: from a checkpoint to one that weighs less."""

from pathlib import Path
from typing import Annotated

import typer

from cli.recording import recorded
from cli.terminal import AsJson, print_figures, progress
from forge.prune import Magnitude, Pattern, Rule, Scope, Threshold, prune_checkpoint
from forge.quantise import Precision
from forge.shrink import Shrinking, shrink_checkpoint
from forge.trim import trim_checkpoint
from forge.windows import read_windows
from wire.errors import ConfigError

Source = Annotated[Path, typer.Argument(help="Folder with config.json, model.safetensors, tokenizer.json.")]
Out = Annotated[Path, typer.Argument(help="New folder of the same kind, which `forge build` takes.")]
Texts = Annotated[list[Path], typer.Option("--text", help="Text file in UTF-8 to train on; repeatable.")]
Heldout = Annotated[Path | None, typer.Option(help="Text file whose first 32 x 512 tokens judge the result.")]
Steps = Annotated[int, typer.Option(min=1, help="How many batches.")]
Batch = Annotated[int, typer.Option(min=1, help="Pieces of text per batch.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per piece; beyond it the result is worse.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides which pieces, and what begins with chance.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between states; a kill loses no more than these.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run for this place that was cut off.")]


@recorded("prune")
def prune(
    source: Source,
    out: Out,
    magnitude: Annotated[float | None, typer.Option(help="Share of the smallest weights to set to zero.")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Take that share of every matrix by itself.")] = False,
    threshold: Annotated[float | None, typer.Option(help="Set weights below this size to zero.")] = None,
    n_m: Annotated[str | None, typer.Option(help="Keep N of every M weights along the input, for example 2:4.")] = None,
    heads: Annotated[float, typer.Option(help="Share of heads to remove, as whole groups that share keys.")] = 0.0,
    mlp: Annotated[float, typer.Option(help="Share of MLP columns to remove, down to a multiple of 32.")] = 0.0,
    calibration: Annotated[
        Path | None, typer.Option(help="Token windows as in samples/eval, to judge heads and columns by what they do.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set weights to zero (smaller on the wire only), or remove heads and MLP columns (smaller everywhere)."""
    rules = _rules(magnitude, per_layer, threshold, n_m)
    structured = bool(heads or mlp)
    if len(rules) + structured != 1:
        raise ConfigError("choose one of --magnitude, --threshold, --n-m, or --heads and --mlp; prune twice for two")
    if calibration is not None and not structured:
        raise ConfigError("zeros are chosen by the size of weights alone; leave --calibration out")
    with progress() as report:
        if structured:
            windows = read_windows(calibration) if calibration is not None else None
            figures = shrink_checkpoint(source, out, Shrinking(heads, mlp), windows, report)
        else:
            figures = prune_checkpoint(source, out, rules[0], report)
    print_figures(figures, as_json, str(out))


def _rules(magnitude: float | None, per_layer: bool, threshold: float | None, n_m: str | None) -> list[Rule]:
    rules: list[Rule] = []
    if magnitude is not None:
        rules.append(Magnitude(magnitude, Scope.MATRIX if per_layer else Scope.GLOBAL))
    elif per_layer:
        raise ConfigError("--per-layer says how --magnitude is taken; add --magnitude")
    if threshold is not None:
        rules.append(Threshold(threshold))
    if n_m is not None:
        kept, _, group = n_m.partition(":")
        if not (kept.isdecimal() and group.isdecimal()):
            raise ConfigError(f"{n_m!r} is no pattern; write it as 2:4")
        rules.append(Pattern(int(kept), int(group)))
    return rules


@recorded("trim-vocabulary")
def trim_vocabulary(
    source: Source,
    out: Out,
    keep: Annotated[int, typer.Option(min=1, help="Most tokens to keep.")],
    text: Annotated[
        list[Path] | None, typer.Option(help="Text in UTF-8 whose tokens are kept first; repeatable. Else by rank.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take tokens out of the tokenizer, and their rows out of the embedding and the head (smaller everywhere)."""
    print_figures(trim_checkpoint(source, out, keep, text or ()), as_json, str(out))


@recorded("distil")
def distil(
    teacher: Source,
    out: Out,
    text: Texts,
    steps: Steps,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the student.")] = None,
    hidden: Annotated[int | None, typer.Option(min=32, help="Hidden size of the student.")] = None,
    mlp: Annotated[int | None, typer.Option(min=32, help="MLP columns of the student.")] = None,
    temperature: Annotated[float, typer.Option(min=0.1, help="Of the distributions that are compared.")] = 2.0,
    hidden_weight: Annotated[float, typer.Option(min=0, help="Weight of the distance of hidden states.")] = 1.0,
    text_weight: Annotated[float, typer.Option(min=0, help="Weight of the text's own next tokens.")] = 0.0,
    batch: Batch = 4,
    length: Length = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its peak.")] = 1e-3,
    seed: Seed = 0,
    save_every: SaveEvery = 50,
    heldout: Heldout = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a student of fewer layers or less width to answer as its teacher does. Needs the extra `train`."""
    from forge.training.distil import Distillation
    from forge.training.distil import distil as train
    from forge.training.job import Job
    from forge.training.optimisation import Schedule

    recipe = Distillation(layers, hidden, mlp, temperature, hidden_weight, text_weight)
    schedule = Schedule(steps, batch, length, learning_rate, seed, save_every)
    with progress() as report:
        figures = train(Job(teacher, out, text, schedule, heldout, resume, report), recipe)
    print_figures(figures, as_json, str(out))


@recorded("train-quantised")
def train_quantised(
    source: Source,
    out: Out,
    text: Texts,
    steps: Steps,
    precision: Annotated[
        Precision, typer.Option(help="How it will be built: `forge build --precision`.")
    ] = Precision.INT4,
    batch: Batch = 4,
    length: Length = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="At its peak.")] = 5e-4,
    seed: Seed = 0,
    save_every: SaveEvery = 50,
    heldout: Heldout = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a checkpoint to be itself although its matrices are rounded. Needs the extra `train`."""
    from forge.training.grid import TRAINED
    from forge.training.job import Job
    from forge.training.optimisation import Schedule
    from forge.training.qat import train_quantised as train

    if precision not in TRAINED:
        raise ConfigError(f"{precision} rounds nothing; choose one of {', '.join(TRAINED)}")
    schedule = Schedule(steps, batch, length, learning_rate, seed, save_every)
    with progress() as report:
        figures = train(Job(source, out, text, schedule, heldout, resume, report), precision)
    print_figures(figures, as_json, str(out))
