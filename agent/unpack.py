"""One decoding of a release's staged pack into work/: begun while frames arrive, or when all are there.

Invariant: its directory in work/ is its own; `discard` ends the child and removes it, and so does the next start of the
agent after a crash. Frames are never touched.
"""

from collections.abc import Sequence
from pathlib import Path

from agent.decoding import DecodeOrder, Decoder
from agent.journal import Deployment
from agent.store import Store
from wire.errors import Code, DeployError

LEAD_S = 10.0
DECODE_FLOOR_BYTES_PER_S = 20e6
"""Decoding begins when what is left to fetch takes about as long as what is there takes to decode on a slow core, and
this much more: earlier would gain nothing, and hold some 40 MB for as long as a thin link needs."""


class Unpack:
    """A decoder at work; `early` when it began before the last frame."""

    def __init__(self, row: Deployment, store: Store, decoder: Decoder, *, early: bool) -> None:
        """Raises DeployError(base_mismatch) when the base of the delta is no longer on the node."""
        if row.base is not None and not store.has_version(row.base):
            raise DeployError(Code.BASE_MISMATCH, f"the base {row.base[:12]}… of the delta is gone; order it again")
        artifact = row.artifact or ""
        self.early = early
        self.directory: Path = store.new_work(f"decode-{row.decoded}-{'early' if early else row.attempts}")
        self._store = store
        self._decode = decoder.begin(
            DecodeOrder(
                store.manifest_path(artifact),
                store.pack_path(artifact),
                self.directory,
                store.version_path(row.base) if row.base else None,
            )
        )

    def add(self, frames: Sequence[int]) -> None:
        """These frames are in the pack."""
        self._decode.add(frames)

    def wait(self, deadline_s: float) -> None:
        """Block until the directory is whole and durable; raises AmperageError."""
        self._decode.wait(deadline_s)

    def discard(self) -> None:
        """End it and remove what it made; a directory that has its name by now is left alone."""
        self._decode.cancel()
        self._store.drop_work(self.directory)


def is_time_to_unpack(fetched: int, left: int, elapsed_s: float, decoded_bytes: int) -> bool:
    """Whether a decoder that begins now is done soon after the last frame: `fetched` frames took `elapsed_s`."""
    lead_s = LEAD_S + decoded_bytes / DECODE_FLOOR_BYTES_PER_S
    return fetched > 0 and left * elapsed_s <= lead_s * fetched
