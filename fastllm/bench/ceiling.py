"""What the machine can do at best, measured: the yardstick of every benchmark.

On a CPU by three small kernels (csrc/cpu/ceiling.cpp): memory read by many streams with prefetch, register-only fp32
FMA chains, and 8-bit dot products. On a GPU by torch: a copy (read + write) and a square matmul.
"""

import contextlib
import functools
import mmap
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .. import _C
from ..info import cache_sizes

SECONDS, PASSES = 0.3, 10  # how long, at least, and how often a ceiling is looked for
ITERATIONS = 5_000  # of a peak kernel: a quarter of a millisecond, short enough to fit between other processes' turns


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _gpu_seconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Ceiling:
    """run() does `work` bytes or operations; unit: GB/s, GFLOP/s or GOP/s (8-bit); clock(run): the seconds that takes."""

    name: str
    unit: str
    work: int
    run: Callable[[], object]
    clock: Callable[[Callable[[], object]], float] = _seconds

    def rate(self, seconds: float) -> float:
        return self.work / seconds / 1e9

    def best(self) -> float:
        """The rate of the fastest pass: what the machine does when nothing disturbs it."""
        return self.rate(min(self._passes(SECONDS, PASSES)))

    def sustained(self, seconds: float = SECONDS) -> float:
        """The rate over some seconds. Memory is shared with the neighbours of a virtual machine: its best pass tells what
        they left for a millisecond, and a decode lasts longer."""
        return self.rate(statistics.mean(self._passes(seconds, 2)))

    def _passes(self, seconds: float, least: int) -> list[float]:
        end, times = time.perf_counter() + seconds, []
        while len(times) < least or time.perf_counter() < end:
            times.append(self.clock(self.run))
        return times


def huge_buffer(size: int) -> torch.Tensor:
    """`size` bytes on huge pages where the system grants them, first touched by the threads that read them."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # a shared mapping, the default, gets no huge pages
    memory = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32).fill_(1)


@functools.cache
def read_ceiling() -> Ceiling:
    """Reads far more than the last-level cache, of which a virtual machine may see a part only; the number of streams is
    the best of four on this machine."""
    size = min(max(8 * cache_sizes()[1], 512 << 20), 1 << 30) // 4096 * 4096
    data, total = huge_buffer(size), torch.zeros(1, dtype=torch.int32)

    def reader(streams: int) -> Callable[[], object]:
        return lambda: _C.read_bandwidth(total.data_ptr(), data.data_ptr(), size // 64, streams, 1024)

    readers = [reader(streams) for streams in (1, 4, 8, 16)]
    fastest = min(readers, key=lambda run: min(_seconds(run) for _ in range(6)))
    return Ceiling("memory read", "GB/s", size, fastest)


@functools.cache
def _peak(name: str, unit: str, kernel: str, factor: float, term: float, threads: int) -> Ceiling:
    result, done = torch.zeros(threads, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def run() -> object:
        return getattr(_C, kernel)(result.data_ptr(), done.data_ptr(), ITERATIONS, factor, term)

    run()
    return Ceiling(name, unit, done.item(), run)


def fma_ceiling() -> Ceiling:
    return _peak("fp32 FMA", "GFLOP/s", "fma_peak", 0.999, 0.001, _C.max_threads())


def dot_ceiling() -> Ceiling:
    return _peak("8-bit dot", "GOP/s", "dot_peak", 1, 1, _C.max_threads())


@functools.cache
def copy_ceiling() -> Ceiling:
    source = torch.ones(256 << 20, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return Ceiling("copy", "GB/s", 2 * source.nbytes, lambda: target.copy_(source), _gpu_seconds)


@functools.cache
def matmul_ceiling(dtype: torch.dtype) -> Ceiling:
    n, name = 4096, f"{str(dtype).removeprefix('torch.')} matmul"
    a, b = (torch.randn(n, n, device="cuda").mul(40 if dtype == torch.int8 else 1).to(dtype) for _ in range(2))
    if dtype == torch.int8:  # cuBLAS wants the second one by columns
        return Ceiling(name, "GOP/s", 2 * n**3, lambda: torch._int_mm(a, b.t()), _gpu_seconds)
    out = torch.empty_like(a)
    return Ceiling(name, "GFLOP/s", 2 * n**3, lambda: torch.mm(a, b, out=out), _gpu_seconds)


def ceilings(device: str, dtype: torch.dtype, peak: str = "fma") -> tuple[Ceiling, Ceiling]:
    """(bandwidth, arithmetic) for a device, a dtype and the unit that a suite's flops run on: "fma" or "dot"."""
    if device == "cuda":
        return copy_ceiling(), matmul_ceiling(torch.int8 if peak == "dot" else dtype)
    return read_ceiling(), dot_ceiling() if peak == "dot" else fma_ceiling()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    previous = _C.set_thread_limit(count or 0)
    try:
        yield
    finally:
        _C.set_thread_limit(previous)


def read_bandwidth(threads: int | None = None, seconds: float = SECONDS) -> float:
    """GB/s at which `threads` threads together read memory over some seconds (default: all that torch uses)."""
    with _threads(threads):
        return read_ceiling().sustained(seconds)


def memory_bandwidth(device: torch.device, threads: int | None = None) -> float:
    """GB/s that a decode on a device can reach at most: of reads on a CPU, of a copy (read + write) on a GPU."""
    return copy_ceiling().best() if device.type == "cuda" else read_bandwidth(threads)


def fma_peak(threads: int | None = None) -> float:
    """fp32 GFLOP/s of `threads` threads in registers."""
    with _threads(threads):
        return fma_ceiling().best()


def dot_peak(threads: int | None = None) -> float:
    """GOP/s of `threads` threads in u8 x s8 dot products."""
    with _threads(threads):
        return dot_ceiling().best()
