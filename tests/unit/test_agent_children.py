"""The decoder child and the runtime's client against real processes and real sockets."""

import http.server
import os
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from agent_simulators import Made, Publisher

from agent import decoding
from agent.decoding import ChildDecoder, DecodeOrder
from agent.runtime_client import ANSWER_LIMIT_BYTES, RuntimeClient
from wire.documents import encode_document
from wire.errors import ArtifactError, Code, DeployError, StoreError, TransferError
from wire.manifest import Manifest
from wire.serving import ProbeReport, ProbeRequest, ProbeVerdict, RuntimeStats


@pytest.fixture(scope="module")
def made() -> Made:
    return Publisher().make("1.0", weights_bytes=2_500_000)


@pytest.fixture
def order(tmp_path: Path, made: Made) -> DecodeOrder:
    (tmp_path / "m.json").write_bytes(encode_document(made.manifest))
    (tmp_path / "p").write_bytes(made.pack)
    (tmp_path / "into").mkdir()
    return DecodeOrder(tmp_path / "m.json", tmp_path / "p", tmp_path / "into", None)


def decode_whole(order: DecodeOrder, deadline_s: float = 30.0) -> None:
    decode = ChildDecoder().begin(order)
    decode.add(range(Manifest.model_validate_json(order.manifest.read_bytes()).frame_count))
    decode.wait(deadline_s)


def test_child_decodes_a_whole_version(order, made):
    decode_whole(order)
    assert (order.into / "weights.bin").read_bytes() == made.files["weights.bin"]
    assert (order.into / "version.json").read_bytes() == encode_document(made.version)


def test_child_decodes_while_frames_arrive(order, made):
    """Frames are written one by one; the child is told of each, and files grow before the last is there."""
    order.pack.write_bytes(made.pack[: made.manifest.index_size_bytes].ljust(len(made.pack), b"\0"))
    decode = ChildDecoder().begin(order)
    last, weights = made.manifest.frame_count - 1, order.into / "weights.bin"
    with order.pack.open("r+b") as pack:
        for frame in [*range(1, last), 0, last]:
            if frame == last:
                wait_until(lambda: weights.exists() and weights.read_bytes()[:1000] == made.files["weights.bin"][:1000])
                assert not (order.into / "version.json").exists()
            start, end = made.manifest.frame_range(frame)
            os.pwrite(pack.fileno(), made.pack[start:end], start)
            decode.add([frame])
        decode.wait(30.0)
    assert (order.into / "weights.bin").read_bytes() == made.files["weights.bin"]
    assert (order.into / "version.json").exists()


def test_child_ends_well_while_its_stdin_is_still_open(order, made):
    """Its thread then still waits for lines, which must not abort an interpreter that ends."""
    command = [sys.executable, "-P", "-m", "agent.decoder"]
    places = ["--manifest", str(order.manifest), "--pack", str(order.pack), "--into", str(order.into)]
    with subprocess.Popen([*command, *places], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"0 {made.manifest.frame_count - 1}\n".encode())
        child.stdin.flush()
        assert child.stdout.read() == b"{}\n"
        assert child.wait(30) == 0


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen in 30 s")


def test_pack_that_stops_arriving_is_no_version(order):
    decode = ChildDecoder().begin(order)
    decode.add([0, 1])
    with pytest.raises(StoreError) as caught:
        decode.wait(30.0)
    assert caught.value.code is Code.CORRUPT
    assert not (order.into / "version.json").exists()


def test_damaged_pack_is_a_typed_error_of_the_child(order):
    pack = bytearray(order.pack.read_bytes())
    pack[-10] ^= 1
    order.pack.write_bytes(pack)
    with pytest.raises(ArtifactError) as caught:
        decode_whole(order)
    assert caught.value.code in (Code.BAD_SECTION, Code.DIGEST_MISMATCH)


def test_missing_manifest_is_a_store_error(order):
    order.manifest.rename(order.manifest.with_name("elsewhere"))
    with pytest.raises(StoreError) as caught:
        ChildDecoder().begin(order).wait(30.0)
    assert caught.value.code is Code.CORRUPT


def sleeping(order: DecodeOrder) -> list[str]:
    return [sys.executable, "-c", "import time; time.sleep(60)"]


def test_child_that_hangs_is_killed_at_the_deadline(order, monkeypatch):
    monkeypatch.setattr(decoding, "_command", sleeping)
    with pytest.raises(DeployError) as caught:
        decode_whole(order, 0.2)
    assert caught.value.code is Code.DEADLINE_PASSED


