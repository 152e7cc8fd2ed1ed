"""The tuner keeps the fastest way that is right, says what became of every other, and holds one version in memory."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.cpu import Cpu
from runtime.golden import Judgement
from runtime.model import PREFILL_TOKENS
from runtime.subject import MEASURED_PROMPT_TOKENS, MEASURED_TOKENS, DecoderSubject, load_subject
from runtime.tuner import ROUNDS_MOST, Tuner, is_plain
from runtime.ways import (
    BFLOAT16,
    FLOAT_EVERYWHERE,
    READING_SESSION,
    READING_TOKENS_LEAST,
    SPINNING,
    TILED_ATTENTION,
    WHOLE_ATTENTION,
    WITHOUT_KLEIDIAI,
    Figure,
    Way,
    fewer_threads,
    kernel_ways,
    other_attention,
    remedies,
    shorter_pieces,
    usual,
)  # fmt: skip
from wire.errors import Code, DeployError
from wire.manifest import VersionDocument
from wire.serving import ExecutionOptions, TrialOutcome

N1 = Cpu("aarch64", "neoverse-n1", ("asimdhp", "asimddp"))
AMPERE_ONE = Cpu("aarch64", "ampere-1", ("asimdhp", "asimddp", "i8mm", "bf16"))
X86 = Cpu("x86_64", "family-6-model-207", ("avx2", "avx512_bf16"))
OPTIONS = ExecutionOptions(threads=4)
CHOSEN, BEATEN, WRONG = TrialOutcome.CHOSEN, TrialOutcome.BEATEN, TrialOutcome.WRONG


@dataclass
class Bench:
    """Speeds and faults of every way to run a simulated version, and how many copies of it are in memory."""

    decode: Callable[[ExecutionOptions], float] = lambda options: 10.0
    read: Callable[[ExecutionOptions], float] = lambda options: 100.0
    pieces: Callable[[ExecutionOptions, int], float] = lambda options, tokens: 50.0
    fault: Callable[[ExecutionOptions], str] = lambda options: ""
    error: Callable[[ExecutionOptions], float] = lambda options: 0.01
    packed: float = 1.0
    """Speed over packed weights, of that without."""
    refuses: Callable[[ExecutionOptions], bool] = lambda options: False
    loaded: int = 0
    most: int = 0


@dataclass
class Simulated:
    """A subject that computes nothing."""

    bench: Bench
    options: ExecutionOptions
    directory: Path = Path()
    document: VersionDocument = field(default_factory=lambda: base_version().document)
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.bench.refuses(self.options):
            raise DeployError(Code.LOAD_FAILED, "no such kernel")
        self.bench.loaded += 1
        self.bench.most = max(self.bench.most, self.bench.loaded)

    def judge(self) -> Judgement:
        return Judgement(1, self.bench.error(self.options), 0.1, 1.0, self.bench.fault(self.options))

    def tokens_per_s(self) -> float:
        return self.factor * self.bench.decode(self.options)

    def read_tokens_per_s(self, piece_tokens: int = PREFILL_TOKENS) -> float:
        if piece_tokens < PREFILL_TOKENS:
            return self.bench.pieces(self.options, piece_tokens)
        return self.factor * self.bench.read(self.options)

    def reading_ways(self, *, apart: bool) -> list[Way]:
        del apart
        return [WHOLE_ATTENTION]

    def again(self, options: ExecutionOptions, packed: Path | None = None) -> Self:
        return replace(self, options=options, factor=self.bench.packed if packed else 1.0)

    def close(self) -> None:
        self.bench.loaded -= 1


def tuner_on(bench: Bench, until_s: float = math.inf) -> Tuner:
    return Tuner(lambda: Simulated(bench, OPTIONS), until_s)


def outcomes(tuner: Tuner) -> dict[str, TrialOutcome]:
    return {trial.name: trial.outcome for trial in tuner.trials}


@pytest.mark.parametrize(
    ("cpu", "kernels", "rescue"),
    [(N1, [WITHOUT_KLEIDIAI], WITHOUT_KLEIDIAI), (AMPERE_ONE, [WITHOUT_KLEIDIAI, BFLOAT16], WITHOUT_KLEIDIAI),
     (X86, [], FLOAT_EVERYWHERE)],
)  # fmt: skip
def test_kernels_are_those_that_the_core_has(cpu: Cpu, kernels: list[Way], rescue: Way) -> None:
    assert kernel_ways(cpu) == kernels
    assert remedies(cpu) == [rescue]


@pytest.mark.parametrize(("cpu", "other"), [(X86, TILED_ATTENTION), (N1, WHOLE_ATTENTION)])
def test_attention_that_a_core_does_not_begin_with_is_tried(cpu: Cpu, other: Way) -> None:
    options = usual(cpu, 3)
    assert options.threads == 3
    assert other_attention(options) == other
    assert other.applied(options) == usual(N1 if cpu is X86 else X86, 3)


def test_change_keeps_what_was_chosen_before() -> None:
    both = BFLOAT16.applied(WITHOUT_KLEIDIAI.applied(OPTIONS))
    assert both.session_config == {**WITHOUT_KLEIDIAI.config, **BFLOAT16.config}
    assert SPINNING.applied(both).session_config == both.session_config
    assert SPINNING.applied(both).spinning


def test_figures_weigh_reading_and_generating() -> None:
    assert Figure.DECODE.of(10, math.nan) == 10
    assert Figure.READ.of(math.nan, 100) == 100
    assert Figure.BOTH.of(50, 50) == pytest.approx(50)
    assert Figure.BOTH.of(10, 100) < Figure.BOTH.of(12, 100) < Figure.BOTH.of(12, 120)


def test_faster_way_is_kept_and_the_slower_closed() -> None:
    bench = Bench(decode=lambda options: 13.0 if options.spinning else 10.0)
    tuner = tuner_on(bench)
    assert tuner.attempt(SPINNING)
    assert tuner.best.options.spinning
    assert outcomes(tuner) == {"as it comes": BEATEN, "spinning threads": CHOSEN}
    assert tuner.trials[1].ratio == pytest.approx(1.3)
    assert (tuner.trials[1].tokens_per_s, tuner.trials[0].tokens_per_s) == (13.0, 10.0)
    assert (bench.loaded, bench.most) == (1, 2)


@pytest.mark.parametrize(
    ("kleidiai", "plain", "kept"),
    [(0.085, 0.006, True), (0.010, 0.004, False), (0.05, 0.03, False)],
    ids=["rounds too much", "rounds little", "both round much"],
)
def test_way_that_rounds_far_less_is_kept_though_it_is_slow(kleidiai: float, plain: float, kept: bool) -> None:
    def is_plain(options: ExecutionOptions) -> bool:
        return WITHOUT_KLEIDIAI.config.items() <= options.session_config.items()

    bench = Bench(
        decode=lambda options: 2.0 if is_plain(options) else 10.0,
        error=lambda options: plain if is_plain(options) else kleidiai,
    )
    tuner = tuner_on(bench)
    assert tuner.attempt(WITHOUT_KLEIDIAI) == kept
    assert tuner.trials[1].ratio is not None  # and what it costs is told
    assert bench.loaded == 1


def test_way_that_rounds_far_more_is_not_kept_though_it_is_fast() -> None:
    bench = Bench(
        decode=lambda options: 20.0 if BFLOAT16.config.items() <= options.session_config.items() else 10.0,
        error=lambda options: 0.05 if BFLOAT16.config.items() <= options.session_config.items() else 0.01,
    )
    tuner = tuner_on(bench)
    assert not tuner.attempt(BFLOAT16)
    assert "golden error is 0.050" in tuner.trials[1].detail


@pytest.mark.parametrize(
    ("others", "rounds"),
    [([13.0], 6), ([9.0], 6), ([13.0] * 3 + [9.0] + [13.0] * 20, 12), ([9.0, 12.0], ROUNDS_MOST)],
    ids=["better", "worse", "better but for once", "now this, now that"],
)
def test_race_ends_when_it_is_plain_who_wins(others: list[float], rounds: int) -> None:
    measured = 0

    def speed(options: ExecutionOptions) -> float:
        nonlocal measured
        if not options.spinning:
            return 10.0
        measured += 1
        return others[(measured - 1) % len(others)]

    tuner = tuner_on(Bench(decode=speed))
    assert tuner.attempt(SPINNING) == (others[0] > 10)
    assert measured == rounds


def test_it_is_plain_when_few_rounds_say_otherwise() -> None:
    assert not is_plain([], 1.05)
    assert not is_plain([1.1] * 5, 1.05)
    assert is_plain([1.1] * 6, 1.05)
    assert is_plain([1.0] * 6, 1.05)
    assert not is_plain([1.1] * 10 + [1.0], 1.05)
    assert is_plain([1.1] * 11 + [1.0], 1.05)
    assert not is_plain([1.1] * 10 + [1.0] * 2, 1.05)


@pytest.mark.parametrize("speed", [9.0, 10.0, 10.4])
def test_way_that_does_not_win_clearly_is_not_kept(speed: float) -> None:
    bench = Bench(decode=lambda options: speed if options.spinning else 10.0)
    tuner = tuner_on(bench)
    assert not tuner.attempt(SPINNING)
    assert not tuner.best.options.spinning
    assert outcomes(tuner) == {"as it comes": CHOSEN, "spinning threads": BEATEN}
    assert bench.loaded == 1


def test_faster_way_that_is_wrong_is_never_kept() -> None:
    bench = Bench(read=lambda o: 900.0 if o.session_config else 100.0, fault=lambda o: "wrong" * bool(o.session_config))
    tuner = tuner_on(bench)
    assert not tuner.attempt(BFLOAT16)
    assert outcomes(tuner)[BFLOAT16.name] is WRONG
    assert tuner.trials[-1].detail == "wrong"
    assert not tuner.judged.fault
    assert bench.loaded == 1


def test_way_that_does_not_load_leaves_a_row() -> None:
    bench = Bench(refuses=lambda options: not options.flash_attention)
    tuner = tuner_on(bench)
    assert not tuner.attempt(WHOLE_ATTENTION)
    assert outcomes(tuner)[WHOLE_ATTENTION.name] is TrialOutcome.FAILED
    assert "no such kernel" in tuner.trials[-1].detail
    assert bench.loaded == 1


def test_way_that_changes_nothing_is_not_tried_and_one_without_time_is_named() -> None:
    tuner = tuner_on(Bench(), until_s=-math.inf)
    assert not tuner.attempt(Way("nothing", Figure.BOTH))
    assert not tuner.attempt(SPINNING)
    assert outcomes(tuner) == {"as it comes": CHOSEN, "spinning threads": TrialOutcome.SKIPPED}


def test_threads_are_halved_as_long_as_that_is_better() -> None:
    bench = Bench(decode=lambda o: 40.0 / o.threads, read=lambda o: 400.0 if o.threads > 1 else 50.0)
    tuner = tuner_on(bench)
    tuner.attempt_threads()
    assert (tuner.best.options.threads, tuner.best.options.spinning) == (2, False)
    assert [(trial.name, trial.outcome) for trial in tuner.trials] == [
        ("as it comes", BEATEN), ("spinning threads", BEATEN), ("2 threads", CHOSEN), ("1 thread", BEATEN),
        ("spinning threads", BEATEN),
    ]  # fmt: skip
    assert fewer_threads(ExecutionOptions(threads=1)) is None


def test_threads_that_lose_asleep_are_tried_spinning_before_one_is() -> None:
    bench = Bench(decode=lambda o: 10.0 if o.threads == 1 else 20.0 if o.spinning else 5.0, read=lambda o: 50.0)
    tuner = Tuner(lambda: Simulated(bench, ExecutionOptions(threads=2)), math.inf)
    tuner.attempt_threads()
    assert (tuner.best.options.threads, tuner.best.options.spinning) == (2, True)
    assert outcomes(tuner) == {"as it comes": BEATEN, "spinning threads": CHOSEN, "1 thread": BEATEN}


@pytest.mark.parametrize(("better_from", "kept"), [(32, 32), (8, 8), (1, READING_TOKENS_LEAST)])
def test_session_that_reads_gets_the_pieces_at_which_it_is_better(better_from: int, kept: int) -> None:
    def speed(options: ExecutionOptions, tokens: int) -> float:
        by_it = options.reading_config is not None and tokens >= options.reading_tokens
        return 60.0 if by_it == (tokens >= better_from) else 50.0

    bench = Bench(read=lambda options: 100.0 if options.reading_config is None else 200.0, pieces=speed)
    tuner = tuner_on(bench)
    tuner.attempt_shorter_pieces()
    assert len(tuner.trials) == 1, "nothing to ask about where one session does both"
    assert tuner.attempt(READING_SESSION)
    tuner.attempt_shorter_pieces()
    assert tuner.best.options.reading_tokens == kept
    assert bench.loaded == 1
    assert tuner.trials[1].read_tokens_per_s == 200.0, "the table tells the speed of long pieces"
    assert {trial.read_tokens_per_s for trial in tuner.trials[2:]} == {None}


def test_pieces_are_halved_down_to_a_few_tokens() -> None:
    options = READING_SESSION.applied(OPTIONS)
    lengths = [options.reading_tokens]
    while (way := shorter_pieces(options)) is not None:
        options = way.applied(options)
        lengths.append(options.reading_tokens)
    assert lengths == [32, 16, 8, 4]


def test_one_thread_does_not_spin() -> None:
    bench = Bench(decode=lambda o: (2.0 if o.spinning else 1.0) * 100.0 / o.threads**2)
    tuner = tuner_on(bench)
    tuner.attempt_threads()
    assert (tuner.best.options.threads, tuner.best.options.spinning) == (1, False)


def test_remedy_is_taken_where_the_usual_way_is_wrong() -> None:
    bench = Bench(fault=lambda options: "" if options.session_config else "golden error")
    tuner = tuner_on(bench)
    assert tuner.judged.fault
    assert tuner.remedy(remedies(X86))
    assert not tuner.judged.fault
    assert outcomes(tuner) == {"as it comes": WRONG, FLOAT_EVERYWHERE.name: CHOSEN}
    assert bench.loaded == 1


def test_nothing_is_chosen_where_no_remedy_helps() -> None:
    tuner = tuner_on(Bench(fault=lambda options: "golden error"))
    assert not tuner.remedy(remedies(N1))
    assert set(outcomes(tuner).values()) == {WRONG}
    assert tuner.judged.fault


def test_packed_weights_are_taken_when_they_are_used_whatever_noise_says_of_their_speed() -> None:
    bench = Bench()
    tuner = tuner_on(bench)
    assert not tuner.attempt_packed(Path("cache"), lambda: "nobody reads them")
    assert tuner.trials[-1].detail == "nobody reads them"
    assert tuner.attempt_packed(Path("cache"), lambda: "")
    assert bench.loaded == 1
    noisy = tuner_on(Bench(packed=0.7))
    assert noisy.attempt_packed(Path("cache"), lambda: "")
    assert noisy.trials[-1].ratio == pytest.approx(0.7)


def test_decoding_is_measured_behind_what_reading_reads() -> None:
    version = base_version()
    subject = load_subject(version.directory, version.document, ExecutionOptions(threads=1))
    assert isinstance(subject, DecoderSubject)
    decode, lengths, read = subject.model.decode, list[int](), list[int]()
    prefill = subject.model.prefill
    subject.model.decode = lambda tokens, at: (lengths.extend(at), decode(tokens, at))[1]
    subject.model.prefill = lambda slot, tokens, at: (read.append(at + len(tokens)), prefill(slot, tokens, at))[1]
    assert subject.tokens_per_s() > 0
    assert read[-1] == MEASURED_PROMPT_TOKENS
    assert lengths == list(range(MEASURED_PROMPT_TOKENS, MEASURED_PROMPT_TOKENS + MEASURED_TOKENS))
    subject.tokens_per_s()
    assert read.count(MEASURED_PROMPT_TOKENS) == 1
    subject.close()


def test_real_way_that_is_slower_by_far_is_beaten_with_the_same_answers() -> None:
    version = base_version()
    tuner = Tuner(lambda: load_subject(version.directory, version.document, ExecutionOptions(threads=1)), math.inf)
    assert not tuner.attempt(Way("without packing", Figure.BOTH, config={"session.disable_prepacking": "1"}))
    first, other = tuner.trials
    assert (first.outcome, other.outcome) == (CHOSEN, BEATEN)
    assert other.ratio is not None
    assert other.ratio < 0.5
    assert first.heap_bytes is not None
    assert other.heap_bytes is not None
    assert other.heap_bytes < first.heap_bytes
    tuner.best.close()
