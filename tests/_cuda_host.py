"""Where the tests of the CUDA C++ kernels run: on a GPU, or on this processor with the library that tests/cuda_host makes of
the same sources, which FASTLLM_CUDA_HOST names."""

import ctypes
import os

from fastllm import _C
from fastllm.ops import _cuda

HOST = os.environ.get("FASTLLM_CUDA_HOST")
DEVICE = "cpu" if HOST else "cuda"

if HOST:
    _C.load_cuda(HOST)
    _library = ctypes.CDLL(HOST)
else:
    assert _cuda.library()[0], _cuda.library()[1]


def pose(major: int = 9, shared_memory: int = 227 << 10) -> None:
    """What the library on a processor takes its device for; a GPU is what it is."""
    if HOST:
        _library.cuda_host_device(major, shared_memory)


def order(seed: int, multiprocessors: int | None = None) -> None:
    """The order in which threads take turns and copies end on a processor, and how many blocks run beside each other there."""
    if HOST:
        _library.cuda_host_seed(ctypes.c_uint64(seed))
        if multiprocessors is not None:
            _library.cuda_host_multiprocessors(multiprocessors)
