"""One block of zeroed memory that takes room when it is written to: for all packed weights, and for a KV cache.

Weights lie on huge pages where the system gives them: panels are read once per token from end to end, and with 4 KiB
pages the page walks alone would cost bandwidth.
"""

import mmap

import torch
from torch import Tensor

HUGE = 2 << 20


class Arena:
    """Gives out aligned uint8 tensors from one mapping of `nbytes`; they keep it alive. huge: on huge pages."""

    def __init__(self, nbytes: int, huge: bool = True):
        """MemoryError when the system refuses the mapping."""
        try:
            # private: a shared mapping, Python's default, gets no huge pages
            self._map = mmap.mmap(-1, nbytes + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no {nbytes / 1e9:.2f} GB of memory: {error}") from error
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
