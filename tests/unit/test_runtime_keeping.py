"""A model that rested comes back only when there is room for it, and says so when there is none."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, base_version, wait_for

from runtime import engine, loading
from runtime.budget import Sharing
from runtime.generation import End, Event, Generation, Reason, deliver_directly
from runtime.loaded import Loaded
from runtime.sampling import Sampling
from runtime.settings import RuntimeSettings
from wire.errors import Code
from wire.serving import ExecutionOptions, ServingModel


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    version = base_version()
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / version.decoded).symlink_to(version.directory)
    entry = ServingModel(
        model=MODEL, release="0" * 64, version="1.0", decoded=version.decoded, options=ExecutionOptions(threads=1),
        cpu="test", onnxruntime="test",
    )  # fmt: skip
    monkeypatch.setattr(engine, "IDLE_TRIM_S", 0.05)
    settings = RuntimeSettings(store=tmp_path, threads=1, keep_alive_s=0.1)
    loaded = loading.Loader(settings).load(entry, deliver_directly, None, Sharing())
    yield loaded
    loaded.engine.close()


def ask(loaded: Loaded) -> End:
    ends: list[End] = []
    ended = threading.Event()

    def take(event: Event) -> None:
        if isinstance(event, End):
            ends.append(event)
            ended.set()

    loaded.engine.submit(Generation([5, 6, 7], 3, Sampling(temperature=0.0), take))  # type: ignore[attr-defined]
    assert ended.wait(20)
    return ends[0]


def rests(loaded: Loaded) -> bool:
    (only,) = loaded.engine._engines  # type: ignore[attr-defined]
    return bool(only._keeper.resting)


def test_model_is_not_loaded_again_while_others_have_its_memory(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(loaded).reason is Reason.LENGTH
    wait_for("rest", lambda: rests(loaded))
    with monkeypatch.context() as crowded:
        crowded.setattr(loading, "available_bytes", lambda: (1 << 20, "memory.max of the node"))
        end = ask(loaded)
    assert end.reason is Reason.FAILED
    assert end.error is not None
    assert (end.error.code, end.error.http_status) == (Code.NOT_READY, 503)
    assert "1.0 MiB left (memory.max of the node)" in end.error.message
    assert rests(loaded)
    assert ask(loaded).reason is Reason.LENGTH
