"""Looking into artifacts: figures that add up, what is wrong named by its place, files that come out whole or not."""

import hashlib
import io
import json
import os
import pty
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cli.inspection import artifact_tables, version_table
from codec.encoder import encode_pack
from codec.entropy import byte_histogram, entropy_bytes
from codec.inspection import measure_planes, open_pack
from codec.planes import split_planes
from codec.versions import stream_bytes
from forge.artifact import read_artifact
from forge.build import build_version
from forge.extract import extract_artifact
from forge.inspect import Inspection, inspect_artifact, layer_of
from forge.picture import COLOURS, draw_layers
from forge.release import make_release
from forge.verify import verify_artifact, verify_release
from host.keys import create_key, load_signer
from tests.fixtures.codec.versions import make_manifest, make_version, same_files, write_artifact
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, ConfigError, StoreError
from wire.index import Index, encode_index, parse_index
from wire.manifest import FRAME_BYTES, VersionDocument, streams_of
from wire.signing import RoleKeys, TrustPolicy

PROJECT = Path(__file__).resolve().parents[2]
SAMPLES = PROJECT / "samples"


@dataclass(frozen=True, slots=True)
class Made:
    """A version, its base, and artifacts of it by the path of their manifests."""

    version: VersionDocument
    directory: Path
    base: Path
    full: Path
    delta: Path


@pytest.fixture
def made(tmp_path: Path) -> Made:
    text = b" ".join(b"%d" % (n * n) for n in range(900))
    base = make_version(tmp_path / "base", weights=400_000, notes=text)
    version = make_version(tmp_path / "v", weights=400_000, changed=0.02, notes=text[:99] + text)
    packs = (tmp_path / "full.pack", tmp_path / "delta.pack")
    full = encode_pack(version, tmp_path / "v", packs[0])
    delta = encode_pack(version, tmp_path / "v", packs[1], base=(base, tmp_path / "base"))
    manifests = (make_manifest(version, full), make_manifest(version, delta, base.decoded_digest()))
    paths = [write_artifact(tmp_path / "r", m, p) for m, p in zip(manifests, packs, strict=True)]
    return Made(version, tmp_path / "v", tmp_path / "base", *paths)


@dataclass(frozen=True, slots=True)
class Sample:
    release: Path
    trust: Path
    base: Path
    full: Path
    delta: Path


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The sample's second release, full and as a delta to the first version."""
    place = tmp_path_factory.mktemp("sample")
    build_version(SAMPLES / "tales-5m-base", place / "base", ("tales", "1.0"))
    build_version(SAMPLES / "tales-5m-finetuned-50", place / "v", ("tales", "1.1"), scales_of=place / "base")
    keys = RoleKeys(keys=(create_key(place / "key.pem"),))
    (place / "trust.json").write_bytes(encode_document(TrustPolicy(release=keys, desired=keys)))
    make_release(place / "v", place / "r", load_signer(place / "key.pem"), sequence=2, base_dir=place / "base")
    paths = sorted(
        (place / "r").glob("*.manifest.json"), key=lambda path: read_artifact(path).manifest.base is not None
    )
    return Sample(place / "r", place / "trust.json", place / "base", *paths)


def pack_of(manifest: Path) -> Path:
    return read_artifact(manifest).pack


