"""Triton, loaded when its first kernel is asked for, and what launchers share.

Importing Triton costs 70 MB and a third of a second, for nothing where no GPU is used. So an op file writes
`from ._triton import tl, triton` and decorates with `@triton.jit` through the stand-ins below, which keep a kernel's
source; `load` puts Triton's own in their place, in every module of this package. Where it is not installed they stay.
"""

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch


class Source:
    """A kernel that Triton has not seen yet."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        self.function, self.options = function, options


class Constant:
    """Of a kernel: a value at the head of its module, or the annotation of an argument."""

    def __init__(self, value: Any):
        self.value = value


class triton:
    """What op files use of the module. Its own host functions would cost a launch 2 us each: they are made to run in kernels."""

    @staticmethod
    def jit(function=None, **options):
        return Source(function, options) if function else lambda function: Source(function, options)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length() if n > 1 else 1


class tl:
    """triton.language, likewise."""

    constexpr = Constant


_loading = threading.RLock()


def load() -> str | None:
    """Loads Triton and gives it every kernel, once; None, or why there is none."""
    with _loading:
        return _load()


@functools.cache
def _load() -> str | None:
    try:
        import triton as real
        import triton.language as language
    except ImportError as error:
        return f"no Triton: {error}"
    triton.jit = staticmethod(real.jit)
    stand_ins, package = {tl: language}, __name__.split(".")[0]  # this module's own tl is replaced too
    spaces = [vars(m) for n, m in list(sys.modules.items()) if n.startswith(f"{package}.")]
    found = [(space, name, value) for space in spaces for name, value in space.items()]
    for _, _, value in found:
        if isinstance(value, Source) and value not in stand_ins:
            kept = value.function.__annotations__
            value.function.__annotations__ = {k: language.constexpr if v is Constant else v for k, v in kept.items()}
            stand_ins[value] = real.jit(**value.options)(value.function)
    for space, name, value in found:
        if isinstance(value, Constant):
            space[name] = language.constexpr(value.value)
        elif isinstance(value, (Source, type)) and value in stand_ins:
            space[name] = stand_ins[value]
    return None


@functools.cache
def available() -> bool:
    return bool(torch.version.cuda) and torch.cuda.is_available() and load() is None


def unavailable_reason() -> str:
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    return "no CUDA device" if not torch.cuda.is_available() else load() or ""


def on_device(launcher):
    """Triton launches on the current device: with several, a launcher first goes to where its tensors are."""
    if torch.cuda.device_count() < 2:
        return launcher

    @functools.wraps(launcher)
    def launch(*args, **options):
        lists = (a if isinstance(a, (list, tuple)) else (a,) for a in args)
        with torch.cuda.device(next(t.device for a in lists for t in a if isinstance(t, torch.Tensor))):
            return launcher(*args, **options)

    return launch


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """How many programs fill the device once (4 on the interpreter, enough to test the reduction over programs)."""
    return multiprocessors(device.index or 0) if device.type == "cuda" else 4


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether kernels may take matrices as descriptors, which the copy engine of Hopper and later reads."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def roomy(device: torch.device) -> bool:
    """Whether a program may hold as much as Hopper lets it: 227 KB of shared memory, filled by its copy engine."""
    if not has_descriptors(device):
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 << 10


def matrix(x: torch.Tensor, rows: int, cols: int) -> Any:
    """A descriptor of x [R, C], of which blocks of rows x cols are read, or None where pointers must do: an older GPU or
    Triton, rows that do not begin at multiples of 16 bytes."""
    fits = x.numel() > 0 and x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0
    if not fits or x.data_ptr() % 16 or not has_descriptors(x.device):
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols])


def row_warps(block: int, itemsize: int) -> int:
    """Warps for a program that holds a row of `block` elements: 32 bytes a thread, two 16-byte loads in flight."""
    return min(16, max(1, block * itemsize // 1024))


_MOST_ROWS = tl.constexpr(65535)  # a grid's second size, at most


def grid_of(rows: int, cols: int, block: int) -> tuple[int, int, int]:
    """A program for each `block` columns of each row. Neighbours take neighbouring columns: memory is walked as it lies."""
    most = _MOST_ROWS.value
    return triton.cdiv(cols, block), min(rows, most), triton.cdiv(rows, most)


@triton.jit
def row_of_grid():
    """Of a program of such a grid; beyond the last one where there are many."""
    return tl.program_id(2).to(tl.int64) * _MOST_ROWS + tl.program_id(1)


@triton.jit
def place(rows, cols, BLOCK: tl.constexpr, FLAT: tl.constexpr = False):
    """Of a program of such a grid: its row, its columns, and which of them exist. FLAT: there is one row."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, inside = 0, col < cols
    if not FLAT:
        row = row_of_grid()
        inside = inside & (row < rows)
    return row, col, inside
