"""A 200 MB artifact through a real Mosquitto to a real agent, beside plain paho, and from the order to serving.

Ours is the depot's process, the broker and the agent's whole process: staging file, SHA-256 per frame, fdatasync and a
journal row per 8 MiB or second. Its clock runs from the transition to `fetching` to the one to `decoding`; decoding is
held back until then, as the peers decode nothing. The peers send the same bytes by paho alone; theirs runs from the
first publish to the last byte dealt with. Everything runs on this one machine, so the rate is what processors allow,
not a link. Publish-to-active is of the agent as it is, decoding while frames arrive.
"""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import ROUNDS, Row, Samples, at_least, at_most, measure, row, rows_against
from benchmarks.site import Fleet, Keys, Release, agent_children, depot_child, make_heavy_release, running
from benchmarks.thin_link import obeying
from cli.demo.processes import Child
from fleet.broker import PrivateBroker
from host.link import Broker
from wire.manifest import FRAME_BYTES
from wire.messages import State
from wire.topics import Topics

WIRE_BYTES = 200_000_000
SYNC_BYTES = 8 << 20
"""What the agent flushes at a time (agent/fetch.py JOURNAL_EVERY_BYTES)."""
PSS_GROWTH_LIMIT_MB = 24.0
SHARE_OF_PLAIN = 0.9
EXTRA_LIMIT_S = 2.0
"""Publish-to-active may take that much longer than what cannot be avoided (docs/design.md section 9)."""
PSS_EVERY_S = 0.02
SETTLE_S = 0.5
OURS, SAME_SYNC, ONE_SYNC, PLAIN = (
    "ours", "paho + SHA-256 + fdatasync per 8 MiB", "paho + SHA-256 + one fdatasync", "paho alone",
)  # fmt: skip


def run() -> Sequence[Row]:
    """Make the release once, then measure."""
    with TemporaryDirectory() as place:
        work = Path(place)
        keys = Keys(work / "keys")
        release = make_heavy_release(work, keys.release, WIRE_BYTES)
        with PrivateBroker(work / "broker") as broker:
            depot = depot_child(broker, "bench", work, (release.artifact, release.document, release.pack))
            address = Broker(host=broker.host, port=broker.port)
            _, fetching = agent_children(address, "bench", work / "fetching", keys, decodes_early=False)
            runtime, agent = agent_children(address, "bench", work / "node", keys)
            fleet = Fleet(address, Topics("bench"), keys)
            fleet.offer(release)
            with running(depot):
                with running(fetching):
                    fetch(fleet, release)  # everything is up after this, however long a process took to start
                    rows = [*_rates(fleet, release, broker, work), _memory(fleet, release, fetching)]
                    link_s = Samples(tuple(fetch(fleet, release) for _ in range(ROUNDS)))
                with running(runtime, agent):
                    fetch(fleet, release)
                    rows += _publish_to_active(fleet, release, work, link_s)
                rows += obeying(fleet, address, release, keys, work)
            fleet.close()
        return rows


def fetch(fleet: Fleet, release: Release) -> float:
    """Seconds of one fetch; nothing is left of it."""
    fleet.order(release)
    entered = fleet.wait_for(State.DECODING)
    fleet.order(None)
    fleet.wait_for(State.CANCELLED)
    time.sleep(SETTLE_S)
    return entered[State.DECODING] - entered[State.FETCHING]


def _rates(fleet: Fleet, release: Release, broker: PrivateBroker, work: Path) -> list[Row]:
    megabytes = release.manifest.pack_size_bytes / 1e6
    measured = measure(
        {
            OURS: lambda: megabytes / fetch(fleet, release),
            SAME_SYNC: lambda: megabytes / plain(broker, release, work / "plain", SYNC_BYTES),
            ONE_SYNC: lambda: megabytes / plain(broker, release, work / "plain", 0),
            PLAIN: lambda: megabytes / plain(broker, release, None, 0),
        }
    )
    target = at_least(SHARE_OF_PLAIN, ratio=True)
    durable = {name: samples for name, samples in measured.items() if name != PLAIN}
    bare = {name: samples for name, samples in measured.items() if name in (OURS, PLAIN)}
    what = f"transfer of {megabytes:.0f} MB"
    return [
        *rows_against(what, "MB/s", OURS, durable, target),
        *rows_against(what, "MB/s", OURS, bare),
    ]


