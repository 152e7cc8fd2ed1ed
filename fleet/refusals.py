"""Messages from nodes that could not be used: counted always, logged at a bounded rate, never fatal."""

import time
from dataclasses import dataclass

import structlog

from wire.errors import AmperageError, ArtifactError, Code

log = structlog.get_logger()

LOG_EVERY_S = 1.0
STORABLE_LIMIT = 1 << 53
"""Counters above this are nonsense: 2^53 is exact in JSON readers and far below SQLite's 2^63."""


@dataclass(slots=True)
class Refusals:
    """One counter; a node that floods us with rubbish must not fill the log."""

    count: int = 0
    _logged_s: float = float("-inf")

    def add(self, topic: str, error: AmperageError) -> None:
        """Count a refused message and say so, unless something was said within the last second."""
        self.count += 1
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_EVERY_S:
            self._logged_s = now_s
            log.warning(
                "message_refused", topic=topic[:200], code=str(error.code), reason=error.message, refused=self.count
            )


def check_speaker(node: str, claimed: str) -> None:
    """A node speaks for itself only: the topic, which the broker's ACL proves, must agree with the payload.

    Raises ArtifactError(wrong_node).
    """
    if node != claimed:
        raise ArtifactError(Code.WRONG_NODE, f"message in the name of {claimed} came on the topic of {node[:64]}")


def check_counters(*values: int) -> None:
    """Raise ArtifactError(bad_document) for counters that no honest node can have reached."""
    if max(values) > STORABLE_LIMIT:
        raise ArtifactError(Code.BAD_DOCUMENT, "a counter is beyond 2^53; restart the node's agent")
