"""Size and speed of artifacts, full and delta, beside zstd, onnxruntime's external data and ZipNN on the same tensors.

Sizes are exact; "tensors / entropy" is their wire over the sum of the order-0 byte entropies per plane and tensor, the
bound of any code without context. Rates count decoded bytes and are medians of rounds in turns. Ours decodes into real,
mapped files and compares the SHA-256 of each; `zstd -d | sha256sum` writes no file. Both have two threads (a pipeline's
two processes), or one core between them. Model weights are the samples', all-MiniLM-L6-v2's, and random ones.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import zstandard

from benchmarks.artifact_models import (
    GOLDEN,
    PLACEHOLDER,
    Built,
    Packed,
    build_sample,
    minilm_matrices,
    onnx_external_bytes,
    pack,
    place_bf16,
    place_blocks,
    place_f32,
    place_int8,
    place_pruned_bf16,
    sample_matrices,
    sections_of,
    smollm_matrices,
    write_version,
)
from benchmarks.harness import (
    PeerAbsent,
    Row,
    Samples,
    Subject,
    at_least,
    at_most,
    exact,
    measure,
    rate_of,
    row,
    rows_against,
)
from codec.ans import decode_ans_into, encode_ans
from codec.decoder import decode_pack
from codec.entropy import byte_histogram, entropy_bytes
from codec.huffman import encode_huffman
from codec.planes import Bytes
from codec.sections import encode_section
from wire.digest import digest_of
from wire.documents import encode_document
from wire.manifest import Dtype, FileEntry, Layout, TensorColumns, VersionDocument

LARGE_NIBBLES = 64 << 20
LARGE_CHANGED = 0.02
ANONYMOUS_LIMIT_MB = 64.0
"""docs/design.md section 9."""
LIMIT_SAMPLE_BYTES = 1 << 20
PLANE_BYTES = 1 << 20


def run() -> Sequence[Row]:
    """Build, pack, measure."""
    with TemporaryDirectory() as place:
        work = Path(place)
        base = build_sample(work, "base", None)
        small, far = build_sample(work, "finetuned-50", base), build_sample(work, "finetuned-400", base)
        full = pack(base, None, work)
        near, distant = pack(small, base, work), pack(far, base, work)
        smollm = pack(write_version(work / "smollm-int4", smollm_matrices(), place_blocks), None, work)
        brain = pack(write_version(work / "smollm-bf16", smollm_matrices(), place_bf16), None, work)
        return [
            *_whole_artifact(full),
            *_tensor_sizes(work, full, smollm, brain),
            *_thin_planes(),
            *_delta_sizes("50 steps", near),
            *_delta_sizes("400 steps", distant),
            *_encode_rates(smollm, work),
            *_decode_rates("int4", smollm, work),
            *_decode_rates("bf16", brain, work),
            *_apply_rates(near, work),
            *_memory(smollm, work),
        ]


def _whole_artifact(full: Packed) -> list[Row]:
    raw, ours = full.built.raw, exact(full.wire_bytes)
    external = onnx_external_bytes(full.built)
    return [
        row("tales int4: int4 tensors with float32 scales / wire", "x", exact(external / full.tensor_wire_bytes),
            at_least(1.2)),
        row("tales int4: wire of the tensors", "B", exact(full.tensor_wire_bytes),
            peer=("onnxruntime external data", exact(external))),
        *(row(f"tales int4: wire of {path}", "B", exact(full.file_wire_bytes(path)))
          for path in ("model.onnx", "tokenizer.json", "golden.json")),
        row("tales int4: index", "B", exact(full.encoded.index_size_bytes)),
        *(
            row("tales int4: whole artifact", "B", ours, at_most(1.0, ratio=True),
                (f"zstd -{level}", exact(len(_zstd(level, raw)))))
            for level in (3, 19)
        ),
    ]  # fmt: skip


def _tensor_sizes(work: Path, tales: Packed, smollm: Packed, brain: Packed) -> list[Row]:
    rows = _sizes("tales int4", tales)
    rows += _sizes("tales int8", pack(write_version(work / "int8", sample_matrices(), place_int8), None, work))
    bf16 = pack(write_version(work / "bf16", sample_matrices(), place_bf16), None, work)
    rows += [*_sizes("tales bf16", bf16, 1.49), _beside_zipnn("tales bf16", bf16)]
    pruned = write_version(work / "pruned", sample_matrices(), place_pruned_bf16)
    rows += _sizes("tales bf16, half pruned", pack(pruned, None, work))
    try:
        for name, place in (("f32", place_f32), ("int8", place_int8), ("int4", place_blocks)):
            built = write_version(work / f"minilm-{name}", minilm_matrices(), place)
            rows += _sizes(f"MiniLM {name}", pack(built, None, work))
    except PeerAbsent as absence:
        rows.append(row(str(absence), "", exact(float("inf")), at_most(0)))
    rows += _sizes("random 135M int4", smollm)
    return [*rows, *_sizes("random 135M bf16", brain, 1.49), _beside_zipnn("random 135M bf16", brain)]


def _sizes(name: str, packed: Packed, least_ratio: float | None = None) -> list[Row]:
    """Against the entropy and against the stored bytes; what every codec has of the sections' coded bytes."""
    sections = sections_of(packed)
    coded = sum(section.coded_size for section in sections)
    by_codec: dict[str, int] = {}
    for section in sections:
        by_codec[section.codec.name.lower()] = by_codec.get(section.codec.name.lower(), 0) + section.coded_size
    ratio = packed.tensor_raw_bytes / packed.tensor_wire_bytes
    worst = max(section.coded_size / section.raw_size for section in sections if section.raw_size)
    return [
        row(f"{name}: tensors / entropy", "x", exact(packed.over_entropy), at_most(1.01)),
        row(f"{name}: stored / wire", "x", exact(ratio), at_least(least_ratio) if least_ratio else None),
        row(f"{name}: largest section / raw", "x", exact(worst), at_most(1.0)),
        *(row(f"{name}: share of {codec}", "%", exact(100 * size / coded)) for codec, size in sorted(by_codec.items())),
    ]


