"""Real versions, a store around them, and a real runtime process, for the tests of the runtime."""

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray
from openai import OpenAI
from safetensors.numpy import save_file

from codec.versions import read_version
from forge.build import build_version, reseal_version
from forge.cache_scales import Int8Cache
from host.unix_http import UnixConnection
from wire.documents import encode_document
from wire.manifest import VersionDocument
from wire.serving import ExecutionOptions, Serving, ServingModel

PROJECT = Path(__file__).resolve().parents[1]
MODEL = "tales"
ONE_THREAD = ExecutionOptions(threads=1)
Seen = TypeVar("Seen")
SLOWNESS = 8.0 if "QEMU_CPU" in os.environ else 1.0
"""What deadlines are multiplied by: on an emulated CPU everything takes ten to sixty times as long."""


@dataclass(frozen=True, slots=True)
class Version:
    """A built version directory."""

    directory: Path
    document: VersionDocument

    @property
    def decoded(self) -> str:
        return self.document.decoded_digest()

    @property
    def fingerprint(self) -> str:
        return f"amperage-{self.decoded[:12]}"


@cache
def built(checkpoint: str, version: str, cache_choice: Int8Cache | None = None) -> Version:
    """A sample checkpoint as a version, made once per test run, or by another machine (tests/arm/forged.py)."""
    home = Path(tempfile.mkdtemp(prefix="amperage-runtime-"))
    atexit.register(shutil.rmtree, home)
    if forged := os.environ.get("AMPERAGE_FORGED"):
        shutil.copytree(Path(forged, f"{checkpoint}-int8-cache" if cache_choice else checkpoint), home / "version")
        return Version(home / "version", read_version(home / "version"))
    source = PROJECT / "samples" / checkpoint
    document = build_version(source, home / "version", (MODEL, version), cache=cache_choice)
    return Version(home / "version", document)


def base_version() -> Version:
    return built("tales-5m-base", "1.0")


def int8_cache_version() -> Version:
    return built("tales-5m-base", "1.0", Int8Cache())


def tuned_version() -> Version:
    return built("tales-5m-finetuned-50", "2.0")


