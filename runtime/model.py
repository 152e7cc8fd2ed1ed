"""One loaded decoder: its onnxruntime sessions, its memory for keys and values, and the shapes in which it runs.

The graph contract is docs/design.md section 6. Invariants: past and present of a layer are the same memory, so a step
writes one row per token and copies nothing; only the engine's thread runs steps; the slots in use by a batch of k are
0..k-1, because a slice of the slab from its start is contiguous and is bound without a copy.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.session import DECODING, READING, open_sessions
from runtime.slab import Shape, Slab
from runtime.speculation import DRAFT_TOKENS
from wire.errors import Code, DeployError
from wire.manifest import DecoderConfig
from wire.serving import ExecutionOptions

Float = NDArray[np.float32]
Int = NDArray[np.int64]

PREFILL_TOKENS = 128
"""Longest chunk of a prompt between two decode steps: it bounds the pause of running answers."""


class Interrupt:
    """Ends one step from any thread: onnxruntime looks at it before every node of the graph."""

    def __init__(self) -> None:
        self.options = ort.RunOptions()

    def set(self) -> None:
        """Make the step raise, as soon as it runs or at once; what it has written of its slots is worth nothing."""
        self.options.terminate = True


@dataclass(slots=True)
class _Bound:
    """A binding with the arrays it reads and writes; the arrays must live as long as it does."""

    session: Any
    binding: Any
    input_ids: Int
    seqlens: NDArray[np.int32]
    total: NDArray[np.int32]
    logits: Float
    values: list[Any] = field(default_factory=list)


class Model:
    """A session with its slab. Raises DeployError(load_failed) when onnxruntime refuses the graph.

    `packed` is a directory of the prepack cache, whose graphs stand for the version's own.
    """

    def __init__(
        self, directory: Path, config: DecoderConfig, shape: Shape, options: ExecutionOptions,
        packed: Path | None = None,
    ) -> None:  # fmt: skip
        self.config, self.shape = config, shape
        sessions = open_sessions(directory, options, packed)
        self._session, self._reader = sessions[DECODING], sessions.get(READING, sessions[DECODING])
        self._wide_tokens = options.reading_tokens
        """Shortest chunk for the session that reads: below it, the one that decodes is faster at reading, too."""
        self.slab = Slab(config, shape)
        self._decoders: dict[int, _Bound] = {}
        self._prefillers: dict[tuple[int, int, bool], _Bound] = {}
        self._verifiers: dict[tuple[int, int], _Bound] = {}
        self._verified = self._logits(1 + DRAFT_TOKENS)

    @property
    def reads_apart(self) -> bool:
        """True when long chunks are read by a session of their own, with other kernels."""
        return self._reader is not self._session

    def decode(self, tokens: list[int], lengths: list[int]) -> Float:
        """One step of slots 0..k-1: `tokens[i]` is appended to slot i, which holds `lengths[i]` tokens.

        Returns logits float32 [k, vocab_size], a view that the next call of the same k overwrites.
        """
        k = len(tokens)
        bound = self._decoders.get(k)
        if bound is None:
            ids, rows = np.zeros((k, 1), np.int64), np.arange(k, dtype=np.int64)
            bound = self._decoders[k] = self._bind(self._session, 0, ids, rows, self._logits(k))
        bound.input_ids[:, 0] = tokens
        bound.seqlens[:] = lengths
        bound.total[()] = max(lengths) + 1
        bound.session.run_with_iobinding(bound.binding)
        return bound.logits

    def prefill(
        self, slot: int, tokens: list[int], length: int, *, wide: bool | None = None, interrupt: Interrupt | None = None
    ) -> Float:
        """Append `tokens` (at most PREFILL_TOKENS) to `slot`, which holds `length` tokens.

        `wide` names the session, the one that reads long chunks or the one that decodes; None: as the chunk's length
        says. Returns logits float32 [vocab_size] of the last one, a view that the next prefill of the slot overwrites;
        raises RuntimeError when `interrupt` is set meanwhile.
        """
        count = len(tokens)
        bound = self._reading_binding(slot, 1, count, wide)
        bound.seqlens[0] = length + count - 1
        bound.total[()] = length + count
        ids, rows = np.asarray([tokens], np.int64), np.full(1, count - 1, np.int64)
        logits: Float = self._read(bound, ids, rows, interrupt)[0]
        return logits

    def prefill_together(
        self, slot: int, prompts: Sequence[Sequence[int]], interrupt: Interrupt | None = None
    ) -> Float:
        """Read whole prompts into the slots from `slot` on, in one step that pads them to the longest.

        Returns logits float32 [prompts, vocab_size] of their last tokens, a view that the next such step overwrites.
        """
        counts = np.array([len(prompt) for prompt in prompts])
        longest = int(counts.max())
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        bound = self._reading_binding(slot, len(prompts), ids.size, None)
        bound.seqlens[:] = counts - 1
        bound.total[()] = longest
        return self._read(bound, ids, np.arange(len(prompts)) * longest + counts - 1, interrupt)

    def verify(self, slot: int, tokens: list[int], length: int) -> Float:
        """Append `tokens`, at most 1 + DRAFT_TOKENS, to `slot`, which holds `length` tokens.

        To take tokens back, go on with a smaller length: what lies behind it is never read. Returns logits float32
        [tokens, vocab_size], a view that the next call overwrites. They differ from those of `decode` in their last
        bits, because other kernels make them.
        """
        count = len(tokens)
        bound = self._verifiers.get((slot, count))
        if bound is None:
            ids, rows = np.zeros((1, count), np.int64), np.arange(count, dtype=np.int64)
            bound = self._bind(self._session, slot, ids, rows, self._verified[:count])
            self._verifiers[slot, count] = bound
        bound.input_ids[0] = tokens
        bound.seqlens[0] = length + count - 1
        bound.total[()] = length + count
        bound.session.run_with_iobinding(bound.binding)
        return bound.logits

    def warm_up(self) -> None:
        """Run every kind of step once: the first request pays for no allocation, and a graph that loads but does not
        keep the contract shows here. Raises DeployError(load_failed).
        """
        token = self.config.bos_token_id or 0
        try:
            for wide in {False, self.reads_apart}:
                self.prefill(0, [token] * min(8, self.shape.capacity - 1), 0, wide=wide)
            self.verify(0, [token] * min(1 + DRAFT_TOKENS, self.shape.capacity), 0)
            for k in range(1, self.shape.slots + 1):
                self.decode([token] * k, [0] * k)
                self.slab.free(k - 1, 8)
            self.slab.trim()
        except Exception as error:  # as in _session
            self.close()
            raise DeployError(
                Code.LOAD_FAILED, f"the graph loads but does not run as its contract says: {str(error)[:500]}"
            ) from error

    def close(self) -> None:
        """Give session and slab back now, whoever still holds this object; it cannot run any more."""
        self._decoders.clear()
        self._prefillers.clear()
        self._verifiers.clear()
        self.slab.close()
        self._verified = np.zeros((0, 0), np.float32)
        self._session = self._reader = None

    def _reading_binding(self, slot: int, prompts: int, tokens: int, wide: bool | None) -> _Bound:
        wide = self.reads_apart and (tokens >= self._wide_tokens if wide is None else wide)
        bound = self._prefillers.get((slot, prompts, wide))
        if bound is None:
            session = self._reader if wide else self._session
            ids, rows = np.zeros((prompts, 1), np.int64), np.zeros(prompts, np.int64)
            bound = self._bind(session, slot, ids, rows, self._logits(prompts))
            self._prefillers[slot, prompts, wide] = bound
        return bound

    def _read(self, bound: _Bound, ids: Int, rows: Int, interrupt: Interrupt | None) -> Float:
        """Run a binding whose chunk, unlike that of a decode step, has another length every time."""
        bound.values[:2] = [_value(ids), _value(rows)]
        bound.binding.bind_ortvalue_input("input_ids", bound.values[0])
        bound.binding.bind_ortvalue_input("logit_rows", bound.values[1])
        bound.session.run_with_iobinding(bound.binding, interrupt.options if interrupt is not None else None)
        return bound.logits

    def _logits(self, rows: int) -> Float:
        return np.zeros((rows, self.config.vocab_size), np.float32)

    def _bind(self, session: Any, slot: int, ids: Int, logit_rows: Int, logits: Float) -> _Bound:
        """Bind the slots from `slot` on, one for each row of `ids`."""
        k = len(ids)
        bound = _Bound(session, session.io_binding(), ids, np.zeros(k, np.int32), np.zeros((), np.int32), logits)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": bound.input_ids, "logit_rows": logit_rows, "seqlens_k": bound.seqlens,
            "total_sequence_length": bound.total,
        }  # fmt: skip
        for name, array in inputs.items():
            bound.values.append(_value(array))
            bound.binding.bind_ortvalue_input(name, bound.values[-1])
        bound.values.append(_value(bound.logits))
        bound.binding.bind_ortvalue_output("logits", bound.values[-1])
        for part, memory in enumerate(self.slab.parts(slot, k)):
            name = f"{part // 2}.{('key', 'value')[part % 2]}"
            bound.values.append(_value(memory))
            bound.binding.bind_ortvalue_input(f"past_key_values.{name}", bound.values[-1])
            bound.binding.bind_ortvalue_output(f"present.{name}", bound.values[-1])
        return bound


def _value(array: NDArray[Any]) -> Any:
    """An OrtValue over the memory of a contiguous array, which it also keeps alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)
