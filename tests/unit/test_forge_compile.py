"""Compiling ONNX models: every pass gives what onnxruntime gives without it, and what is left alone says why."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import GraphProto, ModelProto

sys.path.insert(0, str(Path(__file__).parents[1]))

from onnx_fixtures import (
    BOOL,
    INT64,
    Array,
    graph,
    model,
    node,
    random,
    recurrence,
    refinement,
    run_plainly,
    save,
    value,
)

from forge.compiler.compilation import Choices, Report, compile_model, run_passes
from forge.compiler.trial import Sampling
from forge.compiler.work import Limits, Work
from forge.onnx_file import read_onnx
from wire.errors import ArtifactError, ConfigError


def compiled(whole: ModelProto, limits: Limits | None = None) -> Work:
    copy = ModelProto()
    copy.CopyFrom(whole)
    work = Work(copy, limits or Limits())
    run_passes(work)
    return work


def kinds(work: Work) -> list[str]:
    return [entry.op_type for entry in work.graph.node]


def check_same(whole: ModelProto, work: Work, feeds: dict[str, Array], tolerance: float = 1e-6) -> None:
    expected, found = run_plainly(whole, feeds), run_plainly(work.model, feeds)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_loop_of_constant_turns_becomes_its_turns() -> None:
    whole = model(refinement())
    work = compiled(whole)
    assert "Loop" not in kinds(work)
    assert kinds(work).count("Tanh") == 8
    assert "Cast" not in kinds(work), "what depends on the turn alone is folded"
    check_same(whole, work, {"x": random(1, 8)})


@pytest.mark.parametrize("directions", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_scan_of_known_length_becomes_its_turns(directions: int, axis: int) -> None:
    length = [5, 1, 4] if axis == 0 else [1, 5, 4]
    whole = model(
        recurrence(
            length, scan_input_axes=[axis], scan_input_directions=[directions], scan_output_axes=[axis],
            scan_output_directions=[1 - directions],
        )
    )  # fmt: skip
    work = compiled(whole)
    assert "Scan" not in kinds(work)
    assert kinds(work).count("MatMul") == 5 + 1, "the inputs' products are one"
    check_same(whole, work, {"h": random(1, 8), "x": random(*length)})


def test_loop_in_a_loop_whose_turns_depend_on_the_outer_one_is_unrolled() -> None:
    inner = graph(
        [node("Add", "v step", "w"), node("Identity", "c", "c_out")],
        [value("i", [], INT64), value("c", [], BOOL), value("v")], [value("c_out", [], BOOL), value("w")],
    )  # fmt: skip
    outer = graph(
        [
            node("Add", "j first", "turns"), node("Loop", "turns - u", "summed", body=inner),
            node("Identity", "d", "d_out"),
        ],
        [value("j", [], INT64), value("d", [], BOOL), value("u")], [value("d_out", [], BOOL), value("summed")],
        first=np.int64(1),
    )  # fmt: skip
    loop = node("Loop", "three - x", "y", body=outer)
    whole = model(graph([loop], [value("x", [2])], [value("y")], three=np.int64(3), step=random(2)))
    work = compiled(whole)
    assert kinds(work) == ["Add"] * (1 + 2 + 3)
    check_same(whole, work, {"x": random(2)})


def test_branch_of_a_constant_condition_is_taken() -> None:
    branches = {f"{name}_branch": graph([node(kind, "x", name)], [], [value(name)])
                for name, kind in (("then", "Exp"), ("else", "Neg"))}  # fmt: skip
    branch = node("If", "no", "y", **branches)
    whole = model(graph([branch], [value("x", [2])], [value("y")], no=np.asarray(False)))
    work = compiled(whole)
    assert kinds(work) == ["Neg"]
    check_same(whole, work, {"x": random(2)})


def while_loop() -> GraphProto:
    """A Loop that goes on while its value is small."""
    body = graph(
        [node("Add", "v v", "w"), node("ReduceMax", "w", "most", keepdims=0), node("Less", "most bound", "more")],
        [value("i", [], INT64), value("c", [], BOOL), value("v")], [value("more", [], BOOL), value("w")],
        bound=np.float32(100),
    )  # fmt: skip
    return graph([node("Loop", "many - x", "y", body=body)], [value("x", [2])], [value("y")], many=np.int64(50))


def loop_of_computed_turns() -> GraphProto:
    whole = refinement()
    whole.initializer.remove(next(tensor for tensor in whole.initializer if tensor.name == "turns"))
    whole.input.append(value("turns", [], INT64))
    return whole


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        (while_loop(), "condition is computed"),
        (loop_of_computed_turns(), "number of turns is computed"),
        (refinement(0), "makes no turn"),
        (refinement(10**15), "over what is left of the limit"),
        (recurrence(["T", 1, 4]), "length of what it scans"),
    ],
)
def test_loop_that_cannot_be_unrolled_is_left_alone_with_its_reason(whole: GraphProto, said: str) -> None:
    work = compiled(model(whole))
    assert kinds(work)[0] in ("Loop", "Scan")
    (reason,) = work.left.values()
    assert said in reason


def test_loop_over_the_limit_of_nodes_is_left_alone() -> None:
    assert kinds(compiled(model(refinement()), Limits(nodes=60))) == ["Loop"]
    assert "Loop" not in kinds(compiled(model(refinement()), Limits(nodes=100)))


def test_scan_of_operator_set_8_is_left_alone() -> None:
    work = compiled(model(recurrence(), opset=8))
    assert "operator set 8" in next(iter(work.left.values()))


def test_constants_are_folded_unless_the_file_would_grow_beyond_the_limit() -> None:
    nodes = [
        node("Transpose", "matrix", "over", perm=[1, 0]), node("MatMul", "x over", "product"),
        node("ConstantOfShape", "sizes", "ones"), node("Add", "product ones", "y"),
        node("Concat", "half half", "sizes", axis=0),
    ]  # fmt: skip
    constants = {"matrix": random(300, 4), "half": np.asarray([300])}
    whole = graph([nodes[0], nodes[1], nodes[4], nodes[2], nodes[3]], [value("x", [300, 4])], [value("y")], **constants)
    work = compiled(model(whole), Limits(grown_bytes=100_000))
    assert sorted(kinds(work)) == ["Add", "ConstantOfShape", "MatMul"], "a transposed matrix costs nothing"
    assert "would add 359984" in work.left["ones.node"]
    assert sorted(kinds(compiled(model(whole)))) == ["Add", "MatMul"]
    check_same(model(whole), work, {"x": random(300, 4)})


def test_constant_that_nobody_could_hold_is_not_computed() -> None:
    nodes = [node("ConstantOfShape", "sizes", "ones"), node("Gather", "ones x", "y")]
    whole = graph(nodes, [value("x", [1], INT64)], [value("y")], sizes=np.asarray([1 << 27]))
    work = compiled(model(whole))
    assert kinds(work) == ["ConstantOfShape", "Gather"]
    assert "would compute" in work.left["ones.node"]


def test_chance_and_defaults_of_inputs_are_no_constants() -> None:
    nodes = [node("RandomNormalLike", "shape", "noise"), node("Add", "noise given", "sum"), node("Add", "sum x", "y")]
    whole = graph(nodes, [value("x", [2]), value("given", [2])], [value("y")], given=random(2), shape=random(2))
    assert kinds(compiled(model(whole))) == ["RandomNormalLike", "Add", "Add"]


def skip_norm(kind: str, outputs: str = "normed - - sum", weights: str = "gamma") -> ModelProto:
    nodes = [
        node(kind, f"a b {weights}", outputs, domain="com.microsoft", epsilon=1e-5),
        node("Add", f"normed {outputs.split()[-1]}", "y"),
    ]  # fmt: skip
    inputs = [value("a", ["B", "S", 8]), value("b", ["B", "S", 8])]
    stored = {name: random(8, seed=seed) for seed, name in enumerate(("gamma", "beta", "bias"))}
    return model(graph(nodes, inputs, [value("y")], **{name: stored[name] for name in weights.split() if name != "-"}))


@pytest.mark.parametrize(
    ("whole", "parted"),
    [
        (skip_norm("SkipSimplifiedLayerNormalization"), ["Add", "SimplifiedLayerNormalization", "Add"]),
        (skip_norm("SkipSimplifiedLayerNormalization", weights="gamma bias"),
         ["Add", "Add", "SimplifiedLayerNormalization", "Add"]),
        (skip_norm("SkipSimplifiedLayerNormalization", "normed"), ["Add", "SimplifiedLayerNormalization", "Add"]),
        (skip_norm("SkipLayerNormalization", weights="gamma beta"), ["Add", "LayerNormalization", "Add"]),
        (skip_norm("SkipLayerNormalization", weights="gamma - bias"), ["Add", "Add", "LayerNormalization", "Add"]),
        (skip_norm("SkipLayerNormalization", weights="gamma beta bias"), ["Add", "Add", "LayerNormalization", "Add"]),
    ],
)  # fmt: skip
def test_norm_that_holds_a_sum_becomes_sum_and_norm(whole: ModelProto, parted: list[str]) -> None:
    work = compiled(whole)
    assert kinds(work) == parted
    check_same(whole, work, {"a": random(2, 3, 8), "b": random(2, 3, 8, seed=9)})


def test_norm_whose_statistics_are_read_is_left_alone() -> None:
    whole = skip_norm("SkipLayerNormalization", "normed mean")
    assert kinds(compiled(whole))[0] == "SkipLayerNormalization"


@pytest.mark.parametrize("opset", [12, 18])
def test_products_of_one_input_become_one_with_their_biases(opset: int) -> None:
    nodes, constants = [], {}
    for name, columns in (("q", 8), ("k", 4), ("v", 4)):
        nodes += [node("MatMul", f"x w{name}", f"m{name}"), node("Add", f"m{name} b{name}", name)]
        constants |= {f"w{name}": random(8, columns), f"b{name}": random(columns)}
    nodes.append(node("Concat", "q k v", "y", axis=-1))
    whole = model(graph(nodes, [value("x", ["B", 8])], [value("y")], **constants), opset)
    work = compiled(whole)
    assert kinds(work) == ["MatMul", "Add", "Split", "Concat"]
    check_same(whole, work, {"x": random(3, 8)})


def test_matrix_that_something_else_reads_is_not_merged() -> None:
    nodes = [node("MatMul", "x a", "p"), node("MatMul", "x b", "q"), node("Add", "p q", "s"), node("Add", "s b", "y")]
    whole = model(graph(nodes, [value("x", [8, 8])], [value("y")], a=random(8, 8), b=random(8, 8, seed=1)))
    assert kinds(compiled(whole)).count("MatMul") == 2


def quantised(name: str, rows: int, seed: int) -> dict[str, Array]:
    packed = np.random.default_rng(seed).integers(0, 256, (rows, 1, 16)).astype(np.uint8)
    return {f"{name}.packed": packed, f"{name}.scales": np.abs(random(rows, 1, seed=seed))}


def test_int4_products_of_one_input_become_one() -> None:
    def product(name: str, rows: int) -> Any:
        return node(
            "MatMulNBits", f"x {name}.packed {name}.scales", name, domain="com.microsoft", K=32, N=rows, bits=4,
            block_size=32,
        )  # fmt: skip

    nodes = [product("gate", 8), product("up", 24), node("Concat", "gate up", "y", axis=-1)]
    stored = quantised("gate", 8, 1) | quantised("up", 24, 2)
    whole = model(graph(nodes, [value("x", ["B", 32])], [value("y")], **stored))
    work = compiled(whole)
    assert kinds(work) == ["MatMulNBits", "Split", "Concat"]
    check_same(whole, work, {"x": random(3, 32)}, 1e-5)


def test_same_work_is_done_once_and_copies_leave() -> None:
    nodes = [
        node("Exp", "x", "a"), node("Exp", "x", "b"), node("Identity", "b", "c"), node("Add", "a c", "d"),
        node("Identity", "d", "y"), node("Neg", "x", "nobody"),
    ]  # fmt: skip
    whole = model(graph(nodes, [value("x", [2])], [value("y")]))
    work = compiled(whole)
    assert kinds(work) == ["Exp", "Add"]
    check_same(whole, work, {"x": random(2)})


def compile_file(whole: ModelProto, home: Path, **choices: Any) -> Report:
    return compile_model(save(whole, home / "in.onnx"), home / "out.onnx", Choices(rounds=5, **choices))


def test_report_tells_nodes_difference_and_speed(tmp_path: Path) -> None:
    found = compile_file(model(refinement()), tmp_path)
    assert (found.nodes_before["Loop"], found.nodes_after.get("Loop", 0)) == (1, 0)
    assert found.done["Loop unrolled"] == 1
    assert 0 <= found.difference < 1e-5
    assert min(found.before_s, found.after_s, found.gain) > 0
    assert read_onnx(tmp_path / "out.onnx").graph.node


def test_shape_that_is_fixed_unrolls_a_scan_over_it(tmp_path: Path) -> None:
    fixed = {"x": (6, 1, 4)}
    found = compile_file(model(recurrence(["T", 1, 4])), tmp_path, fixed=fixed, sampling=Sampling(fixed))
    assert "Scan" not in found.nodes_after


def test_model_that_answers_otherwise_is_not_written(tmp_path: Path) -> None:
    feeds = {name: random(64, 512, 8, seed=seed) for seed, name in enumerate(("a", "b"))}
    with pytest.raises(ArtifactError, match=r"differ by .* nothing was written"):  # the two kernels round differently
        compile_file(skip_norm("SkipLayerNormalization"), tmp_path, tolerance=0.0, sampling=Sampling(given=feeds))
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_same_model_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    source = save(model(recurrence()), tmp_path / "in.onnx")
    outputs = []
    for name in ("a", "b"):
        out = tmp_path / name / "out.onnx"
        main = [sys.executable, "-c", "from cli.main import main; main()"]
        arguments = ["forge", "compile", str(source), str(out), "--rounds", "5", "--json"]
        told = json.loads(subprocess.run([*main, *arguments], stdout=subprocess.PIPE, check=True).stdout)
        assert told["nodes_after"]["Tanh"] == 5
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]


def test_inputs_that_do_not_fit_are_refused_with_what_to_give(tmp_path: Path) -> None:
    whole = model(graph([node("Neg", "x", "y")], [value("x", [1, 8])], [value("y")]))
    with pytest.raises(ConfigError, match="give --shape x="):
        compile_file(whole, tmp_path, sampling=Sampling({"x": (2, 8)}))
    with pytest.raises(ConfigError, match="has no input 'z'"):
        compile_file(whole, tmp_path, sampling=Sampling({"z": (2, 8)}))


def test_model_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not end within"):
        compile_file(model(refinement(10**15)), tmp_path, run_limit_s=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


LEFT_TO_ONNXRUNTIME = {
    "Gelu": (
        [node("Div", "x root", "a"), node("Erf", "a", "b"), node("Add", "b one", "c"), node("Mul", "x c", "d"),
         node("Mul", "d half", "y")], {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)},
    ),
    "SimplifiedLayerNormalization": (
        [node("Pow", "x two", "a"), node("ReduceMean", "a last", "b"), node("Add", "b epsilon", "c"),
         node("Sqrt", "c", "d"), node("Div", "x d", "e"), node("Mul", "e weight", "y")],
        {"two": np.float32(2), "last": np.asarray([-1]), "epsilon": np.float32(1e-5), "weight": random(8)},
    ),
    "Gemm": ([node("MatMul", "x w", "a"), node("Add", "a b", "y")], {"w": random(8, 8), "b": random(8)}),
    "Transpose": ([node("Transpose", "x", "a", perm=[1, 0]), node("Transpose", "a", "b", perm=[1, 0]),
                   node("Transpose", "b", "y", perm=[1, 0])], {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_TO_ONNXRUNTIME)
def test_what_is_left_to_onnxruntime_is_one_node_when_it_is_loaded(kind: str, tmp_path: Path) -> None:
    nodes, constants = LEFT_TO_ONNXRUNTIME[kind]
    work = compiled(model(graph(nodes, [value("x", [4, 8])], [value("y")], **constants)))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(work.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [entry.op_type for entry in read_onnx(tmp_path / "loaded.onnx").graph.node] == [kind]