def spoil(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def resign(path: Path, place: Path, *, change: Sequence[tuple[int, int]] = (), crc_of: int | None = None) -> Path:
    """The artifact again with bytes of its data replaced and a section's CRC changed, vouched for by a new manifest."""
    artifact = read_artifact(path)
    manifest, pack = artifact.manifest, bytearray(artifact.pack.read_bytes())
    for position, value in change:
        pack[position] = value
    data = bytes(pack[manifest.index_size_bytes :])
    sections = list(parse_index(bytes(pack[: manifest.index_size_bytes]), len(data)).sections)
    if crc_of is not None:
        sections[crc_of] = replace(sections[crc_of], crc32=sections[crc_of].crc32 ^ 1)
    hashes = tuple(hashlib.sha256(data[i : i + FRAME_BYTES]).digest() for i in range(0, len(data), FRAME_BYTES))
    index = encode_index(Index(hashes, tuple(sections)))
    frames = tuple(hashlib.sha256(index[i : i + FRAME_BYTES]).hexdigest() for i in range(0, len(index), FRAME_BYTES))
    place.mkdir(exist_ok=True)
    (place / "resigned.pack").write_bytes(index + data)
    return write_artifact(place, manifest.model_copy(update={"index_frames": frames}), place / "resigned.pack")


def amperage(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from cli.main import main; main()", "forge", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)


# Figures


@pytest.mark.parametrize("name", ["full", "delta"])
def test_figures_add_up_to_the_wire_size(made: Made, name: str) -> None:
    path: Path = getattr(made, name)
    found = inspect_artifact(read_artifact(path))
    assert found.wire_bytes == path.stat().st_size + pack_of(path).stat().st_size
    parts = found.tensors.coded_bytes + sum(cost.coded_bytes for cost in found.files)
    assert found.manifest_bytes + found.index_bytes + parts == found.wire_bytes
    assert sum(cost.coded_bytes for cost in found.planes) == found.tensors.coded_bytes
    assert sum(layer.cost.coded_bytes for layer in found.layers) == found.tensors.coded_bytes
    assert sum(sum(layer.planes.values()) for layer in found.layers) == found.tensors.coded_bytes
    assert sum(share.coded_bytes for share in found.codecs.values()) == parts


def test_sparse_streams_are_counted_with_their_masks(tmp_path: Path) -> None:
    version = make_version(tmp_path / "v", weights=50_000, floats=60_000, pruned=0.7)
    encoded = encode_pack(version, tmp_path / "v", tmp_path / "p")
    path = write_artifact(tmp_path / "r", make_manifest(version, encoded), tmp_path / "p")
    found = inspect_artifact(read_artifact(path))
    assert found.operations["sparse"] > 0
    assert sum(cost.coded_bytes for cost in found.planes) == found.tensors.coded_bytes
    assert (
        found.manifest_bytes
        + found.index_bytes
        + found.tensors.coded_bytes
        + sum(cost.coded_bytes for cost in found.files)
        == path.stat().st_size + encoded.pack_size_bytes
    )
    assert any(cost.label.endswith(" mask") and cost.entropy_bytes for cost in found.planes)
    with pytest.raises(ArtifactError, match=r"section \d+ .*plane mantissa low"):
        verify_artifact(resign(path, tmp_path / "again", crc_of=_section_of(path, "mantissa low")), None, None)
    extract_artifact(read_artifact(path), tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "v")


def _section_of(path: Path, plane: str) -> int:
    artifact = read_artifact(path)
    with open_pack(artifact.manifest, artifact.pack) as pack:
        costs = [cost for cost in measure_planes(pack) for share in cost.codecs.values() for _ in range(share.sections)]
    return next(number for number, cost in enumerate(costs) if cost.plane == plane)


def test_entropy_is_that_of_the_planes_of_the_version(made: Made) -> None:
    artifact = read_artifact(made.full)
    with open_pack(artifact.manifest, artifact.pack) as pack:
        measured = [cost.entropy_bytes for cost in measure_planes(pack)]
    expected = [
        entropy_bytes(byte_histogram(plane))
        for stream in streams_of(made.version)
        for plane in split_planes(stream.layout, np.array(stream_bytes(made.directory, stream)))
    ]
    assert measured == pytest.approx(expected)


def test_without_entropy_nothing_is_decoded(made: Made) -> None:
    spoil(pack_of(made.full), -1)  # data that would not decode
    found = inspect_artifact(read_artifact(made.full), entropy=False)
    assert found.tensors.entropy_bytes is None
    assert found.tensors.coded_bytes > 0
    assert found.codecs["huffman"].sections > 0


def test_delta_shows_operations_and_leaves_the_bound_of_a_dictionary_open(made: Made) -> None:
    found = inspect_artifact(read_artifact(made.delta))
    assert found.operations["copy"] > 0
    assert found.operations["difference"] > 0
    files = {cost.label: cost for cost in found.files}
    assert (files["notes.txt"].entropy_bytes, set(files["notes.txt"].codecs)) == (None, {"dictionary"})
    assert (files["model.onnx"].coded_bytes, files["model.onnx"].entropy_bytes) == (0, 0.0)
    assert found.layers[0].operations == {"difference": 1}


def test_sample_is_told_by_layers(sample: Sample) -> None:
    found = inspect_artifact(read_artifact(sample.full))
    assert [layer.label for layer in found.layers] == [
        "model.embed_tokens", *(f"layer {n}" for n in range(6)), "model.norm",
    ]  # fmt: skip
    assert found.weights == sum(layer.weights for layer in found.layers) == 5_475_584
    for layer in found.layers[1:7]:
        assert layer.bound_per_weight is not None
        assert 3.9 < layer.bound_per_weight < layer.bits_per_weight < 4.1


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("layers.12.qkv.packed", "layer 12"),
        ("model.layers.3.norm", "layer 3"),
        ("encoder.h.0.w", "layer 0"),
        ("blocks.7.w.scales", "layer 7"),
        ("lm_head.packed", "lm_head"),
        ("packed", "packed"),
    ],
)
def test_layer_is_read_from_a_tensors_name(tensor: str, layer: str) -> None:
    assert layer_of(tensor) == layer


