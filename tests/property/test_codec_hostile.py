"""Whole artifacts that were cut, mutated or made up: always ArtifactError, never another exception, a crash, or memory.

Mutations are made twice: as damage (the index no longer has its signed digest), and as malice (the index frames are
signed again over the mutation, so that everything behind the digests is reached).
"""

import hashlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from codec.decoder import decode_pack
from codec.encoder import encode_pack
from codec.versions import read_version
from tests.fixtures.codec.versions import make_manifest, make_version
from wire.documents import encode_document, parse_document
from wire.errors import ArtifactError, Code, StoreError
from wire.index import Index, Section, SectionCodec, encode_index, parse_index
from wire.manifest import FRAME_BYTES, Manifest

HEADROOM_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Artifact:
    manifest: Manifest
    pack: bytes
    base: Path

    @property
    def data(self) -> bytes:
        return self.pack[self.manifest.index_size_bytes :]

    @property
    def index(self) -> Index:
        return parse_index(self.pack[: self.manifest.index_size_bytes], len(self.data))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small delta with every operation, and sections of every codec."""
    place = tmp_path_factory.mktemp("artifact")
    base = make_version(place / "base", weights=6000, floats=300, notes=b"old notes of some length " * 9)
    version = make_version(place / "v", weights=6000, floats=300, changed=0.02, notes=b"new notes of some length " * 8)
    encoded = encode_pack(version, place / "v", place / "p", base=(base, place / "base"))
    return Artifact(make_manifest(version, encoded, base.decoded_digest()), (place / "p").read_bytes(), place / "base")


def resign(artifact: Artifact, index: Index, data: bytes) -> tuple[Manifest, bytes]:
    """A manifest that vouches for the given index and data."""
    hashes = tuple(hashlib.sha256(data[i : i + FRAME_BYTES]).digest() for i in range(0, len(data), FRAME_BYTES))
    head = encode_index(Index(hashes, index.sections))
    frames = tuple(hashlib.sha256(head[i : i + FRAME_BYTES]).hexdigest() for i in range(0, len(head), FRAME_BYTES))
    update = {"index_size_bytes": len(head), "index_frames": frames, "pack_size_bytes": len(head) + len(data)}
    return artifact.manifest.model_copy(update=update), head + data


def decode(artifact: Artifact, manifest: Manifest, pack: bytes) -> dict[str, str]:
    """SHA-256 of every decoded file by name."""
    with TemporaryDirectory() as place:
        (Path(place) / "p").write_bytes(pack)
        (Path(place) / "out").mkdir()
        out = Path(place) / "out"
        decode_pack(manifest, Path(place) / "p", out, base=artifact.base)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_untouched_artifact_decodes(artifact: Artifact) -> None:
    decode(artifact, artifact.manifest, artifact.pack)
    decode(artifact, *resign(artifact, artifact.index, artifact.data))
    assert set(artifact.manifest.operations) == {"f", "c", "d"}
    assert {SectionCodec.RICE, SectionCodec.DICTIONARY} <= {section.codec for section in artifact.index.sections}


def test_artifact_cut_at_every_byte_is_refused(artifact: Artifact) -> None:
    with TemporaryDirectory() as place:
        pack, out = Path(place) / "p", Path(place) / "out"
        pack.write_bytes(artifact.pack)
        for size in range(len(artifact.pack) - 1, -1, -1):
            os.truncate(pack, size)
            out.mkdir()
            with pytest.raises(ArtifactError):
                decode_pack(artifact.manifest, pack, out, base=artifact.base, threads=1)
            shutil.rmtree(out)


def test_sections_cut_at_every_byte_and_signed_are_refused(artifact: Artifact) -> None:
    """The last section is shortened byte by byte, with an index that agrees."""
    index, data = artifact.index, artifact.data
    for size in range(1, index.sections[-1].coded_size):
        cut = data[: len(data) - size]
        last = resized(index.sections[-1], index.sections[-1].coded_size - size)
        with pytest.raises(ArtifactError):
            decode(artifact, *resign(artifact, Index((), (*index.sections[:-1], last)), cut))


def resized(section: Section, coded_size: int) -> Section:
    return Section(section.stream, section.plane, section.codec, section.raw_size, coded_size, section.crc32)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mutated_bytes_anywhere_are_refused_or_change_nothing(artifact: Artifact, draw: st.DataObject) -> None:
    """A byte that no decoder looks at (an unused palette entry) may pass here: its frame's hash catches it before."""
    spoiled = bytearray(artifact.pack)
    position = draw.draw(st.integers(0, len(spoiled) - 1))
    spoiled[position] ^= draw.draw(st.integers(1, 255))
    try:
        decoded = decode(artifact, artifact.manifest, bytes(spoiled))
    except ArtifactError:
        return
    assert position >= artifact.manifest.index_size_bytes
    assert all(decoded[entry.path] == entry.sha256 for entry in artifact.manifest.version.files)


