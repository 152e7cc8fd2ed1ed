"""A checkpoint to a version directory: import, quantise, graph, golden vectors, version.json.

The directory is written under a temporary name beside its place and renamed at the end; a crash leaves the temporary
name, which the next build of that place removes.
"""

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
from onnx import ModelProto
from tokenizers import Tokenizer

from codec.versions import VERSION_FILE, read_version, stream_bytes
from forge.cache_scales import Int8Cache, measure_scales, place_scales
from forge.checkpoint import Architecture, Checkpoint
from forge.decoder_weights import place_weights
from forge.golden import make_golden, write_golden
from forge.graph import build_graph
from forge.progress import Progress, silent
from forge.quantise import Float
from forge.reference import MODEL_FILE, shipped_judge, twin_judge
from forge.weights import WEIGHTS_FILE, writing_weights
from wire.documents import encode_document
from wire.errors import ConfigError
from wire.golden import GOLDEN_FILE
from wire.manifest import DecoderConfig, Dtype, FileEntry, Layout, TensorColumns, VersionDocument, streams_of

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
FILES = (MODEL_FILE, WEIGHTS_FILE, TOKENIZER_FILE, TEMPLATE_FILE, GOLDEN_FILE)

PLAIN_TEMPLATE = "{%- for message in messages -%}{{ message['content'] }}{{ '\\n\\n' if not loop.last }}{%- endfor -%}"
"""For checkpoints without a chat template: the messages' texts joined by blank lines."""


def build_version(  # noqa: PLR0913  # each is a choice of the caller, three of them by name
    source: Path, out: Path, named: tuple[str, str], *, scales_of: Path | None = None,
    cache: Int8Cache | None = None, progress: Progress | None = None,
) -> VersionDocument:  # fmt: skip
    """Build the version directory `out` from the checkpoint `source`; `named` is (model, version). `scales_of` is the
    version whose scales are kept where they fit, so that a delta to it is sparse. Without `cache` keys and values are
    cached as float32.

    Raises ConfigError or ArtifactError with a remedy when the checkpoint does not fit.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another place for the version")
    checkpoint = Checkpoint(source)
    temporary = out.with_name(f".{out.name}.building")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    base_scales = read_scales(scales_of) if scales_of else None
    _copy_text(source, temporary)
    with writing_weights(temporary) as writer:
        weights = place_weights(checkpoint, writer, base_scales=base_scales, progress=progress)
        _write_graph(temporary, build_graph(checkpoint.architecture, weights))
        config = _config(checkpoint.architecture)
        if cache is not None:
            writer.sink.flush()
            scales = place_scales(writer, measure_scales(temporary, config, cache, progress or silent))
            _write_graph(temporary, build_graph(checkpoint.architecture, weights, scales))
            config = config.model_copy(update={"kv_cache": Dtype.I8})
    columns = writer.columns(FILES.index(WEIGHTS_FILE))
    identity = (*named, config)
    draft = _describe(temporary, identity, columns, FILES[:-1])
    if progress is not None:
        progress("golden vectors", 0, 1)
    tokenizer = Tokenizer.from_file(str(temporary / TOKENIZER_FILE))
    reference, shipped = twin_judge(temporary, draft), shipped_judge(temporary, draft)
    write_golden(make_golden(reference, shipped, tokenizer, checkpoint.architecture.vocab_size), temporary)
    document = _describe(temporary, identity, columns, FILES)
    (temporary / VERSION_FILE).write_bytes(encode_document(document))
    temporary.rename(out)
    return document


def reseal_version(directory: Path) -> VersionDocument:
    """Write version.json anew after files were changed; names, sizes and tensors must be as before."""
    old = read_version(directory)
    names = tuple(entry.path for entry in old.files)
    document = _describe(directory, (old.model, old.version, old.config), old.tensors, names)
    (directory / VERSION_FILE).write_bytes(encode_document(document))
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


def _write_graph(directory: Path, graph: ModelProto) -> None:
    (directory / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))


def _copy_text(source: Path, out: Path) -> None:
    """Tokenizer and chat template, the plain one when the checkpoint has none."""
    if not (source / TOKENIZER_FILE).is_file():
        raise ConfigError(f"{source} has no {TOKENIZER_FILE}; export the fast tokenizer beside the weights")
    shutil.copyfile(source / TOKENIZER_FILE, out / TOKENIZER_FILE)
    template = source / TEMPLATE_FILE
    (out / TEMPLATE_FILE).write_text(template.read_text() if template.is_file() else PLAIN_TEMPLATE)


def _config(a: Architecture) -> DecoderConfig:
    return DecoderConfig(
        layers=a.layers, hidden_size=a.hidden_size, kv_heads=a.kv_heads, head_size=a.head_size,
        vocab_size=a.vocab_size, context_tokens=a.context_tokens, bos_token_id=a.bos_token_id,
        eos_token_ids=a.eos_token_ids,
    )  # fmt: skip


def _describe(
    directory: Path, identity: tuple[str, str, DecoderConfig], tensors: TensorColumns, names: tuple[str, ...]
) -> VersionDocument:
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
