"""What a compiled GPU kernel takes: registers a thread, bytes spilled, shared memory a block. `pytest -s` prints it."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one block may use
# Bytes of a thread that may be spilled: none where kernels were fitted, a few where they were only compiled. Attention has larger
# blocks: on sm_90 the clock found them fastest, elsewhere they were fitted to heads of 64 alone. By far the most is in the
# gradients of keys and values with a window and a cap, heads of 128: on sm_90 blocks without spills take 1.43 times as long
SPILLED = {80: 0, 89: 24, 90: 0, 100: 8}
ATTENTION = {80: 136, 89: 64, 90: 136, 100: 104}
KEYS = {80: 136, 89: 144, 90: 480, 100: 680}


class Use(NamedTuple):
    kernel: str
    arch: str  # "sm_90a"
    registers: int
    spilled: int
    shared: int
    note: str = ""  # which of its variants

    @property
    def fits(self) -> bool:
        arch = int(re.sub(r"\D", "", self.arch))
        attention = KEYS if self.kernel == "triton_backward.keys_kernel" else ATTENTION
        spilled = (attention if self.kernel.startswith("triton_") else SPILLED)[arch]
        return self.spilled <= spilled and self.shared <= SHARED_MEMORY[arch]

    def __str__(self) -> str:
        return (
            f"{self.kernel:32} {self.arch:7} {self.registers:3} registers {self.spilled:4} spilled {self.shared:6} shared"
            f"  {self.note}"
        )


def of_cubin(tool: Path, cubin: Path) -> tuple[int, int]:
    """Registers and bytes spilled (stack and local memory), as ptxas placed them."""
    text = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def of_ptxas(output: str) -> list[Use]:
    """Every kernel in what `nvcc -Xptxas -v` prints."""
    found = re.findall(
        r"entry function '(\w+)' for '(sm_\w+)'\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads\n.*Used (\d+) registers(.*)",
        output,
    )
    return [
        Use(
            m[1] if (m := re.search(r"([a-z_]+kernel)", name)) else name,  # mangled
            arch,
            int(registers),
            sum(map(int, spills)),
            sum(map(int, re.findall(r"(\d+) bytes smem", rest))),
        )
        for name, arch, *spills, registers, rest in found
    ]


def check(uses: Iterable[Use]) -> None:
    """Prints the report, most registers first, and lets no kernel spill more, or take more shared memory, than it may."""
    uses = sorted(uses, key=lambda u: (-u.registers, *u[:2], u.note))
    print("", *uses, sep="\n")
    assert uses, "no kernel was compiled"
    bad = [str(u) for u in uses if not u.fits]
    assert not bad, "\n".join(bad)