def _beside_zipnn(name: str, packed: Packed) -> Row:
    """Our wire of the tensors beside ZipNN's of the same bytes, which has to be installed by hand: it needs torch."""
    raw = packed.built.tensor_bytes
    try:
        import zipnn  # type: ignore[import-not-found]

        theirs: Samples | None = exact(len(zipnn.ZipNN(bytearray_dtype="bfloat16").compress(raw)))
    except ImportError:
        theirs = None
    return row(f"{name}: wire", "B", exact(packed.tensor_wire_bytes), peer=("ZipNN", theirs))


def _thin_planes() -> list[Row]:
    """Planes whose symbols cost little, where ANS may be taken: what it saves, and at what speed."""
    chance = np.random.default_rng(5)
    levels = np.clip(np.rint(chance.standard_normal(2 * PLANE_BYTES) * 2.6) + 8, 0, 15).astype(np.uint8)
    rows = []
    for share in (0.5, 0.8, 0.9):
        kept = np.where(chance.random(levels.size) < share, 8, levels).astype(np.uint8)
        least = {0.9: 4.9}.get(share)
        rows += _thin_plane(f"int4, {share:.0%} pruned", kept[0::2] | kept[1::2] << np.uint8(4), least)
    crumbs = chance.integers(0, 3, (PLANE_BYTES, 4)).astype(np.uint8)
    ternary = np.bitwise_or.reduce(crumbs << np.array([0, 2, 4, 6], np.uint8), axis=1)
    return [*rows, *_thin_plane("ternary in 2 bits", ternary, 2 / 1.61)]


def _thin_plane(name: str, plane: Bytes, least_ratio: float | None) -> list[Row]:
    section, entropy = encode_section(plane), entropy_bytes(byte_histogram(plane))
    coded, out = encode_ans(plane), np.empty_like(plane)
    rates = measure({"ours": rate_of(lambda: decode_ans_into(coded, out), plane.size / 1e6)})
    ans = rates["ours"]
    assert ans is not None
    return [
        row(f"{name}: stored / wire ({section.codec.name.lower()})", "x", exact(plane.size / len(section.coded)),
            at_least(least_ratio) if least_ratio else None),
        row(f"{name}: ANS / entropy", "x", exact(len(coded) / entropy),
            peer=("zstd", exact(len(encode_huffman(plane.tobytes())) / entropy))),
        row(f"{name}: ANS decodes, one thread", "MB/s", ans),
    ]  # fmt: skip


