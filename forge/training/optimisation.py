"""The steps of a training run, and what a run that was killed goes on from.

Every `save_every` steps the parameters and the optimiser's state replace the run's state file as one, so that a kill at
any moment loses no more than those steps. Batches depend on seed and step alone: a run that was resumed ends with the
same bits as one that was not, on the same machine and number of threads.
"""

import hashlib
import io
import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forge.progress import Progress
from forge.training.corpus import Corpus
from host.files import write_atomically
from wire.errors import ConfigError

WARM_UP = 0.05
"""Share of the steps in which the rate grows to its peak; then it falls along half a cosine."""
LAST_RATE = 0.05
"""What the rate ends at, as a share of its peak."""
LARGEST_GRADIENT = 1.0
"""Norm that gradients are scaled down to."""
BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train; `length` is in tokens."""

    steps: int
    batch: int
    length: int
    learning_rate: float
    seed: int
    save_every: int


@dataclass(frozen=True, slots=True)
class Run:
    """Where a run keeps its state, whether it may go on from it, and the digest of all that makes it what it is."""

    state: Path
    resume: bool
    fingerprint: str


def fingerprint_of(schedule: Schedule, corpus: Corpus, recipe: Mapping[str, Any]) -> str:
    """SHA-256 of what decides the result, so that a state is never taken for that of another run."""
    settings = {**asdict(schedule), "save_every": 0, "corpus": corpus.digest, **recipe}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def state_path(out: Path) -> Path:
    """The state file of the run that makes `out`."""
    return out.with_name(f".{out.name}.training")


def optimise(  # noqa: PLR0913  # what is trained, on what, how, and who watches
    parameters: dict[str, Tensor], loss_of: Callable[[Tensor], Tensor], corpus: Corpus, schedule: Schedule, run: Run,
    progress: Progress,
) -> list[float]:  # fmt: skip
    """Train `parameters` in place by AdamW; `loss_of` is called with int64 [batch, length]. Returns the loss of every
    step.

    Raises ConfigError when a state is there and may not be used, or is of another run.
    """
    optimiser = torch.optim.AdamW(list(parameters.values()), lr=schedule.learning_rate, betas=BETAS, weight_decay=0.0)
    losses = _restore(run, parameters, optimiser)
    for step in range(len(losses), schedule.steps):
        progress(f"train, loss {losses[-1]:.3f}" if losses else "train", step, schedule.steps)
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * _rate(step, schedule.steps)
        loss = loss_of(corpus.batch(schedule.seed, step, schedule.batch, schedule.length))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), LARGEST_GRADIENT)
        optimiser.step()
        losses.append(float(loss.detach()))
        if len(losses) % schedule.save_every == 0:
            _save(run, parameters, optimiser, losses)
    return losses


def _rate(step: int, steps: int) -> float:
    """Share of the peak rate in `step`."""
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    fallen = (step - warm) / max(1, steps - warm)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * fallen))


def _save(run: Run, parameters: Mapping[str, Tensor], optimiser: Any, losses: list[float]) -> None:
    buffer = io.BytesIO()
    values = {name: value.detach() for name, value in parameters.items()}
    state = {"fingerprint": run.fingerprint, "losses": losses, "parameters": values}
    state["optimiser"] = optimiser.state_dict()
    torch.save(state, buffer)
    write_atomically(run.state, buffer.getvalue())


def _restore(run: Run, parameters: Mapping[str, Tensor], optimiser: Any) -> list[float]:
    """Losses of the steps that the state has behind it; none when there is no state."""
    if not run.state.exists():
        return []
    if not run.resume:
        raise ConfigError(f"{run.state} is of a run that was cut off; add --resume to go on with it, or remove it")
    try:
        state = torch.load(run.state, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{run.state} cannot be read ({error}); remove it and train from the start") from error
    if state["fingerprint"] != run.fingerprint:
        raise ConfigError(f"{run.state} is of a run with other settings, model or text; remove it, or give the same")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(state["parameters"][name])
    optimiser.load_state_dict(state["optimiser"])
    return [float(loss) for loss in state["losses"]]
