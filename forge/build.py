"""A checkpoint to a version directory: import, quantise, graph, golden vectors, version.json.

The directory is written under a temporary name beside its place and renamed at the end; a crash leaves the temporary
name, which the next build of that place removes.
"""

import hashlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto
from tokenizers import Tokenizer

from codec.versions import VERSION_FILE, read_version, stream_bytes
from forge.activations import measure_activations
from forge.cache_scales import Int8Cache, measure_scales, place_scales
from forge.checkpoint import Checkpoint
from forge.decoder_weights import place_weights
from forge.encoder_checkpoint import EncoderCheckpoint, is_encoder
from forge.encoder_graph import build_encoder_graph
from forge.encoder_weights import place_encoder
from forge.golden import golden_texts, make_embedding_set, make_golden
from forge.graph import build_graph
from forge.placer import Placer, Rounded
from forge.progress import Progress, silent
from forge.provenance import PROVENANCE_FILE, LeastNoticed, Provenance, write_provenance
from forge.quantise import BLOCK, BLOCKS, Float, Precision
from forge.reference import MODEL_FILE
from forge.weights import WEIGHTS_FILE, writing_weights
from wire.documents import encode_document
from wire.errors import ConfigError
from wire.golden import GOLDEN_FILE, EmbeddingSet, GoldenSet
from wire.manifest import (
    DecoderConfig,
    Dtype,
    EncoderConfig,
    FileEntry,
    Layout,
    ModelConfig,
    TensorColumns,
    VersionDocument,
    streams_of,
)

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
FILES = (MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TEMPLATE_FILE, GOLDEN_FILE)

DECODER_PRECISION = Precision.INT4
ENCODER_PRECISIONS = (Precision.FLOAT32, Precision.INT8, Precision.INT4)
ENCODER_PRECISION = Precision.INT8
"""all-MiniLM-L6-v2 keeps a cosine of 0.999 to its float32 embeddings in int8, and 0.93 to 0.98 in int4."""

PLAIN_TEMPLATE = "{%- for message in messages -%}{{ message['content'] }}{{ '\\n\\n' if not loop.last }}{%- endfor -%}"
"""For checkpoints without a chat template: the messages' texts joined by blank lines."""


