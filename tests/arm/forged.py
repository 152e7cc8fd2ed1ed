"""What this machine forges for tests on another kind: `python -m tests.arm.forged DIRECTORY`.

Versions of the samples by the names of their checkpoints, the base with `-int8-cache` too: tests/runtime_fixtures.py
takes them where AMPERAGE_FORGED names the directory. And `release`, of `successor`, full and as a delta to the base. A
model is forged once and proved on every kind of node; a test on Arm that forged its own would prove the wrong thing.
"""

import shutil
import sys
from pathlib import Path

from forge.build import build_version
from forge.cache_scales import Int8Cache
from forge.release import make_release
from host.keys import create_key, load_signer

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
MODEL = "tales"
BASE, TUNED = "tales-5m-base", "tales-5m-finetuned-50"


def forge(out: Path) -> None:
    """Replace `out`; a crash leaves `out` half made or its temporary name, which the next call replaces."""
    temporary = out.with_name(f".{out.name}.forging")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    build_version(SAMPLES / BASE, temporary / BASE, (MODEL, "1.0"))
    build_version(SAMPLES / BASE, temporary / f"{BASE}-int8-cache", (MODEL, "1.0"), cache=Int8Cache())
    build_version(SAMPLES / TUNED, temporary / TUNED, (MODEL, "2.0"))
    build_version(SAMPLES / TUNED, temporary / "successor", (MODEL, "2.0"), scales_of=temporary / BASE)
    create_key(temporary / "key")
    signer = load_signer(temporary / "key")
    make_release(temporary / "successor", temporary / "release", signer, sequence=1, base_dir=temporary / BASE)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


if __name__ == "__main__":
    forge(Path(sys.argv[1]))
