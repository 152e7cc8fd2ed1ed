"""The decoder child: turns a staged pack into a version directory, then ends. Started with `python -m agent.decoder`.

The only module of this package that imports codec, and with it numpy: a crash, a hang or an exhausted memory of the
decoder is the child's, never the agent's. It reaches no network and no journal; a crash leaves a half-written directory
in work/, which nobody takes for a version. On stdin come lines `first last`: numbers of frames that are in the pack by
now; it ends when all are. The last line on stdout is `{}` or `{"code": ..., "message": ...}`.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from host.files import read_bounded, sync_files
from wire.documents import DOCUMENT_LIMIT_BYTES, parse_document
from wire.errors import AmperageError, Code, StoreError
from wire.manifest import Manifest

READ_BYTES = 64 * 1024
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    """Decode; the exit status is 0, or 1 after a typed error was written."""
    parser = argparse.ArgumentParser(prog="agent.decoder")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--pack", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args(arguments)
    _die_with(options.parent)
    try:
        _decode(options)
    except AmperageError as error:
        _answer({"code": error.code.value, "message": error.message})
        return 1
    except OSError as error:
        code = Code.NO_SPACE if error.errno in (28, 122) else Code.IO_ERROR  # ENOSPC, EDQUOT
        _answer({"code": code.value, "message": f"decoding: {error}; free space or check the disk"})
        return 1
    _answer({})
    return 0


def _decode(options: argparse.Namespace) -> None:
    from codec.decoder import decode_pack  # after the parent was checked: it takes a while and brings numpy

    try:
        document = read_bounded(options.manifest, DOCUMENT_LIMIT_BYTES)
    except FileNotFoundError as error:
        raise StoreError(Code.CORRUPT, f"{options.manifest} is missing; order the release again") from error
    manifest = parse_document(Manifest, document, code=Code.BAD_MANIFEST)
    decode_pack(
        manifest, options.pack, options.into, base=options.base, threads=options.threads, arriving=_arriving_frames()
    )
    sync_files(options.into)  # here, where waiting for the disk holds up nobody; the engine commits


def _arriving_frames() -> Iterator[range]:
    """What stdin says, read past sys.stdin: the pack may be whole before the last line is read, and a thread that holds
    the lock of sys.stdin while the interpreter ends makes it abort."""
    rest = b""
    while data := os.read(0, READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            first, last = map(int, line.split())
            yield range(first, last + 1)


def _answer(body: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


def _die_with(parent: int) -> None:
    """Do not outlive the agent (prctl(2)): a second decoder would race for the same disk."""
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
