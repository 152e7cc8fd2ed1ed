"""Which artifact of a release this node takes, and whether it may begin: all checks before byte one, pure.

Invariant: a release is read only after its envelope was opened, a manifest only after its digest was right, and both
must agree on what they lead to.
"""

from dataclasses import dataclass

from agent.trust import Trust
from wire.documents import parse_document
from wire.errors import ArtifactError, Code, DeployError
from wire.manifest import Manifest, Requirements
from wire.release import ArtifactRef, Release, Variant
from wire.serving import prepack_factor
from wire.signing import Role


@dataclass(frozen=True, slots=True)
class Fitness:
    """What the node has to offer; None where the machine does not say."""

    memory_bytes: int | None
    disk_free_bytes: int
    cpu_features: frozenset[str]
    versions: frozenset[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """The variant, and the artifact that leads to it; `base` is the version a delta applies to."""

    variant: Variant
    artifact: ArtifactRef
    base: str | None


def open_release(trust: Trust, envelope: bytes, model: str) -> Release:
    """The verified release; raises ArtifactError (bad_document, unknown_signer, bad_signature)."""
    release = parse_document(Release, trust.open(envelope, Role.RELEASE))
    if release.model != model:
        raise ArtifactError(
            Code.BAD_DOCUMENT, f"desired state names this release for model {model}, but it is of {release.model}"
        )
    return release


def choose(release: Release, node: Fitness) -> Choice:
    """The first variant that the node can run, by the smallest delta whose base it has, else in full.

    Raises DeployError(unfit_node).
    """
    faults = []
    for variant in release.variants:
        fault = _unfit(variant.requirements, node)
        if fault is None:
            deltas = [delta for delta in variant.deltas if delta.base in node.versions]
            best = min(deltas, key=lambda delta: delta.wire_bytes, default=None)
            if best is not None and best.wire_bytes < variant.full.wire_bytes:
                return Choice(variant, best, best.base)
            return Choice(variant, variant.full, None)
        faults.append(f"{variant.name}: {fault}")
    raise DeployError(Code.UNFIT_NODE, f"no variant fits this node ({'; '.join(faults)}); publish a smaller one")


def check_manifest(manifest: Manifest, release: Release, choice: Choice) -> None:
    """Raise ArtifactError(bad_manifest) unless the manifest leads where the release says."""
    expected = (choice.variant.decoded, choice.base, release.model, release.version)
    found = (manifest.decoded, manifest.base, manifest.version.model, manifest.version.version)
    if found != expected:
        raise ArtifactError(
            Code.BAD_MANIFEST, "the manifest does not lead to the version, base or model of the release; sign it anew"
        )


def check_room(manifest: Manifest, node: Fitness, reserve_bytes: int, prepack_sessions: int) -> None:
    """Raise DeployError unless there is disk (no_space) and memory for the version beside what is there.

    Disk for its pack, its files, and the packed weights of `prepack_sessions` sessions, 0 where none are kept.
    """
    decoded_bytes = sum(entry.size_bytes for entry in manifest.version.files)
    prepack_bytes = round(prepack_factor(prepack_sessions) * decoded_bytes)
    version_bytes = max(decoded_bytes, manifest.requirements.disk_bytes)
    needed = manifest.pack_size_bytes + version_bytes + prepack_bytes + reserve_bytes
    if node.disk_free_bytes < needed:
        small = ', or do without packed weights (disk = "small" in agent.toml)' if prepack_bytes else ""
        raise DeployError(
            Code.NO_SPACE,
            f"the store has {node.disk_free_bytes} bytes free and needs {needed}: pack {manifest.pack_size_bytes}, "
            f"version {version_bytes}, packed weights {prepack_bytes}, reserve {reserve_bytes}; free space or enlarge "
            f"the disk{small}",
        )
    fault = _unfit(manifest.requirements, node)
    if fault is not None:
        raise DeployError(Code.UNFIT_NODE, f"{fault}; publish a smaller variant")


def _unfit(requirements: Requirements, node: Fitness) -> str | None:
    if node.memory_bytes is not None and node.memory_bytes < requirements.ram_bytes:
        return f"needs {requirements.ram_bytes} bytes of memory, {node.memory_bytes} are available"
    missing = sorted(set(requirements.cpu_features) - node.cpu_features)
    return f"needs CPU features {', '.join(missing)}" if missing else None
