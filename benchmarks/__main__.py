"""`scripts/bench NAME [--json FILE]` runs `benchmarks.NAME.run()`; `--list` names them with the first line of each.

A benchmark is a module of this package with `run() -> Sequence[Row]`. Exit status 0 means that it was measured; whether
the targets are met is in the rows.
"""

import argparse
import ast
import importlib
import sys
from pathlib import Path

from benchmarks.harness import save, show

NO_BENCHMARKS = {"__init__", "__main__", "harness"}


def sentences() -> dict[str, str]:
    """Names of the benchmarks and the first line of their docstrings, read without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body)
        if path.stem not in NO_BENCHMARKS and runs:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> int:
    """Exit status of the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure one part against its peers.")
    parser.add_argument("name", nargs="?", help="which benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    arguments = parser.parse_args()
    known = sentences()
    if arguments.list:
        width = max(map(len, known), default=0)
        for name, sentence in known.items():
            print(f"{name:{width}}  {sentence}")
        return 0
    if arguments.name not in known:
        parser.error(f"name one of: {', '.join(known) or 'none exist yet'}")
    rows = list(importlib.import_module(f"benchmarks.{arguments.name}").run())
    show(arguments.name, rows)
    if arguments.json is not None:
        save(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
