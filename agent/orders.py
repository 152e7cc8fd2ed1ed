"""Which desired state counts, and what it asks for: pure.

Invariant: generations only go up. An order older than the accepted one is refused, the same one again changes nothing,
and another one under the same number is refused: an end is reopened only by a newer order.
"""

from dataclasses import dataclass

from agent.journal import Deployment
from agent.lifecycle import is_end
from agent.trust import Trust
from wire.documents import encode_document, parse_document
from wire.errors import Code, DeployError
from wire.messages import Desired, DesiredModel, State
from wire.serving import ServingModel
from wire.signing import Role


@dataclass(frozen=True, slots=True)
class Accepted:
    """The last accepted order; generation 0 and no payload before the first."""

    generation: int
    payload: bytes | None

    @property
    def desired(self) -> Desired | None:
        """The order itself."""
        return parse_document(Desired, self.payload) if self.payload else None


def judge_desired(envelope: bytes, trust: Trust, node: str, accepted: Accepted) -> bytes | None:
    """The payload to accept, or None when it is the accepted one.

    Raises ArtifactError (signature, form) and DeployError (wrong_node, stale_generation).
    """
    payload = trust.open(envelope, Role.DESIRED)
    desired = parse_document(Desired, payload)
    if desired.node != node:
        raise DeployError(Code.WRONG_NODE, f"desired state is for node {desired.node}; publish it on that node's topic")
    if desired.generation > accepted.generation:
        return encode_document(desired)
    if desired.generation == accepted.generation and encode_document(desired) == accepted.payload:
        return None
    raise DeployError(
        Code.STALE_GENERATION,
        f"generation {desired.generation} is not above the accepted {accepted.generation}; "
        "send one above what the node reports",
    )


def needs_work(wanted: DesiredModel, generation: int, row: Deployment | None, served: ServingModel | None) -> bool:
    """True when `wanted` has to be started: it is new, its end was not reached by this order, or it is not served."""
    if row is None or row.release != wanted.release:
        return True
    if not is_end(row.state):
        return False
    if row.state is State.COMMITTED:
        return served is None or served.release != wanted.release
    return row.generation < generation
