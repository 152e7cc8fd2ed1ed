"""`amperage.json` beside a checkpoint or a version: what it was made of, by which steps, with which tools.

It is not among the files of version.json, so that it changes no digest; a release takes it along in its manifests.
Nothing in it depends on when or where it was made. It names the digests of the files that it was written beside, and is
believed only while they are so.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from host.files import read_bounded, write_atomically
from wire.digest import Digest, digest_of
from wire.documents import DOCUMENT_LIMIT_BYTES, Command, SchemaOne, encode_document, parse_document
from wire.errors import ArtifactError, Code, ConfigError

PROVENANCE_FILE = "amperage.json"
FOLDER_FILES = ("*.json", "*.safetensors", "*.jinja", "*/config.json")
"""What of a checkpoint's folder a build may read."""
FILES_LIMIT = 256
TOLD_FILES = 32
"""Of the source, in a manifest, which has to stay small; of more it tells one digest."""
TOOLS = ("amperage", "numpy", "onnx", "onnxruntime", "tokenizers", "torch")

Text = Annotated[str, StringConstraints(min_length=1, max_length=400, strict=True)]
Files = Annotated[dict[Text, Digest], Field(max_length=FILES_LIMIT)]


class LeastNoticed(Command):
    """What golden vectors notice least of the damages that they were tried on."""

    damage: Text
    ratio: Annotated[float, Field(ge=0)]
    """Its error as a multiple of their tolerance: below 1 such a damage is served."""

    def __str__(self) -> str:
        return f"{self.damage}: {self.ratio:g} times the tolerance"


class Step(Command):
    """One command of the forge; options have the names of the command line."""

    command: Text
    options: Annotated[dict[Text, Text], Field(max_length=64)] = {}
    inputs: Files = {}
    """Digests of what else it read: of token windows and texts as they were used, of versions their decoded digest."""
    tools: Annotated[dict[Text, Text], Field(max_length=16)] = {}

    def __str__(self) -> str:
        options = [f"--{name}" if value == "true" else f"--{name} {value}" for name, value in self.options.items()]
        inputs = [f"--{name} {digest[:12]}…" for name, digest in self.inputs.items()]
        return " ".join([self.command, *options, *inputs])


class Provenance(Command):
    """The document: `source` are the files of the first checkpoint, `files` those that lie beside this one."""

    schema_: SchemaOne = 1
    source: Files = {}
    steps: Annotated[tuple[Step, ...], Field(max_length=32)] = ()
    files: Files = {}
    least_noticed: LeastNoticed | None = None

    def as_texts(self) -> dict[str, str]:
        """What a manifest says of it, by name."""
        texts = {f"source {name}": digest for name, digest in self.source.items()}
        if len(texts) > TOLD_FILES:
            lines = "".join(f"{digest}  {name}\n" for name, digest in self.source.items())
            texts = {f"source: {len(texts)} files as sha256sum lists them": digest_of(lines.encode())}
        for number, step in enumerate(self.steps, 1):
            texts[f"step {number}"] = str(step)
            texts[f"step {number} tools"] = " ".join(f"{name} {release}" for name, release in step.tools.items())
            texts |= {f"step {number} {name}": digest for name, digest in step.inputs.items()}
        if self.least_noticed is not None:
            texts["least noticed damage"] = str(self.least_noticed)
        return texts


def tools() -> dict[str, str]:
    """Versions of what decides a step's result, as far as it is installed."""
    return {name: release for name in TOOLS if (release := _release(name)) is not None}


def chain_of(source: Path) -> Provenance:
    """Where the checkpoint `source` comes from; one without the document is where a chain begins.

    Raises ArtifactError when the document is damaged, or not that of the files beside it.
    """
    found, files = read_provenance(source), digests_of(source)
    if found is None:
        return Provenance(source=files)
    if found.files != files:
        raise ArtifactError(
            Code.DIGEST_MISMATCH,
            f"{source} has other files than its {PROVENANCE_FILE} was written for; make the checkpoint again, or remove"
            f" {PROVENANCE_FILE} if the change was meant: its history then begins here",
        )
    return found


def write_provenance(directory: Path, provenance: Provenance) -> None:
    """Beside the files of `directory`, whose digests it takes."""
    found = provenance.model_copy(update={"files": digests_of(directory)})
    write_atomically(directory / PROVENANCE_FILE, encode_document(found), mode=0o644)


def provenance_texts(directory: Path) -> dict[str, str]:
    """What the manifests of a version say of where it comes from. Raises ArtifactError as chain_of."""
    return chain_of(directory).as_texts() if (directory / PROVENANCE_FILE).exists() else {}


def read_provenance(directory: Path) -> Provenance | None:
    """None where there is none. Raises ArtifactError when it is no such document."""
    path = directory / PROVENANCE_FILE
    if not path.exists():
        return None
    return parse_document(Provenance, read_bounded(path, DOCUMENT_LIMIT_BYTES), code=Code.CORRUPT)


def digests_of(directory: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files by name, of a version's of version.json, which has the others'."""
    if (directory / "version.json").is_file():
        return {"version.json": digest_of_file(directory / "version.json")}
    paths = sorted({path for pattern in FOLDER_FILES for path in directory.glob(pattern)})
    if len(paths) > FILES_LIMIT:
        raise ConfigError(f"{directory} has more than {FILES_LIMIT} files; leave only those of one checkpoint in it")
    files = {path.relative_to(directory).as_posix(): path for path in paths if path.is_file()}
    return {name: digest_of_file(path) for name, path in files.items() if name != PROVENANCE_FILE}


def digest_of_file(path: Path) -> str:
    """SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _release(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
