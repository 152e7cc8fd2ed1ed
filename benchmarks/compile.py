"""Models before and after `forge compile`: a plain decoder, beside the forge's own graph of it, and models with loops.

The decoder is the sample, written with plain operators from the same weights (benchmarks/plain_decoder.py), in float32
and in int4. All run in this process on every core that is allowed; the forge's graph as the runtime runs it. Two are
measured in turns at a time. Node counts are those of the files; onnxruntime fuses some more when it loads any of them.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from benchmarks.decoder_models import SAMPLE
from benchmarks.harness import Row, Subject, Target, at_most, exact, measure, row, seconds_of
from benchmarks.loop_models import gru_scan, refinement_loop
from benchmarks.plain_decoder import plain_feeds, write_plain_decoder
from forge.build import build_version
from forge.checkpoint import read_architecture
from forge.compiler.compilation import Choices, Report, compile_model
from forge.compiler.trial import Sampling, Session
from forge.compiler.work import count_nodes
from forge.onnx_file import read_onnx
from forge.quantise import Precision
from forge.reference import MODEL_FILE
from runtime.cpu import allowed_threads
from runtime.model import Model
from runtime.slab import Shape
from wire.manifest import DecoderConfig
from wire.serving import ExecutionOptions

ROUNDS = 31
CACHED, PROMPT = 128, 64
"""Tokens before the one that is decoded, and tokens of the prompt that is read."""
RUNS = {"decode": 10, "read": 3, "loop": 200}
"""Of one round."""
TOLERANCES = {Precision.FLOAT32: 1e-4, Precision.INT4: 0.05}
"""int4 kernels round what they multiply to int8, which turns a last bit into a step."""
PLAIN, COMPILED, OWN = "plain", "compiled", "the forge's graph"

Feeds = Mapping[str, np.ndarray[Any, Any]]


def run() -> Sequence[Row]:
    """Rows for the decoder in both precisions, and for each loop."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="amperage-bench-") as folder:
        for precision in (Precision.FLOAT32, Precision.INT4):
            rows += _decoder_rows(Path(folder, precision), precision)
        rows += _loop_rows(Path(folder), "GRU as Scan of 32 steps", gru_scan(), at_most(1.0, ratio=True))
        rows += _loop_rows(Path(folder), "refinement as Loop of 8 turns", refinement_loop(), at_most(0.8, ratio=True))
    return rows


def _decoder_rows(home: Path, precision: Precision) -> list[Row]:
    home.mkdir()
    threads, a = allowed_threads(0), read_architecture(SAMPLE / "config.json")
    feeds = {"decode": plain_feeds(a, 1, CACHED), "read": plain_feeds(a, PROMPT, 0)}
    source = write_plain_decoder(SAMPLE, home, precision)
    sampling = Sampling(given=dict(feeds["decode"]))
    choices = Choices(tolerance=TOLERANCES[precision], sampling=sampling, rounds=5)
    report = compile_model(source, home / "compiled.onnx", choices)
    document = build_version(SAMPLE, home / "own", ("tales", "1"), precision=precision)
    assert isinstance(document.config, DecoderConfig)
    own = Model(home / "own", document.config, Shape(1, a.context_tokens), ExecutionOptions(threads=threads))
    own_work: dict[str, Callable[[], object]] = {
        "decode": lambda: own.decode([5], [CACHED]),
        "read": lambda: own.prefill(0, [int(token) for token in feeds["read"]["input_ids"][0]], 0),
    }
    plain, compiled = (Session(path, threads, optimised=True) for path in (source, home / "compiled.onnx"))
    rows = _count_rows(
        f"{precision} decoder", report, sum(count_nodes(read_onnx(home / "own" / MODEL_FILE).graph).values())
    )
    for kind, inputs in feeds.items():
        works = {PLAIN: _running(plain, inputs), COMPILED: _running(compiled, inputs), OWN: own_work[kind]}
        for name, target in ((COMPILED, at_most(1.0, ratio=True)), (OWN, at_most(0.9, ratio=True))):
            rows.append(
                _time_row(f"{precision} decoder, {kind}: {name}", RUNS[kind], works[name], works[PLAIN], target)
            )
    return rows


def _loop_rows(home: Path, name: str, made: tuple[ModelProto, Feeds], target: Target) -> list[Row]:
    model, feeds = made
    source, out = home / f"{model.graph.name}.onnx", home / f"{model.graph.name}.compiled.onnx"
    source.write_bytes(model.SerializeToString())
    report = compile_model(source, out, Choices(sampling=Sampling(given=dict(feeds)), rounds=5))
    before, after = (Session(path, 1, optimised=True) for path in (source, out))
    works = _running(after, feeds), _running(before, feeds)
    return [*_count_rows(name, report), _time_row(f"{name}: {COMPILED}", RUNS["loop"], *works, target)]


def _running(session: Session, feeds: Feeds) -> Callable[[], object]:
    inputs = dict(feeds)
    return lambda: session.once(inputs)


def _count_rows(name: str, report: Report, own: int | None = None) -> list[Row]:
    before, after = (sum(counts.values()) for counts in (report.nodes_before, report.nodes_after))
    rows = [row(f"{name}, nodes: {COMPILED}", "nodes", exact(after), None, (PLAIN, exact(before)))]
    if own is not None:
        rows.append(row(f"{name}, nodes: {OWN}", "nodes", exact(own), None, (PLAIN, exact(before))))
    return rows


def _time_row(
    metric: str, runs: int, ours: Callable[[], object], plain: Callable[[], object], target: Target
) -> Row:  # fmt: skip
    measured = measure({"ours": _milliseconds(ours, runs), PLAIN: _milliseconds(plain, runs)}, ROUNDS)
    own = measured["ours"]
    assert own is not None
    return row(metric, "ms", own, target, (PLAIN, measured[PLAIN]))


def _milliseconds(work: Callable[[], object], runs: int) -> Subject:
    def several() -> None:
        for _ in range(runs):
            work()

    timed = seconds_of(several)
    return lambda: 1e3 * timed() / runs
