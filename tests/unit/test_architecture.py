"""The house rules that a machine can check: import order, fences round libraries, sizes, names, paths (docs/design.md).

Imports are read from the syntax tree, those inside functions too: a lazy import is an import.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
NODE = {"wire", "codec", "host"}
MAY_IMPORT = {
    "wire": {"wire"},
    "codec": {"wire", "codec"},
    "host": {"wire", "host"},
    "agent": NODE | {"agent"},
    "runtime": NODE | {"runtime"},
    "fleet": NODE | {"fleet"},
    "forge": NODE | {"forge", "runtime"},
    "cli": NODE | {"fleet", "forge", "cli"},
}
"""By package, which of ours it may import. cli starts agent and runtime as processes and never imports them."""

FENCES = {
    "paho": {"host/mqtt.py"},
    "tomli": {"host/settings.py"},
    "cryptography": {"host/keys.py"},
    "onnxruntime": {"runtime/", "forge/"},
    "onnx": {"forge/"},
    "safetensors": {"forge/"},
    "securesystemslib": {"wire/signing.py", "host/keys.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
    "numpy": {"codec/", "agent/decoder.py", "runtime/", "forge/", "cli/"},
    "zstandard": {"codec/", "agent/decoder.py"},
    "openai": {"cli/demo/"},
    "matplotlib": {"forge/picture.py"},
    "torch": {"forge/training/"},
}
"""By library, the only modules or packages that may import it."""

NODE_FORBIDDEN = {"rich", "typer", "cryptography", "onnx", "safetensors", "openai", "click", "matplotlib", "torch"}
AGENT_FORBIDDEN = NODE_FORBIDDEN | {"numpy", "onnxruntime", "tokenizers", "zstandard"}
DURABILITY_CALLS = {"fsync", "fdatasync", "sync", "rename", "replace", "renames", "link", "symlink"}
LINES_OF_A_MODULE = 400
LINES_OF_A_FUNCTION = 60
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "manager"}

MODULES = sorted(
    path.relative_to(PROJECT).as_posix() for package in MAY_IMPORT for path in (PROJECT / package).rglob("*.py")
)


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse((PROJECT / module).read_text(), module)


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names that `module` imports, with `from a import b` as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute, so that a name is found by grep"
            origin = node.module or ""
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return frozenset(names)


def libraries_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module)}


def file_of(name: str) -> str | None:
    """The module file of a dotted name of ours, None for anything else."""
    for candidate in (name.replace(".", "/") + ".py", name.replace(".", "/") + "/__init__.py"):
        if candidate in MODULES:
            return candidate
    return None


def reachable_from(*starts: str) -> set[str]:
    """Modules of ours that importing `starts` can load; a package's __init__ comes with its modules."""
    seen: set[str] = set()
    pending = [start for start in starts if start in MODULES]
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        parent = f"{Path(module).parent.as_posix()}/__init__.py"
        found = {file_of(name) for name in imports_of(module)} | {parent if parent in MODULES else None}
        pending += [path for path in found if path]
    return seen


