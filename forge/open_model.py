"""A decoder's checkpoint in float32 whose inside can be read and changed while it runs.

Every matrix may be replaced for one run, and what each is multiplied with may be read. Matrices have the names and the
shapes [rows, columns] that the forge quantises; an embedding that is the head, too, is replaced as both.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from forge.checkpoint import Architecture, Checkpoint
from forge.decoder_weights import place_weights
from forge.graph import build_graph
from forge.placer import Placer
from forge.quantise import Float, Precision
from forge.reference import MODEL_FILE, Judge
from forge.weights import WEIGHTS_FILE, Placed, writing_weights
from forge.windows import fit_windows

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class _Use:
    """One initializer of the graph that holds a matrix."""

    initializer: str
    transposed: bool
    source: str | None
    """Value that it is multiplied with; None where its rows are looked up."""


class OpenModel:
    """See the module. Windows are lists of tokens, which `fit` has made."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        """`folder` is an empty one that must outlive this."""
        self.architecture = a = checkpoint.architecture
        with writing_weights(folder) as writer:
            graph = build_graph(a, place_weights(checkpoint, Placer(writer, {}, Precision.FLOAT32)))
        self._placed = {p.name.removesuffix(WEIGHT): p for p in writer.placed if len(p.shape) == 2}
        self._uses = _uses(graph, writer.placed, a)
        self._folder = folder
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
        for use in (use for uses in self._uses.values() for use in uses):
            graph.graph.input.append(
                helper.make_tensor_value_info(use.initializer, TensorProto.FLOAT, shapes[use.initializer])
            )
        sources = {use.source for uses in self._uses.values() for use in uses if use.source is not None}
        graph.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(sources))
        (folder / MODEL_FILE).write_bytes(graph.SerializeToString(deterministic=True))
        self._judge = Judge(folder / MODEL_FILE, a.layers, a.kv_heads, a.head_size)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all matrices that a build would quantise, in the order of weights.bin."""
        return tuple(self._uses)

    @property
    def multiplied(self) -> tuple[str, ...]:
        """Of those that something is multiplied with: all but an embedding that is no head."""
        return tuple(name for name, uses in self._uses.items() if any(use.source is not None for use in uses))

    def matrix(self, name: str) -> Float:
        """float32 [rows, columns] as trained."""
        placed = self._placed[name]
        data = np.fromfile(self._folder / WEIGHTS_FILE, np.float32, placed.size_bytes // 4, offset=placed.offset)
        stored = data.reshape(placed.shape)
        return np.ascontiguousarray(stored.T) if self._uses[name][0].transposed else stored

    def logits(self, window: Sequence[int], replaced: Mapping[str, Float], rows: Sequence[int] | None = None) -> Float:
        """Logits float32 [len(rows), vocabulary] with the matrices of `replaced` in the place of the trained ones."""
        feeds = {
            use.initializer: np.ascontiguousarray(values.T) if use.transposed else values
            for name, values in replaced.items()
            for use in self._uses[name]
        }
        return self._judge.logits(window, rows, feeds)

    def inputs(self, window: Sequence[int], names: Sequence[str]) -> list[Float]:
        """What each matrix of `names` is multiplied with as the model reads `window`, float32 [tokens, columns]."""
        sources = [self._source(name) for name in names]
        unique = sorted(set(sources))
        found = dict(zip(unique, self._judge.values(unique, window), strict=True))
        return [found[source].reshape(-1, found[source].shape[-1]) for source in sources]

    def fit(self, windows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The windows cut to the context. Raises ConfigError as fit_windows."""
        return fit_windows(windows, self.architecture.vocab_size, self.architecture.context_tokens)

    def _source(self, name: str) -> str:
        return next(use.source for use in self._uses[name] if use.source is not None)


@contextmanager
def open_model(source: Path) -> Iterator[OpenModel]:
    """The checkpoint in the folder `source`; its float32 weights lie in a temporary folder meanwhile."""
    with tempfile.TemporaryDirectory(prefix="amperage-forge-") as folder:
        yield OpenModel(Checkpoint(source), Path(folder))


def _uses(graph: ModelProto, placed: Sequence[Placed], a: Architecture) -> dict[str, list[_Use]]:
    """Where the graph uses each matrix, found by the matrices' places in weights.bin."""
    names = {p.offset: p.name.removesuffix(WEIGHT) for p in placed if len(p.shape) == 2}
    sources = {node.input[1]: node.input[0] for node in graph.graph.node if node.op_type == "MatMul"}
    uses: dict[str, list[_Use]] = {}
    for tensor in graph.graph.initializer:
        offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), None)
        if offset not in names:
            continue
        name = EMBEDDING if a.tied_head and names[offset] == HEAD else names[offset]
        source = sources.get(tensor.name)
        uses.setdefault(name, []).append(_Use(tensor.name, source is not None, source))
    return uses
