"""What all steps of the demo share: the folder, the processes, the witness, the releases made so far."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.demo.chat import ask, connect
from cli.demo.display import Display
from cli.demo.facts import Facts, Step
from cli.demo.observer import Observer
from cli.demo.processes import Site, succeed, wait_for
from wire.bitmap import Bitmap
from wire.documents import parse_document
from wire.errors import AmperageError
from wire.manifest import Manifest
from wire.messages import ModelReport
from wire.serving import Serving

MODEL = "tales"
SERVING_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Made:
    """A release as the forge left it: folders, digests and sizes in bytes."""

    version: str
    directory: Path
    release_directory: Path
    release: str
    """SHA-256 of the signed release document."""
    decoded: str
    raw_bytes: int
    wire_bytes: int
    bits_per_weight: float
    delta_bytes: int | None

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint` of answers by this version."""
        return f"amperage-{self.decoded[:12]}"

    def manifest_of(self, *, delta: bool) -> tuple[str, Manifest, Path]:
        """(artifact digest, manifest, pack path) of the full artifact or of the delta."""
        for path in sorted(self.release_directory.glob("*.manifest.json")):
            manifest = parse_document(Manifest, path.read_bytes())
            if (manifest.base is not None) == delta:
                digest = path.name.removesuffix(".manifest.json")
                return digest, manifest, self.release_directory / f"{digest}.pack"
        raise FileNotFoundError(f"release {self.version} has no {'delta' if delta else 'full artifact'}")


@dataclass(slots=True)
class Stage:
    """Shared state of a run."""

    directory: Path
    samples: Path
    display: Display
    facts: Facts
    site: Site
    observer: Observer
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def keys(self) -> Path:
        """Folder of the operator's keys."""
        return self.directory / "keys"

    @property
    def api(self) -> Path:
        """Socket of the control plane."""
        return self.directory / "fleet.sock"

    @contextmanager
    def step(self, number: int, title: str) -> Iterator[Step]:
        """Run one step: errors of ours end the step, not the demo; everything else is a bug and ends both."""
        step = Step(number, title)
        self.facts.steps.append(step)
        self.display.begin(step)
        try:
            yield step
        except AmperageError as error:
            step.error = str(error)
        finally:
            step.finish()
            self.display.end(step)

    def build(self, version: str, checkpoint: str, scales_of: Made | None = None, name: str | None = None) -> Path:
        """Import and quantise a sample checkpoint into a version directory; `name` tells two of one version apart."""
        out = self.directory / "versions" / (name or version)
        scales = ["--scales-of", str(scales_of.directory)] if scales_of else []
        source = str(self.samples / checkpoint)
        succeed(["forge", "build", source, "--name", MODEL, "--version", version, "--out", str(out), *scales])
        return out

    def release(self, directory: Path, sequence: int, base: Made | None = None, key: Path | None = None) -> Made:
        """Pack and sign the version in `directory`, with a delta from `base`; kept in `made` by its version."""
        out = self.directory / "releases" / f"{directory.name}-{sequence}"
        delta = ["--base", str(base.directory)] if base else []
        signing = ["--key", str(key or self.keys / "release.pem"), "--sequence", str(sequence), "--out", str(out)]
        summary = json.loads(succeed(["forge", "release", str(directory), *signing, *delta, "--json"]))
        return Made(
            summary["version"], directory, out, summary["release"], summary["decoded"], summary["raw_bytes"],
            summary["wire_bytes"], summary["bits_per_weight"], summary.get("delta_wire_bytes"),
        )  # fmt: skip

    def publish(self, made: Made) -> None:
        """Hand a release to the control plane."""
        succeed(["fleet", "publish", str(made.release_directory), "--api", str(self.api), "--json"])

    def order(self, made: Made, nodes: list[str], max_failures: int = 0) -> str:
        """Start a rollout and return its identity."""
        where = ["--nodes", ",".join(nodes), "--max-failures", str(max_failures)]
        arguments = [made.release, *where, "--api", str(self.api), "--json"]
        return str(json.loads(succeed(["fleet", "rollout", *arguments]))["id"])

    def rollout(self, identity: str) -> dict[str, Any]:
        """The control plane's view of a rollout."""
        answer: dict[str, Any] = json.loads(succeed(["fleet", "rollouts", identity, "--api", str(self.api), "--json"]))
        return answer

    def wait_rollout(self, identity: str, timeout_s: float) -> dict[str, Any]:
        """Wait until a rollout is over."""

        def over() -> dict[str, Any] | None:
            seen = self.rollout(identity)
            return seen if seen["state"] != "running" else None

        return wait_for(f"the end of rollout {identity}", over, timeout_s)

    def serving_on_disk(self, node: str) -> str | None:
        """Decoded digest that `serving.json` names, read from the node's disk."""
        path = self.site.nodes[node].store / "serving.json"
        if not path.exists():
            return None
        models = parse_document(Serving, path.read_bytes(), limit_bytes=SERVING_LIMIT_BYTES).models
        return next((entry.decoded for entry in models if entry.model == MODEL), None)

    def answering(self, node: str) -> str:
        """`system_fingerprint` that the node's socket answers with."""
        with connect(self.site.nodes[node].socket) as client:
            return next(iter(ask(client, MODEL, 4).fingerprints))

    def check_serves(self, step: Step, node: str, made: Made) -> None:
        """Judge by disk and by socket that `node` serves `made`."""
        disk = self.serving_on_disk(node)
        step.check(f"{node}: serving.json names {made.version}", disk == made.decoded, (disk or "nothing")[:12])
        answer = self.answering(node)
        step.check(f"{node}: its socket answers as {made.version}", answer == made.fingerprint, answer)

    def journalled(self, node: str, artifact: str) -> Bitmap | None:
        """Frames that the node's journal calls verified, read from its disk without disturbing it."""
        path = self.site.nodes[node].store / "journal.sqlite"
        if not path.exists():
            return None
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1.0)
        try:
            row = connection.execute("SELECT frames, verified FROM fetch WHERE artifact = ?", (artifact,)).fetchone()
        except sqlite3.OperationalError:
            return None  # the table is not there yet, or the writer is at work: look again
        finally:
            connection.close()
        return Bitmap(row[0], row[1]) if row else None

    def model_report(self, node: str) -> ModelReport | None:
        """What the node last reported of the demo's model, as the observer saw it."""
        reported = self.observer.report_of(node)
        return next((entry for entry in reported.models if entry.model == MODEL), None) if reported else None