SECTIONS = st.builds(
    Section,
    stream=st.integers(0, 9),
    plane=st.integers(0, 4),
    codec=st.sampled_from(list(SectionCodec)),
    raw_size=st.sampled_from([1, 299, 300, 301, 3000, 1 << 20]),
    coded_size=st.integers(1, 400),
    crc32=st.integers(0, 2**32 - 1),
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_signed_section_table_that_lies_is_refused(artifact: Artifact, draw: st.DataObject) -> None:
    table = list(artifact.index.sections)
    for _ in range(draw.draw(st.integers(1, 3))):
        row = draw.draw(st.integers(0, len(table) - 1))
        match draw.draw(st.sampled_from(["replace", "drop", "repeat"])):
            case "replace":
                table[row] = draw.draw(SECTIONS)
            case "drop" if len(table) > 1:
                del table[row]
            case _:
                table.insert(row, table[row])
    if tuple(table) == artifact.index.sections:
        return
    data = artifact.data.ljust(sum(section.coded_size for section in table), b"\0")
    data = data[: sum(section.coded_size for section in table)]
    with pytest.raises(ArtifactError):
        decode(artifact, *resign(artifact, Index((), tuple(table)), data))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_signed_section_of_other_bytes_is_refused(artifact: Artifact, draw: st.DataObject) -> None:
    """Bytes of a section change, under any codec's name; the CRC of what was meant stays."""
    table, data = list(artifact.index.sections), bytearray(artifact.data)
    row = draw.draw(st.integers(0, len(table) - 1))
    start = sum(section.coded_size for section in table[:row])
    data[start + draw.draw(st.integers(0, table[row].coded_size - 1))] ^= draw.draw(st.integers(1, 255))
    codec = draw.draw(st.sampled_from(list(SectionCodec)))
    old = table[row]
    table[row] = Section(old.stream, old.plane, codec, old.raw_size, old.coded_size, old.crc32)
    try:
        decoded = decode(artifact, *resign(artifact, Index((), tuple(table)), bytes(data)))
    except ArtifactError:
        return
    # A bit that no decoder reads (padding) may change and the same bytes come out: that is no harm.
    assert all(decoded[entry.path] == entry.sha256 for entry in artifact.manifest.version.files)


def bombs() -> Iterator[tuple[str, SectionCodec, bytes, int]]:
    """Sections that claim or cause as much as they can: (name, codec, coded bytes, decoded size in the index)."""
    mebibyte = 1 << 20
    full = bytes([0xFF]) * (mebibyte - 64)
    yield "header that claims exabytes", SectionCodec.HUFFMAN, bytes.fromhex("28b52ffde06c06060663636363"), mebibyte
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 30))
    yield "a GiB of zeros", SectionCodec.HUFFMAN, zeros, mebibyte
    # Block headers of RFC 8878 3.1.1.2: run-length blocks of 128 KiB, 8192 of them, behind a header that claims a MiB.
    runs = b"".join((1 << 17 << 3 | 1 << 1 | (n == 8191)).to_bytes(3, "little") + b"\0" for n in range(8192))
    header = bytes.fromhex("28b52ffd a0") + mebibyte.to_bytes(4, "little")
    yield "a GiB of zeros behind a modest header", SectionCodec.HUFFMAN, header + runs, mebibyte
    yield "window of a GiB", SectionCodec.HUFFMAN, bytes.fromhex("28b52ffd 80 a0 00001000") + runs[:32], mebibyte
    yield "rice of ones", SectionCodec.RICE, bytes.fromhex("0400000000000800ffffffff") + full, mebibyte
    yield "rice of most events", SectionCodec.RICE, bytes.fromhex("04140014000008000000 0800") + full, mebibyte
    yield "rice of wide palette", SectionCodec.RICE, bytes.fromhex("0814041400000400 00000400") + full, mebibyte
    yield "ans of many lanes", SectionCodec.ANS, bytes([12, 0, 0, 0]) + full, mebibyte
    yield "ans of one lane", SectionCodec.ANS, bytes([0, 0, 0, 0]) + full, mebibyte


