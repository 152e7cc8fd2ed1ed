"""Size and speed of artifacts, full and delta, beside zstd -3, -19 and -19 --patch-from on the same bytes.

The sample models are quantised to int4 by the forge first. Sizes are exact; rates count decoded bytes and are medians
of rounds in turns. Ours writes real files, checks CRC-32 and SHA-256 of everything and uses two threads; the peers
write their decoded bytes to one file and check nothing. Encoding uses every core here, and one in zstd.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import zstandard

from benchmarks.harness import Row, at_least, at_most, exact, measure, rate_of, row, rows_against
from codec.decoder import decode_pack
from codec.encoder import EncodedPack, encode_pack
from forge.build import build_version
from wire.digest import digest_of
from wire.documents import encode_document
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

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
GIGABIT_MB_PER_S = 125.0
"""A gigabit link in MB/s: a slower decoder would be what a node waits for."""
LARGE_NIBBLES = 64 << 20
LARGE_CHANGED = 0.02
ANONYMOUS_LIMIT_MB = 64.0
"""docs/design.md section 9."""


@dataclass(frozen=True, slots=True)
class Built:
    """A version directory."""

    directory: Path
    version: VersionDocument

    @property
    def raw(self) -> bytes:
        """All files end to end: what a general compressor is given."""
        return b"".join(path.read_bytes() for path in sorted(self.directory.iterdir()))


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
    def over_entropy(self) -> float:
        """Coded bytes of the tensors over the sum of the order-0 byte entropies of their planes."""
        names = set(self.built.version.tensors.name)
        planes = [plane for plane in self.encoded.planes if plane.stream in names]
        return sum(plane.coded_bytes for plane in planes) / sum(plane.entropy_bytes for plane in planes)


def run() -> Sequence[Row]:
    """Build, pack, measure."""
    with TemporaryDirectory() as place:
        work = Path(place)
        base = _build(work, "base", None)
        small = _build(work, "finetuned-50", base)
        far = _build(work, "finetuned-400", base)
        full = _pack(base, None, work)
        near, distant = _pack(small, base, work), _pack(far, base, work)
        return [
            *_full_sizes(full),
            *_delta_sizes("50 steps", near),
            *_delta_sizes("400 steps", distant),
            *_encode_rates(full, work),
            *_decode_rates(full, work),
            *_apply_rates(near, work),
            *_memory(work),
        ]


def _full_sizes(full: Packed) -> list[Row]:
    raw = full.built.raw
    ours = exact(full.wire_bytes)
    return [
        row("raw / wire", "x", exact(len(raw) / full.wire_bytes), at_least(1.2)),
        row("tensors / order-0 entropy", "x", exact(full.over_entropy), at_most(1.01)),
        *(
            row("full artifact", "B", ours, at_most(1.0, ratio=True), (f"zstd -{level}", exact(len(_zstd(level, raw)))))
            for level in (3, 19)
        ),
    ]


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
    megabytes = len(raw) / 1e6
    measured = measure(
        {
            "ours": rate_of(lambda: encode_pack(full.built.version, full.built.directory, work / "again"), megabytes),
            "zstd -3": rate_of(lambda: _zstd(3, raw), megabytes),
            "zstd -19": rate_of(lambda: _zstd(19, raw), megabytes),
        }
    )
    return rows_against("encode", "MB/s", "ours", measured)


def _decode_rates(full: Packed, work: Path) -> list[Row]:
    raw = full.built.raw
    megabytes = len(raw) / 1e6
    frames = {level: _zstd(level, raw) for level in (3, 19)}
    measured = measure(
        {
            "ours": rate_of(_decoding(full, work), megabytes),
            **{
                f"zstd -{level}": rate_of(_writing(zstandard.ZstdDecompressor(), frame, work), megabytes)
                for level, frame in frames.items()
            },
        }
    )
    return rows_against("decode to files", "MB/s", "ours", measured, at_least(GIGABIT_MB_PER_S))


def _apply_rates(delta: Packed, work: Path) -> list[Row]:
    assert delta.base is not None
    raw, old = delta.built.raw, delta.base.raw
    frame = _patch_compressor(old).compress(raw)
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    patching = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31)
    megabytes = len(raw) / 1e6
    measured = measure(
        {
            "ours": rate_of(_decoding(delta, work), megabytes),
            "zstd --patch-from": rate_of(_writing(patching, frame, work), megabytes),
        }
    )
    return rows_against("apply a delta to files", "MB/s", "ours", measured)


def _memory(work: Path) -> list[Row]:
    """The largest anonymous memory of a process that does nothing but apply a delta to a large version."""
    base, new = _large(work / "large-base", 0.0), _large(work / "large", LARGE_CHANGED)
    delta = _pack(new, base, work)
    (work / "manifest").write_bytes(encode_document(delta.manifest))
    (work / "applied").mkdir()
    arguments = [str(path) for path in (work / "manifest", delta.pack, work / "applied", base.directory)]
    done = subprocess.run([sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=True)
    megabytes = int(done.stdout) / 1000
    size = sum(entry.size_bytes for entry in new.version.files) >> 20
    return [
        row(
            f"anonymous memory of the decoder, delta of {size} MiB", "MB", exact(megabytes), at_most(ANONYMOUS_LIMIT_MB)
        )
    ]


_CHILD = """
import sys, threading
from pathlib import Path
from codec.decoder import decode_pack
from wire.documents import parse_document
from wire.manifest import Manifest

