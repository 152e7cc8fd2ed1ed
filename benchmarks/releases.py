"""What a version costs on the wire: a release of it, signed with a key that nobody keeps."""

import tempfile
from pathlib import Path

from forge.release import ReleaseSummary, make_release
from host.keys import create_key, load_signer


def release_summary(directory: Path) -> ReleaseSummary:
    """Pack the version as `amperage forge release` does, throw the packs away and keep the figures."""
    with tempfile.TemporaryDirectory(prefix="amperage-bench-") as folder:
        create_key(Path(folder, "key.pem"))
        signer = load_signer(Path(folder, "key.pem"))
        return make_release(directory, Path(folder, "release"), signer, sequence=1)
