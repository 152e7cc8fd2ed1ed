"""A version directory as the runtime opens it: checked before onnxruntime or the tokenizer sees a byte of it.

Invariant: a directory that passed is flat, has the sizes that its document says, and its graph reads nothing but the
weights beside it. Contents were hashed when the directory was made; a changed byte shows in the golden vectors.
"""

import stat
from pathlib import Path

from host.files import read_bounded
from runtime.external import check_external_data
from wire.digest import digest_of
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import ArtifactError, Code, StoreError
from wire.manifest import GraphConfig, VersionDocument

VERSION_FILE = "version.json"
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "weights.bin"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
GRAPH_LIMIT_BYTES = 64 * 1024 * 1024


def open_version(directory: Path, decoded: str | None = None) -> tuple[VersionDocument, str]:
    """Check a version directory; returns its document and decoded digest, which must be `decoded` when given.

    Raises ArtifactError or StoreError when it is not whole.
    """
    try:
        data = read_bounded(directory / VERSION_FILE, DOCUMENT_LIMIT_BYTES)
    except FileNotFoundError as error:
        raise StoreError(Code.CORRUPT, f"{directory} holds no {VERSION_FILE}; order the release again") from error
    digest = digest_of(data)
    if decoded is not None and digest != decoded:
        raise ArtifactError(
            Code.DIGEST_MISMATCH, f"{directory} holds version {digest[:12]}…, not {decoded[:12]}…; remove it and "
            "order the release again",
        )  # fmt: skip
    document = parse_document(VersionDocument, data)
    names = {entry.path for entry in document.files}
    tokenizer = set() if isinstance(document.config, GraphConfig) else {TOKENIZER_FILE}
    if missing := ({GRAPH_FILE, WEIGHTS_FILE} | tokenizer) - names:
        raise ArtifactError(Code.CORRUPT, f"{directory} lists no {min(missing)}; build the version again")
    for entry in document.files:
        check_file(directory / entry.path, entry.size_bytes)
    check_external_data(directory / GRAPH_FILE, WEIGHTS_FILE, GRAPH_LIMIT_BYTES)
    return document, digest


def file_digest(document: VersionDocument, path: str) -> str | None:
    """SHA-256 of a file as the document says, None when it lists no such file."""
    return next((entry.sha256 for entry in document.files if entry.path == path), None)


def weights_bytes(document: VersionDocument) -> int:
    """Size of weights.bin."""
    return next(entry.size_bytes for entry in document.files if entry.path == WEIGHTS_FILE)


def check_file(path: Path, size_bytes: int) -> None:
    """Raise StoreError unless `path` is a plain file of that size."""
    try:
        found = path.lstat()
    except OSError as error:
        raise StoreError(Code.CORRUPT, f"{path}: {error.strerror}; order the release again") from error
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(Code.CORRUPT, f"{path} is no plain file; remove its directory and order the release again")
    if found.st_size != size_bytes:
        raise StoreError(
            Code.CORRUPT, f"{path} has {found.st_size} bytes instead of {size_bytes}; order the release again"
        )
