"""Triton, where it is of use: the import guard and what launchers share.

Importing Triton costs 70 MB and a quarter of a second, so a torch built without CUDA leaves it out, unless TRITON_INTERPRET
or FASTLLM_TRITON asks for it (to interpret kernels, or to compile them ahead of time). `fastllm` imports without it: an op
file writes `from ._triton import tl, triton` and decorates with `@triton.jit` through the stand-ins below, which keep the
source of a kernel without compiling it.
"""

import functools
import os

import torch

try:
    if not (torch.version.cuda or os.environ.get("TRITON_INTERPRET") or os.environ.get("FASTLLM_TRITON")):
        raise ImportError("this torch is built without CUDA; FASTLLM_TRITON=1 loads Triton all the same")
    import triton
    import triton.language as tl

    _missing = None
except ImportError as error:  # of no use here, or not shipped for this platform
    _missing = f"no Triton: {error}"

    class triton:
        """Keeps op files importable where Triton is not installed."""

        @staticmethod
        def jit(function=None, **options):
            return function if function else lambda function: function

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length() if n > 1 else 1

    class tl:
        @staticmethod
        def constexpr(value):
            return value


@functools.cache
def available() -> bool:
    return _missing is None and torch.cuda.is_available()


def unavailable_reason() -> str:
    return _missing or "no CUDA device"


def on_device(launcher):
    """Triton launches on the current device: with several, a launcher first goes to where its tensors are."""
    if torch.cuda.device_count() < 2:
        return launcher

    @functools.wraps(launcher)
    def launch(*args, **options):
        with torch.cuda.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
            return launcher(*args, **options)

    return launch


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device) -> int:
    """How many programs fill the device once (4 on the interpreter, enough to test the reduction over programs)."""
    return multiprocessors(device.index or 0) if device.type == "cuda" else 4


def row_warps(block: int, itemsize: int) -> int:
    """Warps for a program that holds a row of `block` elements: 32 bytes a thread, two 16-byte loads in flight."""
    return min(16, max(1, block * itemsize // 1024))