manifest, pack, into, base = map(Path, sys.argv[1:])
peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.001):
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
        peak[0] = max(peak[0], int(line.split()[1]))

watcher = threading.Thread(target=watch)
watcher.start()
decode_pack(parse_document(Manifest, manifest.read_bytes()), pack, into, base=base)
done.set()
watcher.join()
print(peak[0] * 1024 // 1000)
"""


def _build(work: Path, name: str, base: Built | None) -> Built:
    source, out = SAMPLES / f"tales-5m-{name}", work / name
    scales_of = base.directory if base else None
    return Built(out, build_version(source, out, ("tales", name), scales_of=scales_of))


def _pack(built: Built, base: Built | None, work: Path) -> Packed:
    pack = work / f"{built.directory.name}.pack"
    against = (base.version, base.directory) if base else None
    encoded = encode_pack(built.version, built.directory, pack, base=against)
    manifest = Manifest(
        decoded=built.version.decoded_digest(), version=built.version,
        base=base.version.decoded_digest() if base else None, operations=encoded.operations,
        index_size_bytes=encoded.index_size_bytes, index_frames=encoded.index_frames,
        pack_size_bytes=encoded.pack_size_bytes, golden=built.version.files[-1].sha256,
        requirements=Requirements(ram_bytes=0, disk_bytes=0),
    )  # fmt: skip
    return Packed(built, base, pack, encoded, manifest)


def _large(directory: Path, changed: float) -> Built:
    """A made-up version: int4 weights of which a share moved by one."""
    directory.mkdir()
    chance = np.random.default_rng(11)
    nibbles = np.tile(np.clip(chance.normal(8, 2.3, 1 << 20), 0, 15).astype(np.uint8), LARGE_NIBBLES >> 20)
    moved = np.flatnonzero(chance.random(nibbles.size, np.float32) < changed)
    nibbles[moved] = (nibbles[moved] + chance.choice(np.array([1, 15], np.uint8), moved.size)) & 15
    files = {"weights.bin": (nibbles[0::2] | nibbles[1::2] << 4).tobytes(), "golden.json": b"{}"}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    version = VersionDocument(
        model="large", version="1",
        config=DecoderConfig(layers=1, hidden_size=1, kv_heads=1, head_size=1, vocab_size=1, context_tokens=1),
        files=tuple(FileEntry(path=n, size_bytes=len(d), sha256=digest_of(d)) for n, d in files.items()),
        tensors=TensorColumns(name=("w",), file=(0,), dtype=(Dtype.U4,), shape=((LARGE_NIBBLES,),), offset=(0,),
                              layout=(Layout.BYTES,)),
    )  # fmt: skip
    (directory / "version.json").write_bytes(encode_document(version))
    return Built(directory, version)


def _decoding(packed: Packed, work: Path) -> Callable[[], None]:
    base, places = packed.base.directory if packed.base else None, _places(work)

    def decode() -> None:
        place = next(places)
        place.mkdir()
        decode_pack(packed.manifest, packed.pack, place, base=base)

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
