"""Round trips of whole version directories, full and delta, and refusals of packs that are not what was signed."""

import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from codec.decoder import decode_pack
from codec.encoder import encode_pack
from tests.fixtures.codec.versions import make_manifest, make_version, same_files, write_files
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, StoreError
from wire.index import index_size, parse_index
from wire.manifest import TensorColumns, VersionDocument, streams_of


@contextmanager
def files_limited() -> Iterator[None]:
    """No file of this process may grow over 256 KiB meanwhile (setrlimit(2)): a full disk without filling one."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


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


@pytest.mark.parametrize("pruned", [0.5, 0.9, 1.0])
def test_pruned_floats_are_coded_without_their_zeros(tmp_path: Path, pruned: float) -> None:
    version = make_version(tmp_path / "v", weights=600, floats=200_000, pruned=pruned)
    dense = make_version(tmp_path / "dense", weights=600, floats=200_000)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    before = encode_pack(dense, tmp_path / "dense", tmp_path / "dense.pack")
    assert encoded.operations == "fssssffff"
    assert before.operations == "f" * 9
    kept = 1 - pruned
    # A mask of one bit per weight (less where few remain), and the weights that remain.
    assert encoded.pack_size_bytes <= before.pack_size_bytes * kept + 4 * 200_000 / 8 + 5000
    (tmp_path / "out").mkdir()
    decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out")
    assert same_files(tmp_path / "v", tmp_path / "out")


def test_negative_zeros_are_kept(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", weights=600, floats=50_000, pruned=0.9)
    weights = np.fromfile(tmp_path / "v" / "weights.bin", np.uint8)
    brain = weights[version.tensors.offset[4] :].view("<u2")
    brain[brain == 0] = 0x8000
    files = {entry.path: (tmp_path / "v" / entry.path).read_bytes() for entry in version.files}
    (tmp_path / "w").mkdir()
    entries = write_files(tmp_path / "w", {**files, "weights.bin": weights.tobytes()})
    version = version.model_copy(update={"files": entries})
    (tmp_path / "w" / "version.json").write_bytes(encode_document(version))
    encoded = encode_pack(version, tmp_path / "w", tmp_path / "p")
    assert encoded.operations == "fsssfffff"
    (tmp_path / "out").mkdir()
    decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out")
    assert same_files(tmp_path / "w", tmp_path / "out")


def test_frames_that_arrive_in_any_order_decode_meanwhile(tmp_path: Path) -> None:
    """The pack on the disk is filled frame by frame while it is decoded; what is not there yet reads as zeros."""
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    manifest, pack = make_manifest(version, encoded), (tmp_path / "p").read_bytes()
    order = list(range(1, manifest.frame_count))
    random.Random(7).shuffle(order)
    (tmp_path / "out").mkdir()

    def arriving() -> Iterator[list[int]]:
        with (tmp_path / "staged").open("r+b") as staged:
            yield [0]
            for frame in order:
                start, end = manifest.frame_range(frame)
                os.pwrite(staged.fileno(), pack[start:end], start)
                yield [frame, frame]

    (tmp_path / "staged").write_bytes(pack[: encoded.index_size_bytes].ljust(len(pack), b"\0"))
    decode_pack(manifest, tmp_path / "staged", tmp_path / "out", arriving=arriving())
    assert same_files(tmp_path / "v", tmp_path / "out")


def test_progress_of_decoding_ends_with_all_bytes(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    seen: list[tuple[int, int]] = []
    (tmp_path / "out").mkdir()
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out", threads=1, progress=report)
    streams = streams_of(version)
    assert seen[-1] == (sum(stream.size_bytes for stream in streams),) * 2
    assert seen == sorted(seen)


def test_fetch_that_ends_early_ends_the_decoding(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    manifest = make_manifest(version, encode_pack(version, tmp_path / "v", tmp_path / "p"))
    for frames, what in (([0, 1, 2], "before the pack was whole"), ([manifest.frame_count], "has no frame")):
        (tmp_path / what).mkdir()
        with pytest.raises(ArtifactError, match=what):
            decode_pack(manifest, tmp_path / "p", tmp_path / what, arriving=[frames])
        assert not (tmp_path / what / "version.json").exists()


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


def test_damaged_section_is_named_by_its_crc(tmp_path: Path) -> None:
    """Its frame's hash is made to fit again, so that only the file's SHA-256 sees it, and the CRC says where."""
    version = make_version(tmp_path / "v", weights=6000)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    spoiled = bytearray((tmp_path / "p").read_bytes())
    index = parse_index(bytes(spoiled[: encoded.index_size_bytes]), len(spoiled) - encoded.index_size_bytes)
    row = next(n for n, section in enumerate(index.sections) if section.stream == 4 and section.codec == 0)
    spoiled[encoded.index_size_bytes + sum(section.coded_size for section in index.sections[:row])] ^= 1
    (tmp_path / "p").write_bytes(spoiled)
    manifest = make_manifest(version, encoded)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="a section of brain, plane 1, decodes to other bytes") as refused:
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


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_gives_the_same_directory(tmp_path: Path, threads: int) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    (tmp_path / "out").mkdir()
    decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out", threads=threads)
    assert same_files(tmp_path / "v", tmp_path / "out")


def test_delta_of_an_unchanged_version_copies_everything_and_sends_an_index_only(tmp_path: Path) -> None:
    base = make_version(tmp_path / "base")
    delta = encode_pack(base, tmp_path / "base", tmp_path / "p", base=(base, tmp_path / "base"))
    assert set(delta.operations) == {"c"}
    assert delta.pack_size_bytes == delta.index_size_bytes == index_size(0, 0)
    (tmp_path / "out").mkdir()
    manifest = make_manifest(base, delta, base.decoded_digest())
    decode_pack(manifest, tmp_path / "p", tmp_path / "out", base=tmp_path / "base")
    assert same_files(tmp_path / "base", tmp_path / "out")


def test_stream_unlike_the_base_is_coded_in_full(tmp_path: Path) -> None:
    base, version = make_version(tmp_path / "base"), make_version(tmp_path / "v", seed=2)
    delta = encode_pack(version, tmp_path / "v", tmp_path / "p", base=(base, tmp_path / "base"))
    full = encode_pack(version, tmp_path / "v", tmp_path / "full")
    assert delta.operations[0] == "f"
    assert delta.pack_size_bytes <= full.pack_size_bytes


def test_file_that_changed_its_length_refers_to_the_base(tmp_path: Path) -> None:
    text = " ".join(str(n * n) for n in range(9000)).encode()
    base, version = make_version(tmp_path / "base", notes=text), make_version(tmp_path / "v", notes=text[:777] + text)
    delta = encode_pack(version, tmp_path / "v", tmp_path / "p", base=(base, tmp_path / "base"))
    notes = next(plane for plane in delta.planes if plane.stream == "notes.txt")
    assert (notes.operation, notes.codecs) == ("f", ("dictionary",))
    assert notes.coded_bytes < 200
    (tmp_path / "out").mkdir()
    manifest = make_manifest(version, delta, base.decoded_digest())
    decode_pack(manifest, tmp_path / "p", tmp_path / "out", base=tmp_path / "base")
    assert same_files(tmp_path / "v", tmp_path / "out")


def test_delta_without_a_base_is_refused(tmp_path: Path) -> None:
    base, version = make_version(tmp_path / "base"), make_version(tmp_path / "v", changed=0.02)
    delta = encode_pack(version, tmp_path / "v", tmp_path / "p", base=(base, tmp_path / "base"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError) as refused:
        decode_pack(make_manifest(version, delta, base.decoded_digest()), tmp_path / "p", tmp_path / "out")
    assert refused.value.code is Code.BASE_MISMATCH


@pytest.mark.parametrize("spoil", ["shorten", "remove"])
def test_base_whose_file_is_damaged_is_refused(tmp_path: Path, spoil: str) -> None:
    base, version = make_version(tmp_path / "base"), make_version(tmp_path / "v", changed=0.02)
    delta = encode_pack(version, tmp_path / "v", tmp_path / "p", base=(base, tmp_path / "base"))
    victim = tmp_path / "base" / "weights.bin"
    os.truncate(victim, 1000) if spoil == "shorten" else victim.unlink()
    (tmp_path / "out").mkdir()
    manifest = make_manifest(version, delta, base.decoded_digest())
    with pytest.raises(ArtifactError) as refused:
        decode_pack(manifest, tmp_path / "p", tmp_path / "out", base=tmp_path / "base")
    assert refused.value.code is Code.BASE_MISMATCH


def test_base_with_other_bytes_is_refused_by_the_digest(tmp_path: Path) -> None:
    base, version = make_version(tmp_path / "base"), make_version(tmp_path / "v", changed=0.02)
    delta = encode_pack(version, tmp_path / "v", tmp_path / "p", base=(base, tmp_path / "base"))
    victim = tmp_path / "base" / "weights.bin"
    victim.write_bytes(b"\1" + victim.read_bytes()[1:])
    (tmp_path / "out").mkdir()
    manifest = make_manifest(version, delta, base.decoded_digest())
    with pytest.raises(ArtifactError) as refused:
        decode_pack(manifest, tmp_path / "p", tmp_path / "out", base=tmp_path / "base")
    assert refused.value.code is Code.DIGEST_MISMATCH


def test_directory_changed_after_it_was_built_is_not_packed(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    (tmp_path / "v" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError) as refused:
        encode_pack(version, tmp_path / "v", tmp_path / "p")
    assert refused.value.code is Code.DIGEST_MISMATCH


def test_bytes_outside_the_tensors_that_a_node_could_not_restore_are_not_packed(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", weights=1000)
    weights = bytearray((tmp_path / "v" / "weights.bin").read_bytes())
    weights[500] = 1  # the packed tensor ends here, the next begins at 512
    entry = write_files(tmp_path / "v", {"weights.bin": bytes(weights)})
    lying = version.model_copy(update={"files": (*entry, *version.files[1:])})
    with pytest.raises(ArtifactError, match="outside its tensors"):
        encode_pack(lying, tmp_path / "v", tmp_path / "p")


def test_pack_of_another_length_is_refused(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", weights=1000)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    with (tmp_path / "p").open("ab") as pack:
        pack.write(b"\0")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError) as refused:
        decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out")
    assert refused.value.code is Code.BAD_INDEX


def test_version_larger_than_the_disk_is_refused_before_a_block_is_reserved(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", weights=1000)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    huge = [version.files[0].model_copy(update={"size_bytes": 1 << 40, "path": f"huge-{n}"}) for n in range(200)]
    lying = version.model_copy(update={"files": (*version.files, *huge)})
    manifest = make_manifest(version, encoded).model_copy(update={"version": lying, "operations": "f" * 209})
    (tmp_path / "out").mkdir()
    with files_limited(), pytest.raises(StoreError) as refused:
        decode_pack(manifest, tmp_path / "p", tmp_path / "out")
    assert refused.value.code is Code.NO_SPACE
    assert list((tmp_path / "out").iterdir()) == []


def test_file_system_that_refuses_a_block_is_a_store_error_and_no_crash(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    (tmp_path / "out").mkdir()
    with files_limited(), pytest.raises(StoreError) as refused:
        decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out")
    assert refused.value.code is Code.IO_ERROR
    assert not (tmp_path / "out" / "version.json").exists()


def test_version_without_tensors_round_trips(tmp_path: Path) -> None:
    made = make_version(tmp_path / "made")
    (tmp_path / "v").mkdir()
    files = write_files(tmp_path / "v", {"golden.json": b"golden vectors", "big.bin": b"0123456789" * 300_000})
    version = VersionDocument(model="m", version="1", config=made.config, files=files, tensors=TensorColumns())
    (tmp_path / "v" / "version.json").write_bytes(encode_document(version))
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    (tmp_path / "out").mkdir()
    decode_pack(make_manifest(version, encoded), tmp_path / "p", tmp_path / "out")
    assert same_files(tmp_path / "v", tmp_path / "out")


def test_progress_ends_at_the_total_and_never_goes_back(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    seen: list[tuple[int, int]] = []
    encode_pack(version, tmp_path / "v", tmp_path / "p", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_figures_add_up_to_the_pack(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v")
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    assert sum(plane.coded_bytes for plane in encoded.planes) == encoded.pack_size_bytes - encoded.index_size_bytes
    packed = next(plane for plane in encoded.planes if plane.stream == "packed")
    assert packed.entropy_bytes <= packed.coded_bytes < packed.entropy_bytes * 1.01
