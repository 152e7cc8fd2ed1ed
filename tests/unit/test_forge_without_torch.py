"""Without torch the forge works, and what needs it says how to get it."""

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = (
    "import sys\n"
    "class Blocked:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] == 'torch': raise ModuleNotFoundError(name, name='torch')\n"
    "sys.meta_path.insert(0, Blocked())\n"
    "from cli.main import main\n"
    "main(sys.argv[1:])\n"
)


@pytest.mark.parametrize("command", ["distil", "train-quantised"])
def test_training_without_torch_names_the_extra_to_install(tmp_path: Path, command: str) -> None:
    arguments = ["forge", command, str(tmp_path), str(tmp_path / "out"), "--text", "t.txt", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=PROJECT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stderr.strip().endswith("pip install 'amperage[train]'")
