"""Rounding a decoder's matrices by what they are multiplied with while it reads text."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from forge.build import TOKENIZER_FILE, build_version
from forge.golden import PROMPTS
from forge.moments import measure_largest, measure_moments
from forge.open_model import EMBEDDING, HEAD, open_model
from forge.own_text import OWN_TOKENS, continue_prompts
from forge.placer import Rounded
from forge.progress import Progress
from forge.quantise import BlockMatrix, Precision
from forge.rounding import Grid, Rounding, round_matrix
from forge.static import StaticMatrix, static_matrix
from runtime.cpu import allowed_threads
from runtime.model import Model
from runtime.slab import Shape
from wire.errors import ConfigError
from wire.manifest import DecoderConfig
from wire.serving import ExecutionOptions


def round_checkpoint(
    source: Path, grid: Grid, rounding: Rounding, windows: Sequence[Sequence[int]] | None, progress: Progress
) -> Rounded:
    """All matrices of the decoder `source` on `grid`, tables in their own precision. `windows` of tokens calibrate,
    None lets the model write its own.

    Raises ConfigError when the rounding does not fit the precision, or windows the model.
    """
    chosen = grid.precision
    static = chosen is Precision.INT8_STATIC
    if chosen is Precision.FLOAT32 or (static and rounding is not Rounding.NEAREST):
        raise ConfigError(f"{chosen} has no other rounding than the nearest; leave --rounding {rounding} out")
    texts = windows if windows is not None else own_windows(source, progress)
    with open_model(source) as model:
        seen = (measure_largest if static else measure_moments)(model, model.fit(texts), progress)
        rounded: dict[str, BlockMatrix | StaticMatrix] = {}
        for number, name in enumerate(model.names):
            progress("round", number, len(model.names))
            weights, table = model.matrix(name), name in (EMBEDDING, HEAD)
            if static and not table:
                rounded[name] = static_matrix(weights, seen[name])
                continue
            stored = replace(grid, precision=chosen.of_tables) if table else grid
            rounded[name] = round_matrix(name, weights, stored, rounding, seen.get(name))
    return rounded


def own_windows(source: Path, progress: Progress) -> list[list[int]]:
    """What the decoder `source` writes by itself in float32: a window for each of the golden vectors' prompts."""
    with tempfile.TemporaryDirectory(prefix="amperage-forge-") as folder:
        directory = Path(folder) / "float32"
        version = build_version(source, directory, ("own-text", "0"), precision=Precision.FLOAT32, progress=progress)
        config = version.config
        if not isinstance(config, DecoderConfig):
            raise ConfigError("only decoders are calibrated by text of their own; leave --rounding out for encoders")
        tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
        shape = Shape(len(PROMPTS), min(config.context_tokens, OWN_TOKENS))
        model = Model(directory, config, shape, ExecutionOptions(threads=allowed_threads()))
        try:
            return continue_prompts(model, tokenizer, progress)
        finally:
            model.close()
