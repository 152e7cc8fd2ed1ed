"""The committed test vectors: what they decode to, by both decoders, and that encoding makes the same bytes again."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from codec.decoder import decode_pack
from codec.sections import decode_section_into
from tests import reference_decoder
from tests.fixtures.codec import make_vectors
from tests.fixtures.codec.reference_zstd import decode_frame
from wire.documents import parse_document
from wire.index import Section, SectionCodec
from wire.manifest import Manifest

VECTORS: dict[str, Any] = json.loads(make_vectors.VECTORS.read_text())


def decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


@pytest.mark.parametrize("vector", VECTORS["sections"], ids=lambda vector: vector["name"])
def test_section_vector_decodes_by_both_decoders(vector: dict[str, Any]) -> None:
    coded, plane, dictionary = (decoded(vector[key]) for key in ("coded", "decoded", "dictionary"))
    assert coded is not None
    assert plane is not None
    out = np.empty(len(plane), np.uint8)
    section = Section(0, 0, SectionCodec(vector["codec"]), len(plane), len(coded), 0)
    decode_section_into(section, coded, out, dictionary)
    assert out.tobytes() == plane
    by_reference = {
        1: lambda: decode_frame(coded),
        2: lambda: reference_decoder.decode_ans(coded, len(plane)),
        3: lambda: decode_frame(coded, dictionary or b""),
        4: lambda: reference_decoder.decode_rice(coded, len(plane)),
    }[vector["codec"]]
    assert by_reference() == plane


@pytest.mark.parametrize("name", ["full", "delta"])
def test_artifact_vector_decodes_by_both_decoders(tmp_path: Path, name: str) -> None:
    vector = VECTORS["artifacts"][name]
    base = tmp_path / "base"
    if vector["base"]:
        base.mkdir()
        for path, data in VECTORS["artifacts"][vector["base"]]["files"].items():
            (base / path).write_bytes(base64.b64decode(data))
    pack = base64.b64decode(vector["pack"])
    (tmp_path / "pack").write_bytes(pack)
    (tmp_path / "out").mkdir()
    manifest = parse_document(Manifest, vector["manifest"].encode())
    decode_pack(manifest, tmp_path / "pack", tmp_path / "out", base=base if vector["base"] else None)
    files = {path: base64.b64decode(data) for path, data in vector["files"].items()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert reference_decoder.decode(vector["manifest"].encode(), pack, base) == files


def test_vectors_have_every_codec_and_every_operation() -> None:
    assert {vector["codec"] for vector in VECTORS["sections"]} == set(SectionCodec) - {SectionCodec.RAW}
    operations = "".join(json.loads(vector["manifest"])["operations"] for vector in VECTORS["artifacts"].values())
    assert set(operations) == set("fscd")


def test_encoding_makes_the_committed_bytes_on_any_machine() -> None:
    """The zstd library is pinned by requirements; with another one its frames may differ, and so the vectors."""
    assert ".".join(map(str, zstandard.ZSTD_VERSION)) == VECTORS["zstd"]
    assert make_vectors.sections() == VECTORS["sections"]
    assert make_vectors.artifacts() == VECTORS["artifacts"]
    assert make_vectors.digests() == VECTORS["digests"]
