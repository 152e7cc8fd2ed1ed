"""Manifest and version document: what their validators refuse, streams, frames."""

import hashlib
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.documents import encode_document, parse_document
from wire.errors import ArtifactError, Code
from wire.manifest import (
    BITS,
    FRAME_BYTES,
    Datatype,
    DecoderConfig,
    Dtype,
    EncoderConfig,
    FileEntry,
    GraphConfig,
    GraphTensor,
    Layout,
    Manifest,
    Pooling,
    Requirements,
    TensorColumns,
    VersionDocument,
    streams_of,
)

CONFIG = DecoderConfig(layers=1, hidden_size=8, kv_heads=1, head_size=8, vocab_size=16, context_tokens=32)
TensorRow = tuple[str, int, Dtype, tuple[int, ...], int]
"""Name, file, dtype, shape, offset."""
GOLDEN = hashlib.sha256(b"golden").hexdigest()


def make_file(path: str, size_bytes: int, sha256: str = GOLDEN) -> FileEntry:
    return FileEntry(path=path, size_bytes=size_bytes, sha256=sha256)


def make_columns(*rows: TensorRow) -> TensorColumns:
    return TensorColumns(
        name=tuple(row[0] for row in rows),
        file=tuple(row[1] for row in rows),
        dtype=tuple(row[2] for row in rows),
        shape=tuple(row[3] for row in rows),
        offset=tuple(row[4] for row in rows),
        layout=tuple(Layout.BYTES for _ in rows),
    )


def make_version(
    *rows: tuple[str, int, Dtype, tuple[int, ...], int], files: tuple[FileEntry, ...] = ()
) -> VersionDocument:
    return VersionDocument(
        model="tales",
        version="1.0",
        config=CONFIG,
        files=files or (make_file("weights.bin", 256), make_file("golden.json", 6)),
        tensors=make_columns(*rows),
    )


def make_manifest(**changes: Any) -> Manifest:
    version = changes.pop("version", make_version(("w", 0, Dtype.U8, (16,), 0)))
    fields: dict[str, Any] = {
        "decoded": version.decoded_digest(),
        "version": version,
        "operations": "f" * len(streams_of(version)),
        "index_size_bytes": 100,
        "index_frames": (GOLDEN,),
        "pack_size_bytes": 1000,
        "golden": GOLDEN,
        "requirements": Requirements(ram_bytes=0, disk_bytes=0),
    }
    return Manifest(**{**fields, **changes})


@pytest.mark.parametrize("path", ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "-x", "a\0b", "a" * 129, "ä"])
def test_file_name_that_could_leave_the_directory_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        make_file(path, 1)


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a#", "A", "..", "a b", "a" * 65])
def test_model_name_that_could_leave_its_topic_level_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model"):
        VersionDocument(
            model=name, version="1", config=CONFIG, files=(make_file("a", 1),), tensors=TensorColumns()
        )  # fmt: skip


@pytest.mark.parametrize("digest", ["", "A" * 64, "a" * 63, "a" * 65, "g" * 64, "a" * 64 + "\n"])
def test_digest_of_another_form_is_refused(digest: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        make_file("a", 1, digest)


@pytest.mark.parametrize("names", [("a", "a"), ("a", "version.json")])
def test_two_files_of_one_name_and_the_reserved_name_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="file names"):
        make_version(files=tuple(make_file(name, 1) for name in names))


@pytest.mark.parametrize(
    "rows",
    [
        [("w", 0, Dtype.U8, (257,), 0)],
        [("w", 0, Dtype.U8, (1,), 256)],
        [("w", 2, Dtype.U8, (1,), 0)],
        [("w", 0, Dtype.F32, (65,), 0)],
        [("w", 0, Dtype.U8, (1 << 40, 1 << 40), 0)],
    ],
)
def test_tensor_outside_its_file_is_refused(rows: list[TensorRow]) -> None:
    with pytest.raises(ValueError, match="outside its file"):
        make_version(*rows)


