"""Pruned decoders beside the dense one: bytes on the wire and tokens per second, one stream.

A third to a half of the heads and a quarter of the MLP columns leave in one, half of the weights become zero in the
other. All run as the dense one's probe says, so that shapes alone make the difference. The runtime has no sparse
kernels: of zeros no speed is expected, and their row says how much noise there is.
"""

from collections.abc import Sequence

from benchmarks.decode import decoding
from benchmarks.decoders import MODELS, PRUNED, Child, probed_options
from benchmarks.harness import Row, Target, at_least, at_most, exact, measure, row
from benchmarks.releases import release_summary
from runtime.cpu import allowed_threads

ROUNDS = 15
FASTER = 1.1
"""Shrunken models have 0.74 to 0.76 of the weights outside of their embedding."""


def run() -> Sequence[Row]:
    """Rows for both models."""
    return [entry for model in MODELS for entry in (*_speed(model), *_wire(model))]


def _speed(model: str) -> list[Row]:
    names = [model, *(name for name in PRUNED if name.startswith(model))]
    threads = allowed_threads(0)
    options = probed_options(MODELS[model](), threads)
    children = {name: Child("ours", name, threads, options) for name in names}
    try:
        measured = measure({name: decoding(child) for name, child in children.items()}, ROUNDS)
    finally:
        for child in children.values():
            child.close()
    rows = []
    for name in names[1:]:
        own = measured[name]
        assert own is not None
        target: Target | None = at_least(FASTER, ratio=True) if name.endswith("shrunken") else None
        rows.append(row(f"{name}: decode, {threads} threads", "tok/s", own, target, (model, measured[model])))
    return rows


def _wire(model: str) -> list[Row]:
    dense = exact(release_summary(MODELS[model]().directory).wire_bytes)
    pruned = [name for name in PRUNED if name.startswith(model)]
    return [
        row(
            f"{name}: full artifact", "B", exact(release_summary(PRUNED[name]().directory).wire_bytes),
            at_most(0.9, ratio=True), (model, dense),
        )
        for name in pruned
    ]  # fmt: skip
