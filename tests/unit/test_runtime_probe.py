"""Every verdict of a probe, provoked for real in a real child."""

import asyncio
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import SLOWNESS, Version, base_version, spoiled_version, tuned_version, wait_for

from forge.build import reseal_version
from runtime.probe import run_probe, with_provider
from runtime.settings import RuntimeSettings
from runtime.ways import FLOAT_ACTIVATIONS, FLOAT_EVERYWHERE
from wire.documents import parse_document
from wire.serving import ExecutionOptions, ProbeReport, ProbeRequest, ProbeVerdict, Trial, TrialOutcome


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    home = tmp_path / "versions"
    home.mkdir()
    return home


def install(versions: Path, version: Version) -> str:
    shutil.copytree(version.directory, versions / version.decoded)
    return version.decoded


def probe(versions: Path, candidate: str, *, incumbent: str | None = None, timeout_s: float = 60.0 * SLOWNESS,
          memory_bytes: int = 0) -> ProbeReport:  # fmt: skip
    settings = RuntimeSettings(store=versions.parent, threads=1, probe_memory_bytes=memory_bytes)
    request = ProbeRequest(candidate=candidate, incumbent=incumbent, timeout_s=timeout_s)
    return asyncio.run(run_probe(versions, request, settings))


def children(marker: str) -> Iterator[int]:
    """Probe children of this process whose command line holds `marker`."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and marker in command:
            yield int(stat.parent.name)


async def probe_and_signal(versions: Path, candidate: str, number: int, timeout_s: float) -> ProbeReport:
    """Probe, and send a signal to the child as soon as there is one."""
    settings = RuntimeSettings(store=versions.parent, threads=1)
    request = ProbeRequest(candidate=candidate, timeout_s=timeout_s)
    task = asyncio.create_task(run_probe(versions, request, settings))
    child = await asyncio.to_thread(wait_for, "a probe child", lambda: next(children(str(versions)), None))
    os.kill(child, number)
    return await task


def test_right_candidate_passes_with_every_figure(versions: Path) -> None:
    incumbent, candidate = install(versions, base_version()), install(versions, tuned_version())
    report = probe(versions, candidate, incumbent=incumbent)
    assert report.verdict is ProbeVerdict.PASSED, report.detail
    assert report.golden_rows == 8
    assert report.golden_error is not None
    assert report.golden_tolerance is not None
    assert report.golden_error < report.golden_tolerance / 2
    assert report.top1_agreement is not None
    assert report.top1_agreement > 0.5
    assert report.tokens_per_s is not None
    assert report.incumbent_tokens_per_s is not None
    assert report.load_s is not None
    assert report.peak_rss_bytes is not None
    assert report.peak_rss_bytes > 30_000_000
    assert report.options is not None
    assert report.options.threads == 1
    assert report.cpu
    assert report.onnxruntime


def test_shuffled_nibbles_of_one_layer_are_a_golden_mismatch(versions: Path, tmp_path: Path) -> None:
    report = probe(versions, install(versions, spoiled_version(tmp_path / "spoiled")))
    assert report.verdict is ProbeVerdict.GOLDEN_MISMATCH
    assert report.golden_error is not None
    assert report.golden_tolerance is not None
    assert report.golden_error > report.golden_tolerance
    assert "tolerance" in report.detail


def not_a_number(home: Path, tensor: str) -> Version:
    """The base with every value of a float32 tensor not a number."""
    shutil.copytree(base_version().directory, home)
    columns = base_version().document.tensors
    row = columns.name.index(tensor)
    weights = np.memmap(home / base_version().document.files[columns.file[row]].path, dtype=np.uint8, mode="r+")
    start = columns.offset[row]
    weights[start : start + columns.size_bytes(row)].view(np.float32)[:] = np.nan
    weights.flush()
    return Version(home, reseal_version(home))


def test_logits_that_are_not_a_number_are_a_golden_mismatch(versions: Path, tmp_path: Path) -> None:
    report = probe(versions, install(versions, not_a_number(tmp_path / "nan", "model.embed_tokens.scales")))
    assert report.verdict is ProbeVerdict.GOLDEN_MISMATCH
    assert report.golden_error is None
    assert "not finite" in report.detail


def test_layer_that_gives_no_numbers_is_a_golden_mismatch(versions: Path, tmp_path: Path) -> None:
    """Finite logits or not: KleidiAI's kernels make finite int8 activations of what is not a number."""
    report = probe(versions, install(versions, not_a_number(tmp_path / "nan", "layers.2.input_norm")))
    assert report.verdict is ProbeVerdict.GOLDEN_MISMATCH


