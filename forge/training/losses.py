"""What training makes small: divergence from a teacher, distance of hidden states; and perplexity, which judges."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from forge.checkpoint import Architecture
from forge.training.llama import Parameters, forward

WINDOW_TOKENS = 512
WINDOWS = 32
"""Held-out text is judged by this many windows, as the model cards of the samples do."""


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || student) in nats of logits [..., vocabulary] at `temperature`, times its square so that
    gradients keep their size (Hinton et al., arXiv 1503.02531)."""
    wanted = functional.log_softmax(teacher.flatten(0, -2) / temperature, dim=-1)
    given = functional.log_softmax(student.flatten(0, -2) / temperature, dim=-1)
    return functional.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of every token after the first."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean squared error of hidden states as a share of the teacher's mean square."""
    return functional.mse_loss(student, teacher) / teacher.square().mean()


def perplexity(a: Architecture, parameters: Parameters, windows: Tensor) -> float:
    """exp of the mean negative log likelihood over `windows` int64 [n, length]; first tokens are not scored."""
    with torch.no_grad():
        losses = [float(cross_entropy(forward(a, parameters, window[None]).logits, window[None])) for window in windows]
    return math.exp(sum(losses) / len(losses))
