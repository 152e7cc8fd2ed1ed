"""Measuring the versions of language models: bytes, memory, quality, speed.

Every version is a process of its own, so that its memory is its own, and works while the others wait. All run with the
same settings, not with those that a probe would choose for each, so that the recipe alone makes the difference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import Samples, Subject, measure
from benchmarks.memory import Process
from benchmarks.releases import release_summary
from benchmarks.results.figures import DecoderFigures
from benchmarks.results.making import Made
from benchmarks.results.quality import judge_version
from codec.versions import read_version
from runtime.cpu import allowed_threads
from wire.manifest import DecoderConfig
from wire.serving import ExecutionOptions

PROMPT_TOKENS, WARM_TOKENS, DECODED_TOKENS = 32, 4, 96
Say = Callable[[str], None]


def measure_decoders(made: Sequence[Made], judging: Path, rounds: int, say: Say) -> list[DecoderFigures]:
    """A row per version, in their order; `judging` holds the windows of tokens that judge."""
    qualities = []
    for one in made:
        say(f"evaluating {one.recipe.name}")
        qualities.append(judge_version(one.directory, judging))
    say("measuring memory and speed")
    with _loaded(made) as processes:
        memory = [_memory(process, one) for process, one in zip(processes, made, strict=True)]
        subjects = {one.recipe.name: _decoding(process) for process, one in zip(processes, made, strict=True)}
        speeds = measure(subjects, rounds)
    return [
        DecoderFigures.model_validate(costs(one, speeds[one.recipe.name]) | asdict(quality) | used)
        for one, quality, used in zip(made, qualities, memory, strict=True)
    ]


def costs(one: Made, speed: Samples | None) -> dict[str, Any]:
    """The fields of a row that every version has."""
    assert speed is not None
    return {
        "name": one.recipe.name, "series": one.recipe.series, "commands": one.recipe.steps, "weights": one.weights,
        "disk_bytes": sum(path.stat().st_size for path in one.directory.iterdir()),
        "wire_bytes": release_summary(one.directory).wire_bytes, "speed": speed.median, "speed_spread": speed.spread,
    }  # fmt: skip


@contextmanager
def _loaded(made: Sequence[Made]) -> Iterator[list[Process]]:
    threads = allowed_threads(0)
    options = ExecutionOptions(threads=threads).model_dump(mode="json")
    with ExitStack() as stack:
        processes = []
        for one in made:
            order = {"kind": "ours", "threads": threads, "options": options, "prepack": None}
            process = Process(order | {"directory": str(one.directory)})
            stack.callback(process.close)
            process.load()
            processes.append(process)
        yield processes


def _memory(process: Process, one: Made) -> dict[str, int]:
    """Bytes with the whole context in use: what load and steps added, and mapped files of the version."""
    config = read_version(one.directory).config
    assert isinstance(config, DecoderConfig)
    process.ask(read=config.context_tokens - DECODED_TOKENS, seed=0)
    used = process.ask(decode=DECODED_TOKENS)
    return {"ram_bytes": used["anonymous"] + used["slab"] + used["resident"], "cache_bytes": used["slab"]}


def _decoding(process: Process) -> Subject:
    """Tokens per second of an answer to a short prompt."""

    def subject() -> float:
        process.ask(read=PROMPT_TOKENS, seed=0)
        process.ask(decode=WARM_TOKENS)  # threads awake, caches warm
        return DECODED_TOKENS / float(process.ask(decode=DECODED_TOKENS)["seconds"])

    return subject