@cache
def wide_version() -> Version:
    """Random weights of some 20 MB in int4: enough to tell them from what else a process holds."""
    home = Path(tempfile.mkdtemp(prefix="amperage-runtime-"))
    atexit.register(shutil.rmtree, home)
    config = json.loads((PROJECT / "samples" / "tales-5m-base" / "config.json").read_text())
    config |= {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "head_dim": 64,
               "num_attention_heads": 12, "num_key_value_heads": 4}  # fmt: skip
    shapes = {
        "self_attn.q_proj": (768, 768), "self_attn.k_proj": (256, 768), "self_attn.v_proj": (256, 768),
        "self_attn.o_proj": (768, 768), "mlp.gate_proj": (2304, 768), "mlp.up_proj": (2304, 768),
        "mlp.down_proj": (768, 2304),
    }  # fmt: skip
    chance = np.random.default_rng(7)

    def matrix(shape: tuple[int, int]) -> NDArray[np.float16]:
        return (chance.standard_normal(shape, np.float32) * np.float32(0.02)).astype(np.float16)

    tensors = {"model.embed_tokens.weight": matrix((4096, 768)), "model.norm.weight": np.ones(768, np.float16)}
    for layer in range(config["num_hidden_layers"]):
        names = {f"model.layers.{layer}.{name}.weight": matrix(shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= names | {f"model.layers.{layer}.{norm}.weight": np.ones(768, np.float16) for norm in norms}
    checkpoint = home / "checkpoint"
    checkpoint.mkdir()
    save_file(tensors, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(config))
    shutil.copyfile(PROJECT / "samples" / "tales-5m-base" / "tokenizer.json", checkpoint / "tokenizer.json")
    document = build_version(checkpoint, home / "version", (MODEL, "wide"))
    return Version(home / "version", document)


def shuffle_tensor(directory: Path, row: int) -> VersionDocument:
    """Shuffle the elements of one tensor of a version and seal it anew; its golden vectors stay the good ones.

    A weights file that is a hard link of another's is written through: give it a copy.
    """
    document = read_version(directory)
    columns = document.tensors
    path = directory / document.files[columns.file[row]].path
    weights = np.memmap(path, np.uint8, "r+")
    tensor = weights[columns.offset[row] : columns.offset[row] + columns.size_bytes(row)]
    items = tensor.view(np.float32 if columns.dtype[row] == "f32" else np.uint8)
    items[:] = np.random.default_rng(row).permutation(items)
    weights.flush()
    return reseal_version(directory)


def spoiled_version(home: Path) -> Version:
    """The base with the nibbles of one middle tensor shuffled; its golden vectors are the good ones."""
    good = base_version()
    shutil.copytree(good.directory, home)
    columns = good.document.tensors
    row = next(r for r, dtype in enumerate(columns.dtype) if dtype == "u4" and ".2." in columns.name[r])
    return Version(home, shuffle_tensor(home, row))


def wait_for(what: str, look: Callable[[], Seen | None], timeout_s: float = 20.0 * SLOWNESS) -> Seen:
    """Poll `look` until it returns something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)


@dataclass(slots=True)
class Node:
    """A store and the settings of a runtime over it."""

    home: Path
    extra: str = ""
    process: subprocess.Popen[bytes] | None = None
    entries: dict[str, ServingModel] = field(default_factory=dict)
    options: ExecutionOptions = ONE_THREAD

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def public(self) -> Path:
        return self.home / "inference.sock"

    @property
    def admin(self) -> Path:
        return self.home / "admin.sock"

    def install(self, version: Version) -> str:
        """Put a version into the store without serving it; returns its decoded digest."""
        target = self.store / "versions" / version.decoded
        if not target.exists():
            shutil.copytree(version.directory, target, copy_function=os.link)
        return version.decoded

    def order(self, version: Version, name: str = MODEL) -> None:
        """Install a version and name it in serving.json, as the agent does."""
        self.entries[name] = ServingModel(
            model=name, release="0" * 64, version=version.document.version, decoded=self.install(version),
            options=self.options, cpu="test", onnxruntime="test",
        )  # fmt: skip
        self.write()

    def write(self) -> None:
        temporary = self.store / "serving.tmp"
        self.store.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(encode_document(Serving(models=tuple(self.entries.values()))))
        temporary.rename(self.store / "serving.json")

    @property
    def settings(self) -> Path:
        path = self.home / "runtime.toml"
        path.write_text(
            f'store = "{self.store}"\npublic_socket = "{self.public}"\nadmin_socket = "{self.admin}"\nthreads = 1\n'
            f"{self.extra}\n"
        )
        return path

    def start(self) -> None:
        self.store.mkdir(parents=True, exist_ok=True)
        with (self.home / "runtime.log").open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "runtime.main", "serve", "--settings", str(self.settings)],
                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            )  # fmt: skip
        wait_for("a listening admin socket", lambda: self.alive() and _listens(self.admin))

    def alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        return True

    def log(self) -> str:
        return (self.home / "runtime.log").read_text()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)

    def wait_ready(self) -> None:
        wait_for("readiness", lambda: ask(self.public, "GET", "/v2/health/ready").status == 200)

    def client(self, timeout_s: float = 30.0) -> OpenAI:
        """The official client over the public socket."""
        transport = httpx2.HTTPTransport(uds=str(self.public))
        return OpenAI(
            base_url="http://localhost/v1", api_key="unused", max_retries=0,
            http_client=httpx2.Client(transport=transport, timeout=timeout_s),
        )  # fmt: skip


@contextmanager
def running(home: Path, *versions: Version, extra: str = "", options: ExecutionOptions = ONE_THREAD) -> Iterator[Node]:
    """A runtime process that serves the versions, killed at the end."""
    node = Node(home, extra, options=options)
    for version in versions:
        node.order(version)
    node.start()
    try:
        if versions:
            node.wait_ready()
        yield node
    finally:
        assert node.process is not None
        node.process.kill()
        node.process.wait(10)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    body: bytes
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.body)


def ask(path: Path, method: str, target: str, body: Any = None, timeout_s: float = 30.0) -> Reply:
    """One request over a Unix socket; a body that is not bytes is sent as JSON."""
    connection = UnixConnection(path, timeout_s)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, target, data)
        response = connection.getresponse()
        return Reply(response.status, response.read(), {k.lower(): v for k, v in response.getheaders()})
    finally:
        connection.close()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


@dataclass(slots=True)
class Load:
    """Four clients that ask without a pause; `ask` of a client's number gives the versions that its answer names."""

    ask: Callable[[int], set[str | None]]
    answers: list[set[str | None]] = field(default_factory=list)

    def during(self, changes: Sequence[Callable[[], None]]) -> None:
        """Make each change under load, and go on when it has brought a dozen answers; none may fail."""
        stop = threading.Event()
        failures: list[Exception] = []

        def client(number: int) -> None:
            while not stop.is_set():
                try:
                    self.answers.append(self.ask(number))
                except Exception as error:  # noqa: BLE001  every failure counts, whatever it is
                    failures.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            for change in changes:
                change()
                done = len(self.answers)
                wait_for("answers", lambda done=done: failures or len(self.answers) > done + 12)
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
        assert failures == []