def _delta_sizes(what: str, delta: Packed) -> list[Row]:
    assert delta.base is not None
    peer = len(_patch_compressor(delta.base.raw).compress(delta.built.raw))
    return [
        row(f"delta, {what}", "B", exact(delta.wire_bytes), at_most(1.0, ratio=True),
            ("zstd -19 --patch-from", exact(peer))),
        row(f"delta tensors / entropy of the difference, {what}", "x", exact(delta.over_entropy)),
    ]  # fmt: skip


def _encode_rates(full: Packed, work: Path) -> list[Row]:
    raw = full.built.raw
    sample = raw[: len(raw) // 16]  # zstd's level 19 would take minutes for the whole, and is no faster on more
    measured = measure(
        {
            "ours": rate_of(lambda: pack(full.built, None, work), len(raw) / 1e6),
            "zstd -3": rate_of(lambda: _zstd(3, raw), len(raw) / 1e6),
            "zstd -19": rate_of(lambda: _zstd(19, sample), len(sample) / 1e6),
        }
    )
    return rows_against("int4: encode (ours on all cores, zstd on one)", "MB/s", "ours", measured)


def _decode_rates(name: str, packed: Packed, work: Path) -> list[Row]:
    weights = packed.built.directory / "weights.bin"
    frame = work / f"{name}.zst"
    frame.write_bytes(_zstd(3, weights.read_bytes()))
    megabytes = weights.stat().st_size / 1e6
    pipes = {f"zstd -d | {tool}": f"zstd -dcq {frame} | {tool}" for tool in ("sha256sum", "openssl sha256")}
    two = measure(
        {
            "ours": _decoding(packed, work, threads=2),
            **{peer: _piping(command, megabytes) for peer, command in pipes.items()},
            "limit": _core_limit(weights, 2),
        }
    )
    one = measure(
        {
            "ours": _decoding(packed, work, threads=1),
            **{f"{peer}, one core": _piping(f"taskset 1 sh -c '{c}'", megabytes) for peer, c in pipes.items()},
        }
    )
    limit = two.pop("limit")
    return [
        *rows_against(f"{name}: decode to mapped, hashed files, two threads", "MB/s", "ours", two,
                      at_least(1.0, ratio=True)),
        *rows_against(f"{name}: decode to mapped, hashed files, one thread", "MB/s", "ours", one,
                      at_least(1.0, ratio=True)),
        row(f"{name}: the same, two threads", "MB/s", two["ours"] or exact(0),
            peer=("two cores that only decode zstd and hash", limit)),
    ]  # fmt: skip


def _piping(command: str, megabytes: float) -> Subject:
    def pipe() -> None:
        missing = [tool for tool in ("zstd", "openssl", "sha256sum", "taskset") if not shutil.which(tool)]
        if missing:
            raise PeerAbsent(f"{', '.join(missing)}: install the Debian package")
        subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)

    return rate_of(pipe, megabytes)


def _core_limit(weights: Path, threads: int) -> Subject:
    """What `threads` cores could do if they did nothing but entropy decoding and SHA-256, from memory to memory."""
    sample = weights.read_bytes()[: 16 * LIMIT_SAMPLE_BYTES]
    planes = [sample[i : i + LIMIT_SAMPLE_BYTES] for i in range(0, len(sample), LIMIT_SAMPLE_BYTES)]
    frames = [encode_huffman(plane) for plane in planes]
    decompressor = zstandard.ZstdDecompressor()

    def work() -> None:
        for frame in frames:
            sha256(decompressor.decompress(frame)).digest()

    return rate_of(work, threads * len(sample) / 1e6)


def _apply_rates(delta: Packed, work: Path) -> list[Row]:
    assert delta.base is not None
    raw, old = delta.built.raw, delta.base.raw
    frame = _patch_compressor(old).compress(raw)
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    patching = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31)
    megabytes = len(raw) / 1e6
    measured = measure(
        {
            "ours": _decoding(delta, work, threads=2),
            "zstd --patch-from": rate_of(_writing(patching, frame, work), megabytes),
        }
    )
    return rows_against("apply a delta to files", "MB/s", "ours", measured)