# Pictures and tables


def test_picture_shows_every_large_kind_of_plane(sample: Sample) -> None:
    with Image.open(io.BytesIO(draw_layers(inspect_artifact(read_artifact(sample.full))))) as image:
        assert image.width > 900
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS[:3]} <= colours


def hostile(found: Inspection) -> Inspection:
    name = "[red]$\\frac$\x1b[2J\u202e" + "x" * 150
    layers = tuple(
        replace(layer, label=name, planes={name + str(n): size for n, size in enumerate(layer.planes.values())})
        for layer in found.layers
    )
    return replace(found, layers=layers * 60, version=name, planes=(replace(found.planes[0], label=name),))


def test_hostile_names_are_drawn_and_printed_but_never_obeyed(made: Made) -> None:
    found = hostile(inspect_artifact(read_artifact(made.full)))
    assert draw_layers(found).startswith(b"\x89PNG")
    sink = io.StringIO()
    Console(file=sink, width=400, force_terminal=False).print(artifact_tables(found))
    assert "\x1b" not in sink.getvalue()
    assert "\u202e" not in sink.getvalue()
    assert "[red]$" in sink.getvalue()
    sink = io.StringIO()
    columns = made.version.tensors.model_copy(update={"name": ("[bold]\x1b[2J", "b", "c", "d", "e")})
    Console(file=sink, width=200).print(version_table(made.version.model_copy(update={"tensors": columns})))
    assert "[bold]\\x1b" in sink.getvalue()


