"""Names of the MQTT topics (docs/design.md section 4) and the way back from a topic to what it names.

`root` may hold several levels. Node and artifact names cannot hold `/`, `+` or `#` (wire/manifest.py, wire/digest.py),
so a name never reaches outside its level.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topics:
    """Builders of topic names below `root`."""

    root: str = "amperage"

    def status(self, node: str) -> str:
        """Retained; also the node's last will."""
        return f"{self.root}/node/{node}/status"

    def desired(self, node: str) -> str:
        """Retained, signed: what the node should run."""
        return f"{self.root}/node/{node}/desired"

    def reported(self, node: str) -> str:
        """Retained: what the node runs."""
        return f"{self.root}/node/{node}/reported"

    def event(self, node: str) -> str:
        """Lifecycle transitions, kept by the node until acknowledged."""
        return f"{self.root}/node/{node}/event"

    def telemetry(self, node: str) -> str:
        """Health, inference and energy, kept by the node until acknowledged."""
        return f"{self.root}/node/{node}/telemetry"

    def ack(self, node: str) -> str:
        """Fleet to node: what is committed."""
        return f"{self.root}/node/{node}/ack"

    def want(self, node: str) -> str:
        """Node to depot: frames that are missing."""
        return f"{self.root}/node/{node}/want"

    def frames(self, artifact: str) -> str:
        """Depot to every node that wants the artifact."""
        return f"{self.root}/frames/{artifact}"

    def document(self, digest: str) -> str:
        """Retained release or manifest document."""
        return f"{self.root}/doc/{digest}"

    def every_node(self, kind: str) -> str:
        """Subscription filter for one kind of topic of all nodes."""
        return f"{self.root}/node/+/{kind}"

    def node_of(self, topic: str) -> tuple[str, str] | None:
        """(node, kind) of a node's topic, or None when it is no such topic."""
        prefix = f"{self.root}/node/"
        if not topic.startswith(prefix):
            return None
        node, _, kind = topic[len(prefix) :].partition("/")
        return (node, kind) if node and kind and "/" not in kind else None
