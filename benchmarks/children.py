"""A child process that takes orders: an object of JSON per line to its standard input, one per line back.

A child that waits for orders uses no CPU, so that nobody's threads spin into another's time.
"""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.decoder_models import ROOT
from benchmarks.harness import PeerAbsent

PEERS = ROOT / ".venv" / "opt" / "peers"
LLAMA = ROOT / ".venv" / "opt" / "llama"
"""llama-cpp-python's source distribution and the libraries built of it for this CPU, both by scripts/bench."""


class OrderedChild:
    """`python -m MODULE ARGUMENTS` with the peers at hand; `greeting` is what it says when it is up.

    Raises PeerAbsent when it ends by itself.
    """

    def __init__(self, module: str, arguments: list[str], threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(PEERS), str(LLAMA / "src")))}
        environment |= {"LLAMA_CPP_LIB_PATH": str(LLAMA / "build" / "bin"), "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.greeting = self._answer()

    def ask(self, **order: int) -> dict[str, Any]:
        """Have one thing done."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, errors = self.process.communicate()
            raise PeerAbsent((errors.strip().splitlines() or ["it ended without a word"])[-1][:300])
        answer: dict[str, Any] = json.loads(line)
        return answer
