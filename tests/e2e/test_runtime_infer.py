"""Tensors of the Open Inference Protocol over the socket of a real process: an encoder takes and gives them."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from encoder_fixtures import ENCODER, check_embeddings, random_text, serving_both
from runtime_fixtures import MODEL, Node, ask

from host.unix_http import UnixConnection

pytestmark = pytest.mark.e2e
INFER = f"/v2/models/{ENCODER}/infer"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with serving_both(tmp_path_factory.mktemp("node")) as node:
        yield node


def padded(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, int64 [texts, longest]; what stands in the padding must not matter."""
    ids = np.full((len(texts), max(map(len, texts))), 382)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


def tensor(name: str, values: np.ndarray, **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(values.shape), "datatype": "INT64", **rest}


def test_infer_takes_and_gives_tensors_in_json(node: Node) -> None:
    texts = [random_text(30), random_text(3), random_text(90)]
    ids, mask = padded(texts)
    inputs = [tensor("input_ids", ids, data=ids.tolist()), tensor("attention_mask", mask, data=mask.ravel().tolist())]
    reply = ask(node.public, "POST", INFER, {"inputs": inputs, "id": "7"}).json()
    assert (reply["model_name"], reply["model_version"], reply["id"]) == (ENCODER, "1.0", "7")
    (output,) = reply["outputs"]
    assert (output["name"], output["shape"], output["datatype"]) == ("embeddings", [3, 64], "FP32")
    check_embeddings(np.reshape(output["data"], output["shape"]).tolist(), texts)
    bare = ask(node.public, "POST", INFER, {"inputs": [tensor("input_ids", ids[:1, :30], data=texts[0])]}).json()
    check_embeddings([bare["outputs"][0]["data"]], texts[:1])


def test_infer_takes_and_gives_binary_tensors(node: Node) -> None:
    texts = [random_text(30), random_text(3), random_text(90)]
    ids, mask = padded(texts)
    inputs = [
        tensor(name, values, parameters={"binary_data_size": values.nbytes})
        for name, values in (("input_ids", ids), ("attention_mask", mask))
    ]
    outputs = [{"name": "embeddings", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    connection = UnixConnection(node.public, 30.0)
    connection.request(
        "POST", INFER, header + ids.astype("<i8").tobytes() + mask.astype("<i8").tobytes(),
        {"Inference-Header-Content-Length": str(len(header))},
    )  # fmt: skip
    response = connection.getresponse()
    body = response.read()
    length = int(response.headers["Inference-Header-Content-Length"])
    connection.close()
    (output,) = json.loads(body[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(body) - length}
    check_embeddings(np.frombuffer(body[length:], "<f4").reshape(output["shape"]).tolist(), texts)


def test_metadata_lists_the_tensors_of_an_encoder(node: Node) -> None:
    metadata = ask(node.public, "GET", f"/v2/models/{ENCODER}").json()
    assert metadata["platform"] == "onnxruntime_encoder"
    assert [(entry["name"], entry["datatype"], entry["shape"]) for entry in metadata["inputs"]] == [
        ("input_ids", "INT64", [-1, -1]), ("attention_mask", "INT64", [-1, -1]),
    ]  # fmt: skip
    assert metadata["outputs"] == [{"name": "embeddings", "datatype": "FP32", "shape": [-1, 64]}]
    assert metadata["parameters"]["max_tokens"] == 150
    assert "binary_tensor_data" in ask(node.public, "GET", "/v2").json()["extensions"]
    assert ask(node.public, "GET", f"/v2/models/{MODEL}").json()["inputs"] == []


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"outputs": [{"name": "logits"}]}, 400, "embeddings"),
        ({"parameters": {"priority": 1}}, 400, "priority"),
        ({"inputs": [{"name": "pixels", "shape": [1], "datatype": "INT64", "data": [1]}]}, 400, "pixels"),
        ({"inputs": [{"name": "input_ids", "shape": [2], "datatype": "INT64", "data": [5, 6]}]}, 400, "input_ids"),
        ({"mask": [0, 1]}, 400, "attention_mask"),
        ({"mask": [0, 0]}, 400, "attention_mask"),
        ({"mask": [2, 0]}, 400, "attention_mask"),
        ({"mask": [1]}, 400, "attention_mask"),
        ({"ids": [5, 384]}, 400, "vocabulary"),
    ],
)
def test_infer_that_does_not_fit_is_refused_with_its_reason(
    node: Node, change: dict[str, Any], status: int, said: str
) -> None:
    ids, mask = np.asarray([change.pop("ids", [5, 6])]), np.asarray([change.pop("mask", [1, 1])])
    inputs = [tensor("input_ids", ids, data=ids.tolist()), tensor("attention_mask", mask, data=mask.tolist())]
    reply = ask(node.public, "POST", INFER, {"inputs": inputs} | change)
    assert reply.status == status, reply.body
    assert said in reply.json()["error"]


def test_decoder_takes_no_tensors(node: Node) -> None:
    ids = np.asarray([[5]])
    body = {"inputs": [tensor("input_ids", ids, data=[5])]}
    reply = ask(node.public, "POST", f"/v2/models/{MODEL}/infer", body)
    assert (reply.status, reply.json()["code"]) == (400, "bad_request")
    assert "/v1/chat/completions" in reply.json()["error"]
