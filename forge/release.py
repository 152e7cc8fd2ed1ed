"""A version directory to a signed release: packs, manifests, envelope, and what they cost."""

import hashlib
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from codec.encoder import EncodedPack, PlaneFigures, encode_pack
from codec.versions import read_version
from forge.bounds import Demand, measure_quality
from forge.build import longest_block, parameters_of
from forge.progress import Progress, silent
from forge.provenance import provenance_texts
from host.keys import Signer
from wire.digest import digest_of
from wire.documents import DOCUMENT_LIMIT_BYTES, encode_document
from wire.errors import ArtifactError, Code, ConfigError
from wire.golden import GOLDEN_FILE
from wire.manifest import Dtype, Manifest, Quality, Requirements, VersionDocument
from wire.release import ArtifactRef, DeltaRef, Release, Variant
from wire.signing import Role

RELEASE_FILE = "release.json"
VARIANTS = {Dtype.U2: "int2-block", Dtype.U4: "int4-block", Dtype.I8: "int8", Dtype.U8: "int8-block"}
"""Names of variants by the dtype of their matrices, the first that a version has, since tables may have another; how
many weights share a scale follows."""
MIXED = "mixed-block"
"""Of layers whose matrices differ."""
RAM_FACTOR = 2.5
"""Weights mapped, weights repacked by onnxruntime (up to 2.2 times), and a KV cache: what a node should have free."""


NO_DEMAND = Demand()


@dataclass(frozen=True, slots=True)
class _Told:
    """What manifests say for people."""

    quality: Quality
    provenance: dict[str, str]


