"""A manifest leads exactly where the signed release says: to the version, from the base, for the model."""

from typing import Any

import pytest

from agent.admission import Choice, check_manifest
from wire.errors import ArtifactError, Code
from wire.manifest import DecoderConfig, FileEntry, Manifest, Requirements, TensorColumns, VersionDocument
from wire.release import ArtifactRef, Release, Variant

DIGEST, OTHER = "a" * 64, "b" * 64


def make_manifest(model: str = "tales", version: str = "1.0", base: str | None = None) -> Manifest:
    config = DecoderConfig(layers=1, hidden_size=8, kv_heads=1, head_size=8, vocab_size=8, context_tokens=8)
    entry = FileEntry(path="golden.json", size_bytes=1, sha256=DIGEST)
    document = VersionDocument(model=model, version=version, config=config, files=(entry,), tensors=TensorColumns())
    return Manifest(
        decoded=document.decoded_digest(), version=document, base=base, operations="f", index_size_bytes=1,
        index_frames=(DIGEST,), pack_size_bytes=1, golden=DIGEST, requirements=Requirements(ram_bytes=0, disk_bytes=0),
    )  # fmt: skip


def make_order(manifest: Manifest) -> tuple[Release, Choice]:
    """A release and the agent's choice that `manifest` satisfies."""
    reference = ArtifactRef(manifest=DIGEST, wire_bytes=1)
    variant = Variant(name="int4", decoded=manifest.decoded, full=reference, requirements=manifest.requirements)
    release = Release(
        model=manifest.version.model, version=manifest.version.version, sequence=1, variants=(variant,)
    )  # fmt: skip
    return release, Choice(variant, reference, manifest.base)


@pytest.mark.parametrize("manifest", [make_manifest(), make_manifest(base=OTHER)], ids=["full", "delta"])
def test_manifest_that_leads_where_the_release_says_is_taken(manifest: Manifest) -> None:
    check_manifest(manifest, *make_order(manifest))


@pytest.mark.parametrize("other", [{"model": "news"}, {"version": "1.1"}, {"base": DIGEST}, {"base": OTHER}])
def test_manifest_that_leads_elsewhere_than_the_release_is_refused(other: dict[str, Any]) -> None:
    ordered = make_manifest(base=OTHER if "base" in other and other["base"] == DIGEST else None)
    with pytest.raises(ArtifactError) as refused:
        check_manifest(make_manifest(**other), *make_order(ordered))
    assert refused.value.code is Code.BAD_MANIFEST
