"""Packed weights from a real probe to a real server: mapped, proved, done without, and removed."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import MODEL, Node, Version, ask, base_version, running, tuned_version, wait_for, wide_version

from agent.runtime_client import RuntimeClient
from wire.serving import ModelStats, ProbeReport, ProbeRequest, ProbeVerdict, ServingModel

pytestmark = pytest.mark.e2e
SAY: Any = [{"role": "user", "content": "It was late in the evening when the"}]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A runtime that serves nothing yet and has a place for packed weights."""
    with running(tmp_path, extra=f'cache = "{tmp_path}/cache"\nreading_session = false') as node:
        yield node


def probe(node: Node, version: Version, *, prepack: bool = True) -> ProbeReport:
    request = ProbeRequest(candidate=node.install(version), prepack=prepack)
    report = RuntimeClient(node.admin).probe(MODEL, request)
    assert report.verdict is ProbeVerdict.PASSED, report.detail
    return report


def order(node: Node, version: Version, report: ProbeReport, cpu: str | None = None) -> None:
    """Make the runtime serve as the agent does after a probe."""
    assert report.options is not None
    node.entries[MODEL] = ServingModel(
        model=MODEL, release="0" * 64, version=version.document.version, decoded=version.decoded,
        options=report.options, prepack=report.prepack, cpu=cpu or report.cpu, onnxruntime=report.onnxruntime,
    )  # fmt: skip
    node.write()
    RuntimeClient(node.admin).load(MODEL)


def serves(node: Node) -> ModelStats:
    return RuntimeClient(node.admin).stats().models[0]


def answer(node: Node) -> str | None:
    with node.client() as client:
        reply = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=24, temperature=0)
    return reply.choices[0].message.content


def caches(node: Node) -> list[Path]:
    return sorted(path.parent for path in (node.home / "cache").rglob("prepack.json"))


def mapping(node: Node, file: Path) -> dict[str, int]:
    """Bytes of the runtime process's mappings of `file` by field of smaps (proc(5))."""
    assert node.process is not None
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{node.process.pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.endswith(" kB"):
            name, _, figure = line.partition(":")
            sums[name] = sums.get(name, 0) + 1024 * int(figure.split()[0])
    return sums


def anonymous_bytes(node: Node) -> int:
    assert node.process is not None
    rollup = Path(f"/proc/{node.process.pid}/smaps_rollup").read_text()
    found = re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def test_server_maps_what_the_probe_packed_and_keeps_it_off_the_heap(node: Node, tmp_path: Path) -> None:
    version = wide_version()
    report = probe(node, version)
    assert report.prepack is not None, report.prepack_detail
    assert report.prepack_bytes == sum(p.stat().st_size for p in caches(node)[0].iterdir() if p.suffix != ".json")
    order(node, version, report)
    assert (serves(node).packed, serves(node).stale) == (True, "")
    text = answer(node)
    weights = next(entry.size_bytes for entry in version.document.files if entry.path == "weights.bin")
    mapped = mapping(node, caches(node)[0] / "decode.bin")
    assert mapped["Rss"] > 0.9 * weights
    assert mapped["Anonymous"] == 0

    (tmp_path / "heap").mkdir()
    with running(tmp_path / "heap") as other:
        other.install(version)
        order(other, version, report.model_copy(update={"prepack": None}))
        assert (serves(other).packed, serves(other).stale) == (False, "")
        assert answer(other) == text
        assert anonymous_bytes(node) < anonymous_bytes(other) - 0.8 * weights


LONGER = [pytest.param(damage, marks=pytest.mark.full) for damage in ("truncated", "absent")]


@pytest.mark.parametrize("damage", ["changed", *LONGER])
def test_damaged_cache_is_done_without_and_told_and_proved_again(node: Node, damage: str) -> None:
    report = probe(node, base_version())
    weights = caches(node)[0] / "decode.bin"
    data = weights.read_bytes()
    weights.parent.chmod(0o750)
    weights.unlink()
    if damage != "absent":
        weights.write_bytes(data[:9000] + b"\x11" + data[9001:] if damage == "changed" else data[:-1])
    order(node, base_version(), report)
    assert serves(node).packed is False
    assert "prepack cache cannot be used" in serves(node).stale
    row = ask(node.admin, "POST", "/v2/repository/index", b"").json()[0]
    assert (row["state"], row["packed"], row["stale"]) == ("READY", False, serves(node).stale)
    assert "prepack cache cannot be used" in node.log()
    text = answer(node)
    again = probe(node, base_version())
    assert again.prepack == report.prepack
    order(node, base_version(), again)
    assert (serves(node).packed, serves(node).stale) == (True, "")
    assert answer(node) == text


def test_cache_for_another_cpu_is_done_without_and_told(node: Node) -> None:
    report = probe(node, base_version())
    order(node, base_version(), report, cpu="aarch64 neoverse-n1 asimddp")
    assert serves(node).packed is False
    assert "neoverse-n1" in serves(node).stale
    assert answer(node)


def test_caches_go_with_their_versions_and_none_is_written_where_disk_is_short(node: Node) -> None:
    first, second = base_version(), tuned_version()
    order(node, first, probe(node, first))
    order(node, second, probe(node, second))
    assert {path.parent.name for path in caches(node)} == {first.decoded, second.decoded}, "one is for a roll-back"
    (node.store / "versions" / first.decoded).rename(node.home / "pruned")
    report = probe(node, second, prepack=False)
    assert report.prepack is None
    assert [path.parent.name for path in caches(node)] == [second.decoded]
    order(node, second, report)
    assert caches(node) == []
    assert serves(node).packed is False
    assert answer(node)


def probe_child(node: Node) -> int | None:
    """The process that holds a half-written cache, once there is one."""
    if not list((node.home / "cache").glob("*/.writing-*/*")):
        return None
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if node.process is not None and parent == node.process.pid:
            return int(stat.parent.name)
    return None


def test_probe_that_is_killed_while_it_writes_leaves_no_cache(node: Node) -> None:
    node.install(base_version())
    verdicts: list[ProbeVerdict] = []
    request = ProbeRequest(candidate=base_version().decoded)

    def ask_for_one() -> None:
        verdicts.append(RuntimeClient(node.admin).probe(MODEL, request).verdict)

    thread = Thread(target=ask_for_one)
    thread.start()
    os.kill(wait_for("a half-written cache", lambda: probe_child(node), 60), signal.SIGKILL)
    thread.join(60)
    assert verdicts == [ProbeVerdict.CRASHED]
    assert not list((node.home / "cache").rglob("prepack.json"))
    assert not list((node.home / "cache").rglob(".writing-*"))
    order(node, base_version(), probe(node, base_version()))
    assert serves(node).packed is True