@dataclass(frozen=True, slots=True)
class ReleaseSummary:
    """Figures for people; sizes in bytes. `planes` sums the full artifact per kind of plane."""

    model: str
    version: str
    release: str
    decoded: str
    raw_bytes: int
    wire_bytes: int
    bits_per_weight: float
    tensor_wire_bytes: int
    tensor_entropy_bytes: float
    index_bytes: int
    delta_wire_bytes: int | None
    delta_of: str | None
    planes: tuple[dict[str, Any], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def make_release(  # noqa: PLR0913  # each is a choice of the caller, four of them by name
    version_dir: Path,
    out: Path,
    signer: Signer,
    *,
    sequence: int,
    base_dir: Path | None = None,
    demand: Demand = NO_DEMAND,
    progress: Progress = silent,
) -> ReleaseSummary:
    """Pack and sign the version in `version_dir` into the new directory `out`, with a delta from `base_dir`.

    Raises ConfigError when `out` exists, ArtifactError when the version is not what its document says or worse than
    `demand` allows, and then leaves nothing behind.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; remove it or choose another place for the release")
    version = read_version(version_dir)
    check_version_files(version, version_dir)
    told = _Told(measure_quality(version_dir, demand, progress), provenance_texts(version_dir))
    temporary = out.with_name(f".{out.name}.packing")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    full, full_pack = _make_artifact(version, version_dir, temporary, None, told, progress)
    delta = None
    if base_dir is not None:
        base = (read_version(base_dir), base_dir)
        delta = _make_artifact(version, version_dir, temporary, base, told, progress)[0]
    envelope = signer.sign(Role.RELEASE, encode_document(_release(version, sequence, full, delta)))
    (temporary / RELEASE_FILE).write_bytes(envelope)
    temporary.rename(out)
    return _summary(version, digest_of(envelope), full, full_pack, delta)


def check_version_files(version: VersionDocument, directory: Path) -> None:
    """ArtifactError(digest_mismatch) unless every file is as version.json says."""
    for entry in version.files:
        with (directory / entry.path).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise ArtifactError(
                    Code.DIGEST_MISMATCH, f"{entry.path} was changed after the build; build the version again"
                )


def _make_artifact(  # noqa: PLR0913  # each is another part of the manifest
    version: VersionDocument,
    directory: Path,
    out: Path,
    base: tuple[VersionDocument, Path] | None,
    told: _Told,
    progress: Progress,
) -> tuple[ArtifactRef | DeltaRef, EncodedPack]:
    """Encode one artifact into `out`, its files named by the manifest's digest."""
    scratch = out / ".pack"
    what = "pack" if base is None else "pack the delta"
    encoded = encode_pack(version, directory, scratch, base=base, progress=partial(progress, what))
    bits = round(8 * encoded.pack_size_bytes / parameters_of(version), 4)
    manifest = Manifest(
        decoded=version.decoded_digest(),
        version=version,
        base=base[0].decoded_digest() if base else None,
        operations=encoded.operations,
        index_size_bytes=encoded.index_size_bytes,
        index_frames=encoded.index_frames,
        pack_size_bytes=encoded.pack_size_bytes,
        golden=next(entry.sha256 for entry in version.files if entry.path == GOLDEN_FILE),
        requirements=_requirements(version),
        quality=told.quality.model_copy(update={"bits_per_weight": bits}),
        provenance={
            "forge": package_version("amperage"), "onnxruntime": package_version("onnxruntime"), **told.provenance,
        },
    )  # fmt: skip
    document = encode_document(manifest)
    if len(document) > DOCUMENT_LIMIT_BYTES:
        raise ArtifactError(
            Code.BAD_MANIFEST,
            f"manifest has {len(document)} bytes, over {DOCUMENT_LIMIT_BYTES}: shorten tensor names or merge tensors",
        )
    digest = digest_of(document)
    (out / f"{digest}.manifest.json").write_bytes(document)
    scratch.rename(out / f"{digest}.pack")
    wire_bytes = encoded.pack_size_bytes + len(document)
    if base is None:
        return ArtifactRef(manifest=digest, wire_bytes=wire_bytes), encoded
    return DeltaRef(manifest=digest, wire_bytes=wire_bytes, base=base[0].decoded_digest()), encoded


def variant_name(version: VersionDocument) -> str:
    """How the matrices are stored, for people and for a node's report, with the longest block."""
    columns = version.tensors
    in_layers = {dtype for name, dtype in zip(columns.name, columns.dtype, strict=True) if name.startswith("layers.")}
    name = next((name for dtype, name in VARIANTS.items() if dtype in columns.dtype), "float32")
    if len(in_layers & VARIANTS.keys()) > 1:
        name = MIXED
    return f"{name}{longest_block(version)}" if name.endswith("block") else name


def _requirements(version: VersionDocument) -> Requirements:
    decoded = sum(entry.size_bytes for entry in version.files)
    return Requirements(ram_bytes=int(decoded * RAM_FACTOR), disk_bytes=decoded)


def _release(version: VersionDocument, sequence: int, full: ArtifactRef, delta: ArtifactRef | None) -> Release:
    deltas = (delta,) if isinstance(delta, DeltaRef) else ()
    variant = Variant(
        name=variant_name(version), decoded=version.decoded_digest(), full=full, deltas=deltas,
        requirements=_requirements(version),
    )  # fmt: skip
    return Release(model=version.model, version=version.version, sequence=sequence, variants=(variant,))


def _summary(
    version: VersionDocument, release: str, full: ArtifactRef, encoded: EncodedPack, delta: ArtifactRef | None
) -> ReleaseSummary:
    names = set(version.tensors.name)
    tensors = [plane for plane in encoded.planes if plane.stream in names]
    return ReleaseSummary(
        model=version.model,
        version=version.version,
        release=release,
        decoded=version.decoded_digest(),
        raw_bytes=sum(entry.size_bytes for entry in version.files),
        wire_bytes=full.wire_bytes,
        bits_per_weight=round(8 * full.wire_bytes / parameters_of(version), 4),
        tensor_wire_bytes=sum(plane.coded_bytes for plane in tensors),
        tensor_entropy_bytes=round(sum(plane.entropy_bytes for plane in tensors), 1),
        index_bytes=encoded.index_size_bytes,
        delta_wire_bytes=delta.wire_bytes if delta else None,
        delta_of=delta.base if isinstance(delta, DeltaRef) else None,
        planes=_sum_planes(encoded.planes, names),
    )


def _sum_planes(planes: tuple[PlaneFigures, ...], tensors: set[str]) -> tuple[dict[str, Any], ...]:
    """One row per kind: packed nibbles, scales, norms, and every file that holds no tensors."""
    rows: dict[tuple[str, str], dict[str, Any]] = defaultdict(
        lambda: {"raw_bytes": 0, "coded_bytes": 0, "entropy_bytes": 0.0, "codecs": set()}
    )
    for plane in planes:
        kind = plane.stream.rsplit(".", 1)[-1] if plane.stream in tensors else plane.stream
        row = rows[(kind, plane.plane)]
        row["raw_bytes"] += plane.raw_bytes
        row["coded_bytes"] += plane.coded_bytes
        row["entropy_bytes"] += plane.entropy_bytes
        row["codecs"] |= set(plane.codecs)
    return tuple(
        {"kind": kind, "plane": name, **row, "entropy_bytes": round(row["entropy_bytes"], 1),
         "codecs": sorted(row["codecs"])}
        for (kind, name), row in rows.items()
    )  # fmt: skip
