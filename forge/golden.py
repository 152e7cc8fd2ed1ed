"""Making golden vectors: texts whose reference logits or embeddings notice a wrong layer.

A row's error is the RMS difference of the chosen columns divided by the standard deviation of the whole reference row.
Int8 activations cost the int4 sample 0.5 to 0.8 % on x86, leaving out half a layer at least 18 % of any row and 33 % of
the chosen ones. The tolerance lies between them and is widened only when this very model needs more on the machine that
makes it. What a damage moves no further than kernels may round is not noticed: that is what digests are for.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from forge.damages import Damage, decoder_damages, encoder_damages
from forge.encoder_reference import EncoderJudge, shipped_encoder
from forge.golden_choice import Row, choose_rows, make_vector, relative_error, rows_of
from forge.provenance import LeastNoticed
from forge.quantise import Float
from forge.reference import Judge, float_twin, shape_of, shipped_judge
from runtime.subject import MEASURED_TOKENS
from wire.golden import EmbeddingSet, EmbeddingVector, GoldenSet, GoldenVector
from wire.manifest import DecoderConfig, EncoderConfig, VersionDocument

TOLERANCE = 0.1
MARGIN = 3.0
MIN_TOP1_AGREEMENT = 0.5
"""Near ties flip the argmax between kernels; a wrong model agrees almost nowhere."""
LONG_TOKENS = 160
"""Of the text for what only shows late: windows, rotary positions, prompts that are read in more than one chunk."""
LATE_ROWS = 32

EMBEDDING_TOLERANCE = 0.001
EMBEDDING_MARGIN = 9.0
"""Of a squared distance, where MARGIN is of a distance."""
EMBEDDING_TOKENS = 256
"""Length of the long text, where the model takes so many."""

PROMPTS = (
    "The",
    "It was late in the evening when the",
    "She opened the letter slowly, and read",
    "There were three men in the boat, and each of them said that",
    '"I do not know," he answered; "but if you will come with me to the village, we shall',
    "1, 2, 3, 4, 5, 6, 7,",
    "In the beginning of the year the roads were bad, the rivers were high, and nobody travelled unless he must; so",
    "My dear sir, you will forgive me for writing at such length about a matter which concerns you little, but I",
)


def make_golden(directory: Path, version: VersionDocument, tokenizer: Tokenizer) -> tuple[GoldenSet, LeastNoticed]:
    """Golden vectors of the float32 twin of a decoder, with a tolerance that leaves the model as shipped a margin on
    this machine, and what they notice least."""
    config = version.config
    assert isinstance(config, DecoderConfig)  # noqa: S101  encoders have make_embedding_set
    twin = float_twin(directory)
    rows = _candidates(tokenizer, config.context_tokens)
    damages = decoder_damages(twin, config.layers, max(len(row.text) for row in rows))
    judge = Judge(twin.SerializeToString(), *shape_of(version))
    reference, shipped = _logits(judge, rows), _logits(shipped_judge(directory, version), rows)
    seen = [relative_error(_damaged(judge, rows, damage), reference) for damage in damages]
    late = np.array([row.late for row in rows])
    choices = choose_rows(late, reference, relative_error(shipped, reference), np.array(seen))
    numbers = [choice.row for choice in choices]
    chosen = [rows[number] for number in numbers]
    damaged = [np.concatenate([_damaged(judge, [row], damage) for row in chosen]) for damage in damages]
    random = np.random.default_rng(0)
    vectors = tuple(
        make_vector(row, reference[choice.row], damaged[choice.damage][i] - reference[choice.row], random)
        for i, (row, choice) in enumerate(zip(chosen, choices, strict=True))
    )
    tolerance = round(min(max(TOLERANCE, MARGIN * _worst(vectors, shipped[numbers])), 1.0), 4)
    golden = GoldenSet(tolerance=tolerance, min_top1_agreement=MIN_TOP1_AGREEMENT, vectors=vectors)
    errors = [_worst(vectors, found) / tolerance for found in damaged]
    return golden, _least(damages, errors)


def row_error(vector: GoldenVector, row: Float) -> float:
    """RMS difference of `row` (float32 [vocabulary]) to the vector, as a share of the reference's deviation."""
    difference = row[list(vector.columns)] - np.asarray(vector.logits, np.float32)
    return float(np.sqrt(np.mean(np.square(difference))) / vector.deviation)


