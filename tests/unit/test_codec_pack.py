"""Round trips of whole version directories, full and delta, and refusals of packs that are not what was signed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from codec.decoder import decode_pack
from codec.encoder import EncodedPack, encode_pack
from wire.documents import encode_document
from wire.errors import ArtifactError, Code
from wire.index import index_size
from wire.manifest import (
    DecoderConfig,
    Dtype,
    FileEntry,
    Layout,
    Manifest,
    Requirements,
    TensorColumns,
    VersionDocument,
)

CONFIG = DecoderConfig(layers=1, hidden_size=1, kv_heads=1, head_size=1, vocab_size=1, context_tokens=1)
GOLDEN = b"golden vectors"


def make_version(directory: Path, *, seed: int = 1, changed: float = 0.0) -> VersionDocument:
    """A small version with every layout; `changed` is the share of nibbles that differ from seed's own."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(seed)
    nibbles = np.clip(random.normal(8, 2.5, 1_600_000), 0, 15).astype(np.uint8)
    moved = np.random.default_rng(99).random(nibbles.size) < changed
    nibbles[moved] = np.clip(nibbles[moved].astype(np.int8) + 1, 0, 15).astype(np.uint8)
    packed = nibbles[0::2] | nibbles[1::2] << 4
    floats = random.normal(0, 0.02, 5000).astype(np.float32)
    grid = (floats.view(np.uint32) & 0xFFFF0000).view(np.float32)
    parts = [
        ("packed", Dtype.U4, nibbles.size, Layout.BYTES, packed.tobytes()),
        ("scales", Dtype.F32, grid.size, Layout.F32_BF16_GRID, grid.tobytes()),
        ("norm", Dtype.F32, floats.size, Layout.F32, floats.tobytes()),
        ("half", Dtype.F16, floats.size, Layout.F16, floats.astype(np.float16).tobytes()),
        ("brain", Dtype.BF16, floats.size, Layout.BF16, (floats.view(np.uint32) >> 16).astype(np.uint16).tobytes()),
    ]
    blob, offsets = bytearray(), []
    for _, _, _, _, data in parts:
        blob += b"\0" * (-len(blob) % 64)
        offsets.append(len(blob))
        blob += data
    files = {"weights.bin": bytes(blob), "model.onnx": b"graph " * 500, "golden.json": GOLDEN, "empty.txt": b""}
    entries = []
    for name, data in files.items():
        (directory / name).write_bytes(data)
        entries.append(FileEntry(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    version = VersionDocument(
        model="m",
        version="1",
        config=CONFIG,
        files=tuple(entries),
        tensors=TensorColumns(
            name=tuple(part[0] for part in parts),
            file=(0,) * len(parts),
            dtype=tuple(part[1] for part in parts),
            shape=tuple((part[2],) for part in parts),
            offset=tuple(offsets),
            layout=tuple(part[3] for part in parts),
        ),
    )
    (directory / "version.json").write_bytes(encode_document(version))
    return version


def make_manifest(version: VersionDocument, encoded: EncodedPack, base: str | None = None) -> Manifest:
    return Manifest(
        decoded=version.decoded_digest(),
        version=version,
        base=base,
        operations=encoded.operations,
        index_size_bytes=encoded.index_size_bytes,
        index_frames=encoded.index_frames,
        pack_size_bytes=encoded.pack_size_bytes,
        golden=hashlib.sha256(GOLDEN).hexdigest(),
        requirements=Requirements(ram_bytes=0, disk_bytes=0),
    )


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    return names == sorted(path.name for path in b.iterdir()) and all(
        (a / name).read_bytes() == (b / name).read_bytes() for name in names
    )


def test_full_pack_decodes_to_the_same_directory(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    (tmp_path / "out").mkdir()
    decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out")
    assert same_files(tmp_path / "v", tmp_path / "out")
    assert set(encoded.operations) == {"f"}


def test_encoding_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encode_pack(version, tmp_path / "v", tmp_path / "a")
    encode_pack(version, tmp_path / "v", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_delta_decodes_to_the_same_directory_and_is_small(tmp_path: Path) -> None:
    base = make_version(tmp_path / "base")
    version = make_version(tmp_path / "v", changed=0.02)
    full = encode_pack(version, tmp_path / "v", tmp_path / "full")
    delta = encode_pack(version, tmp_path / "v", tmp_path / "delta", base=(base, tmp_path / "base"))
    assert delta.pack_size_bytes * 8 < full.pack_size_bytes
    assert "d" in delta.operations
    assert "c" in delta.operations
    assert "rice" in {codec for plane in delta.planes for codec in plane.codecs}
    (tmp_path / "out").mkdir()
    manifest = make_manifest(version, delta, base.decoded_digest())
    decode_pack(manifest, tmp_path / "delta", tmp_path / "out", base=tmp_path / "base")
    assert same_files(tmp_path / "v", tmp_path / "out")


def test_delta_on_another_base_is_refused(tmp_path: Path) -> None:
    base = make_version(tmp_path / "base")
    other = make_version(tmp_path / "other", seed=2)
    version = make_version(tmp_path / "v", changed=0.02)
    delta = encode_pack(version, tmp_path / "v", tmp_path / "delta", base=(base, tmp_path / "base"))
    (tmp_path / "out").mkdir()
    manifest = make_manifest(version, delta, base.decoded_digest())
    with pytest.raises(ArtifactError) as refused:
        decode_pack(manifest, tmp_path / "delta", tmp_path / "out", base=tmp_path / "other")
    assert refused.value.code is Code.BASE_MISMATCH
    assert other.decoded_digest() != base.decoded_digest()


def test_flipped_bit_in_any_part_of_the_pack_is_refused(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    manifest = make_manifest(version, encoded)
    good = (tmp_path / "p").read_bytes()
    for position in (0, 40, encoded.index_size_bytes - 1, encoded.index_size_bytes + 9, len(good) // 2, len(good) - 1):
        spoiled = bytearray(good)
        spoiled[position] ^= 0x04
        (tmp_path / "p").write_bytes(spoiled)
        out = tmp_path / f"out{position}"
        out.mkdir()
        with pytest.raises(ArtifactError):
            decode_pack(manifest, tmp_path / "p", out)


def test_section_with_a_wrong_crc_is_refused_before_the_file_hash(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    spoiled = bytearray((tmp_path / "p").read_bytes())
    spoiled[encoded.index_size_bytes - 1] ^= 1  # the last section's CRC, its frame's hash made to fit again
    (tmp_path / "p").write_bytes(spoiled)
    frame = hashlib.sha256(spoiled[: encoded.index_size_bytes]).hexdigest()
    manifest = make_manifest(version, encoded).model_copy(update={"index_frames": (frame,)})
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError) as refused:
        decode_pack(manifest, tmp_path / "p", tmp_path / "out")
    assert refused.value.code is Code.BAD_SECTION


def test_file_that_decodes_to_other_bytes_is_refused(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    entries = (version.files[0], version.files[1].model_copy(update={"sha256": "0" * 64}), *version.files[2:])
    lying = version.model_copy(update={"files": entries})
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError) as refused:
        decode_pack(make_manifest(lying, encoded), tmp_path / "p", tmp_path / "out")
    assert refused.value.code is Code.DIGEST_MISMATCH


def test_index_is_small_beside_the_pack(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    assert encoded.index_size_bytes < encoded.pack_size_bytes * 0.01
    assert encoded.index_size_bytes >= index_size(1, 1)