def test_missing_matplotlib_is_named_with_what_installs_it(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'amperage\[forge\]'"):
        draw_layers(inspect_artifact(read_artifact(made.full)))


# Verification


def test_artifact_verifies_alone_and_with_the_release_beside_it(sample: Sample) -> None:
    seen: list[tuple[str, int, int]] = []
    figures = verify_artifact(sample.delta, sample.trust, sample.base, lambda *args: seen.append(args))
    assert figures["signature"] == "ok"
    assert figures["files"] == 5
    assert {what for what, _, _ in seen} == {"frames", "sections", "files"}
    assert all(done <= total for _, done, total in seen)
    assert "not checked" in verify_artifact(pack_of(sample.full), None, None)["signature"]


def test_delta_without_its_base_says_which_it_needs(sample: Sample) -> None:
    with pytest.raises(ConfigError, match="--base"):
        verify_artifact(sample.delta, None, None)


def test_artifact_that_the_release_does_not_name_is_refused(sample: Sample, made: Made, tmp_path: Path) -> None:
    (tmp_path / "r" / "release.json").write_bytes((sample.release / "release.json").read_bytes())
    with pytest.raises(ArtifactError, match="does not name this artifact") as refused:
        verify_artifact(made.full, sample.trust, None)
    assert refused.value.code is Code.BAD_MANIFEST


def test_wrong_frame_is_named(made: Made) -> None:
    manifest = read_artifact(made.full).manifest
    spoil(pack_of(made.full), manifest.index_size_bytes + FRAME_BYTES + 7)
    with pytest.raises(ArtifactError, match=f"frame 2 of {manifest.frame_count} ") as refused:
        verify_artifact(made.full, None, None)
    assert refused.value.code is Code.FRAME_MISMATCH
    spoil(pack_of(made.full), 5)
    with pytest.raises(ArtifactError, match="frame 0 of"):
        verify_artifact(made.full, None, None)


def test_wrong_section_is_named_with_its_tensor_and_plane(made: Made, tmp_path: Path) -> None:
    path = resign(made.full, tmp_path / "again", crc_of=1)
    with pytest.raises(ArtifactError, match=r"section 1 .*'scales'.*exponent.*huffman") as refused:
        verify_artifact(path, None, None)
    assert refused.value.code is Code.BAD_SECTION


def test_wrong_section_that_refers_to_the_base_is_named(made: Made, tmp_path: Path) -> None:
    artifact = read_artifact(made.delta)
    with open_pack(artifact.manifest, artifact.pack) as pack:
        sections = [(chunk.stream.path, section) for chunk in pack.chunks for section in chunk.sections]
    number = next(n for n, (path, _) in enumerate(sections) if path == "notes.txt")
    path = resign(made.delta, tmp_path / "again", crc_of=number)
    with pytest.raises(ArtifactError, match=rf"section {number} \(file notes.txt.*dictionary"):
        verify_artifact(path, None, made.base)


def test_wrong_file_is_named(made: Made, tmp_path: Path) -> None:
    artifact = read_artifact(made.full)
    files = [entry.model_copy(update={"sha256": "0" * 64}) if entry.path == "notes.txt" else entry
             for entry in artifact.manifest.version.files]  # fmt: skip
    version = artifact.manifest.version.model_copy(update={"files": tuple(files)})
    update = {"version": version, "decoded": version.decoded_digest()}
    path = write_artifact(tmp_path / "again", artifact.manifest.model_copy(update=update), artifact.pack)
    with pytest.raises(ArtifactError, match=r"notes\.txt") as refused:
        verify_artifact(path, None, None)
    assert refused.value.code is Code.DIGEST_MISMATCH


def test_manifest_that_is_not_what_it_is_named_for_is_refused(made: Made) -> None:
    spoil(made.full, made.full.read_bytes().index(b'"model":"m"') + 9)
    for look in (inspect_artifact, lambda artifact: verify_artifact(artifact.path, None, None)):
        with pytest.raises(ArtifactError) as refused:
            look(read_artifact(made.full))
        assert refused.value.code is Code.DIGEST_MISMATCH


def test_release_with_a_spoiled_pack_names_the_frame(sample: Sample, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sample.release.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    spoil(copy / pack_of(sample.full).name, 1_000_000)
    with pytest.raises(ArtifactError, match=r"frame 9 of"):
        verify_release(copy, sample.trust, None)


def test_mutated_pack_is_refused_or_changes_no_file_whatever_is_asked(made: Made, tmp_path: Path) -> None:
    chance, (start, end) = random.Random(5), read_artifact(made.delta).manifest.frame_range(1)
    for number in range(60):
        place = tmp_path / f"mutated{number}"
        path = resign(made.delta, place, change=[(chance.randrange(start, end), chance.randrange(256))])
        artifact = read_artifact(path)
        for ask in (inspect_artifact, lambda a, p=place: extract_artifact(a, p / "out", base=made.base)):
            with suppress(ArtifactError):
                ask(artifact)
        if (place / "out").exists():
            assert same_files(place / "out", made.directory)


def test_index_that_lies_is_refused_by_inspection(made: Made) -> None:
    chance, artifact = random.Random(6), read_artifact(made.full)
    good = artifact.pack.read_bytes()
    for _ in range(150):
        head = bytearray(good[: artifact.manifest.index_size_bytes])
        head[chance.randrange(len(head))] ^= 1 << chance.randrange(8)
        artifact.pack.write_bytes(bytes(head) + good[len(head) :])
        signed = artifact.manifest.model_copy(update={"index_frames": (hashlib.sha256(head).hexdigest(),)})
        try:
            inspect_artifact(replace(artifact, manifest=signed))
        except ArtifactError:
            continue
        table = 20 * len(parse_index(bytes(head), len(good) - len(head)).sections)
        assert head[-table:] == good[: len(head)][-table:]  # it hit the hash of a frame, which nobody asked for


# Extraction


def test_extracted_directory_is_the_version(made: Made, tmp_path: Path) -> None:
    assert extract_artifact(read_artifact(made.full), tmp_path / "a")[-1] == "version.json"
    extract_artifact(read_artifact(made.delta), tmp_path / "b", base=made.base)
    assert same_files(tmp_path / "a", made.directory)
    assert same_files(tmp_path / "b", made.directory)


@pytest.mark.parametrize("name", ["full", "delta"])
@pytest.mark.parametrize("files", [("notes.txt",), ("weights.bin",), ("empty.txt", "model.onnx"), ("golden.json",)])
def test_files_are_extracted_alone(made: Made, tmp_path: Path, name: str, files: tuple[str, ...]) -> None:
    base = made.base if name == "delta" else None
    extract_artifact(read_artifact(getattr(made, name)), tmp_path / "out", base=base, files=files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(files)
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (made.directory / file).read_bytes()


def test_one_file_comes_out_of_a_pack_whose_other_sections_are_wrong(made: Made, tmp_path: Path) -> None:
    start = read_artifact(made.full).manifest.index_size_bytes
    path = resign(made.full, tmp_path / "again", change=[(start + 9, 0), (start + 10, 0), (start + 11, 0)])
    with pytest.raises(ArtifactError):
        extract_artifact(read_artifact(path), tmp_path / "whole")
    extract_artifact(read_artifact(path), tmp_path / "out", files=("notes.txt",))
    assert (tmp_path / "out" / "notes.txt").read_bytes() == (made.directory / "notes.txt").read_bytes()
    assert not (tmp_path / "whole").exists()


def test_failed_extraction_leaves_nothing_and_an_old_crash_is_cleared(made: Made, tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / ".out.extracting").mkdir(parents=True)
    (place / ".out.extracting" / "weights.bin").write_bytes(b"half")
    spoil(pack_of(made.full), -1)
    with pytest.raises(ArtifactError, match="frame"):
        extract_artifact(read_artifact(made.full), place / "out")
    assert list(place.iterdir()) == []
    spoil(pack_of(made.full), -1)
    extract_artifact(read_artifact(made.full), place / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_existing_directory_unknown_file_and_wrong_target_are_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="never overwritten"):
        extract_artifact(read_artifact(made.full), tmp_path / "there")
    with pytest.raises(ConfigError, match=r"weights\.bin"):
        extract_artifact(read_artifact(made.full), tmp_path / "out", files=("weight.bin",))
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        read_artifact(tmp_path / "there" / "version.json")
    pack_of(made.full).unlink()
    with pytest.raises(StoreError, match=r"\.pack"):
        extract_artifact(read_artifact(made.full), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The commands


def test_commands_print_json_and_no_progress_in_pipes(sample: Sample, tmp_path: Path) -> None:
    plot = tmp_path / "bits.png"
    done = amperage("inspect", sample.delta, "--plot", plot, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["operations"]["difference"] > 0
    assert 0.4 < figures["bits_per_weight"]["wire"] < 0.5
    assert figures["layers"][1]["operations"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    done = amperage("verify", sample.delta, "--base", sample.base, "--json")
    assert (done.returncode, done.stderr, json.loads(done.stdout)["frames"]) == (0, "", 4)
    done = amperage("extract", sample.full, "--into", tmp_path / "x", "--file", "tokenizer.json", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["files"] == ["tokenizer.json"]
    done = amperage("inspect", sample.release)
    assert done.stdout.count("delta to") == 1
    assert json.loads(amperage("inspect", sample.release, "--no-entropy", "--json").stdout)[0]["base"] is None
    assert json.loads(amperage("inspect", sample.base, "--json").stdout)["model"] == "tales"
    assert amperage("inspect", sample.release, "--plot", plot).returncode == 78
    assert amperage("verify", sample.release).returncode == 78


def test_progress_is_shown_on_a_terminal(sample: Sample) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", "from cli.main import main; main()", "forge", "verify", str(sample.full), "--json"]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # EIO: the other side is closed (pty(7))
            pass
        said = process.stdout.read() if process.stdout else b""
        assert process.wait(60) == 0
    os.close(ours)
    assert b"\xe2\x94\x81" in shown  # the bar
    assert json.loads(said)["files"] == 5
