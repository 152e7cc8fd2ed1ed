"""What all tests share: one private Mosquitto per run, and the modules beside this file."""

import os
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
if "QEMU_CPU" in os.environ:
    hypothesis.settings.register_profile("emulated", deadline=None)
    hypothesis.settings.load_profile("emulated")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    """A real broker at `.host` and `.port`; tests keep apart by topic root and client id."""
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as running:
        yield running
