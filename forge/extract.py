"""An artifact to a version directory, as a node does it, or to some of its files.

The directory appears whole, on the disk, or not at all: it is decoded under a temporary name beside its place, which
the next extraction to that place removes when a crash left it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from codec.decoder import decode_pack
from codec.excerpt import write_excerpt
from codec.inspection import OpenPack, check_frames, open_pack
from codec.versions import VERSION_FILE
from forge.artifact import Artifact
from forge.progress import Progress, silent
from host.files import commit_directory, make_directory, remove_file, remove_tree
from wire.errors import ConfigError

_EXCERPT = ".excerpt.pack"


def extract_artifact(
    artifact: Artifact,
    into: Path,
    *,
    base: Path | None = None,
    files: Sequence[str] = (),
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Decode to the new directory `into`, read-only as on a node: the version, or of it only `files`. `base` is the
    version that a delta needs. Returns the names.

    Raises ConfigError when `into` exists or a file is unknown, ArtifactError naming the frame or file that is wrong,
    StoreError when the disk refuses.
    """
    known = [entry.path for entry in artifact.manifest.version.files]
    unknown = sorted(set(files) - set(known))
    if unknown:
        raise ConfigError(f"the artifact has no file {', '.join(unknown)}; it has {', '.join(known)}")
    if into.exists():
        raise ConfigError(f"{into} exists and is never overwritten; choose a new directory")
    with open_pack(artifact.manifest, artifact.pack) as pack, _appearing(into) as place:
        check_frames(pack, lambda done, total: progress("frames", done, total))
        if not files:
            report = partial(progress, "decode")
            decode_pack(artifact.manifest, artifact.pack, place, base=base, progress=report)
            return (*known, VERSION_FILE)
        _decode_files(pack, frozenset(files), place, base)
        return tuple(name for name in known if name in files)


def _decode_files(pack: OpenPack, names: frozenset[str], place: Path, base: Path | None) -> None:
    """Without version.json: nobody takes some files for a version."""
    excerpt = place.with_name(place.name + _EXCERPT)
    try:
        manifest = write_excerpt(pack, names, excerpt)
        decode_pack(manifest, excerpt, place, base=base)
    finally:
        remove_file(excerpt)
    remove_file(place / VERSION_FILE)


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `directory` durably when the block ends well, and is removed otherwise."""
    temporary = directory.with_name(f".{directory.name}.extracting")
    remove_tree(temporary)
    make_directory(temporary)
    try:
        yield temporary
        commit_directory(temporary, directory)
    except BaseException:
        remove_tree(temporary)
        raise
