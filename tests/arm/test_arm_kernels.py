"""What is particular to Arm: the core, KleidiAI's int4 kernels, and artifacts that another kind of machine made.

Runs on an Arm machine, and by scripts/test-arm on an emulated one.
"""

import math
import os
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from runtime_fixtures import base_version, spoiled_version

from benchmarks.kernels import make_channels_loud
from codec.decoder import decode_pack
from codec.encoder import encode_pack
from codec.versions import read_version
from forge.artifact import Artifact, artifacts_in
from runtime.cpu import detect_cpu
from runtime.golden import Judgement, judge_model, read_golden, run_prompt
from runtime.model import Float, Model, Shape
from runtime.subject import load_subject
from runtime.tuner import Tuner
from runtime.ways import WITHOUT_KLEIDIAI
from wire.manifest import VersionDocument
from wire.serving import ExecutionOptions

PLAIN = {"mlas.disable_kleidiai": "1"}
FORGED = os.environ.get("AMPERAGE_FORGED", "")
AT_ANOTHER = pytest.mark.skipif(not FORGED, reason="nothing from another machine is here; scripts/test-arm brings it")
EMULATED = {
    "neoverse-n1": "aarch64 neoverse-n1 asimdhp,asimddp",
    "max,sve=off,sme=off": "aarch64 qemu-max asimdhp,asimddp,i8mm,bf16",
    "max": "aarch64 qemu-max asimdhp,asimddp,sve,sve2,i8mm,bf16,sme",
}
"""What the emulated core says of itself (MIDR_EL1) and to its programs (AT_HWCAP), by QEMU_CPU."""


def load(session_config: dict[str, str], directory: Path | None = None) -> Model:
    version = base_version()
    options = ExecutionOptions(threads=1, session_config=session_config)
    return Model(directory or version.directory, version.document.config, Shape(1, 192), options)


def logits(session_config: dict[str, str]) -> tuple[Float, Float]:
    """Logits of one prompt: by prefill, and by a decode step."""
    prefilled, decoded = run_prompt(load(session_config), [17, 301, 5, 44, 1203, 9, 88, 640])
    return prefilled, decoded


def judged(session_config: dict[str, str], directory: Path | None = None) -> Judgement:
    golden = read_golden(base_version().directory, base_version().document.config.vocab_size)
    return judge_model(load(session_config, directory), golden)


@pytest.mark.skipif("QEMU_CPU" not in os.environ, reason="no emulator")
def test_core_is_the_one_that_is_emulated() -> None:
    assert str(detect_cpu()) == EMULATED[os.environ["QEMU_CPU"]]


def test_kleidiai_gives_other_bits_so_it_is_what_computes() -> None:
    for ours, again, plain in zip(logits({}), logits({}), logits(PLAIN), strict=True):
        assert np.array_equal(ours, again)  # so the difference below is no noise
        assert not np.array_equal(ours, plain)
        assert 0.001 < np.sqrt(np.mean(np.square(ours - plain))) / plain.std() < 0.05


@pytest.mark.parametrize("session_config", [{}, PLAIN], ids=["kleidiai", "plain"])
def test_golden_vectors_hold_with_room(session_config: dict[str, str]) -> None:
    judgement = judged(session_config)
    assert judgement.fault == ""
    assert judgement.worst_error is not None
    assert judgement.worst_error < judgement.tolerance / 4
    assert judgement.top1_agreement == 1.0


def test_tuner_turns_kleidiai_off_where_channels_are_loud(tmp_path: Path) -> None:
    loud = tmp_path / "loud"
    shutil.copytree(base_version().directory, loud)
    make_channels_loud(loud)
    document, options = base_version().document, ExecutionOptions(threads=1)
    tuner = Tuner(lambda: load_subject(loud, document, options), math.inf)
    assert tuner.attempt(WITHOUT_KLEIDIAI)
    rounded, plain = (trial.golden_error for trial in tuner.trials)
    assert rounded is not None
    assert plain is not None
    assert rounded > 5 * plain


@pytest.mark.parametrize("session_config", [{}, PLAIN], ids=["kleidiai", "plain"])
def test_golden_vectors_notice_one_shuffled_tensor(session_config: dict[str, str], tmp_path: Path) -> None:
    spoiled = spoiled_version(tmp_path / "spoiled")
    assert "over the tolerance" in judged(session_config, spoiled.directory).fault


@cache
def artifacts() -> tuple[Artifact, ...]:
    return artifacts_in(Path(FORGED, "release"))


def base_of(artifact: Artifact) -> Path | None:
    return None if artifact.manifest.base is None else Path(FORGED, "tales-5m-base")


@AT_ANOTHER
@pytest.mark.parametrize("number", [0, 1], ids=["full", "delta"])
def test_artifact_of_another_machine_decodes_to_its_bytes(number: int, tmp_path: Path) -> None:
    artifact = artifacts()[number]
    decode_pack(artifact.manifest, artifact.pack, tmp_path, base=base_of(artifact))
    for entry in artifact.manifest.version.files:
        assert (tmp_path / entry.path).read_bytes() == Path(FORGED, "successor", entry.path).read_bytes()


@AT_ANOTHER
@pytest.mark.parametrize("number", [0, 1], ids=["full", "delta"])
def test_encoding_gives_the_pack_of_another_machine(number: int, tmp_path: Path) -> None:
    artifact, base = artifacts()[number], base_of(artifacts()[number])
    against: tuple[VersionDocument, Path] | None = None if base is None else (read_version(base), base)
    encode_pack(artifact.manifest.version, Path(FORGED, "successor"), tmp_path / "pack", base=against)
    assert (tmp_path / "pack").read_bytes() == artifact.pack.read_bytes()