def test_child_that_reads_nothing_never_blocks_who_tells_it(order, monkeypatch):
    """Far more than a pipe holds: it is kept; the deadline ends the child, and then the wait for it."""
    monkeypatch.setattr(decoding, "_command", sleeping)
    decode = ChildDecoder().begin(order)
    for frame in range(0, 100_000, 2):
        decode.add([frame])
    with pytest.raises(DeployError) as caught:
        decode.wait(0.2)
    assert caught.value.code is Code.DEADLINE_PASSED


def test_child_that_crashes_is_decoder_crashed(order, monkeypatch):
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    monkeypatch.setattr(decoding, "_command", lambda _: command)
    with pytest.raises(DeployError, match="signal 11") as caught:
        decode_whole(order)
    assert caught.value.code is Code.DECODER_CRASHED


def test_cancelled_child_is_killed(order, monkeypatch):
    monkeypatch.setattr(decoding, "_command", sleeping)
    decode, caught = ChildDecoder().begin(order), []

    def wait() -> None:
        try:
            decode.wait(30.0)
        except DeployError as error:
            caught.append(error.code)

    thread = threading.Thread(target=wait)
    thread.start()
    decode.cancel()
    thread.join(20)
    assert caught == [Code.DECODER_CRASHED]


def test_child_does_not_outlive_its_parent(order):
    code = (
        "import os, sys, subprocess;"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; from agent.decoder import _die_with;"
        " _die_with(' + str(os.getpid()) + '); print(1, flush=True); time.sleep(60)'], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    child = int(done.stdout)
    for _ in range(500):
        try:
            state = Path(f"/proc/{child}/stat").read_text().split()[2]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        threading.Event().wait(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child lives on")


class Stub:
    """An admin socket that answers with `status` and `body`."""

    def __init__(self, path: Path) -> None:
        self.status, self.body, self.seen = 200, b"{}", []
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub.seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.do_GET()

            def do_GET(self) -> None:
                self.send_response(stub.status)
                self.send_header("Content-Length", str(len(stub.body)))
                self.end_headers()
                self.wfile.write(stub.body)

            def log_message(self, *_: object) -> None:
                pass

            def address_string(self) -> str:
                return "unix"

        self.server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    stub = Stub(tmp_path / "admin.sock")
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


@pytest.fixture
def client(tmp_path: Path) -> RuntimeClient:
    return RuntimeClient(tmp_path / "admin.sock")


def test_runtime_that_is_not_there_is_a_transfer_error(client):
    with pytest.raises(TransferError) as caught:
        client.stats()
    assert caught.value.code is Code.RUNTIME_UNREACHABLE


def test_probe_sends_its_request_and_parses_the_report(client, stub):
    stub.body = encode_document(ProbeReport(verdict=ProbeVerdict.CRASHED, detail="signal 11"))
    request = ProbeRequest(candidate="a" * 64)
    assert client.probe("tales", request).verdict is ProbeVerdict.CRASHED
    assert stub.seen == [("/v2/repository/models/tales/probe", encode_document(request))]


def test_refusal_carries_the_runtimes_code_and_words(client, stub):
    stub.status, stub.body = 500, b'{"error": "no such graph", "code": "load_failed"}'
    with pytest.raises(DeployError, match="no such graph") as caught:
        client.load("tales")
    assert caught.value.code is Code.LOAD_FAILED


@pytest.mark.parametrize("body", [b"oops", b"{}", b'{"error": "x", "code": "unheard_of"}', b"[]"])
def test_refusal_without_a_known_code_is_load_failed(client, stub, body):
    stub.status, stub.body = 500, body
    with pytest.raises(DeployError, match="500") as caught:
        client.unload("tales")
    assert caught.value.code is Code.LOAD_FAILED


def test_runtime_that_is_busy_may_be_asked_again(client, stub):
    stub.status, stub.body = 503, b'{"error": "another probe runs", "code": "overloaded"}'
    with pytest.raises(TransferError, match="another probe runs"):
        client.probe("tales", ProbeRequest(candidate="a" * 64))


@pytest.mark.parametrize("body", [b"x", b"{}", b" " * (ANSWER_LIMIT_BYTES + 1)])
def test_answer_of_another_form_or_size_is_refused(client, stub, body):
    stub.body = body
    with pytest.raises(DeployError) as caught:
        client.stats()
    assert caught.value.code is Code.INTERNAL


def test_stats_are_parsed(client, stub):
    stub.body = encode_document(RuntimeStats(pid=5, started_s=1.5))
    assert client.stats().pid == 5
