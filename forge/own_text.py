"""Text for a calibration that was given none: a model goes on from the golden vectors' prompts, sampled with a seed."""

from tokenizers import Tokenizer

from forge.golden import PROMPTS
from forge.progress import Progress
from forge.quantise import Float
from runtime.model import PREFILL_TOKENS, Model
from runtime.sampling import Sampler, Sampling

OWN_TOKENS = 256
"""Length to which each prompt is continued."""


def continue_prompts(model: Model, tokenizer: Tokenizer, progress: Progress) -> list[list[int]]:
    """The prompts, each in a slot of its own, and what the model makes of them."""
    texts = [[int(token) for token in tokenizer.encode(prompt).ids][: model.shape.capacity] for prompt in PROMPTS]
    rows = [read_text(model, slot, text).copy() for slot, text in enumerate(texts)]
    samplers = [Sampler(Sampling(seed=slot)) for slot in range(len(texts))]
    steps = model.shape.capacity - max(map(len, texts))
    for step in range(steps):
        progress("make text for the calibration", step, steps)
        for text, sampler, row in zip(texts, samplers, rows, strict=True):
            text.append(sampler.draw(row))
        rows = list(model.decode([text[-1] for text in texts], [len(text) - 1 for text in texts]))
    return texts


def read_text(model: Model, slot: int, text: list[int]) -> Float:
    """Read `text` into `slot`; logits of the last token."""
    for start in range(0, len(text), PREFILL_TOKENS):
        logits = model.prefill(slot, text[start : start + PREFILL_TOKENS], start)
    return logits
