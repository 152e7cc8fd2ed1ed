"""Distillation: a student of fewer layers or less width learns to answer as its teacher does.

The student begins with the teacher's layers where shapes fit and with chance elsewhere. It is trained to give the
teacher's distribution of the next token (KL at a temperature, arXiv 1503.02531) and the hidden states that the teacher
has after the same share of its layers, through a projection that is thrown away where widths differ (TinyBERT, arXiv
1909.10351). The checkpoint is written when all steps are done; until then there is only the run's state.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional

from forge.checkpoint import Architecture
from forge.checkpoint_folder import Folder
from forge.training.job import Job, Opened, figures_of, open_job, recipe_of, rounded
from forge.training.llama import forward, shapes_of
from forge.training.losses import cross_entropy, distance, divergence, perplexity
from forge.training.optimisation import optimise
from wire.errors import ConfigError

SPREAD = 0.02
"""Standard deviation of what begins with chance."""
PROJECTION = "projection"


@dataclass(frozen=True, slots=True)
class Distillation:
    """The student's shape, None being the teacher's, and the weight of each part of the loss."""

    layers: int | None = None
    hidden_size: int | None = None
    mlp_size: int | None = None
    temperature: float = 2.0
    hidden_weight: float = 1.0
    text_weight: float = 0.0
    """Of the text's own next tokens (cross entropy)."""


def distil(job: Job, recipe: Distillation) -> dict[str, Any]:
    """Train a student of the checkpoint `job.source` and write it as float16. Returns figures, with held-out text the
    perplexities of the teacher, of the student before training, and after it.

    Raises ConfigError or ArtifactError with a remedy.
    """
    opened = open_job(job)
    a = student_of(opened.folder.architecture, recipe)
    parameters = first_parameters(opened.folder, a, job.schedule.seed)
    untrained = {name: value.clone() for name, value in parameters.items()}
    losses = _train(opened, a, parameters, recipe)
    tensors = rounded({name: parameters[name] for name in shapes_of(a)})
    figures = figures_of(job, losses, tensors)
    if opened.windows is not None:
        result = {name: torch.from_numpy(values) for name, values in tensors.items()}
        figures |= {
            "perplexity_teacher": perplexity(opened.folder.architecture, opened.parameters(), opened.windows),
            "perplexity_untrained": perplexity(a, untrained, opened.windows),
            "perplexity": perplexity(a, result, opened.windows),
        }
    opened.finish(_config(opened.folder.config, a), tensors)
    return figures


def student_of(teacher: Architecture, recipe: Distillation) -> Architecture:
    """The student's shape: heads keep their size, and keys and values are shared at least as widely.

    Raises ConfigError when it is larger than the teacher or its parts do not fit each other.
    """
    hidden = recipe.hidden_size or teacher.hidden_size
    heads = teacher.heads if hidden == teacher.hidden_size else hidden // teacher.head_size
    if recipe.hidden_size and (hidden % teacher.head_size or hidden % 32):
        raise ConfigError(f"--hidden {hidden} is no multiple of 32 and of a head's {teacher.head_size}; choose one")
    mlp = recipe.mlp_size or teacher.mlp_size
    if mlp % 32:
        raise ConfigError(f"--mlp {mlp} is no multiple of 32, which the kernels ask for; choose one")
    student = replace(
        teacher, layers=recipe.layers or teacher.layers, hidden_size=hidden, heads=heads,
        kv_heads=gcd(heads, teacher.kv_heads), mlp_size=mlp,
    )  # fmt: skip
    if student.layers > teacher.layers or hidden > teacher.hidden_size or mlp > teacher.mlp_size:
        raise ConfigError("the student would be larger than its teacher; choose fewer layers or less width")
    return student


def chosen_layers(teacher: int, student: int) -> list[int]:
    """Which of the teacher's layers a student begins with: spread evenly, the first and the last among them."""
    return [round(i * (teacher - 1) / (student - 1)) if student > 1 else 0 for i in range(student)]


def first_parameters(teacher: Folder, a: Architecture, seed: int) -> dict[str, Tensor]:
    """What the student begins with; a projection too where widths differ."""
    layers = chosen_layers(teacher.architecture.layers, a.layers)
    parameters = {}
    for name, shape in shapes_of(a).items():
        values = teacher.tensors[_origin(name, layers)]
        fits = values.shape == shape
        parameters[name] = torch.from_numpy(values.copy()) if fits else _chance(name, shape, seed)
    if a.hidden_size != teacher.architecture.hidden_size:
        shape = (teacher.architecture.hidden_size, a.hidden_size)
        parameters[PROJECTION] = _chance(PROJECTION, shape, seed)
    return parameters


def _origin(name: str, layers: list[int]) -> str:
    """The teacher's name for what the student calls `name`."""
    stem, found, rest = name.partition("layers.")
    if not found:
        return name
    number, _, part = rest.partition(".")
    return f"{stem}{found}{layers[int(number)]}.{part}"


def _chance(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Ones for a norm, else small normal values, the same for a name and a seed."""
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(seed << 32 | crc32(name.encode()))
    return torch.randn(shape, generator=generator) * SPREAD


def _train(opened: Opened, a: Architecture, parameters: dict[str, Tensor], recipe: Distillation) -> list[float]:
    """Train `parameters` in place; the loss of every step."""
    job, architecture, teacher = opened.job, opened.folder.architecture, opened.parameters()
    for value in parameters.values():
        value.requires_grad_()

    def loss_of(ids: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = forward(architecture, teacher, ids)
        given = forward(a, parameters, ids)
        loss = divergence(wanted.logits, given.logits, recipe.temperature)
        if recipe.hidden_weight:
            spans = [(i + 1) * architecture.layers // a.layers - 1 for i in range(a.layers)]
            states = [_projected(state, parameters) for state in given.hidden]
            far = [distance(wanted.hidden[span], state) for span, state in zip(spans, states, strict=True)]
            loss = loss + recipe.hidden_weight * torch.stack(far).mean()
        if recipe.text_weight:
            loss = loss + recipe.text_weight * cross_entropy(given.logits, ids)
        return loss

    run = opened.run(recipe_of("distil", asdict(recipe)))
    return optimise(parameters, loss_of, opened.corpus, job.schedule, run, job.progress)


def _projected(state: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return functional.linear(state, parameters[PROJECTION]) if PROJECTION in parameters else state


def _config(teacher: Mapping[str, Any], a: Architecture) -> dict[str, Any]:
    return {
        **teacher, "num_hidden_layers": a.layers, "hidden_size": a.hidden_size, "intermediate_size": a.mlp_size,
        "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads, "head_dim": a.head_size,
    }  # fmt: skip
