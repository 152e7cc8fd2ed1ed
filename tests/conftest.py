"""What all tests share: one private Mosquitto per run, and the modules beside this file."""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fleet.broker import PrivateBroker

collect_ignore = [] if platform.machine() == "aarch64" else ["arm"]
"""Elsewhere scripts/test-arm runs those."""
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
"""A busy or emulated machine is no fault of an example."""


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """A real broker at `.host` and `.port`; tests keep apart by topic root and client id."""
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running
