"""Safetensors of any origin: what fits is read to the bit, what does not names the tensor and what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from forge.tensors import Tensors
from tests.unit.test_parity import FIXTURES
from wire.errors import ArtifactError, ConfigError

Header = dict[str, Any]


def write(folder: Path, header: Header | bytes, data: bytes, claimed: int | None = None) -> Path:
    """A model.safetensors; `claimed` stands where the header's length should."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(encoded) if claimed is None else claimed
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + encoded + data)
    return folder


def entry(dtype: str, shape: list[int], start: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_every_float_type_is_read_as_float32(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.15625], np.float32)
    bfloat16 = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    parts = {"F64": values.astype("<f8").tobytes(), "F32": values.tobytes(), "F16": values.astype("<f2").tobytes()}
    header, data = {}, b""
    for dtype, raw in (parts | {"BF16": bfloat16}).items():
        header[dtype] = entry(dtype, [3], len(data), len(data) + len(raw))
        data += raw
    tensors = Tensors(write(tmp_path, header, data))
    for dtype in header:
        np.testing.assert_array_equal(tensors.tensor(dtype, (3,)), values)


def test_files_under_an_index_are_one_checkpoint() -> None:
    tensors = Tensors(FIXTURES / "tiny-mistral")
    index = json.loads((FIXTURES / "tiny-mistral" / "model.safetensors.index.json").read_text())
    assert tensors.names == index["weight_map"].keys()
    assert len(set(index["weight_map"].values())) == 2


def test_float16_is_what_the_format_s_own_library_reads() -> None:
    tensors = Tensors(FIXTURES / "tiny-llama")
    for name, values in load_file(FIXTURES / "tiny-llama" / "model.safetensors").items():
        np.testing.assert_array_equal(tensors.tensor(name, values.shape), values.astype(np.float32))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"w": entry("F32", [2], 0, 16)}, "tensor w has 16 bytes"),
        ({"w": entry("F32", [2], 4, 12)}, "tensor w ends at byte"),
        ({"v": entry("F32", [2], 0, 8), "w": entry("F32", [1], 4, 8)}, "tensors v and w overlap"),
        ({"w": entry("F3", [2], 0, 8)}, "unknown type 'F3'"),
        ({"w": entry("F32", [-2], 0, 8)}, "tensor w has no proper shape"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "tensor w has no proper shape or offsets"),
        ({"w": 7}, "tensor w is of the unknown type None"),
        ([1], "no JSON object"),
        (b"{", "cannot be read"),
        (b'{"w": 1, "w": 2}', "w stands there twice"),
        (b"[" * 20_000, "cannot be read"),
    ],
)
def test_header_that_does_not_describe_the_file_is_refused(tmp_path: Path, header: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        Tensors(write(tmp_path, header, bytes(8)))
    assert "; " in refusal.value.message  # and what to do


@pytest.mark.parametrize("claimed", [0, 1 << 20, 1 << 62])
def test_length_of_the_header_is_checked_before_it_is_read(tmp_path: Path, claimed: int) -> None:
    with pytest.raises(ConfigError, match="header claims"):
        Tensors(write(tmp_path, {}, bytes(8), claimed))


@pytest.mark.parametrize(
    ("header", "shape", "said"),
    [
        ({"w": entry("I64", [1], 0, 8)}, (1,), "tensor w is I64; convert it"),
        ({"w": entry("F32", [2], 0, 8)}, (1, 2), "config.json implies"),
        ({"v": entry("F32", [2], 0, 8)}, (2,), "lacks tensor w"),
    ],
)
def test_tensor_that_is_not_the_one_that_is_needed_is_refused(
    tmp_path: Path, header: Header, shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ArtifactError, match=said):
        Tensors(write(tmp_path, header, bytes(8))).tensor("w", shape)


def test_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    data = np.array([np.nan, 1.0], np.float32).tobytes()
    with pytest.raises(ArtifactError, match="tensor w holds NaN"):
        Tensors(write(tmp_path, {"w": entry("F32", [2], 0, 8)}, data)).tensor("w", (2,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda named: named | {"other": "../../etc/passwd"}, "no file beside it"),
        (lambda named: named | {"other": next(iter(named.values()))}, "names tensor other"),
        (lambda named: {}, ""),
        (lambda named: 5, "weight_map"),
    ],
)
def test_index_names_only_files_beside_it_and_tensors_in_them(
    tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    folder = Path(shutil.copytree(FIXTURES / "tiny-mistral", tmp_path / "sharded"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    if not said:
        assert not Tensors(folder).names
        return
    with pytest.raises(ConfigError, match=said):
        Tensors(folder)