def build_version(  # noqa: PLR0913  # each is a choice of the caller, three of them by name
    source: Path, out: Path, named: tuple[str, str], *, precision: Precision | None = None,
    rounded: Rounded | None = None, longest: int | None = None, scales_of: Path | None = None,
    cache: Int8Cache | None = None, progress: Progress = silent,
) -> VersionDocument:  # fmt: skip
    """Build the version directory `out` from the checkpoint `source`; `named` is (model, version). `precision` None is
    the one of its kind (DECODER_PRECISION, ENCODER_PRECISION). `rounded` are matrices of a decoder that are quantised
    already, by name. `longest` weights of the others share a scale, where rows have a whole number of such blocks; None
    is as in `scales_of`, else BLOCK. `scales_of` is the version whose scales are kept where they fit, so that a delta
    to it is sparse. Without `cache` keys and values of a decoder are cached as float32.

    Raises ConfigError or ArtifactError with a remedy when the checkpoint does not fit.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another place for the version")
    if source.suffix == ".onnx":
        raise ConfigError(f"{source} is an ONNX model, no checkpoint; serve it as it is with `amperage forge import`")
    encoder = is_encoder(source)
    if longest is not None:
        _check_block(longest, precision or (ENCODER_PRECISION if encoder else DECODER_PRECISION), encoder=encoder)
    make = _make_encoder if encoder else _make_decoder
    temporary = out.with_name(f".{out.name}.building")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    base_scales = read_scales(scales_of) if scales_of else {}
    longest = longest or (longest_block(read_version(scales_of)) if scales_of else BLOCK)
    choices = _Choices(precision, rounded or {}, base_scales, longest, cache, progress)
    config, columns = make(source, temporary, choices)
    identity = (*named, config)
    files = FILES if isinstance(config, DecoderConfig) else tuple(name for name in FILES if name != TEMPLATE_FILE)
    draft = describe_version(temporary, identity, columns, files[:-1])
    progress("golden vectors", 0, 1)
    golden, least_noticed = _golden(temporary, draft)
    (temporary / GOLDEN_FILE).write_bytes(encode_document(golden))
    document = describe_version(temporary, identity, columns, files)
    (temporary / VERSION_FILE).write_bytes(encode_document(document))
    write_provenance(temporary, Provenance(least_noticed=least_noticed))
    temporary.rename(out)
    return document


def reseal_version(directory: Path) -> VersionDocument:
    """Write version.json anew after files were changed; names, sizes and tensors must be as before. Where the version
    came from is forgotten: it is not what that made."""
    old = read_version(directory)
    names = tuple(entry.path for entry in old.files)
    document = describe_version(directory, (old.model, old.version, old.config), old.tensors, names)
    (directory / VERSION_FILE).write_bytes(encode_document(document))
    (directory / PROVENANCE_FILE).unlink(missing_ok=True)
    return document


def read_scales(directory: Path) -> dict[str, Float]:
    """The scales of a version by tensor name, float32 [rows, blocks]."""
    version = read_version(directory)
    scales: dict[str, Float] = {}
    shapes = dict(zip(version.tensors.name, version.tensors.shape, strict=True))
    for stream in streams_of(version):
        if stream.layout is Layout.F32_BF16_GRID:
            scales[stream.name] = stream_bytes(directory, stream).view(np.float32).reshape(shapes[stream.name])
    return scales


def _check_block(longest: int, precision: Precision, *, encoder: bool) -> None:
    if longest not in BLOCKS:
        raise ConfigError(f"no block has {longest} weights; choose one of {', '.join(map(str, BLOCKS))}")
    if precision is Precision.FLOAT32 or (encoder and precision is Precision.INT8):
        raise ConfigError(f"nothing is stored in blocks as {precision}; leave --block out, or choose int4")


def longest_block(version: VersionDocument) -> int:
    """Most weights of a version that share a scale; BLOCK where nothing is in blocks."""
    columns = version.tensors
    shapes = dict(zip(columns.name, columns.shape, strict=True))
    pairs = ((shapes.get(f"{name.removesuffix('.scales')}.packed"), scales) for name, scales in shapes.items())
    return max((packed[1] // scales[1] for packed, scales in pairs if packed is not None), default=BLOCK)


@dataclass(frozen=True, slots=True)
class _Choices:
    """What the caller wants of a build."""

    precision: Precision | None
    rounded: Rounded
    base_scales: Mapping[str, Float]
    longest: int
    cache: Int8Cache | None
    progress: Progress


def _make_decoder(source: Path, out: Path, choices: _Choices) -> tuple[ModelConfig, TensorColumns]:
    """Weights, graph, tokenizer and chat template, the plain one when the checkpoint has none."""
    if choices.precision is Precision.INT8_STATIC and not choices.rounded:
        raise ConfigError("int8-static needs text to calibrate on; build it by `amperage forge build`, or take int8")
    checkpoint = Checkpoint(source)
    a, progress = checkpoint.architecture, choices.progress
    _copy_tokenizer(source, out)
    template = source / TEMPLATE_FILE
    (out / TEMPLATE_FILE).write_text(template.read_text() if template.is_file() else PLAIN_TEMPLATE)
    config = DecoderConfig(
        layers=a.layers, hidden_size=a.hidden_size, kv_heads=a.kv_heads, head_size=a.head_size,
        vocab_size=a.vocab_size, context_tokens=a.context_tokens, bos_token_id=a.bos_token_id,
        eos_token_ids=a.eos_token_ids,
    )  # fmt: skip
    with writing_weights(out) as writer:
        precision = choices.precision or DECODER_PRECISION
        placer = Placer(writer, choices.base_scales, precision, choices.rounded, choices.longest)
        weights = place_weights(checkpoint, placer, progress)
        _write_graph(out, build_graph(a, weights))
        if choices.cache is not None:
            writer.sink.flush()
            scales = place_scales(writer, measure_scales(out, config, choices.cache, progress))
            _write_graph(out, build_graph(a, weights, scales))
            config = config.model_copy(update={"kv_cache": Dtype.I8})
    return config, writer.columns(FILES.index(WEIGHTS_FILE))


def _make_encoder(source: Path, out: Path, choices: _Choices) -> tuple[ModelConfig, TensorColumns]:
    """Weights, graph and tokenizer."""
    if choices.cache is not None:
        raise ConfigError("an encoder keeps no keys and values; leave the cache's type out")
    if choices.precision is not None and choices.precision not in ENCODER_PRECISIONS:
        raise ConfigError(f"encoders are not built as {choices.precision}; use one of {', '.join(ENCODER_PRECISIONS)}")
    checkpoint = EncoderCheckpoint(source)
    a, precision = checkpoint.architecture, choices.precision or ENCODER_PRECISION
    _copy_tokenizer(source, out)
    texts = golden_texts(Tokenizer.from_file(str(out / TOKENIZER_FILE)), a.max_tokens)
    activations = measure_activations(checkpoint, texts) if precision is Precision.INT8 else None
    with writing_weights(out) as writer:
        placer = Placer(writer, choices.base_scales, precision, longest=choices.longest)
        weights = place_encoder(checkpoint, placer, activations, choices.progress)
    _write_graph(out, build_encoder_graph(a, weights))
    config = EncoderConfig(
        layers=a.layers, hidden_size=a.hidden_size, heads=a.heads, vocab_size=a.vocab_size, max_tokens=a.max_tokens,
        dimensions=a.hidden_size, pooling=a.pooling, normalised=a.normalised,
    )  # fmt: skip
    return config, writer.columns(FILES.index(WEIGHTS_FILE))


def _golden(directory: Path, draft: VersionDocument) -> tuple[GoldenSet | EmbeddingSet, LeastNoticed]:
    """Golden vectors of the float32 twin, and what they notice least."""
    tokenizer = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    if isinstance(draft.config, EncoderConfig):
        return make_embedding_set(directory, draft.config, tokenizer)
    return make_golden(directory, draft, tokenizer)


def _write_graph(out: Path, graph: ModelProto) -> None:
    (out / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))


def _copy_tokenizer(source: Path, out: Path) -> None:
    if not (source / TOKENIZER_FILE).is_file():
        raise ConfigError(f"{source} has no {TOKENIZER_FILE}; export the fast tokenizer beside the weights")
    shutil.copyfile(source / TOKENIZER_FILE, out / TOKENIZER_FILE)


def describe_version(
    directory: Path, identity: tuple[str, str, ModelConfig], tensors: TensorColumns, names: tuple[str, ...]
) -> VersionDocument:
    """The document of a version directory; `identity` is (model, version, config), `names` are its files."""
    entries = []
    for name in names:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append(FileEntry(path=name, size_bytes=(directory / name).stat().st_size, sha256=digest))
    model, version, config = identity
    return VersionDocument(model=model, version=version, config=config, files=tuple(entries), tensors=tensors)


def parameters_of(version: VersionDocument) -> int:
    """How many weights the version holds."""
    return sum(weights_by_tensor(version).values())


def weights_by_tensor(version: VersionDocument) -> dict[str, int]:
    """Weights per tensor: its elements, but none for scales, which are the price of quantisation."""
    columns = version.tensors
    rows = zip(columns.name, columns.shape, columns.layout, strict=True)
    return {name: 0 if layout is Layout.F32_BF16_GRID else math.prod(shape) for name, shape, layout in rows}
