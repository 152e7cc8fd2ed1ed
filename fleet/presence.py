"""Who is online, by the rule that a late last will never buries a new life: pure.

A will is published when the broker notices that a link is dead, which can be after the node has come back. It carries
the boot_id and the session (connect counter) of the link that died, so it can be told from news.
"""

from dataclasses import dataclass

from wire.messages import Status


@dataclass(frozen=True, slots=True)
class Presence:
    """The last status of a node that counts."""

    boot_id: str
    session: int
    online: bool


def after_status(current: Presence | None, status: Status, *, retained: bool) -> Presence | None:
    """The presence after `status`, or None when the status is stale.

    A retained status is what the broker remembers: it replaces whatever was known before the link came up.
    """
    news = Presence(status.boot_id, status.session, status.online)
    if current is None or retained:
        return news
    same_boot = status.boot_id == current.boot_id
    if same_boot and status.session < current.session:
        return None
    if not same_boot and not status.online:
        return None  # the will of an earlier start of the agent
    return news
