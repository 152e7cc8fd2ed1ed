"""What every training run is given, and what it opens before the first step."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forge.checkpoint_folder import Folder, read_folder, refuse_existing, to_float16, write_folder
from forge.progress import Progress, silent
from forge.quantise import Float
from forge.training.corpus import Corpus, read_corpus
from forge.training.llama import refuse_other_families
from forge.training.losses import WINDOW_TOKENS, WINDOWS
from forge.training.optimisation import Run, Schedule, fingerprint_of, state_path

AVERAGED_STEPS = 20
"""Losses of single batches are noise; the first and the last ones are told as means of these many."""


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint in, a checkpoint out, and the texts between; `heldout` is what perplexities are measured on."""

    source: Path
    out: Path
    texts: Sequence[Path]
    schedule: Schedule
    heldout: Path | None = None
    resume: bool = False
    progress: Progress = silent


@dataclass(frozen=True, slots=True)
class Opened:
    """A job's files in memory; `windows` is int64 [n, 512]."""

    job: Job
    folder: Folder
    corpus: Corpus
    windows: Tensor | None

    def parameters(self) -> dict[str, Tensor]:
        """The checkpoint's parameters, float32."""
        return {name: torch.from_numpy(values.copy()) for name, values in self.folder.tensors.items()}

    def run(self, recipe: Mapping[str, Any]) -> Run:
        """The run that trains after `recipe`."""
        weights = hashlib.sha256()
        for name in sorted(self.folder.tensors):
            weights.update(name.encode() + self.folder.tensors[name].tobytes())
        identity = {**recipe, "weights": weights.hexdigest()}
        return Run(state_path(self.job.out), self.job.resume, fingerprint_of(self.job.schedule, self.corpus, identity))

    def finish(self, config: Mapping[str, Any], tensors: Mapping[str, Float]) -> None:
        """Write the checkpoint; the run's state is no longer needed."""
        write_folder(self.job.source, self.job.out, config, tensors)
        state_path(self.job.out).unlink(missing_ok=True)


def open_job(job: Job) -> Opened:
    """Read everything that `job` names. Raises ConfigError or ArtifactError with a remedy."""
    refuse_existing(job.out)
    torch.manual_seed(job.schedule.seed)
    torch.use_deterministic_algorithms(True)
    folder = read_folder(job.source)
    refuse_other_families(folder.architecture, frozenset(folder.tensors))
    tokenizer = job.source / "tokenizer.json"
    corpus = read_corpus(tokenizer, job.texts, job.schedule.length)
    windows = None
    if job.heldout is not None:
        windows = read_corpus(tokenizer, [job.heldout], WINDOW_TOKENS).windows(WINDOW_TOKENS, WINDOWS)
    return Opened(job, folder, corpus, windows)


def rounded(parameters: Mapping[str, Tensor]) -> dict[str, Float]:
    """What a checkpoint keeps of trained parameters: float16 values, as float32."""
    return {name: to_float16(value.detach().numpy()) for name, value in parameters.items()}


def figures_of(job: Job, losses: Sequence[float], tensors: Mapping[str, Float]) -> dict[str, Any]:
    """What is told of every run."""
    schedule = job.schedule
    return {
        "parameters": sum(values.size for values in tensors.values()),
        "steps": schedule.steps,
        "tokens": schedule.steps * schedule.batch * schedule.length,
        "loss_first": round(float(np.mean(losses[:AVERAGED_STEPS])), 4),
        "loss_last": round(float(np.mean(losses[-AVERAGED_STEPS:])), 4),
    }


def recipe_of(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as what a fingerprint takes."""
    return {"recipe": name, **json.loads(json.dumps(fields))}