@pytest.mark.parametrize(
    ("name", "codec", "coded", "raw_size"), list(bombs()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_section_bomb_is_refused_within_bounded_memory(
    tmp_path: Path, name: str, codec: SectionCodec, coded: bytes, raw_size: int
) -> None:
    version = make_version(tmp_path / "v", weights=raw_size * 2, floats=2)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    good = Artifact(make_manifest(version, encoded), (tmp_path / "p").read_bytes(), tmp_path / "v")
    first = good.index.sections[0]
    assert first.raw_size == raw_size
    bomb = Section(0, 0, codec, raw_size, len(coded), first.crc32)
    manifest, pack = resign(good, Index((), (bomb, *good.index.sections[1:])), coded + good.data[first.coded_size :])
    (tmp_path / "bomb").write_bytes(pack)
    (tmp_path / "out").mkdir()
    assert in_child(lambda: decode_pack(manifest, tmp_path / "bomb", tmp_path / "out", threads=1)) == "ArtifactError"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small full artifact whose float tensors are sparse."""
    place = tmp_path_factory.mktemp("sparse")
    version = make_version(place / "v", weights=600, floats=400, pruned=0.6)
    encoded = encode_pack(version, place / "v", place / "p")
    assert "s" in encoded.operations
    return Artifact(make_manifest(version, encoded), (place / "p").read_bytes(), place / "v")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_signed_sparse_sections_that_lie_are_refused(sparse: Artifact, draw: st.DataObject) -> None:
    """Masks that set more or fewer items than there are, past the end, or of another size."""
    table, data = list(sparse.index.sections), bytearray(sparse.data)
    row = draw.draw(st.sampled_from([n for n, s in enumerate(table) if sparse.manifest.operations[s.stream] == "s"]))
    old = table[row]
    if draw.draw(st.booleans()):
        start = sum(section.coded_size for section in table[:row])
        data[start + draw.draw(st.integers(0, old.coded_size - 1))] ^= draw.draw(st.integers(1, 255))
    else:
        size = draw.draw(st.sampled_from([0, 1, 49, 50, 51, 399, 400, 401, 1 << 17, (1 << 17) + 1, 1 << 20]))
        coded_size = old.coded_size if size else 0
        table[row] = Section(old.stream, old.plane, old.codec, size, coded_size, old.crc32)
        data = data[: sum(section.coded_size for section in table)]
    try:
        decoded = decode(sparse, *resign(sparse, Index((), tuple(table)), bytes(data)))
    except ArtifactError:
        return
    assert all(decoded[entry.path] == entry.sha256 for entry in sparse.manifest.version.files)


def test_sparse_artifact_cut_at_every_byte_is_refused(sparse: Artifact) -> None:
    with TemporaryDirectory() as place:
        pack, out = Path(place) / "p", Path(place) / "out"
        pack.write_bytes(sparse.pack)
        for size in range(len(sparse.pack) - 1, -1, -1):
            os.truncate(pack, size)
            out.mkdir()
            with pytest.raises(ArtifactError):
                decode_pack(sparse.manifest, pack, out, threads=1)
            shutil.rmtree(out)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_manifest_is_refused_or_means_the_same_files(artifact: Artifact, draw: st.DataObject) -> None:
    document = bytearray(encode_document(artifact.manifest))
    for _ in range(draw.draw(st.integers(1, 3))):
        document[draw.draw(st.integers(0, len(document) - 1))] = draw.draw(st.sampled_from(b'0189af"{}[],:-fscdtu\x00'))
    try:
        manifest = parse_document(Manifest, bytes(document), code=Code.BAD_MANIFEST)
        decoded = decode(artifact, manifest, artifact.pack)
    except (ArtifactError, StoreError):
        return
    assert all(decoded[entry.path] == entry.sha256 for entry in manifest.version.files)


def test_decoding_stays_within_bounded_memory(tmp_path: Path) -> None:
    """A delta of 4 MiB decodes under the same limit that the bombs are held to: the limit is not what stops them."""
    base = make_version(tmp_path / "base", weights=8 << 20)
    version = make_version(tmp_path / "v", weights=8 << 20, changed=0.05)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p", base=(base, tmp_path / "base"))
    manifest = make_manifest(version, encoded, base.decoded_digest())
    (tmp_path / "out").mkdir()
    assert in_child(lambda: decode_pack(manifest, tmp_path / "p", tmp_path / "out", base=tmp_path / "base")) == ""
    assert read_version(tmp_path / "out") == version


def in_child(work: Callable[[], None]) -> str:
    """Run `work` in a child that may map HEADROOM_BYTES more than it has; the name of what it raised, or ''."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        answer = ""
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # the parent judges
            answer = type(error).__name__
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return answer if status == 0 else f"exit status {status}"