def _memory(full: Packed, work: Path) -> list[Row]:
    """The largest anonymous memory of a process that does nothing but decode a large version, or apply a delta."""
    base, new = _large(work / "large-base", 0.0), _large(work / "large", LARGE_CHANGED)
    rows = []
    for what, packed in (("a full artifact", full), ("a delta", pack(new, base, work))):
        (work / "manifest").write_bytes(encode_document(packed.manifest))
        (work / "applied").mkdir()
        paths = [work / "manifest", packed.pack, work / "applied", *([packed.base.directory] if packed.base else [])]
        command = [sys.executable, "-c", _CHILD, *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        shutil.rmtree(work / "applied")
        size = sum(entry.size_bytes for entry in packed.built.version.files) >> 20
        rows.append(row(f"anonymous memory of the decoder, {what} of {size} MiB", "MB", exact(int(done.stdout) / 1000),
                        at_most(ANONYMOUS_LIMIT_MB)))  # fmt: skip
    return rows


_CHILD = """
import sys, threading
from pathlib import Path
from codec.decoder import decode_pack
from wire.documents import parse_document
from wire.manifest import Manifest

manifest, pack, into, *base = map(Path, sys.argv[1:])
peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.001):
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
        peak[0] = max(peak[0], int(line.split()[1]))

watcher = threading.Thread(target=watch)
watcher.start()
decode_pack(parse_document(Manifest, manifest.read_bytes()), pack, into, base=base[0] if base else None)
done.set()
watcher.join()
print(peak[0] * 1024 // 1000)
"""


def _large(directory: Path, changed: float) -> Built:
    """A made-up version: int4 weights of which a share moved by one."""
    directory.mkdir()
    chance = np.random.default_rng(11)
    nibbles = np.tile(np.clip(chance.normal(8, 2.3, 1 << 20), 0, 15).astype(np.uint8), LARGE_NIBBLES >> 20)
    moved = np.flatnonzero(chance.random(nibbles.size, np.float32) < changed)
    nibbles[moved] = (nibbles[moved] + chance.choice(np.array([1, 15], np.uint8), moved.size)) & 15
    files = {"weights.bin": (nibbles[0::2] | nibbles[1::2] << 4).tobytes(), "golden.json": GOLDEN}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    version = VersionDocument(
        model="large", version="1", config=PLACEHOLDER,
        files=tuple(FileEntry(path=n, size_bytes=len(d), sha256=digest_of(d)) for n, d in files.items()),
        tensors=TensorColumns(name=("w",), file=(0,), dtype=(Dtype.U4,), shape=((LARGE_NIBBLES,),), offset=(0,),
                              layout=(Layout.BYTES,)),
    )  # fmt: skip
    (directory / "version.json").write_bytes(encode_document(version))
    return Built(directory, version)


def _decoding(packed: Packed, work: Path, threads: int) -> Subject:
    """MB/s of decoding into a fresh directory, which is removed when the clock has stopped."""
    base = packed.base.directory if packed.base else None
    megabytes = sum(entry.size_bytes for entry in packed.built.version.files) / 1e6

    def decode() -> float:
        place = Path(mkdtemp(dir=work))
        started = time.perf_counter()
        decode_pack(packed.manifest, packed.pack, place, base=base, threads=threads)
        elapsed_s = time.perf_counter() - started
        shutil.rmtree(place)
        return megabytes / elapsed_s

    return decode


def _writing(decompressor: zstandard.ZstdDecompressor, frame: bytes, work: Path) -> Callable[[], None]:
    places = _places(work)

    def decode() -> None:
        next(places).write_bytes(decompressor.decompress(frame))

    return decode


def _places(work: Path) -> Iterator[Path]:
    """Names that are free: removing what the round before left would be measured too."""
    prefix = mkdtemp(dir=work)
    return (Path(prefix) / str(number) for number in count())


def _zstd(level: int, data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def _patch_compressor(base: bytes) -> zstandard.ZstdCompressor:
    """What `zstd -19 --patch-from` does: the base as the window's past, with tables that span it."""
    dictionary = zstandard.ZstdCompressionDict(base, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    parameters = zstandard.ZstdCompressionParameters.from_level(19, window_log=24, hash_log=23)
    return zstandard.ZstdCompressor(compression_params=parameters, dict_data=dictionary)