def test_corrupt_graph_is_a_failed_load(versions: Path) -> None:
    candidate = install(versions, base_version())
    graph = versions / candidate / "model.onnx"
    data = graph.read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiom")
    graph.write_bytes(data)
    report = probe(versions, candidate)
    assert report.verdict is ProbeVerdict.LOAD_FAILED
    assert "GroupQueryAttentiom" in report.detail


def test_version_that_is_not_there_is_a_failed_load(versions: Path) -> None:
    report = probe(versions, "0" * 64)
    assert report.verdict is ProbeVerdict.LOAD_FAILED
    assert "order the release again" in report.detail


def test_version_without_golden_vectors_is_a_failed_load(versions: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(base_version().directory, tmp_path / "mute"))
    (home / "golden.json").write_text('{"schema":1}')
    report = probe(versions, install(versions, Version(home, reseal_version(home))))
    assert report.verdict is ProbeVerdict.LOAD_FAILED
    assert "GoldenSet" in report.detail


def test_template_that_never_ends_is_a_timeout_here_and_not_in_the_server(versions: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(base_version().directory, tmp_path / "endless"))
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    (home / "chat_template.jinja").write_text(loops)
    report = probe(versions, install(versions, Version(home, reseal_version(home))), timeout_s=3.0)
    assert report.verdict is ProbeVerdict.TIMEOUT


def test_incumbent_that_is_broken_does_not_harm_the_candidate(versions: Path) -> None:
    candidate = install(versions, base_version())
    report = probe(versions, candidate, incumbent="1" * 64)
    assert report.verdict is ProbeVerdict.PASSED
    assert report.incumbent_tokens_per_s is None


@pytest.mark.skipif("QEMU_CPU" in os.environ, reason="qemu-user does not bound the address space of its programs")
def test_too_little_memory_is_a_verdict(versions: Path) -> None:
    report = probe(versions, install(versions, base_version()), memory_bytes=200_000_000)
    assert report.verdict is ProbeVerdict.OUT_OF_MEMORY, report.detail


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_child_that_dies_of_a_signal_is_crashed(versions: Path, number: signal.Signals) -> None:
    candidate = install(versions, base_version())
    report = asyncio.run(probe_and_signal(versions, candidate, number, 60.0))
    assert report.verdict is ProbeVerdict.CRASHED
    assert number.name in report.detail


def test_child_that_hangs_is_killed_in_time(versions: Path) -> None:
    candidate = install(versions, base_version())
    report = asyncio.run(probe_and_signal(versions, candidate, signal.SIGSTOP, 1.5))
    assert report.verdict is ProbeVerdict.TIMEOUT
    assert not list(children(str(versions)))


def test_cancelled_probe_leaves_no_child(versions: Path) -> None:
    candidate = install(versions, base_version())

    async def cancel() -> None:
        settings = RuntimeSettings(store=versions.parent, threads=1)
        task = asyncio.create_task(run_probe(versions, ProbeRequest(candidate=candidate), settings))
        await asyncio.to_thread(wait_for, "a probe child", lambda: next(children(str(versions)), None))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert not list(children(str(versions)))


def test_probe_that_cannot_write_packed_weights_passes_and_says_so(versions: Path, tmp_path: Path) -> None:
    """The child's own limit on file sizes stands for a disk that fills up while onnxruntime writes."""
    candidate = install(versions, base_version())
    command = [sys.executable, "-P", "-m", "runtime.main", "probe", "--candidate", str(versions / candidate)]
    done = subprocess.run(
        [*command, "--threads", "1", "--cache", str(tmp_path / "cache")], stdout=subprocess.PIPE, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )  # fmt: skip
    report = parse_document(ProbeReport, done.stdout)
    assert report.verdict is ProbeVerdict.PASSED
    assert report.prepack is None
    assert report.prepack_detail
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has other kernels for prompts")
def test_session_for_prompts_is_chosen_only_where_the_settings_allow_it(versions: Path) -> None:
    candidate = install(versions, base_version())
    chosen: dict[bool, ProbeReport] = {}
    for allowed in (True, False):
        settings = RuntimeSettings(store=versions.parent, threads=1, reading_session=allowed)
        chosen[allowed] = asyncio.run(run_probe(versions, ProbeRequest(candidate=candidate), settings))
    for report in chosen.values():
        assert report.verdict is ProbeVerdict.PASSED
        assert report.options is not None
    assert chosen[False].options is not None
    assert chosen[False].options.reading_config is None
    assert chosen[False].golden_rows == chosen[True].golden_rows


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the remedy of x86")
def test_version_that_only_other_kernels_compute_right_is_run_by_them(versions: Path, tmp_path: Path) -> None:
    """Its golden vectors are judged more strictly than int8 activations can be, and float activations are."""
    home = Path(shutil.copytree(base_version().directory, tmp_path / "strict"))
    golden = json.loads((home / "golden.json").read_text())
    (home / "golden.json").write_text(json.dumps(golden | {"tolerance": 0.001}))
    report = probe(versions, install(versions, Version(home, reseal_version(home))))
    assert report.verdict is ProbeVerdict.PASSED, report.detail
    assert report.options is not None
    assert report.options.session_config == FLOAT_ACTIVATIONS
    assert report.golden_error is not None
    assert report.golden_error < 0.001
    assert (report.trials[0].outcome, report.trials[1].name) == (TrialOutcome.WRONG, FLOAT_EVERYWHERE.name)


