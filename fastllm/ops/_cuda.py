"""The CUDA C++ kernels: whether their library can be used, which ops are to run them, and how one is called.

Where an op has both, FASTLLM_CUDA_KERNELS names the ops that run in CUDA C++; where it is not set, all do: `fastllm bench OP
--device cuda` found each of them faster, but for calls that its launcher leaves to Triton, cuBLAS or cuDNN.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import _C
from ._op import pointer

VARIABLE = "FASTLLM_CUDA_KERNELS"
OPS = tuple(_C.cuda_kernels())


def asked() -> bool:
    """Whether the user has said which."""
    return VARIABLE in os.environ


@functools.cache
def wanted() -> frozenset[str]:
    """The ops that are to run in CUDA C++. FASTLLM_CUDA_KERNELS: names with commas between, "all", or nothing for none."""
    if not asked():
        return frozenset(OPS)
    names = frozenset(name.strip() for name in os.environ[VARIABLE].split(",") if name.strip())
    if names == {"all"}:
        return frozenset(OPS)
    if unknown := names - set(OPS):
        raise ValueError(f"{VARIABLE} names {', '.join(sorted(unknown))}; allowed: {', '.join(OPS)}, or all alone")
    return names


@functools.cache
def library() -> tuple[bool, str]:
    """(usable, why): the compiled CUDA library beside the core."""
    path = Path(__file__).parents[1] / "_cuda.so"
    if not path.exists():
        return False, "not built: this copy of fastllm was compiled without nvcc (FASTLLM_CUDA=1 asks for it)"
    try:
        count = _C.load_cuda(str(path))
    except (RuntimeError, OSError) as error:
        return False, f"broken: {error}"
    version = _C.cuda_runtime_version()
    if count > 0:
        archs, capabilities = _C.cuda_architectures(), [_C.cuda_capability(device) for device in range(count)]
        foreign = next((d for d, capability in enumerate(capabilities) if not serves(archs, capability)), None)
        if foreign is not None:
            wanted = (
                f"GPU {foreign} is sm_{capabilities[foreign]}: build with FASTLLM_CUDA_ARCHS={capabilities[foreign]}"
            )
            return False, f"it holds code for {archs}, and {wanted}"
        return True, f"CUDA {version // 1000}.{version % 1000 // 10}, {count} GPU(s)"
    if count == -35 and driver():  # cudaErrorInsufficientDriver: too old, or none at all
        return False, f"driver {driver()} is too old for CUDA {version // 1000}"
    if count == -35:
        return False, "no NVIDIA driver"
    return False, _C.cuda_error(-count) if count else "no GPU"


def serves(archs: str, capability: int) -> bool:
    """Whether code for "80;90+PTX" runs on a GPU of capability 86, say: machine code does within its generation, not on an
    older one, and PTX on any later one; that of 90a nowhere else, that of 100f in its generation."""
    for arch in archs.split(";"):
        name, ptx = arch.removesuffix("+PTX"), arch.endswith("+PTX")
        number = int(name.rstrip("af"))
        within = number <= capability and number // 10 == capability // 10
        later = ptx and number <= capability and name.isdigit()
        if number == capability or (not name.endswith("a") and within) or later:
            return True
    return False


def driver(path: str = "/proc/driver/nvidia/version") -> str | None:
    """The version of the NVIDIA driver."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    words = next((line for line in lines if "NVRM" in line), "").split()
    return next((word for word in words if word[0].isdigit() and "." in word), None)


@contextlib.contextmanager
def weights_rest() -> Iterator[None]:
    """What this thread launches within writes no weight that it reads, and where tokens stand (positions, slots, lengths, page
    numbers) at its end alone, as in a step of decoding: a kernel may begin with these while the one before is still at work."""
    _C.cuda_weights_rest(True)
    try:
        yield
    finally:
        _C.cuda_weights_rest(False)


def launch(kernel: str, fields: tuple, scratch: Tensor | None, device: torch.device) -> None:
    """Runs a kernel on the current stream; its record is that of the CPU kernel of its name. RuntimeError: CUDA's own."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if code := getattr(_C, f"cuda_{kernel}")(*fields, pointer(scratch), stream):
        raise RuntimeError(f"{kernel}: the CUDA kernel could not be launched: {_C.cuda_error(code)}")
