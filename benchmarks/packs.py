"""Made-up packs, which nobody can decode and everybody can carry: for tests and benchmarks of the transfer."""

import hashlib
import random
from dataclasses import dataclass

from wire.digest import digest_of
from wire.documents import encode_document
from wire.index import Index, Section, SectionCodec, encode_index, index_size
from wire.manifest import FRAME_BYTES, DecoderConfig, FileEntry, Manifest, Requirements, TensorColumns, VersionDocument

SECTION_BYTES = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """A manifest and a pack that nobody can decode, but everybody can carry."""

    manifest: Manifest
    pack: bytes

    @property
    def document(self) -> bytes:
        """The manifest as bytes."""
        return encode_document(self.manifest)

    @property
    def digest(self) -> str:
        """The name of the artifact."""
        return digest_of(self.document)

    def frame(self, frame: int) -> bytes:
        """The bytes of one frame."""
        start, end = self.manifest.frame_range(frame)
        return self.pack[start:end]


def make_version(version: str = "1.0", model: str = "tales") -> VersionDocument:
    """A version of one file."""
    golden = FileEntry(path="golden.json", size_bytes=10, sha256=digest_of(f"{model} {version}".encode()))
    config = DecoderConfig(
        layers=1, hidden_size=8, kv_heads=1, head_size=8, vocab_size=16, context_tokens=32,
    )  # fmt: skip
    return VersionDocument(model=model, version=version, config=config, files=(golden,), tensors=TensorColumns())


def make_artifact(
    data_bytes: int = 3 * FRAME_BYTES + 17,
    seed: int = 1,
    version: str = "1.0",
    base: str | None = None,
    model: str = "tales",
) -> Artifact:
    """A pack of `data_bytes` random bytes behind its index."""
    data = random.Random(seed).randbytes(data_bytes)
    hashes = tuple(hashlib.sha256(data[i : i + FRAME_BYTES]).digest() for i in range(0, data_bytes, FRAME_BYTES))
    sizes = [min(SECTION_BYTES, data_bytes - i) for i in range(0, data_bytes, SECTION_BYTES)]
    sections = tuple(Section(0, 0, SectionCodec.RAW, size, size, 0) for size in sizes)
    index = encode_index(Index(hashes, sections))
    assert len(index) == index_size(len(hashes), len(sections))
    frames = tuple(digest_of(index[i : i + FRAME_BYTES]) for i in range(0, len(index), FRAME_BYTES))
    document = make_version(version, model)
    manifest = Manifest(
        decoded=document.decoded_digest(), version=document, base=base, operations="f", index_size_bytes=len(index),
        index_frames=frames, pack_size_bytes=len(index) + data_bytes, golden=document.files[0].sha256,
        requirements=Requirements(ram_bytes=0, disk_bytes=0),
    )  # fmt: skip
    return Artifact(manifest, index + data)
