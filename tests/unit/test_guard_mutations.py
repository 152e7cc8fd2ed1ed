"""The list of breakages is in step with the code, and the tool that uses it can tell red from green."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", PROJECT / "scripts" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_breakage_applies_once_and_names_tests_that_exist(mutations: ModuleType) -> None:
    assert len(mutations.read_breakages()) >= 20


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (
            'old = "nowhere to be found"\nnew = ""\ntests = ["tests/unit/test_guard_mutations.py::mutations"]',
            "occurs 0",
        ),
        ('old = "import"\nnew = ""\ntests = ["tests/unit/test_guard_mutations.py::mutations"]', "must occur once"),
        ('old = "LIMIT_BYTES = 64 * 1024"\nnew = ""\ntests = []', "names no test"),
        (
            'old = "LIMIT_BYTES = 64 * 1024"\nnew = ""\ntests = ["tests/unit/test_guard_mutations.py::gone"]',
            "no tests/",
        ),
    ],
)
def test_breakage_that_cannot_be_made_is_refused(mutations: ModuleType, tmp_path: Path, entry: str, why: str) -> None:
    (tmp_path / "list.toml").write_text(f'[[breakage]]\nname = "x"\nfile = "wire/documents.py"\n{entry}\n')
    with pytest.raises(ValueError, match=why):
        mutations.read_breakages(tmp_path / "list.toml")


@pytest.mark.full
@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("if len(data) > limit_bytes:", "if len(data) > 1 << 40:", "found"),
        ("if len(data) > limit_bytes:", "if limit_bytes < len(data):", "survived"),
        ("if len(data) > limit_bytes:", "if len(data) >", "not tested"),
    ],
)
def test_verdict_tells_breakages_that_are_found_from_those_that_are_not(
    mutations: ModuleType, tmp_path: Path, old: str, new: str, verdict: str
) -> None:
    test = "tests/unit/test_wire_documents.py::test_document_over_the_limit_is_refused_unread"
    breakage = mutations.Breakage("x", "wire/documents.py", old, new, (test,))
    assert mutations.judge(mutations.Copy(tmp_path), breakage)[0] == verdict