def functions_of(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    ours = set(MAY_IMPORT)
    for module in (module for module in MODULES if module.startswith(f"{package}/")):
        upward = (libraries_of(module) & ours) - MAY_IMPORT[package]
        assert not upward, f"{module} imports {sorted(upward)}; {package} may import {sorted(MAY_IMPORT[package])}"


@pytest.mark.parametrize("library", FENCES)
def test_library_is_imported_only_behind_its_fence(library: str) -> None:
    for module in MODULES:
        if library in libraries_of(module):
            assert any(
                module == place or (place.endswith("/") and module.startswith(place)) for place in FENCES[library]
            ), f"{module} imports {library}, which belongs to {sorted(FENCES[library])}"


def test_agent_process_can_reach_no_numeric_library_and_nothing_of_the_operators() -> None:
    for module in reachable_from("agent/main.py"):
        assert module != "agent/decoder.py", "the decoder is a child process and is never imported by the agent"
        assert not libraries_of(module) & AGENT_FORBIDDEN, f"{module}: {libraries_of(module) & AGENT_FORBIDDEN}"


def test_runtime_process_can_reach_nothing_of_the_operators_and_no_broker() -> None:
    for module in reachable_from("runtime/main.py"):
        unwanted = libraries_of(module) & (NODE_FORBIDDEN | {"paho"})
        assert not unwanted, f"{module}: {unwanted}"


@pytest.mark.parametrize(
    ("start", "blocked"),
    [("agent.main", AGENT_FORBIDDEN - {"click"}), ("runtime.main", NODE_FORBIDDEN - {"click"} | {"paho"})],
)
def test_process_starts_although_what_it_must_not_need_is_missing(start: str, blocked: set[str]) -> None:
    """Third-party packages are covered too: they may try to import these, but must do without."""
    code = (
        "import sys, importlib\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {sorted(blocked)!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"importlib.import_module({start!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_host_files_makes_bytes_durable() -> None:
    for module in MODULES:
        if module == "host/files.py":
            continue
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in DURABILITY_CALLS, (
                    f"{module}:{node.lineno}: os.{node.attr} belongs to host/files.py"
                )


def test_onnxruntime_is_imported_only_after_its_telemetry_is_switched_off() -> None:
    for module in MODULES:
        places = [
            node.lineno
            for node in ast.walk(tree_of(module))
            if (isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "onnxruntime" for a in node.names))
            or (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "onnxruntime")
        ]
        if not places:
            continue
        switched = [
            node.lineno
            for source in (module, f"{module.partition('/')[0]}/__init__.py")
            for node in ast.walk(tree_of(source))
            if isinstance(node, ast.Constant) and node.value == "ORT_DISABLE_TELEMETRY"
            for _ in [0]
            if source != module or node.lineno < min(places)
        ]
        assert switched, f"{module}:{places[0]}: set os.environ['ORT_DISABLE_TELEMETRY'] before importing onnxruntime"


@pytest.mark.parametrize("module", MODULES)
def test_module_is_short_documented_and_named_for_what_it_is(module: str) -> None:
    path = PROJECT / module
    assert len(path.read_text().splitlines()) <= LINES_OF_A_MODULE, f"{module} is too long: split it by what it owns"
    assert path.stem not in EMPTY_NAMES, f"{module}: name it for what it owns"
    if tree_of(module).body:
        assert ast.get_docstring(tree_of(module)), f"{module}: say what it owns, its invariant, what a crash leaves"
    for function in functions_of(module):
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        assert lines <= LINES_OF_A_FUNCTION, f"{module}: {function.name} has {lines} lines"


def test_packaging_folder_is_never_a_python_package() -> None:
    # With an __init__.py, `python -m pytest` and `python -m build` would find it instead of PyPI's `packaging`.
    assert not (PROJECT / "packaging" / "__init__.py").exists()


def project_texts() -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout")
    for name in listed.stdout.decode().split("\0"):
        path = PROJECT / name
        if name and not name.startswith("samples/") and path.is_file():
            try:
                yield path, path.read_text()
            except UnicodeDecodeError:
                continue


def test_no_file_names_the_folder_of_this_checkout() -> None:
    if len(PROJECT.parts) < 3 or PROJECT.parts[1] in ("opt", "usr", "srv", "var", "tmp"):
        pytest.skip(f"{PROJECT} is a path that documentation may name")
    for path, text in project_texts():
        assert f"{PROJECT}/" not in text, f"{path.relative_to(PROJECT)} works on this machine only"


def test_locks_name_no_package_index() -> None:
    for path in sorted((PROJECT / "requirements").glob("*.txt")):
        text = path.read_text()
        assert "://" not in text, f"{path.name} names an index; make it with scripts/lock"
        assert "--hash=sha256:" in text
