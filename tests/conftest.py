"""What all tests share: one private Mosquitto per run."""

from collections.abc import Iterator

import pytest

from fleet.broker import PrivateBroker


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """A real broker at `.host` and `.port`; tests keep apart by topic root and client id."""
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running
