"""What `amperage forge inspect` prints. Names come from files that nobody vouched for: they are shown, never obeyed."""

from collections.abc import Mapping

from rich.console import Group
from rich.table import Table
from rich.text import Text

from forge.artifact import MANIFEST_SUFFIX, Artifact
from forge.inspect import Cost, Inspection, bits_per
from wire.manifest import VersionDocument


def cell(text: str) -> Text:
    """Text without markup, and with what a terminal would act on escaped."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def version_table(document: VersionDocument) -> Table:
    """The tensors of a version."""
    table = Table("tensor", "type", "shape", "bytes", "layout", title=cell(f"{document.model} {document.version}"))
    columns = document.tensors
    for row, name in enumerate(columns.name):
        shape = " x ".join(str(size) for size in columns.shape[row])
        table.add_row(cell(name), columns.dtype[row], shape, f"{columns.size_bytes(row):,}", columns.layout[row])
    return table


def artifacts_table(artifacts: tuple[Artifact, ...]) -> Table:
    """One line for each artifact of a release directory."""
    version = artifacts[0].manifest.version
    table = Table("artifact", "kind", "wire bytes", "bits per weight", title=cell(f"{version.model} {version.version}"))
    for artifact in artifacts:
        manifest = artifact.manifest
        bits = manifest.quality.bits_per_weight
        table.add_row(
            cell(artifact.path.name.removesuffix(MANIFEST_SUFFIX)),
            f"delta to {manifest.base[:12]}…" if manifest.base else "full",
            f"{artifact.manifest_bytes + manifest.pack_size_bytes:,}", "" if bits is None else f"{bits:.3f}",
        )  # fmt: skip
    return table


def artifact_tables(found: Inspection) -> Group:
    """Identity, parts, kinds of planes, layers, codecs, and what the manifest tells beside."""
    history = provenance_table({**{name: str(value) for name, value in found.quality.items()}, **found.provenance})
    return Group(_identity(found), _parts(found), _planes(found), _layers(found), _codecs(found), history)


def provenance_table(texts: Mapping[str, str]) -> Table:
    """What is told of a version's quality and of where it comes from."""
    table = Table("told", "", title="Quality and provenance", title_justify="left")
    for name, text in texts.items():
        table.add_row(cell(name), cell(text))
    return table


def _identity(found: Inspection) -> Table:
    table = Table("identity", "", title=cell(f"{found.model} {found.version}"), title_justify="left")
    table.add_row("artifact", found.artifact)
    table.add_row("decodes to", found.decoded)
    table.add_row("kind", f"delta to {found.base}" if found.base else "full")
    table.add_row("streams", ", ".join(f"{count} {name}" for name, count in found.operations.items()))
    table.add_row("weights", f"{found.weights:,}")
    return table


def _parts(found: Inspection) -> Table:
    """Where the bytes on the wire are."""
    table = _table("part", "raw bytes", "wire bytes", "share", "bits per weight", title="Parts")
    parts: list[tuple[str, int | None, int]] = [
        ("manifest", None, found.manifest_bytes),
        ("index", None, found.index_bytes),
    ]
    parts += [(cost.label, cost.raw_bytes, cost.coded_bytes) for cost in (found.tensors, *found.files)]
    for label, raw, wire in parts:
        table.add_row(
            cell(label), "" if raw is None else f"{raw:,}", f"{wire:,}", f"{wire / found.wire_bytes:.1%}",
            f"{bits_per(wire, found.weights):.3f}",
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "artifact", f"{found.decoded_bytes:,}", f"{found.wire_bytes:,}", "100.0%",
        f"{bits_per(found.wire_bytes, found.weights):.3f}",
    )  # fmt: skip
    return table


def _planes(found: Inspection) -> Table:
    table = _table("plane", "raw bytes", "coded", "order-0 entropy", "coded / entropy", "codecs", title="Planes")
    for cost in (*found.planes, *found.files):
        table.add_row(
            cell(cost.label), f"{cost.raw_bytes:,}", f"{cost.coded_bytes:,}", _entropy(cost), _distance(cost),
            ", ".join(f"{codec} {share.sections}" for codec, share in cost.codecs.items()),
        )  # fmt: skip
    return table


def _layers(found: Inspection) -> Table:
    operations = list(found.operations) if found.base else []
    table = _table(
        "layer", "weights", "raw bytes", "coded", "bits per weight", "order-0 bound", *operations, title="Layers"
    )
    for layer in found.layers:
        bound = layer.bound_per_weight
        table.add_row(
            cell(layer.label), f"{layer.weights:,}", f"{layer.cost.raw_bytes:,}", f"{layer.cost.coded_bytes:,}",
            f"{layer.bits_per_weight:.3f}", "" if bound is None else f"{bound:.3f}",
            *(str(layer.operations.get(name, 0)) for name in operations),
        )  # fmt: skip
    return table


def _codecs(found: Inspection) -> Table:
    table = _table("codec", "sections", "raw bytes", "coded", "share", title="Codecs")
    coded = sum(share.coded_bytes for share in found.codecs.values())
    for codec, share in found.codecs.items():
        table.add_row(
            codec, f"{share.sections:,}", f"{share.raw_bytes:,}", f"{share.coded_bytes:,}",
            f"{share.coded_bytes / max(coded, 1):.1%}",
        )  # fmt: skip
    return table


def _table(first: str, *numbers: str, title: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for column in numbers:
        table.add_column(column, justify="left" if column == "codecs" else "right")
    return table


def _entropy(cost: Cost) -> str:
    return "" if cost.entropy_bytes is None else f"{cost.entropy_bytes:,.0f}"


def _distance(cost: Cost) -> str:
    return f"{cost.coded_bytes / cost.entropy_bytes:.3f}" if cost.entropy_bytes else ""
