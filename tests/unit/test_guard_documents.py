"""Anybody may publish under doc/DIGEST: only bytes of that digest are looked at, and the right ones are waited for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import NODE, TOPICS, Node, Publisher

from wire.documents import encode_document
from wire.errors import Code
from wire.messages import State


def test_document_under_anothers_digest_is_refused_and_the_right_one_still_taken(tmp_path: Path) -> None:
    """Another release of the same key is signed just as well: only the digest tells that it was not ordered."""
    node = Node(tmp_path, Publisher())
    node.start()
    ordered, other = node.publisher.make("2.0"), node.publisher.make("1.0")
    node.broker.offer(other)
    node.broker.put(TOPICS.document(ordered.digest), other.release)
    node.order(1, ordered)
    node.run_until(lambda: rejections(node))
    assert rejections(node) == [Code.DIGEST_MISMATCH]
    assert node.row.state is State.ADMITTED
    node.broker.packs[ordered.artifact] = ordered
    node.broker.put(TOPICS.document(ordered.artifact), encode_document(ordered.manifest))
    node.broker.put(TOPICS.document(ordered.digest), ordered.release)
    node.run_until(lambda: node.row.state is State.COMMITTED)
    assert node.store.has_version(ordered.decoded)
    assert not node.store.has_version(other.decoded)


def rejections(node: Node) -> list[str]:
    reported = TOPICS.reported(NODE) in node.broker.retained
    return [entry.code for entry in node.reported().rejections] if reported else []
