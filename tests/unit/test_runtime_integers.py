"""Prompts read with 8-bit matrices: the derived graph and weights, and a model that runs them."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime_fixtures import base_version

from runtime.cpu import Cpu
from runtime.integer_graph import integer_graph
from runtime.integer_matmul import DOMAIN, NAME, OPSETS, function
from runtime.integer_weights import SLAB_WEIGHTS, by_longer_blocks, by_output
from runtime.model import PREFILL_TOKENS, Model
from runtime.slab import Shape
from runtime.ways import INTEGER_READING, reading_sessions
from wire.errors import ArtifactError, Code, DeployError
from wire.serving import ExecutionOptions, IntegerReading

TOLERANCE = 0.05
"""RMS difference of logits to those of the int4 kernels as a share of their deviation; measured 0.009 to 0.012."""
VERSION = base_version()
LAYERS = VERSION.document.config.layers
GRAPH = (VERSION.directory / "model.onnx").read_bytes()
WEIGHTS = np.memmap(VERSION.directory / "weights.bin", np.uint8, "r")


def packed(bits: int, outputs: int, columns: int, block: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels and scales as MatMulNBits has them, and the weights that they stand for, float64 [outputs, columns]."""
    chance = np.random.default_rng(bits)
    fields = chance.integers(0, 1 << bits, (outputs, columns), dtype=np.uint8)
    scales = chance.uniform(0.001, 0.01, (outputs, columns // block)).astype(np.float32)
    weights = (fields.astype(np.float64) - (1 << bits - 1)) * np.repeat(scales, block, axis=1)
    per_byte = fields.reshape(outputs, columns // block, -1, 8 // bits).astype(np.uint16)
    levels = sum(per_byte[..., i] << bits * i for i in range(8 // bits)).astype(np.uint8)
    return levels, scales, weights


@pytest.fixture(params=list(IntegerReading))
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    options = ExecutionOptions(threads=1, reading_config={}, integer_reading=request.param)
    loaded = Model(VERSION.directory, VERSION.document.config, Shape(2, 512), options)
    yield loaded
    loaded.close()


def test_long_chunks_are_read_with_integers_and_nearly_alike(model: Model) -> None:
    tokens = [int(token) for token in np.random.default_rng(1).integers(3, 4000, PREFILL_TOKENS)]
    narrow = model.prefill(0, tokens, 0, wide=False).copy()
    wide = model.prefill(0, tokens, 0, wide=True).copy()
    error = np.sqrt(np.mean(np.square(wide - narrow))) / narrow.std()
    assert 0 < error < TOLERANCE
    assert np.array_equal(model.prefill(0, tokens, 0), wide)


@pytest.mark.parametrize(("what", "rows"), [(IntegerReading.ALL, 3 * LAYERS), (IntegerReading.MLP, LAYERS)])
def test_head_and_what_else_is_to_stay_are_left_alone(what: IntegerReading, rows: int) -> None:
    before, after = onnx.load_from_string(GRAPH), onnx.load_from_string(integer_graph(GRAPH, WEIGHTS, what).model)
    kinds = Counter(node.op_type for node in after.graph.node)
    assert kinds[NAME] == rows
    changed = [(new, old) for new, old in zip(after.graph.node, before.graph.node, strict=True) if new != old]
    down = [new for new, _ in changed if new.op_type != NAME]
    assert [node.output[0] for node in down] == [f"model.layers.{i}.mlp.down" for i in range(LAYERS)]
    assert len(changed) == rows + LAYERS
    for new, old in changed:
        assert (new.name, new.input[0], list(new.output)) == (old.name, old.input[0], list(old.output))
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_to_the_nearest_step_of_their_output(bits: int) -> None:
    levels, scales, weights = packed(bits, 3 * SLAB_WEIGHTS // 1024, 768)
    matrix, steps = by_output(levels, scales, bits)
    assert matrix.shape == weights.T.shape
    assert np.all(np.abs(matrix.T * steps[:, None] - weights) <= 0.501 * steps[:, None])
    assert np.all(np.abs(matrix).max(axis=0) == 127)


@pytest.mark.parametrize(("columns", "block"), [(768, 256), (96, 32)])
def test_weights_are_rounded_to_the_nearest_step_of_their_longer_block(columns: int, block: int) -> None:
    levels, scales, weights = packed(4, 40, columns)
    found, steps = by_longer_blocks(levels, scales, 4)
    assert found.shape == (40, columns // block, block)
    rounded = (found.astype(np.float64) - 128) * steps[:, :, None]
    assert np.all(np.abs(rounded - weights.reshape(found.shape)) <= 0.501 * steps[:, :, None])


def test_output_whose_weights_are_all_zero_gives_zero() -> None:
    levels, scales = np.full((2, 1, 16), 0x88, np.uint8), np.zeros((2, 1), np.float32)
    matrix, steps = by_output(levels, scales, 4)
    assert not matrix.any()
    assert np.isfinite(steps).all()


def product(source: np.ndarray, matrix: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What the function makes of them in onnxruntime."""
    kinds = (("source", source), ("product", np.zeros((1, 1, 1), np.float32)))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "S", None])] for name, _ in kinds)
    call = helper.make_node(NAME, ["source", "matrix", "scales"], ["product"], domain=DOMAIN, K=len(matrix))
    constants = [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(scales, "scales")]
    model = helper.make_model(
        helper.make_graph([call], "call", inputs, outputs, constants), ir_version=10,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in OPSETS.items()],
        functions=[FunctionProto.FromString(function())],
    )  # fmt: skip
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"source": source})[0])


def test_row_is_multiplied_alike_whatever_stands_beside_it() -> None:
    chance = np.random.default_rng(3)
    matrix = chance.integers(-127, 128, (64, 48)).astype(np.int8)
    scales = chance.uniform(0.5, 1, 48).astype(np.float32)
    source = (chance.standard_normal((2, 5, 64)) * 10.0 ** np.arange(-3, 7).reshape(2, 5, 1)).astype(np.float32)
    source[1, 2] = 0
    found = product(source, matrix, scales)
    exact = source.astype(np.float64) @ (matrix * scales.astype(np.float64))
    steps = np.abs(source).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(found - exact) <= 0.501 * steps * (np.abs(matrix) * scales).sum(axis=0) + 1e-6)
    for b in range(2):
        for s in range(5):
            assert np.array_equal(product(source[b : b + 1, s : s + 1], matrix, scales)[0, 0], found[b, s])


def test_weights_outside_of_their_file_are_refused() -> None:
    with pytest.raises(ArtifactError) as refusal:
        integer_graph(GRAPH, WEIGHTS[: len(WEIGHTS) // 2], IntegerReading.ALL)
    assert refusal.value.code is Code.CORRUPT


def test_graph_without_a_matrix_to_rewrite_is_no_way_to_read() -> None:
    model = ModelProto.FromString(GRAPH)
    del model.graph.initializer[:]
    with pytest.raises(DeployError) as refusal:
        integer_graph(model.SerializeToString(), WEIGHTS, IntegerReading.ALL)
    assert refusal.value.code is Code.LOAD_FAILED


@pytest.mark.parametrize(
    ("cpu", "tried"),
    [
        (Cpu("x86_64", "zen-4", ("avx2", "avx512_vnni")), True), (Cpu("x86_64", "haswell", ("avx2",)), False),
        (Cpu("aarch64", "neoverse-n1", ()), True),
    ],
)  # fmt: skip
def test_integers_are_tried_only_where_their_products_are_added_whole(cpu: Cpu, tried: bool) -> None:
    assert (INTEGER_READING in reading_sessions(cpu)) is tried
