"""A late last will never buries a new life."""

import pytest

from fleet.presence import Presence, after_status
from wire.messages import Status

A, B = "a" * 32, "b" * 32


def _status(boot: str, session: int, *, online: bool) -> Status:
    return Status(node="n", online=online, boot_id=boot, session=session)


@pytest.mark.parametrize(
    ("current", "status", "retained", "online"),
    [
        (None, _status(A, 1, online=True), False, True),
        (None, _status(A, 1, online=False), False, False),
        (Presence(A, 1, True), _status(A, 1, online=False), False, False),
        (Presence(A, 2, True), _status(A, 1, online=False), False, None),
        (Presence(A, 2, True), _status(A, 1, online=True), False, None),
        (Presence(A, 1, False), _status(A, 2, online=True), False, True),
        (Presence(B, 1, True), _status(A, 7, online=False), False, None),
        (Presence(A, 7, True), _status(B, 1, online=True), False, True),
        (Presence(A, 7, True), _status(B, 1, online=False), True, False),
        (Presence(A, 7, True), _status(A, 3, online=False), True, False),
    ],
)
def test_status_counts_unless_it_is_of_an_earlier_life(
    current: Presence | None, status: Status, retained: bool, online: bool | None
) -> None:
    after = after_status(current, status, retained=retained)
    assert (after.online if after else None) is online
    if after:
        assert (after.boot_id, after.session) == (status.boot_id, status.session)
