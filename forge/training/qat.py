"""Quantisation-aware training: a checkpoint learns to be itself although its matrices are rounded.

Every step runs the model with the rounded matrices and moves the float ones behind them so that the distribution of the
next token comes closer to the unrounded model's. The result holds the float matrices, which `forge build` rounds to
exactly what was trained.
"""

from typing import Any

import torch
from torch import Tensor

from forge.quantise import Precision
from forge.training.grid import on_grid
from forge.training.job import Job, Opened, figures_of, open_job, recipe_of, rounded
from forge.training.llama import forward
from forge.training.losses import divergence, perplexity
from forge.training.optimisation import optimise


def train_quantised(job: Job, precision: Precision) -> dict[str, Any]:
    """Train the checkpoint `job.source` on the grid of `precision` and write it as float16. Returns figures, with
    held-out text the perplexities of the float model, of it plainly rounded, and of the trained one as it ships.

    Raises ConfigError or ArtifactError with a remedy.
    """
    opened = open_job(job)
    parameters = opened.parameters()
    losses = _train(opened, parameters, precision)
    tensors = rounded(parameters)
    figures = {"precision": precision.value, **figures_of(job, losses, tensors)}
    if opened.windows is not None:
        a, source = opened.folder.architecture, opened.parameters()
        trained = {name: torch.from_numpy(values) for name, values in tensors.items()}
        figures |= {
            "perplexity_float": perplexity(a, source, opened.windows),
            "perplexity_rounded": perplexity(a, on_grid(precision, source), opened.windows),
            "perplexity": perplexity(a, on_grid(precision, trained), opened.windows),
        }
    opened.finish(opened.folder.config, tensors)
    return figures


def _train(opened: Opened, parameters: dict[str, Tensor], precision: Precision) -> list[float]:
    """Train `parameters` in place; the loss of every step."""
    a, teacher = opened.folder.architecture, opened.parameters()
    for value in parameters.values():
        value.requires_grad_()

    def loss_of(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = forward(a, teacher, ids).logits
        return divergence(wanted, forward(a, on_grid(precision, parameters), ids).logits)

    run = opened.run(recipe_of("train-quantised", {"precision": precision.value}))
    return optimise(parameters, loss_of, opened.corpus, opened.job.schedule, run, opened.job.progress)
