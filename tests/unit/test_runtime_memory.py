"""The C heap of the runtime: what large blocks leave behind."""

import subprocess
import sys

FREED_UNDER_A_SMALL_BLOCK = """
import ctypes
from runtime.memory import anonymous_bytes, tighten_heap

tighten_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.free(libc.malloc(24 << 20))  # after this, glibc left to itself takes blocks of 24 MiB from the heap
large = libc.malloc(16 << 20)
ctypes.memset(large, 1, 16 << 20)
small = libc.malloc(100 << 10)
before = anonymous_bytes()
libc.free(large)
print(before - anonymous_bytes())
"""


def test_a_large_block_below_a_small_one_goes_back_when_freed() -> None:
    command = [sys.executable, "-c", FREED_UNDER_A_SMALL_BLOCK]
    given_back = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert given_back >= 15 << 20
