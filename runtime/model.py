"""A loaded decoder: session, KV slab, and the two shapes in which it runs.

The slab holds one row per slot and layer, [slots, kv_heads, capacity, head_size] float32. The first k rows of an array
are contiguous, so a batch of k decoding requests is a slice without a copy; past and present are bound to the same
memory, so onnxruntime appends in place (GroupQueryAttention, "shared buffer"). Prefill runs with a batch of one,
because the kernel takes more than one new token with a past only there.
"""

import os
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import: the wheel phones home by default

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import AmperageError, Code, DeployError
from wire.manifest import VersionDocument
from wire.serving import ExecutionOptions

Float = NDArray[np.float32]

VERSION_FILE = "version.json"
MODEL_FILE = "model.onnx"
PREFILL_TOKENS = 128
"""Tokens of a prompt between two decode steps: bounds how long a running stream waits for a newcomer."""
SPIN_US = "1000"
"""With spinning on, how long an idle kernel thread burns its core before it sleeps."""


def read_version(directory: Path) -> VersionDocument:
    """The version document, with every file present in its size.

    Raises DeployError(load_failed); contents were hashed when the directory was committed.
    """
    try:
        with (directory / VERSION_FILE).open("rb") as source:
            version = parse_document(VersionDocument, source.read(DOCUMENT_LIMIT_BYTES + 1))
        sizes = {entry.path: (directory / entry.path).stat().st_size for entry in version.files}
    except (OSError, AmperageError) as error:
        raise DeployError(Code.LOAD_FAILED, f"{directory.name[:12]}… is not readable: {error}; deploy again") from error
    wrong = [entry.path for entry in version.files if sizes[entry.path] != entry.size_bytes]
    if wrong:
        raise DeployError(Code.LOAD_FAILED, f"{wrong[0]} of {directory.name[:12]}… has another size; deploy it again")
    return version


def make_session(directory: Path, options: ExecutionOptions) -> ort.InferenceSession:
    """An onnxruntime session with explicit threads. Raises DeployError(load_failed) with onnxruntime's reason."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = options.threads
    chosen.inter_op_num_threads = 1
    chosen.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    if options.spinning:
        chosen.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    for key, value in options.session_config.items():
        chosen.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(directory / MODEL_FILE), chosen, providers=[options.provider])
    except Exception as error:  # onnxruntime raises its own types, RuntimeError and ValueError alike
        raise DeployError(Code.LOAD_FAILED, f"onnxruntime refuses {directory.name[:12]}…: {error}") from error


class Decoder:
    """One model in memory; used by one thread at a time."""

    def __init__(self, directory: Path, options: ExecutionOptions, *, slots: int, capacity: int) -> None:
        """Load; `capacity` is cut to the model's context. Raises DeployError(load_failed)."""
        self.version = read_version(directory)
        self.options = options
        config = self.version.config
        self.slots, self.capacity, self.vocab_size = slots, min(capacity, config.context_tokens), config.vocab_size
        self._session: ort.InferenceSession | None = make_session(directory, options)
        shape = (slots, config.kv_heads, self.capacity, config.head_size)
        self._slab = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in range(config.layers)]
        self._batches: dict[int, _Binding] = {}

    def decode(self, tokens: list[int], lengths: list[int]) -> Float:
        """One token for each of the first k slots; `lengths` are the tokens that they hold already.

        Returns logits float32 [k, vocabulary], valid until the next call.
        """
        k = len(tokens)
        if k not in self._batches:
            self._batches[k] = _Binding(self._live(), self._rows(0, k), k, 1, self.vocab_size)
        return self._batches[k].run(np.asarray(tokens, np.int64)[:, None], np.asarray(lengths, np.int32))

    def prefill(self, slot: int, tokens: list[int], past: int) -> Float:
        """Append `tokens` (at most PREFILL_TOKENS) to `slot`, which holds `past`; logits of the last, float32 [V]."""
        binding = _Binding(self._live(), self._rows(slot, slot + 1), 1, len(tokens), self.vocab_size)
        last = np.asarray([past + len(tokens) - 1], np.int32)
        logits = binding.run(np.asarray([tokens], np.int64), last)
        return np.asarray(logits[0], np.float32)

    def prefill_whole(self, tokens: list[int]) -> Float:
        """A whole prompt into slot 0, chunk by chunk; logits of its last token, float32 [V]."""
        logits = np.zeros(0, np.float32)
        for past in range(0, len(tokens), PREFILL_TOKENS):
            logits = self.prefill(0, tokens[past : past + PREFILL_TOKENS], past)
        return logits

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` over `target`: slots that decode stay dense."""
        for key, value in self._slab:
            key[target, :, :length] = key[source, :, :length]
            value[target, :, :length] = value[source, :, :length]

    def close(self) -> None:
        """Drop session and slab; the object is of no use afterwards."""
        self._batches.clear()
        self._session = None
        self._slab.clear()

    def _live(self) -> ort.InferenceSession:
        if self._session is None:
            raise RuntimeError("decoder is closed")
        return self._session

    def _rows(self, start: int, end: int) -> dict[str, NDArray[np.float32]]:
        """KV inputs by name, views of the slab's rows [start, end)."""
        rows: dict[str, NDArray[np.float32]] = {}
        for i, (key, value) in enumerate(self._slab):
            rows[f"{i}.key"], rows[f"{i}.value"] = key[start:end], value[start:end]
        return rows


class _Binding:
    """Inputs and outputs of one shape, bound once: per call only three small arrays change."""

    def __init__(
        self, session: ort.InferenceSession, rows: dict[str, Float], batch: int, length: int, vocab_size: int
    ) -> None:
        self._session = session
        self._ids = np.zeros((batch, length), np.int64)
        self._last = np.zeros(batch, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits = np.zeros((batch, vocab_size), np.float32)
        chosen = np.arange(length - 1, batch * length, length, dtype=np.int64)
        self._binding = session.io_binding()
        self._kept: list[Any] = [rows]
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": self._ids, "seqlens_k": self._last, "total_sequence_length": self._total, "logit_rows": chosen,
        }  # fmt: skip
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._value(array))
        for name, array in rows.items():
            value = self._value(array)
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self._binding.bind_ortvalue_output(f"present.{name}", value)
        self._binding.bind_ortvalue_output("logits", self._value(self._logits))

    def run(self, ids: NDArray[np.int64], last: NDArray[np.int32]) -> Float:
        """`last` is the index of each row's last token; logits float32 [batch, vocabulary]."""
        self._ids[:] = ids
        self._last[:] = last
        self._total[()] = int(last.max()) + 1
        self._session.run_with_iobinding(self._binding)
        return self._logits

    def _value(self, array: NDArray[Any]) -> Any:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._kept.append((array, value))  # the value points into the array
        return value