def plain(broker: PrivateBroker, release: Release, keep: Path | None, sync_bytes: int) -> float:
    """Seconds of one transfer by plain paho."""
    count = -(-release.manifest.pack_size_bytes // FRAME_BYTES)
    storing = ["--keep", str(keep), "--sync-bytes", str(sync_bytes)] if keep else []
    receiver = _side("receive", broker, "--count", str(count), *storing)
    _line(receiver)
    sender = _side("send", broker, "--file", str(release.pack))
    _line(sender)
    time.sleep(SETTLE_S)
    _press(sender)
    began_s = float(_line(sender))
    ended_s = float(_line(receiver))
    _press(sender)
    for process in (sender, receiver):
        process.communicate(timeout=30)
    if keep:
        keep.unlink()
    return ended_s - began_s


def _side(side: str, broker: PrivateBroker, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.plain_paho", side, str(broker.port), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("plain paho ended before its time")
    return line


def _press(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def _memory(fleet: Fleet, release: Release, agent: Child) -> Row:
    """Largest PSS of the agent during a fetch less that just before, per round."""
    growths = []
    for _ in range(ROUNDS):
        idle = _pss_mb(agent)
        peak, done = [idle], threading.Event()

        def watch(peak: list[float] = peak, done: threading.Event = done) -> None:
            while not done.wait(PSS_EVERY_S):
                peak[0] = max(peak[0], _pss_mb(agent))

        watcher = threading.Thread(target=watch)
        watcher.start()
        fetch(fleet, release)
        done.set()
        watcher.join()
        growths.append(peak[0] - idle)
    return row("growth of the agent's PSS while it fetches", "MB", Samples(tuple(growths)),
               at_most(PSS_GROWTH_LIMIT_MB))  # fmt: skip


def _pss_mb(child: Child) -> float:
    assert child.process
    text = Path(f"/proc/{child.process.pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found.group(1)) * 1024 / 1e6


def _publish_to_active(fleet: Fleet, release: Release, work: Path, link_s: Samples) -> list[Row]:
    """From the order until the runtime serves, against what cannot be shorter; `link_s` are fetches by themselves."""
    versions = work / "node" / "store" / "versions"
    active, decodes, probes, extras = ([] for _ in range(4))
    for number in range(ROUNDS):
        decode_s = decode(release, work / f"decoded-{number}")
        ordered_s = fleet.order(release)
        entered = fleet.wait_for(State.SOAKING)
        fleet.wait_for(State.COMMITTED) if State.COMMITTED not in entered else None
        active.append(entered[State.SOAKING] - ordered_s)
        decodes.append(decode_s)
        probes.append(entered[State.STAGED] - entered[State.PROBING])
        extras.append(active[-1] - max(link_s.median, decode_s) - probes[-1])
        fleet.order(None)
        while any(versions.iterdir()):
            time.sleep(0.05)
    raw_mb = release.raw_bytes / 1e6
    return [
        row("wire / link: this fetch alone", "s", link_s),
        row(f"raw / decode: the {raw_mb:.0f} MB decoded alone", "s", Samples(tuple(decodes))),
        row("probe", "s", Samples(tuple(probes))),
        row("publish-to-active", "s", Samples(tuple(active))),
        row("publish-to-active - max(link, decode) - probe", "s", Samples(tuple(extras)), at_most(EXTRA_LIMIT_S)),
    ]


def decode(release: Release, into: Path) -> float:
    """Seconds that the decoder takes by itself, without the start of its process and without flushing."""
    into.mkdir()
    manifest = release.pack.with_suffix(".manifest.json")
    command = [sys.executable, "-c", _DECODE, str(manifest), str(release.pack), str(into)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


_DECODE = """
import sys, time
from pathlib import Path
from codec.decoder import decode_pack
from wire.documents import parse_document
from wire.manifest import Manifest

manifest, pack, into = map(Path, sys.argv[1:])
parsed = parse_document(Manifest, manifest.read_bytes())
started = time.perf_counter()
decode_pack(parsed, pack, into)
print(time.perf_counter() - started)
"""
