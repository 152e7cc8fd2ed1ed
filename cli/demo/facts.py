"""What the demo saw: steps, checks and figures, and the JSON that carries them.

Invariant: a step held only if every one of its checks held and it raised nothing; the demo held only if every step did.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Check:
    """One claim, whether it held, and what was seen."""

    claim: str
    held: bool
    seen: str


@dataclass(slots=True)
class Step:
    """One numbered step with its checks and figures; `figures` values are JSON scalars, lists or dictionaries."""

    number: int
    title: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    started_s: float = field(default_factory=time.monotonic)
    seconds: float | None = None

    @property
    def held(self) -> bool:
        """True when the step ended, raised nothing and every check held (at least one was made)."""
        return (
            self.seconds is not None and self.error is None and bool(self.checks) and all(c.held for c in self.checks)
        )

    def check(self, claim: str, held: bool, seen: object = "") -> bool:
        """Record a claim; returns `held`."""
        self.checks.append(Check(claim, bool(held), str(seen)))
        return bool(held)

    def finish(self) -> None:
        """Note the duration."""
        self.seconds = round(time.monotonic() - self.started_s, 2)


@dataclass(slots=True)
class Facts:
    """All steps of one run."""

    expected_steps: int
    steps: list[Step] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """True when all expected steps ran and held."""
        return len(self.steps) == self.expected_steps and all(step.held for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        return {
            "held": self.held,
            "steps": [
                {
                    "step": step.number,
                    "title": step.title,
                    "held": step.held,
                    "seconds": step.seconds,
                    "error": step.error,
                    "checks": [{"claim": c.claim, "held": c.held, "seen": c.seen} for c in step.checks],
                    "figures": step.figures,
                }
                for step in self.steps
            ],
        }

    def write(self, path: Path) -> None:
        """Write the JSON to `path`."""
        path.write_text(json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")
