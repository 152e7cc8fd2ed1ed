"""Any ONNX model over the socket of a real process: from its release to its tensors; a damaged one is refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from graph_fixtures import NETWORK, VISION, graph_version, pixels, vision
from onnx_fixtures import run_plainly
from runtime_fixtures import MODEL, Node, Version, ask, base_version, running, shuffle_tensor

from forge.artifact import artifacts_in
from forge.extract import extract_artifact
from forge.release import make_release
from host.keys import create_key, load_signer
from host.unix_http import UnixConnection
from wire.documents import parse_document
from wire.serving import ProbeReport, ProbeVerdict

pytestmark = pytest.mark.e2e
INFER = f"/v2/models/{VISION}/infer"
PROBE_S = 300.0
"""The probe child is nice and waits for whoever else uses the machine."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A runtime that serves what a node decoded of the vision model's release, the network, and the sample LM."""
    home = tmp_path_factory.mktemp("node")
    create_key(home / "key.pem")
    make_release(graph_version(VISION).directory, home / "release", load_signer(home / "key.pem"), sequence=1)
    (artifact,) = artifacts_in(home / "release")
    extract_artifact(artifact, home / "decoded")
    with running(home / "runtime") as node:
        node.order(Version(home / "decoded", graph_version(VISION).document), VISION)
        node.order(graph_version(NETWORK), NETWORK)
        node.order(base_version())
        for name in (VISION, NETWORK, MODEL):
            assert ask(node.admin, "POST", f"/v2/repository/models/{name}/load", {}).status == 200
        yield node


def tensor(name: str, values: np.ndarray, datatype: str, **rest: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(values.shape), "datatype": datatype, **rest}


def test_answers_are_those_of_the_model_in_json(node: Node) -> None:
    inputs = [tensor("pixels", pixels(), "FP32", data=pixels().tolist())]
    reply = ask(node.public, "POST", INFER, {"inputs": inputs, "id": "7"}).json()
    assert (reply["model_name"], reply["model_version"], reply["id"]) == (VISION, "1.0", "7")
    shares, best = run_plainly(vision(), {"pixels": pixels()})
    told = {output["name"]: output for output in reply["outputs"]}
    assert (told["shares"]["datatype"], told["shares"]["shape"]) == ("FP32", [2, 10])
    np.testing.assert_allclose(np.reshape(told["shares"]["data"], (2, 10)), shares, rtol=1e-4, atol=1e-6)
    assert (told["best"]["datatype"], told["best"]["data"]) == ("INT64", best.tolist())


def test_answers_are_those_of_the_model_in_binary(node: Node) -> None:
    given = pixels(4, 32, 32)
    inputs = [tensor("pixels", given, "FP32", parameters={"binary_data_size": given.nbytes})]
    outputs = [{"name": "shares", "parameters": {"binary_data": True}}, {"name": "best"}]
    header = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
    connection = UnixConnection(node.public, 30.0)
    connection.request("POST", INFER, header + given.tobytes(), {"Inference-Header-Content-Length": str(len(header))})
    response = connection.getresponse()
    body = response.read()
    length = int(response.headers["Inference-Header-Content-Length"])
    connection.close()
    told = {output["name"]: output for output in json.loads(body[:length])["outputs"]}
    shares, best = run_plainly(vision(), {"pixels": given})
    assert told["shares"]["parameters"] == {"binary_data_size": len(body) - length}
    np.testing.assert_allclose(np.frombuffer(body[length:], "<f4").reshape(4, 10), shares, rtol=1e-4, atol=1e-6)
    assert told["best"]["data"] == best.tolist()


def test_metadata_lists_the_tensors_and_how_large_they_may_be(node: Node) -> None:
    metadata = ask(node.public, "GET", f"/v2/models/{VISION}").json()
    assert metadata["platform"] == "onnxruntime_graph"
    assert metadata["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
    assert [entry["name"] for entry in metadata["outputs"]] == ["shares", "best"]
    assert metadata["parameters"]["largest"] == {"pixels": [4, 3, 32, 32]}
    row = ask(node.public, "GET", f"/v1/models/{VISION}").json()
    assert (row["kind"], row["context_tokens"]) == ("graph", None)


WORDS = tensor("words", np.arange(3), "INT64", data=[0, 1, 2])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"inputs": [WORDS | {"datatype": "INT32"}]}, "'words' is INT64"),
        ({"inputs": [WORDS | {"shape": [13], "data": [1] * 13}]}, "'n' is 12 at most"),
        ({"inputs": [WORDS | {"shape": [1, 3]}]}, "has the shape"),
        ({"inputs": [WORDS | {"name": "letters"}]}, "'letters' is none"),
        ({"inputs": [WORDS], "outputs": [{"name": "z"}]}, "this model has y"),
        ({"inputs": [WORDS], "outputs": [{"name": "y"}, {"name": "y"}]}, "name each once"),
    ],
)
def test_request_that_does_not_fit_is_refused_with_its_reason(node: Node, body: dict[str, Any], said: str) -> None:
    reply = ask(node.public, "POST", f"/v2/models/{NETWORK}/infer", body)
    assert (reply.status, reply.json()["code"]) == (400, "bad_request")
    assert said in reply.json()["error"]


def test_word_outside_of_the_table_fails_that_request_alone(node: Node) -> None:
    path = f"/v2/models/{NETWORK}/infer"
    assert ask(node.public, "POST", path, {"inputs": [WORDS | {"data": [0, 1, 999]}]}).status == 500
    assert ask(node.public, "POST", path, {"inputs": [WORDS]}).status == 200


def test_graph_takes_no_text(node: Node) -> None:
    for path, body in (("/v1/embeddings", {"input": "x"}), ("/v1/completions", {"prompt": "x"})):
        reply = ask(node.public, "POST", path, {"model": VISION, **body})
        assert reply.status == 400
        assert "/v2/models/MODEL/infer" in reply.json()["error"]["message"]


def test_probe_passes_the_graph_and_refuses_a_damaged_one(node: Node, tmp_path: Path) -> None:
    good = graph_version(NETWORK)
    spoiled = Path(shutil.copytree(good.directory, tmp_path / "spoiled"))
    wrong = node.install(Version(spoiled, shuffle_tensor(spoiled, good.document.tensors.name.index("first"))))
    path = f"/v2/repository/models/{NETWORK}/probe"
    seen = {}
    for candidate in (good.decoded, wrong):
        reply = ask(node.admin, "POST", path, {"candidate": candidate, "incumbent": None}, timeout_s=PROBE_S)
        seen[candidate] = parse_document(ProbeReport, reply.body)
    passed, refused = seen[good.decoded], seen[wrong]
    assert passed.verdict is ProbeVerdict.PASSED, passed.detail
    assert passed.golden_error is not None
    assert passed.golden_error < 0.001
    assert passed.tokens_per_s is not None
    assert refused.verdict is ProbeVerdict.GOLDEN_MISMATCH
    assert "tolerance" in refused.detail
