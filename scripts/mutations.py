"""Breaks the code on purpose, one line at a time, and sees whether the named tests notice (tests/mutations.toml).

Works in a copy of the tree, so that nothing is broken that anybody uses; a crash leaves the copy in the temporary
folder. Exit status 0 only when the tests are green unbroken and red for every breakage.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LIST = PROJECT / "tests" / "mutations.toml"
PACKAGES = ("wire", "codec", "host", "agent", "runtime", "fleet", "forge", "cli")
COPIED = (*PACKAGES, "benchmarks", "docs", "packaging", "requirements", "scripts", "systemd", "tests", "pyproject.toml")
LINKED = ("samples",)
TIMEOUT_S = 300.0
PYTEST_FAILED = 1
"""pytest's exit status when tests ran and some failed; others mean that nothing was tested."""


@dataclass(frozen=True, slots=True)
class Breakage:
    """`old`, which occurs exactly once in `file`, becomes `new`; then at least one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Verdict(StrEnum):
    """What the tests said of a breakage."""

    FOUND = "found"
    SURVIVED = "survived"
    NOT_TESTED = "not tested"
    """The tests could not be run on it, so a failing test proves nothing."""


def read_breakages(path: Path = LIST) -> list[Breakage]:
    """The breakages of tests/mutations.toml; ValueError names what is wrong with one."""
    table = tomllib.loads(path.read_text())
    breakages = [Breakage(**{**entry, "tests": tuple(entry["tests"])}) for entry in table["breakage"]]
    for breakage in breakages:
        count = (PROJECT / breakage.file).read_text().count(breakage.old)
        if count != 1:
            raise ValueError(f"{breakage.name}: `old` occurs {count} times in {breakage.file}; it must occur once")
        if breakage.old == breakage.new or not breakage.tests:
            raise ValueError(f"{breakage.name}: it changes nothing or names no test")
        for test in breakage.tests:
            file, _, name = test.partition("::")
            function = re.escape(name.partition("[")[0])
            if not re.search(rf"^(async )?def {function}\(|^{function} = ", (PROJECT / file).read_text(), re.MULTILINE):
                raise ValueError(f"{breakage.name}: there is no {test}")
    if len({breakage.name for breakage in breakages}) != len(breakages):
        raise ValueError("two breakages have one name")
    return breakages


class Copy:
    """A copy of the tree in which tests import the copied modules, not the installed ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in COPIED:
            source = PROJECT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=ignored)
            else:
                shutil.copy2(source, root / name)
        for name in LINKED:
            (root / name).symlink_to(PROJECT / name)
        self._check_imports()

    def pytest(self, tests: list[str]) -> subprocess.CompletedProcess[str]:
        """Run `tests` here."""
        options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=line"]
        return self._python("-m", "pytest", *options, *tests)

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # PYTHONPATH comes before the editable install, in children that are started with -P too. No bytecode: two
        # breakages of one file within a second would share it.
        environment = {
            **os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "ORT_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, *arguments], cwd=self.root, env=environment, capture_output=True, text=True,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip

    def _check_imports(self) -> None:
        code = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})), sep='\\n')"
        done = self._python("-P", "-c", code)
        strangers = [path for path in done.stdout.split() if not Path(path).is_relative_to(self.root)]
        if done.returncode or strangers or not done.stdout:
            raise RuntimeError(f"the copy is not what is imported: {strangers or done.stderr}")


def judge(copy: Copy, breakage: Breakage) -> tuple[Verdict, str]:
    """Break the copy, run the tests, mend the copy; the verdict and the first line that explains it."""
    path = copy.root / breakage.file
    whole = path.read_text()
    path.write_text(whole.replace(breakage.old, breakage.new))
    try:
        done = copy.pytest(list(breakage.tests))
    except subprocess.TimeoutExpired:
        return Verdict.NOT_TESTED, f"no end within {TIMEOUT_S:g} s"
    finally:
        path.write_text(whole)
    if done.returncode == PYTEST_FAILED:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        return Verdict.FOUND, failed[0].partition("::")[2] if failed else ""
    if done.returncode == 0:
        return Verdict.SURVIVED, "the tests stay green"
    return Verdict.NOT_TESTED, (done.stdout + done.stderr).strip().splitlines()[-1]


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(prog="scripts/mutate", description="Break the code and see the tests go red.")
    parser.add_argument("name", nargs="*", help="only these breakages")
    parser.add_argument("--list", action="store_true", help="name the breakages")
    arguments = parser.parse_args()
    breakages = read_breakages()
    if unknown := set(arguments.name) - {breakage.name for breakage in breakages}:
        parser.error(f"no such breakage: {', '.join(sorted(unknown))}")
    if arguments.list:
        print(*(f"{breakage.name}  {breakage.file}" for breakage in breakages), sep="\n")
        return 0
    chosen = [breakage for breakage in breakages if not arguments.name or breakage.name in arguments.name]
    with tempfile.TemporaryDirectory(prefix="amperage-mutate-") as directory:
        return _run(Copy(Path(directory)), chosen)


def _run(copy: Copy, breakages: list[Breakage]) -> int:
    tests = sorted({test for breakage in breakages for test in breakage.tests})
    unbroken = copy.pytest(tests)
    if unbroken.returncode != 0:
        print(unbroken.stdout[-3000:], "mutate: the tests are red unbroken; mend them first", sep="\n")
        return 1
    print(f"unbroken: {len(tests)} tests are green")
    width = max(len(breakage.name) for breakage in breakages)
    missed = 0
    for breakage in breakages:
        started = time.monotonic()
        verdict, why = judge(copy, breakage)
        missed += verdict is not Verdict.FOUND
        seconds = time.monotonic() - started
        print(f"{breakage.name:{width}}  {verdict:10}  {seconds:5.1f} s  {why}", flush=True)
    print(f"mutate: {len(breakages) - missed} of {len(breakages)} breakages were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