@pytest.mark.parametrize("second_offset", [0, 15])
def test_overlapping_or_unsorted_tensors_are_refused(second_offset: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        make_version(("a", 0, Dtype.U8, (16,), 0), ("b", 0, Dtype.U8, (16,), second_offset))
    make_version(("a", 0, Dtype.U8, (16,), 0), ("b", 0, Dtype.U8, (16,), 16))


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        make_version(("a", 0, Dtype.U8, (16,), 0), ("a", 0, Dtype.U8, (16,), 16))


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        TensorColumns(name=("a",), file=(0,), dtype=(Dtype.U8,), shape=((1,),), offset=(0,), layout=())


@pytest.mark.parametrize(("dtype", "shape", "expected"), [
    (Dtype.U4, (3,), 2), (Dtype.U4, (2, 4), 4), (Dtype.U2, (5,), 2), (Dtype.F32, (2, 3), 24), (Dtype.BF16, (7,), 14),
    (Dtype.U8, (), 1),
])  # fmt: skip
def test_size_of_a_tensor_rounds_up_to_whole_bytes(dtype: Dtype, shape: tuple[int, ...], expected: int) -> None:
    assert make_columns(("t", 0, dtype, shape, 0)).size_bytes(0) == expected
    assert set(BITS) == set(Dtype)


def test_streams_are_tensors_and_whole_files_without_tensors_in_pack_order() -> None:
    version = make_version(
        ("a", 1, Dtype.U8, (16,), 0), ("b", 1, Dtype.U4, (16,), 64), ("c", 2, Dtype.U8, (4,), 0),
        files=(make_file("graph", 7), make_file("weights", 100), make_file("more", 10), make_file("golden.json", 6)),
    )  # fmt: skip
    streams = [(stream.path, stream.name, stream.offset, stream.size_bytes) for stream in streams_of(version)]
    assert streams == [
        ("graph", "", 0, 7), ("weights", "a", 0, 16), ("weights", "b", 64, 8), ("more", "c", 0, 4),
        ("golden.json", "", 0, 6),
    ]  # fmt: skip


def test_decoded_digest_depends_on_every_part_of_the_version() -> None:
    version = make_version(("w", 0, Dtype.U8, (16,), 0))
    others = [
        version.model_copy(update={"version": "1.1"}),
        make_version(("w", 0, Dtype.U8, (16,), 64)),
        version.model_copy(update={"config": CONFIG.model_copy(update={"context_tokens": 64})}),
    ]
    assert version.decoded_digest() == make_version(("w", 0, Dtype.U8, (16,), 0)).decoded_digest()
    assert len({version.decoded_digest(), *(other.decoded_digest() for other in others)}) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"decoded": "0" * 64}, "decoded is not the digest"),
        ({"operations": "f"}, "one letter per stream"),
        ({"operations": "fc"}, "cannot copy or subtract"),
        ({"operations": "dd"}, "cannot copy or subtract"),
        ({"operations": "xx"}, "operations"),
        ({"index_frames": ()}, "index_frames"),
        ({"index_frames": (GOLDEN, GOLDEN)}, "index_frames"),
        ({"index_size_bytes": FRAME_BYTES + 1, "pack_size_bytes": FRAME_BYTES * 2}, "index_frames"),
        ({"pack_size_bytes": 99}, "smaller than its index"),
        ({"golden": "1" * 64}, "golden vectors"),
        ({"index_size_bytes": 0}, "index_size_bytes"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_manifest(**changes)


def test_delta_may_copy_and_subtract() -> None:
    assert make_manifest(base="1" * 64, operations="cd").operations == "cd"


@settings(deadline=None)
@given(index_size=st.integers(1, 5 * FRAME_BYTES), data_size=st.integers(0, 20 * FRAME_BYTES))
def test_frames_cover_the_pack_without_gap_and_none_crosses_from_index_to_data(index_size: int, data_size: int) -> None:
    manifest = make_manifest(
        index_size_bytes=index_size,
        index_frames=(GOLDEN,) * -(-index_size // FRAME_BYTES),
        pack_size_bytes=index_size + data_size,
    )
    ranges = [manifest.frame_range(frame) for frame in range(manifest.frame_count)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == manifest.pack_size_bytes
    assert all(end == start for (_, end), (start, _) in pairwise(ranges))
    assert all(0 < end - start <= FRAME_BYTES for start, end in ranges)
    assert not any(start < index_size < end for start, end in ranges)


def test_float_cache_is_not_written_so_that_older_documents_keep_their_digest() -> None:
    data = encode_document(CONFIG)
    assert b"kv_cache" not in data
    old = json.loads(data)
    assert parse_document(DecoderConfig, json.dumps(old).encode()).kv_cache is Dtype.F32
    int8 = CONFIG.model_copy(update={"kv_cache": Dtype.I8})
    assert json.loads(encode_document(int8)) == old | {"kv_cache": "i8"}
    assert parse_document(DecoderConfig, encode_document(int8)) == int8


def test_cache_of_another_type_is_refused() -> None:
    unknown = json.dumps(json.loads(encode_document(CONFIG)) | {"kv_cache": "u4"}).encode()
    with pytest.raises(ArtifactError, match="kv_cache"):
        parse_document(DecoderConfig, unknown)


OLD_VERSION = (
    '{"config":{"bos_token_id":null,"context_tokens":32,"eos_token_ids":[],"head_size":8,"hidden_size":8,'
    '"kind":"decoder","kv_heads":1,"layers":1,"vocab_size":16},"files":[{"path":"weights.bin","sha256":"'
    + "0"
    * 64
    + '","size_bytes":256}],"model":"tales","schema":1,"tensors":{"dtype":[],"file":[],"layout":[],"name":[],'
    '"offset":[],"shape":[]},"version":"1.0"}'
).encode()
"""A version of a decoder as it was written before there were encoders."""

ENCODER = EncoderConfig(
    layers=6, hidden_size=384, heads=12, vocab_size=30522, max_tokens=256, dimensions=384, pooling=Pooling.MEAN,
    normalised=True,
)  # fmt: skip

GRAPH = GraphConfig(
    inputs=(
        GraphTensor(name="x", datatype=Datatype.FP32, shape=("batch", 3)),
        GraphTensor(name="b", datatype=Datatype.BOOL, shape=()),
    ),
    outputs=(GraphTensor(name="y", datatype=Datatype.INT64, shape=("found", 2)),), largest={"batch": 8},
)  # fmt: skip


def test_version_written_before_there_were_encoders_keeps_its_bytes_and_digest() -> None:
    version = parse_document(VersionDocument, OLD_VERSION)
    assert version.config == CONFIG
    assert encode_document(version) == OLD_VERSION
    untagged = OLD_VERSION.replace(b'"kind":"decoder",', b"")
    assert parse_document(VersionDocument, untagged) == version


def test_version_of_an_encoder_is_read_as_one() -> None:
    version = make_version().model_copy(update={"config": ENCODER})
    read = parse_document(VersionDocument, encode_document(version))
    assert read == version
    assert isinstance(read.config, EncoderConfig)


def test_version_of_a_graph_is_read_as_one() -> None:
    version = make_version().model_copy(update={"config": GRAPH})
    read = parse_document(VersionDocument, encode_document(version))
    assert read == version
    assert isinstance(read.config, GraphConfig)


@pytest.mark.parametrize(
    "config",
    [
        encode_document(GRAPH).replace(b'"batch":8', b'"batch":8,"depth":3'),
        encode_document(GRAPH).replace(b'"batch":8', b""),
        encode_document(GRAPH).replace(b'"batch":8', b'"batch":0'),
        encode_document(GRAPH).replace(b'"FP32"', b'"BYTES"'),
        encode_document(GRAPH).replace(b'"name":"x"', b'"name":"b"'),
        b'{"kind":"vision"}',
        b'{"kind":"encoder"}',
        b'{"kind":["encoder"]}',
        b'{"kind":"' + b"x" * 5000 + b'"}',
        b"[]",
        encode_document(ENCODER).replace(b'"kind":"encoder"', b'"kind":"decoder"'),
        encode_document(ENCODER).replace(b'"pooling":"mean"', b'"pooling":"max"'),
    ],
)
def test_config_of_no_known_kind_is_refused_in_few_words(config: bytes) -> None:
    found = OLD_VERSION.index(b'{"bos'), OLD_VERSION.index(b',"files"')
    with pytest.raises(ArtifactError) as refused:
        parse_document(VersionDocument, OLD_VERSION[: found[0]] + config + OLD_VERSION[found[1] :])
    assert refused.value.code is Code.BAD_DOCUMENT
    assert len(refused.value.message) < 400
