"""The encoder and the real decoder against a second decoder that was written from docs/artifact-format.md alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from codec.ans import encode_ans
from codec.decoder import decode_pack
from codec.encoder import encode_pack
from codec.rice import encode_rice
from tests import reference_decoder
from tests.fixtures.codec import reference_zstd
from tests.fixtures.codec.versions import make_manifest, make_version, same_files
from wire.documents import encode_document

SPARSE = st.lists(st.sampled_from([0] * 60 + [1, 15, 16, 1, 15, 16, 240, 255, 7]), min_size=1, max_size=2000).map(bytes)


@pytest.mark.parametrize("changed", [None, 0.02, 0.3])
def test_reference_decoder_reproduces_the_directory(tmp_path: Path, changed: float | None) -> None:
    text = " ".join(str(n * n) for n in range(2000)).encode()
    base = make_version(tmp_path / "base", weights=60_000, floats=2000, notes=text)
    version = make_version(tmp_path / "v", weights=60_000, floats=2000, changed=changed or 0, notes=text[500:] + text)
    against = None if changed is None else (base, tmp_path / "base")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p", base=against)
    manifest = make_manifest(version, encoded, None if changed is None else base.decoded_digest())
    files = reference_decoder.decode(encode_document(manifest), (tmp_path / "p").read_bytes(), tmp_path / "base")
    for out in ("ours", "reference"):
        (tmp_path / out).mkdir()
    for path, data in files.items():
        (tmp_path / "reference" / path).write_bytes(data)
    decode_pack(manifest, tmp_path / "p", tmp_path / "ours", base=None if changed is None else tmp_path / "base")
    assert same_files(tmp_path / "ours", tmp_path / "reference")
    assert same_files(tmp_path / "v", tmp_path / "reference")


@given(SPARSE.filter(lambda data: len(data) > 1))
def test_reference_decoder_reads_ans(data: bytes) -> None:
    assert reference_decoder.decode_ans(encode_ans(np.frombuffer(data, np.uint8)), len(data)) == data


@given(SPARSE, st.sampled_from([4, 8]))
def test_reference_decoder_reads_rice(data: bytes, bits: int) -> None:
    coded = encode_rice(np.frombuffer(data, np.uint8), bits)
    if coded is not None:
        assert reference_decoder.decode_rice(coded, len(data)) == data


def texts() -> dict[str, bytes]:
    """Inputs that drive Zstandard through its block types, literal types and sequence tables."""
    chance = random.Random(3)
    words = [bytes(chance.choices(range(97, 123), k=chance.randint(2, 9))) for _ in range(200)]
    return {
        "empty": b"",
        "one byte": b"a",
        "run": b"a" * 300_000,
        "noise": chance.randbytes(20_000),
        "symbols": bytes(chance.choices(range(16), weights=range(1, 17), k=150_000)),
        "text": b" ".join(chance.choices(words, k=30_000)),
        "periodic": bytes(range(256)) * 50 + b"".join(b"%d," % i for i in range(3000)),
    }


@pytest.mark.parametrize("level", [1, 3, 19])
@pytest.mark.parametrize("name", texts())
def test_reference_zstd_reads_what_the_library_writes(name: str, level: int) -> None:
    data = texts()[name]
    assert reference_zstd.decode_frame(zstandard.ZstdCompressor(level=level).compress(data)) == data


def test_reference_decoder_reads_sparse_streams(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", weights=600, floats=20_000, pruned=0.8)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    assert "s" in encoded.operations
    manifest = encode_document(make_manifest(version, encoded))
    files = reference_decoder.decode(manifest, (tmp_path / "p").read_bytes())
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()}
