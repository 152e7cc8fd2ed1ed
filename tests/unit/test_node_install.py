"""A node installs the base alone: its lock, its wheel, and both of its programs without the operator's libraries."""

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
OURS = {"wire", "codec", "host", "agent", "runtime", "fleet", "forge", "cli"}
OPERATORS_ONLY = (
    "rich",
    "typer",
    "cryptography",
    "onnx",
    "safetensors",
    "matplotlib",
    "openai",
    "torch",
    "huggingface_hub",
    "pytest",
)
LOCK_LINE = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ; (?P<marker>.+?))? \\$", re.MULTILINE)
NEVER = "sys_platform == 'never'"


def locked(name: str) -> dict[str, set[str]]:
    """Versions by package of a lock, without those that no platform installs."""
    found: dict[str, set[str]] = {}
    for line in LOCK_LINE.finditer((PROJECT / "requirements" / f"{name}.txt").read_text()):
        if NEVER not in (line["marker"] or ""):
            found.setdefault(line["name"], set()).add(line["version"])
    return found


def build_wheel(directory: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = directory.glob("*.whl")
    return wheel


def test_picture_maker_is_the_forges_alone() -> None:
    assert "matplotlib" in locked("forge")
    assert "matplotlib" not in locked("fleet")


def test_lock_of_the_node_holds_nothing_of_the_operators() -> None:
    node = locked("node")
    assert {"onnxruntime", "paho-mqtt", "pydantic", "securesystemslib", "tokenizers"} <= node.keys()
    assert not {name.replace("_", "-") for name in OPERATORS_ONLY} & node.keys()


@pytest.mark.parametrize("name", ["node", "fleet", "forge", "demo"])
def test_all_locks_agree_with_what_is_tested(name: str) -> None:
    tested = locked("dev")
    assert locked(name)
    for package, versions in locked(name).items():
        assert versions == tested.get(package), f"{package}: run scripts/lock"


def test_wheel_holds_our_packages_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        names = wheel.namelist()
        (points,) = (wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    tops = {name.partition("/")[0] for name in names}
    assert tops - OURS == {top for top in tops if top.endswith(".dist-info")}
    assert tops >= OURS
    assert {"amperage-agent = agent.main:main", "amperage-runtime = runtime.main:main"} <= set(points.splitlines())


@pytest.mark.full
def test_base_install_runs_both_programs_of_a_node(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    binaries = tmp_path / "venv" / "bin"

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    pip = ("python", "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps")
    run(*pip, "--require-hashes", "-r", str(PROJECT / "requirements" / "node.txt"))
    run(*pip, str(build_wheel(tmp_path)))
    present = (
        "import importlib.util as util, sys\n"
        f"sys.exit(', '.join(name for name in {OPERATORS_ONLY!r} if util.find_spec(name)) or None)"
    )
    run("python", "-c", present)
    owners = (
        "from importlib.metadata import packages_distributions as owners\n"
        f"print(*sorted({{name: owners().get(name) for name in {sorted(OURS)!r}}}.items()))"
    )
    assert run("python", "-c", owners).count("['amperage']") == len(OURS)
    assert "run" in run("amperage-agent", "--help")
    assert "serve" in run("amperage-runtime", "--help")
    # the decoder child is started by its module name, from any folder
    assert "--manifest" in run("python", "-P", "-m", "agent.decoder", "--help")
