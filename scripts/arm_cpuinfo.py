"""Prints /proc/cpuinfo as Linux would on the core that runs this: `arm_cpuinfo.py PROCESSORS`.

For scripts/test-arm: qemu-user of Debian 12 shows programs the /proc/cpuinfo of the x86 below them. The core's name is
read from the register MIDR_EL1, which Linux lets programs read (Documentation/arch/arm64/cpu-feature-registers.rst),
and the features are those of the auxiliary vector that runtime/cpu.py knows. The format is that of c_show in
arch/arm64/kernel/cpuinfo.c.
"""

import ctypes
import mmap
import sys

from runtime.cpu import detect_cpu

MRS_X0_MIDR_EL1_RET = bytes.fromhex("000038d5c0035fd6")


def main_id_register() -> int:
    """MIDR_EL1 of the core, by two instructions of machine code."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(MRS_X0_MIDR_EL1_RET)
    return int(ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))())


def cpuinfo(processors: int, register: int, features: tuple[str, ...]) -> str:
    """The text for `processors` equal cores."""
    fields = {
        "BogoMIPS": "50.00", "Features": " ".join(("fp", "asimd", *features)),
        "CPU implementer": f"0x{register >> 24 & 0xFF:02x}", "CPU architecture": "8",
        "CPU variant": f"0x{register >> 20 & 0xF:x}", "CPU part": f"0x{register >> 4 & 0xFFF:03x}",
        "CPU revision": str(register & 0xF),
    }  # fmt: skip
    lines = [f"{name}: {value}" if len(name) > 15 else f"{name}\t: {value}" for name, value in fields.items()]
    return "".join("\n".join((f"processor\t: {number}", *lines, "", "")) for number in range(processors))


if __name__ == "__main__":
    print(cpuinfo(int(sys.argv[1]), main_id_register(), detect_cpu().features), end="")
