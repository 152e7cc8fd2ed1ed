"""Tensors of the Open Inference Protocol: what is read, and what is refused before anything is allocated for it."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.tensors import read_tensors
from wire.errors import Code, InferenceError

IDS = {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "data": [1, 2, 3, 4, 5, 6]}


def body_of(*inputs: dict[str, Any], **rest: Any) -> bytes:
    return json.dumps({"inputs": inputs, **rest}).encode()


def test_flat_and_nested_data_are_the_same_tensor() -> None:
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]):
        request, tensors = read_tensors(body_of(IDS | {"data": data}, id="seven"), None)
        assert tensors["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert request.id == "seven"


@pytest.mark.parametrize(("datatype", "width"), [("INT32", "<i4"), ("INT64", "<i8")])
def test_binary_data_follow_the_json_in_the_order_of_the_inputs(datatype: str, width: str) -> None:
    blobs = [np.arange(6, dtype=width).tobytes(), np.ones(6, width).tobytes()]
    inputs = [
        {"name": name, "shape": [2, 3], "datatype": datatype, "parameters": {"binary_data_size": len(blob)}}
        for name, blob in zip(("input_ids", "attention_mask"), blobs, strict=True)
    ]
    header = body_of(*inputs)
    _, tensors = read_tensors(header + b"".join(blobs), str(len(header)))
    assert tensors["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert tensors["input_ids"].dtype == np.dtype(width)


def test_binary_and_json_inputs_mix() -> None:
    blob = np.ones(6, "<i8").tobytes()
    mask = {"name": "attention_mask", "shape": [2, 3], "datatype": "INT64", "parameters": {"binary_data_size": 48}}
    header = body_of(mask, IDS)
    _, tensors = read_tensors(header + blob, str(len(header)))
    assert tensors["input_ids"].tolist()[1] == [4, 5, 6]


@pytest.mark.parametrize(
    ("datatype", "data", "dtype"),
    [
        ("BOOL", [[True, False]], "?"), ("UINT8", [[0, 255]], "u1"), ("INT16", [[-5, 5]], "<i2"),
        ("FP16", [[0.5, 2]], "<f2"), ("FP32", [[0.5, 2]], "<f4"), ("FP64", [[0.1, 2]], "<f8"),
    ],
)  # fmt: skip
def test_every_type_is_read_from_json_and_from_binary_data(datatype: str, data: list[Any], dtype: str) -> None:
    told = {"name": "x", "shape": [1, 2], "datatype": datatype}
    _, from_json = read_tensors(body_of(told | {"data": data}), None)
    blob = np.asarray(data, dtype).tobytes()
    header = body_of(told | {"parameters": {"binary_data_size": len(blob)}})
    _, from_binary = read_tensors(header + blob, str(len(header)))
    for tensors in (from_json, from_binary):
        assert tensors["x"].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(tensors["x"], np.asarray(data, dtype))


def test_scalar_has_the_empty_shape() -> None:
    _, tensors = read_tensors(body_of({"name": "n", "shape": [], "datatype": "INT64", "data": [7]}), None)
    assert (tensors["n"].shape, int(tensors["n"])) == ((), 7)


BINARY = {"name": "input_ids", "shape": [2, 3], "datatype": "INT64", "parameters": {"binary_data_size": 48}}


@pytest.mark.parametrize(
    ("inputs", "blob", "said"),
    [
        ([IDS | {"shape": [2, 2]}], b"", "numbers"),
        ([IDS | {"shape": [1 << 24] * 8}], b"", "numbers"),
        ([IDS | {"shape": [1 << 24] * 9}], b"", "shape"),
        ([IDS | {"shape": [0, 6]}], b"", "shape"),
        ([IDS | {"shape": [-2, -3]}], b"", "shape"),
        ([IDS | {"shape": []}], b"", "shape"),
        ([IDS | {"datatype": "BYTES"}], b"", "datatype"),
        ([IDS | {"datatype": "BOOL"}], b"", "not all BOOL"),
        ([IDS | {"datatype": "FP32", "data": ["1"] * 6}], b"", "not all FP32"),
        ([IDS | {"datatype": "FP64", "data": [10**400] * 6}], b"", "no FP64"),
        ([IDS | {"datatype": "UINT8", "data": [256] * 6}], b"", "no UINT8"),
        ([IDS | {"data": [[1, 2, 3], 4]}], b"", "nested"),
        ([IDS | {"data": [1.0] * 6}], b"", "data"),
        ([IDS | {"data": [True] * 6}], b"", "data"),
        ([IDS | {"data": None}], b"", "no data"),
        ([IDS | {"data": [[[1, 2, 3], [4, 5, 6]]]}], b"", "data"),
        ([IDS | {"data": [1 << 80] * 6}], b"", "INT64"),
        ([IDS | {"data": [1 << 31] * 6, "datatype": "INT32"}], b"", "INT32"),
        ([IDS, IDS], b"", "twice"),
        ([], b"", "inputs"),
        ([IDS | {"parameters": {"shared_memory_region": "x"}}], b"", "shared_memory_region"),
        ([BINARY], b"", "0 bytes"),
        ([BINARY], b"x" * 47, "47 bytes"),
        ([BINARY], b"x" * 49, "no input"),
        ([IDS], b"x", "no input"),
        ([BINARY | {"data": [1] * 6}], b"x" * 48, "input_ids"),
        ([BINARY | {"parameters": {"binary_data_size": 1 << 60}}], b"x" * 48, "48 bytes"),
        ([BINARY | {"shape": [1 << 24, 1 << 24]}], b"x" * 48, "48 bytes"),
    ],
)
def test_tensor_that_contradicts_itself_is_refused(inputs: list[dict[str, Any]], blob: bytes, said: str) -> None:
    header = body_of(*inputs)
    with pytest.raises(InferenceError, match=said) as refused:
        read_tensors(header + blob, str(len(header)))
    assert (refused.value.code, refused.value.http_status) == (Code.BAD_REQUEST, 400)


@pytest.mark.parametrize("length", ["0", "-1", "999999", "1e3", "", "²", " 5", "9" * 5000])
def test_length_of_the_json_that_cannot_be_is_refused(length: str) -> None:
    with pytest.raises(InferenceError, match="Inference-Header-Content-Length"):
        read_tensors(body_of(IDS), length)


@given(st.binary(max_size=200), st.none() | st.integers(-5, 300).map(str))
def test_garbage_is_refused_or_read_but_never_a_defect(body: bytes, length: str | None) -> None:
    with pytest.raises(InferenceError):
        read_tensors(body, length)
