"""What an artifact is made of and what each part costs: by part, by layer, by kind of plane, by codec.

Every figure adds up to the wire size: manifest + index + sections. Nothing here writes.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from codec.inspection import CodecShare, PlaneCost, measure_planes, open_pack
from forge.artifact import Artifact
from forge.build import weights_by_tensor
from forge.progress import Progress, silent

OPERATIONS = {"f": "full", "s": "sparse", "c": "copy", "d": "difference"}
"""Names of the manifest's letters; one that is not here stands for itself."""

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|h)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part costs, in bytes: its planes before coding and coded, and the sum of the order-0 entropies of every
    plane of every stream in it, None when not all are known."""

    label: str
    raw_bytes: int
    coded_bytes: int
    entropy_bytes: float | None
    codecs: dict[str, CodecShare]


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer, or what stands beside the layers; coded bytes by kind of plane, streams by operation."""

    label: str
    weights: int
    cost: Cost
    planes: dict[str, int]
    operations: dict[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Coded bits per weight."""
        return bits_per(self.cost.coded_bytes, self.weights)

    @property
    def bound_per_weight(self) -> float | None:
        """The order-0 bound in bits per weight."""
        return None if self.cost.entropy_bytes is None else bits_per(self.cost.entropy_bytes, self.weights)


@dataclass(frozen=True, slots=True)
class Inspection:
    """All figures of one artifact; sizes in bytes. `files` are those without tensors: graph, tokenizer and so on."""

    model: str
    version: str
    artifact: str
    decoded: str
    base: str | None
    weights: int
    decoded_bytes: int
    wire_bytes: int
    manifest_bytes: int
    index_bytes: int
    tensors: Cost
    files: tuple[Cost, ...]
    planes: tuple[Cost, ...]
    layers: tuple[LayerCost, ...]
    codecs: dict[str, CodecShare]
    operations: dict[str, int]
    quality: dict[str, Any]
    """Figures that the manifest tells."""
    provenance: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, with bits per weight."""
        plain = asdict(self)
        for layer, figures in zip(self.layers, plain["layers"], strict=True):
            figures["bits_per_weight"] = round(layer.bits_per_weight, 4)
        return {
            **plain,
            "bits_per_weight": {
                "wire": round(bits_per(self.wire_bytes, self.weights), 4),
                "tensors": round(bits_per(self.tensors.coded_bytes, self.weights), 4),
                "decoded": round(bits_per(self.decoded_bytes, self.weights), 4),
            },
        }


def inspect_artifact(artifact: Artifact, *, entropy: bool = True, progress: Progress = silent) -> Inspection:
    """Measure an artifact; with `entropy` by decoding every section.

    Raises ArtifactError, naming the section where one does not decode, and StoreError.
    """
    manifest, version = artifact.manifest, artifact.manifest.version
    with open_pack(manifest, artifact.pack) as pack:
        planes = measure_planes(pack, entropy=entropy, progress=lambda done, total: progress("sections", done, total))
    weights = weights_by_tensor(version)
    tensors = [plane for plane in planes if plane.stream.name]
    return Inspection(
        model=version.model,
        version=version.version,
        artifact=artifact.digest,
        decoded=manifest.decoded,
        base=manifest.base,
        weights=sum(weights.values()),
        decoded_bytes=sum(entry.size_bytes for entry in version.files),
        wire_bytes=artifact.manifest_bytes + manifest.pack_size_bytes,
        manifest_bytes=artifact.manifest_bytes,
        index_bytes=manifest.index_size_bytes,
        tensors=_sum("tensors", tensors),
        files=_costs_by(lambda plane: plane.stream.path, [plane for plane in planes if not plane.stream.name]),
        planes=_costs_by(plane_kind, tensors),
        layers=tuple(_layers(tensors, weights)),
        codecs=_add_codecs(planes),
        operations=_count_operations(planes),
        quality=manifest.quality.model_dump(exclude_none=True),
        provenance=manifest.provenance,
    )


def bits_per(size_bytes: float, weights: int) -> float:
    """Bits per weight; 0 where there is no weight."""
    return 8 * size_bytes / weights if weights else 0.0


def plane_kind(plane: PlaneCost) -> str:
    """The role of a tensor, which is the last part of its name, and the plane, where its layout has several."""
    role = plane.stream.name.rpartition(".")[2]
    return role if plane.plane == "bytes" else f"{role} {plane.plane}"


def layer_of(tensor: str) -> str:
    """`layer 3` for a tensor of a numbered layer, else its name without the role."""
    numbered = _LAYER.search(tensor)
    return f"layer {int(numbered[1])}" if numbered else tensor.rpartition(".")[0] or tensor


def _layers(tensors: list[PlaneCost], weights: dict[str, int]) -> Iterator[LayerCost]:
    """In the order of the pack."""
    for label, planes in _groups(lambda plane: layer_of(plane.stream.name), tensors).items():
        names = {plane.stream.name for plane in planes}
        label = min(names) if len(names) == 1 else label
        yield LayerCost(
            label=label,
            weights=sum(weights[name] for name in names),
            cost=_sum(label, planes),
            planes={kind: sum(p.coded_bytes for p in some) for kind, some in _groups(plane_kind, planes).items()},
            operations=_count_operations(planes),
        )


def _groups(key: Callable[[PlaneCost], str], planes: Iterable[PlaneCost]) -> dict[str, list[PlaneCost]]:
    groups: dict[str, list[PlaneCost]] = {}
    for plane in planes:
        groups.setdefault(key(plane), []).append(plane)
    return groups


def _costs_by(key: Callable[[PlaneCost], str], planes: Iterable[PlaneCost]) -> tuple[Cost, ...]:
    return tuple(_sum(label, some) for label, some in _groups(key, planes).items())


def _sum(label: str, planes: Iterable[PlaneCost]) -> Cost:
    planes = list(planes)
    bounds = [plane.entropy_bytes for plane in planes if plane.entropy_bytes is not None]
    return Cost(
        label=label,
        raw_bytes=sum(plane.raw_bytes for plane in planes),
        coded_bytes=sum(plane.coded_bytes for plane in planes),
        entropy_bytes=round(sum(bounds), 1) if len(bounds) == len(planes) else None,
        codecs=_add_codecs(planes),
    )


def _add_codecs(planes: Iterable[PlaneCost]) -> dict[str, CodecShare]:
    shares: dict[str, CodecShare] = {}
    for plane in planes:
        for codec, share in plane.codecs.items():
            old = shares.get(codec, CodecShare(0, 0, 0))
            shares[codec] = CodecShare(
                old.sections + share.sections, old.raw_bytes + share.raw_bytes, old.coded_bytes + share.coded_bytes
            )
    return dict(sorted(shares.items(), key=lambda item: -item[1].coded_bytes))


def _count_operations(planes: Iterable[PlaneCost]) -> dict[str, int]:
    """Streams by operation."""
    streams = {(plane.stream.path, plane.stream.name): plane.operation for plane in planes}
    return dict(Counter(OPERATIONS.get(operation, operation) for operation in streams.values()))
