"""How far int4 kernels of x86 and of emulated Arm, with KleidiAI and without, are from the float32 reference.

The reference is the float32 twin (forge/reference.py) of the very weights that the kernels get. An error is the RMS
difference of a row of logits as a share of the reference row's standard deviation, as golden vectors count it. The
sample comes once more with a block of loud channels: norms times 32 there and the scales that read them divided by 32,
which changes nothing but the activations; there the tuner turns KleidiAI off (docs/adr/0013). Nothing here is a speed:
Arm is emulated (scripts/test-arm).
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.decoder_models import ROOT, sample, smollm
from benchmarks.harness import Row, Samples, at_most, exact, row
from benchmarks.kernel_logits import positions
from codec.versions import read_version
from forge.golden import PROMPTS, TOLERANCE
from forge.quantise import BLOCK, Float
from forge.reference import twin_judge

X86, N1, ONE = "x86", "Neoverse N1", "AmpereOne's instructions"
ARM = ROOT / ".venv" / "opt" / "arm64" / "stamp"
CORES = {N1: "neoverse-n1", ONE: "max,sve=off,sme=off"}
KERNELS: dict[str, dict[str, str]] = {"KleidiAI": {}, "plain": {"mlas.disable_kleidiai": "1"}}
RUNS = {X86: ("plain",), N1: ("KleidiAI", "plain"), ONE: ("KleidiAI",)}
LOUD = 32.0
PERCENT = "% of deviation"
NOT_WORSE = 1.5
"""Times the plain kernels' error that KleidiAI's may be."""
TARGETS = {
    ("RMS error", "plain"): at_most(NOT_WORSE, ratio=True),
    ("largest RMS error", "plain"): at_most(100 * TOLERANCE),
}
"""By metric and peer."""
SMALL_PROMPT = (77, 12, 3001, 640, 2, 2900)
"""For the larger model, whose emulated step takes a second or two."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A version to run, and the prompts."""

    name: str
    directory: Path
    prompts: tuple[tuple[int, ...], ...]


def run() -> Sequence[Row]:
    """Rows for every kind of weights."""
    if not ARM.is_file():
        raise SystemExit(
            f"bench kernels: emulated Arm is not there ({ARM.parent}); `scripts/test-arm --python -V` makes it"
        )
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=ROOT / ".venv" / "opt") as place:
        kinds = _kinds(Path(place))
        found = {core: _logits(core, kinds, Path(place)) for core in RUNS}
        return [entry for weights in kinds for entry in _rows(weights, found)]


def _logits(core: str, kinds: Sequence[Weights], place: Path) -> dict[str, Float]:
    """float32 [rows, vocabulary] by the names of weights and kernels."""
    print(f"kernels: {core}", file=sys.stderr)
    cases = {
        f"{weights.name}, {kernels}": {
            "directory": str(weights.directory), "prompts": weights.prompts, "session_config": KERNELS[kernels],
        }
        for weights in kinds
        for kernels in RUNS[core]
    }  # fmt: skip
    python = [sys.executable] if core == X86 else [str(ROOT / "scripts/test-arm"), "--cpu", CORES[core], "--python"]
    document, out = place / "cases.json", place / "logits.npz"
    document.write_text(json.dumps(cases))
    subprocess.run([*python, "-m", "benchmarks.kernel_logits", str(document), str(out)], cwd=ROOT, check=True)
    with np.load(out) as stored:
        return dict(stored)


def _kinds(place: Path) -> list[Weights]:
    tokenizer = Tokenizer.from_file(str(sample().directory / "tokenizer.json"))
    prompts = tuple(tuple(int(token) for token in tokenizer.encode(prompt).ids) for prompt in PROMPTS)
    loud = place / "loud"
    shutil.copytree(sample().directory, loud)
    make_channels_loud(loud)
    return [
        Weights(sample().name, sample().directory, prompts), Weights(f"{sample().name}, loud channels", loud, prompts),
        Weights(smollm().name, smollm().directory, (SMALL_PROMPT,)),
    ]  # fmt: skip


def make_channels_loud(directory: Path) -> None:
    """Make the first block of channels of every norm of a version louder, and what reads it quieter: the same function.

    The version is not sealed anew. A weights file that is a hard link of another's is written through.
    """
    version = read_version(directory)
    columns = version.tensors
    for name, file, offset, shape in zip(columns.name, columns.file, columns.offset, columns.shape, strict=True):
        if name.endswith(("input_norm", "post_norm", "qkv.scales", "gate_up.scales")):
            path = directory / version.files[file].path
            values = np.memmap(path, np.float32, "r+", offset=offset, shape=shape)
            if len(shape) == 1:
                values[:BLOCK] *= np.float32(LOUD)
            else:
                values[:, 0] /= np.float32(LOUD)


def _rows(weights: Weights, found: dict[str, dict[str, Float]]) -> list[Row]:
    """Neoverse N1 with KleidiAI against its plain kernels and against x86; how far AmpereOne's instructions part."""
    judge = twin_judge(weights.directory, read_version(weights.directory))
    reference = np.concatenate([judge.logits(prompt, positions(len(prompt))) for prompt in weights.prompts])
    kleidiai, plain = (found[N1][f"{weights.name}, {kernels}"] for kernels in KERNELS)
    x86 = found[X86][f"{weights.name}, plain"]
    figures = {name: _figures(reference, logits) for name, logits in (("plain", plain), (X86, x86))}
    rows = []
    for metric, (unit, samples) in _figures(reference, kleidiai).items():
        for peer in figures:
            name = f"{weights.name}: {N1}, KleidiAI: {metric}"
            rows.append(row(name, unit, samples, TARGETS.get((metric, peer)), (peer, figures[peer][metric][1])))
    parted = np.abs(found[ONE][f"{weights.name}, KleidiAI"] - kleidiai).max() / reference.std(axis=1).min()
    name = f"{weights.name}: {ONE}, KleidiAI: largest difference to {N1}"
    return [*rows, row(name, PERCENT, exact(100 * float(parted)))]


def _figures(reference: Float, logits: Float) -> dict[str, tuple[str, Samples]]:
    """Unit and figures by metric."""
    difference = logits.astype(np.float64) - reference
    errors = 100 * np.sqrt(np.mean(np.square(difference), axis=1)) / reference.std(axis=1)
    agreed = np.mean(logits.argmax(axis=1) == reference.argmax(axis=1))
    return {
        "RMS error": (PERCENT, Samples(tuple(float(error) for error in errors))),
        "largest RMS error": (PERCENT, exact(float(errors.max()))),
        "top-1 agreement": ("% of rows", exact(float(100 * agreed))),
    }
