"""Making golden vectors: texts whose reference logits or embeddings notice a wrong layer.

A row's error is the RMS difference of the chosen columns divided by the standard deviation of the whole reference row.
Int8 activations cost the int4 sample 0.4 to 0.8 % on x86; shuffling the nibbles of its least telling tensor costs 18 %.
The tolerance lies between them and is widened only when this very model needs more on the machine that makes it.
"""

import numpy as np
from tokenizers import Tokenizer

from forge.encoder_reference import EncoderJudge
from forge.quantise import Float
from forge.reference import Judge
from wire.golden import EmbeddingSet, EmbeddingVector, GoldenSet, GoldenVector

TOLERANCE = 0.1
MARGIN = 3.0
TOP_COLUMNS = 48
RANDOM_COLUMNS = 208
MIN_TOP1_AGREEMENT = 0.5
"""Near ties flip the argmax between kernels; a wrong model agrees almost nowhere."""

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


def make_golden(reference: Judge, shipped: Judge, tokenizer: Tokenizer, vocab_size: int) -> GoldenSet:
    """Golden vectors of `reference`, with a tolerance that leaves `shipped` a margin on this machine."""
    random = np.random.default_rng(0)
    vectors, errors = [], []
    for prompt in PROMPTS:
        ids = [int(token) for token in tokenizer.encode(prompt).ids]
        last = [len(ids) - 1]
        row = reference.logits(ids, last)[0]
        vector = _vector(ids, row, random, vocab_size)
        vectors.append(vector)
        errors.append(row_error(vector, shipped.logits(ids, last)[0]))
    tolerance = max(TOLERANCE, MARGIN * max(errors))
    return GoldenSet(
        tolerance=min(round(tolerance, 4), 1.0), min_top1_agreement=MIN_TOP1_AGREEMENT, vectors=tuple(vectors)
    )


def row_error(vector: GoldenVector, row: Float) -> float:
    """RMS difference of `row` (float32 [vocabulary]) to the vector, as a share of the reference's deviation."""
    difference = row[list(vector.columns)] - np.asarray(vector.logits, np.float32)
    return float(np.sqrt(np.mean(np.square(difference))) / vector.deviation)


def golden_texts(tokenizer: Tokenizer, max_tokens: int) -> list[list[int]]:
    """Tokens of the prompts, and of all together as often as it takes to judge every position that one text has."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    texts = [[int(token) for token in tokenizer.encode(prompt).ids][:max_tokens] for prompt in PROMPTS]
    longest = min(max_tokens, EMBEDDING_TOKENS)
    joined = [token for text in texts for token in text]
    return [*texts, (joined * (longest // len(joined) + 1))[:longest]]


def make_embedding_set(reference: EncoderJudge, shipped: EncoderJudge, texts: list[list[int]]) -> EmbeddingSet:
    """Golden embeddings of `reference`, with a tolerance that leaves `shipped` a margin on this machine."""
    rows = reference.embed(texts)
    worst = max(embedding_error(row, found) for row, found in zip(rows, shipped.embed(texts), strict=True))
    tolerance = max(EMBEDDING_TOLERANCE, EMBEDDING_MARGIN * worst)
    vectors = tuple(
        EmbeddingVector(input_ids=tuple(text), embedding=tuple(round(float(value), 7) for value in row))
        for text, row in zip(texts, rows, strict=True)
    )
    return EmbeddingSet(tolerance=min(round(tolerance, 6), 1.0), vectors=vectors)


def embedding_error(reference: Float, found: Float) -> float:
    """As wire/golden.py defines it; 1 - cosine of normalised embeddings."""
    expected = reference.astype(np.float64)
    return float(np.sum(np.square(found - expected)) / (2 * np.sum(np.square(expected))))


def _vector(ids: list[int], row: Float, random: np.random.Generator, vocab_size: int) -> GoldenVector:
    top = np.argsort(-row, kind="stable")[:TOP_COLUMNS]
    others = np.setdiff1d(np.arange(vocab_size), top)
    chosen = random.choice(others, min(RANDOM_COLUMNS, others.size), replace=False)
    columns = np.sort(np.concatenate([top, chosen]))
    return GoldenVector(
        input_ids=tuple(ids),
        columns=tuple(int(column) for column in columns),
        logits=tuple(round(float(row[column]), 5) for column in columns),
        deviation=round(float(row.std()), 6),
        argmax=int(np.argmax(row)),
    )
