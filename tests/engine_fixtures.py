"""An engine over the real sample model, a model that answers one step after another, and the sample's tokenizer."""

from collections.abc import Iterator

import pytest
from engine_requests import load as load_sample
from runtime_fixtures import base_version

from runtime.engine import Engine
from runtime.model import Model
from runtime.stats import Stats
from runtime.text import Text

SLOTS, CAPACITY, QUEUE, KEPT = 3, 512, 4, 64


def load(slots: int = SLOTS, capacity: int = CAPACITY, kept_blocks: int = KEPT) -> Model:
    return load_sample(slots, capacity, kept_blocks)


@pytest.fixture(scope="module", name="text")
def text_fixture() -> Text:
    return Text(base_version().directory, base_version().document.config)


@pytest.fixture(scope="module", name="reference")
def reference_fixture() -> Model:
    return load(1)


@pytest.fixture(name="engine")
def engine_fixture() -> Iterator[Engine]:
    engine = Engine("test", load(), Stats(), max_queue=QUEUE)
    yield engine
    engine.close()