def golden_texts(tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Tokens of the prompts, and of all together as often as it takes to judge every position that one text has."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [[int(token) for token in tokenizer.encode(prompt).ids][:max_tokens] for prompt in PROMPTS]
    return [*texts, _repeated(texts, min(max_tokens, EMBEDDING_TOKENS))]


def make_embedding_set(
    directory: Path, config: EncoderConfig, tokenizer: Tokenizer
) -> tuple[EmbeddingSet, LeastNoticed]:
    """Golden embeddings of the float32 twin of an encoder, as make_golden."""
    texts = golden_texts(tokenizer, config.max_tokens)
    twin = float_twin(directory)
    damages = encoder_damages(twin, config.layers)
    judge = EncoderJudge(twin.SerializeToString())
    rows = judge.embed(texts)
    worst = _farthest(rows, shipped_encoder(directory).embed(texts))
    tolerance = round(min(max(EMBEDDING_TOLERANCE, EMBEDDING_MARGIN * worst), 1.0), 6)
    vectors = tuple(
        EmbeddingVector(input_ids=tuple(text), embedding=tuple(round(float(value), 7) for value in row))
        for text, row in zip(texts, rows, strict=True)
    )
    errors = [_farthest(rows, judge.embed(texts, damage.tensors)) / tolerance for damage in damages]
    return EmbeddingSet(tolerance=tolerance, vectors=vectors), _least(damages, errors)


def embedding_error(reference: Float, found: Float) -> float:
    """As wire/golden.py defines it; 1 - cosine of normalised embeddings."""
    expected = reference.astype(np.float64)
    return float(np.sum(np.square(found - expected)) / (2 * np.sum(np.square(expected))))


def _candidates(tokenizer: Tokenizer, context_tokens: int) -> list[Row]:
    """Places of the prompts, and late ones of a long text made of them; what a probe adds must fit the context, too."""
    longest = max(min(LONG_TOKENS, context_tokens - MEASURED_TOKENS - 1), 1)
    texts = [[int(token) for token in tokenizer.encode(prompt).ids][:longest] for prompt in PROMPTS]
    return rows_of(texts, _repeated(texts, longest), LATE_ROWS)


def _repeated(texts: Sequence[Sequence[int]], length: int) -> list[int]:
    """All texts together, as often as it takes to fill `length`."""
    joined = [token for text in texts for token in text]
    return (joined * (length // len(joined) + 1))[:length]


def _logits(judge: Judge, rows: Sequence[Row], tensors: Mapping[str, Float] | None = None) -> Float:
    """Logits float32 [rows, vocabulary]; rows of one text are beside each other and take one run."""
    runs = [(text, [row.position for row in run]) for text, run in groupby(rows, lambda row: row.text)]
    return np.concatenate([judge.logits(text[: max(places) + 1], places, tensors) for text, places in runs])


def _damaged(judge: Judge, rows: Sequence[Row], damage: Damage) -> Float:
    """As _logits, of the model or the texts with `damage`."""
    return _logits(judge, [row.recent(damage.window) if damage.window else row for row in rows], damage.tensors)


def _worst(vectors: Sequence[GoldenVector], rows: Float) -> float:
    return max(row_error(vector, row) for vector, row in zip(vectors, rows, strict=True))


def _farthest(reference: Float, found: Float) -> float:
    return max(embedding_error(row, other) for row, other in zip(reference, found, strict=True))


def _least(damages: Sequence[Damage], ratios: Sequence[float]) -> LeastNoticed:
    number = int(np.argmin(ratios))
    return LeastNoticed(damage=damages[number].name, ratio=round(ratios[number], 2))
