"""One block of zeroed memory that takes room when it is written to: for all packed weights, and for a KV cache; and how much
memory there is.

Weights lie on huge pages where the system gives them: panels are read once per token from end to end, and with 4 KiB
pages the page walks alone would cost bandwidth.
"""

import errno
import math
import mmap
import os
import re

import torch
from torch import Tensor

HUGE = 2 << 20


class Arena:
    """Gives out aligned uint8 tensors from one mapping of `nbytes`; they keep it alive. huge: on huge pages."""

    def __init__(self, nbytes: int, huge: bool = True):
        """MemoryError, with what there is, when the system refuses the mapping."""
        try:
            self._map = _map(nbytes + 2 * HUGE)
        except (OSError, OverflowError) as error:
            raise MemoryError(_refusal(nbytes)) from error
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE
        self._free = whole[start:]
        self.nbytes = nbytes
        self.used = 0

    def take(self, nbytes: int, align: int = 4096) -> Tensor:
        """uint8 [nbytes], aligned."""
        start = -(-self.used // align) * align
        if start + nbytes > self._free.numel():
            raise MemoryError(f"arena of {self.nbytes} bytes is full: {self.used} used, {nbytes} more asked for")
        self.used = start + nbytes
        return self._free[start : self.used]


def _map(nbytes: int) -> mmap.mmap:
    # private: a shared mapping, Python's default, gets no huge pages
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def available(most: int) -> int:
    """How many bytes, of `most`, the system would give now in one piece."""
    least, most = 0, min(most, 1 << 47)
    while most - least > max(HUGE, least >> 6):
        half = (least + most) // 2
        try:
            _map(half).close()
            least = half
        except OSError:
            most = half
    return least


def available_memory(device: torch.device) -> float:
    """Bytes that are free for a process on this device; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            found = {line.split(":")[0]: line.split()[1] for line in file}
        free = float(found["MemAvailable"]) * 1024
    except (OSError, KeyError, IndexError):
        try:
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError):
            return math.inf
    return min(free, _cgroup_room())


def _cgroup_room() -> float:
    """What the limit of a container leaves."""
    try:
        with open("/sys/fs/cgroup/memory.max") as most, open("/sys/fs/cgroup/memory.current") as now:
            limit = most.read().strip()
            return math.inf if limit == "max" else float(limit) - float(now.read())
    except (OSError, ValueError):
        return math.inf


def lack_of_memory(error: BaseException, what: str, step: str) -> MemoryError | None:
    """An error that is for want of memory as one that says so, and for what; None for another one. step: what to do."""
    nbytes = None
    if isinstance(error, torch.OutOfMemoryError):  # a GPU's; the rest of its message is about the allocator
        return MemoryError(f"{what}: {'. '.join(str(error).split('. ')[:2])}; {step}")
    if isinstance(error, RuntimeError):  # of torch's allocator
        found = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))
        if not found:
            return None
        nbytes = int(found[1])
    elif not isinstance(error, MemoryError) and getattr(error, "errno", None) != errno.ENOMEM:
        return None
    reason = _refusal(nbytes) if nbytes else str(error) or "no memory for what its kernels need beside their results"
    return MemoryError(f"{what}: {reason}; {step}")


def _refusal(nbytes: int) -> str:
    reason = os.strerror(errno.ENOMEM)
    return f"{_amount(nbytes)} are asked for and refused ({reason}), {_amount(available(nbytes))} could be had"


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