LIBRARIES = {
    "offers nothing": "void *CreateEpFactories(void *a, void *b, void *c, void *d, unsigned long e, unsigned long *n)"
    " { *n = 0; return 0; } void *ReleaseEpFactory(void *a) { return 0; }",
    "dies": "#include <stdlib.h>\n__attribute__((constructor)) static void begin(void) { abort(); }",
    "hangs": "#include <unistd.h>\n__attribute__((constructor)) static void begin(void) { for (;;) pause(); }",
    "is no library": None,
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="libraries are compiled here")
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("offers nothing", "offers no device"),
        ("dies", "SIGABRT"),
        ("hangs", "did not end"),
        ("is no library", "failed"),
    ],
)
def test_provider_library_that_is_worth_nothing_harms_nobody(
    versions: Path, tmp_path: Path, what: str, told: str
) -> None:
    library, source = tmp_path / "provider.so", LIBRARIES[what]
    if source is None:
        library.write_bytes(b"not a library")
    else:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)], input=source.encode(), check=True
        )
    settings = RuntimeSettings(store=versions.parent, threads=1, provider_libraries={"npu": library})
    request = ProbeRequest(candidate=install(versions, base_version()))
    report = asyncio.run(run_probe(versions, request, settings))
    assert report.verdict is ProbeVerdict.PASSED
    assert report.options is not None
    assert report.options.library is None
    row = report.trials[-1]
    assert (row.name, row.outcome) == ("library npu", TrialOutcome.FAILED)
    assert told in row.detail


def test_provider_that_this_onnxruntime_has_not_is_told(versions: Path) -> None:
    settings = RuntimeSettings(store=versions.parent, threads=1, providers=("AIOExecutionProvider",))
    request = ProbeRequest(candidate=install(versions, base_version()))
    report = asyncio.run(run_probe(versions, request, settings))
    assert report.verdict is ProbeVerdict.PASSED
    assert report.trials[-1].outcome is TrialOutcome.FAILED
    assert "this onnxruntime has no AIOExecutionProvider" in report.trials[-1].detail


def test_faster_provider_takes_the_place_of_the_cpus_options() -> None:
    cpu, npu = ExecutionOptions(threads=2), ExecutionOptions(threads=2, provider="NpuExecutionProvider", library="npu")
    mine = Trial(name="as it comes", options=cpu, outcome=TrialOutcome.CHOSEN)
    report = ProbeReport(
        verdict=ProbeVerdict.PASSED, options=cpu, tokens_per_s=10.0, trials=(mine,), prepack="a" * 64, prepack_bytes=1
    )
    row = Trial(name="library npu", options=npu, outcome=TrialOutcome.CHOSEN, ratio=3.0)
    found = ProbeReport(verdict=ProbeVerdict.PASSED, options=npu, tokens_per_s=30.0, trials=(mine, row))
    merged = with_provider(report, "library npu", found)
    assert (merged.options, merged.tokens_per_s, merged.prepack) == (npu, 30.0, None)
    assert [trial.outcome for trial in merged.trials] == [TrialOutcome.BEATEN, TrialOutcome.CHOSEN]
    slow = found.model_copy(update={"options": cpu, "trials": (mine, row.model_copy(update={"ratio": 0.4}))})
    assert with_provider(report, "library npu", slow).options == cpu
    assert with_provider(report, "library npu", slow).prepack == "a" * 64
