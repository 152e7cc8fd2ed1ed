"""Quantisation-aware training: a checkpoint learns to be itself although its matrices are rounded.

Every step runs the model with the rounded matrices and moves the float ones behind them so that the distribution of the
next token comes closer to the unrounded model's. For int4 the result holds the float matrices, which `forge build`
rounds to exactly what was trained. For ternary it holds the rounded ones, whose three values per block int4 holds too,
to within a scale's rounding: on the wire they cost what ternary costs.
"""

from typing import Any

import torch
from torch import Tensor

from forge.quantise import Float
from forge.training.grid import TABLES, Method, on_grid
from forge.training.job import Job, Opened, figures_of, open_job, recipe_of, rounded
from forge.training.llama import forward
from forge.training.losses import divergence, perplexity
from forge.training.optimisation import optimise


def train_quantised(job: Job, method: Method) -> dict[str, Any]:
    """Train the checkpoint `job.source` on the grid of `method` and write it as float16. Returns figures, with held-out
    text the perplexities of the float model, of it plainly rounded, and of the trained one as it ships.

    Raises ConfigError or ArtifactError with a remedy.
    """
    opened = open_job(job)
    parameters = opened.parameters()
    losses = _train(opened, parameters, method)
    tensors = _exported(method, parameters)
    figures = {"method": method.value, **figures_of(job, losses, tensors)}
    if opened.windows is not None:
        a, source = opened.folder.architecture, opened.parameters()
        with torch.no_grad():
            plain, trained = on_grid(method, source), _shipped(method, tensors)
        figures |= {
            "perplexity_float": perplexity(a, source, opened.windows),
            "perplexity_rounded": perplexity(a, plain, opened.windows),
            "perplexity": perplexity(a, trained, opened.windows),
        }
    opened.finish(opened.folder.config, tensors)
    return figures


def _train(opened: Opened, parameters: dict[str, Tensor], method: Method) -> list[float]:
    """Train `parameters` in place; the loss of every step."""
    a, teacher = opened.folder.architecture, opened.parameters()
    for value in parameters.values():
        value.requires_grad_()

    def loss_of(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = forward(a, teacher, ids).logits
        return divergence(wanted, forward(a, on_grid(method, parameters), ids).logits)

    run = opened.run(recipe_of("train-quantised", {"method": method.value}))
    return optimise(parameters, loss_of, opened.corpus, opened.job.schedule, run, opened.job.progress)


def _exported(method: Method, parameters: dict[str, Tensor]) -> dict[str, Float]:
    """What the checkpoint holds."""
    kept = rounded(parameters)
    if method is Method.TERNARY:
        with torch.no_grad():
            shipped = on_grid(method, parameters)
        kept |= rounded({name: value for name, value in shipped.items() if value.dim() == 2 and name not in TABLES})
    return kept


def _shipped(method: Method, tensors: dict[str, Float]) -> dict[str, Tensor]:
    """What a build makes of the checkpoint's tensors; ternary matrices are rounded in it already."""
    values = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    if method is Method.INT4:
        return on_grid(method, values)
    tables = {name: value for name, value in values.items() if name in TABLES}
    return values | on_grid(method, tables)
