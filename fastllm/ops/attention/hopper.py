"""attention forward in CUDA C++ for sm_90a (csrc/cuda/attention_sm90a.cu), in the place of cuDNN's and Triton's where
FASTLLM_CUDA_KERNELS names `attention`. `refusal` says which calls it leaves to them; its lse is what every backward reads.
"""

import functools

import torch
from torch import Tensor

from .. import _cuda
from .._dropout import threshold
from .._op import DTYPES, pointer
from ..rope import unit_stride
from .spec import Settings, beyond_plain
from .triton_forward import gpu

NAME = "CUDA C++ (sm_90: dense 16-bit, heads of 64 and 128, no bias, cap, sinks, dropout; else cuDNN or Triton)"
DIMS = (64, 128)
MOST = 1 << 30  # rows or keys


def refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    s: Settings,
) -> str | None:
    """Why this kernel does not take the call; None when it does."""
    if (reason := beyond_plain(q, k, cu_q, bias, alibi, sinks, s)) is not None:
        return reason
    if q.shape[3] not in DIMS:  # a head is one or two boxes of the copy engine, and its sums must fit the registers
        return f"head dim {q.shape[3]}: {' or '.join(map(str, DIMS))}"
    if s.scale <= 0:
        return f"scale {s.scale}: above 0"
    if max(q.shape[1], k.shape[1]) >= MOST:
        return f"2^30 rows or keys and more: {max(q.shape[1], k.shape[1])}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not copyable(x):
            return f"{name} with strides {x.stride()}: rows, heads and batch must lie multiples of 16 bytes apart"
    if q.device.type == "cuda" and capability(q.device.index or 0) != (9, 0):
        return f"compute capability {'.'.join(map(str, capability(q.device.index or 0)))}: 9.0, for WGMMA and TMA"
    return None


def copyable(x: Tensor) -> bool:
    """Whether the copy engine takes it: it steps by multiples of 16 bytes, below 2^40, and not by none."""
    steps = [step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(0 < s < 1 << 39 and s % 8 == 0 for s in steps)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def cuda(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
    train: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    settings = Settings(causal, window, scale, softcap, p, seed, call, exact)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if refusal(q, k, v, cu_q, bias, alibi, sinks, settings) is not None:
        return gpu(q, k, v, cu_q, cu_k, bias, alibi, sinks, *settings)
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), None  # lse: read by the backward alone
    if train:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    record = (
        out.data_ptr(), pointer(lse), q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, 0, 0, 0, *sizes, *strides,
        *(0,) * 6, DTYPES[q.dtype], 0, causal, window, seed, call, threshold(p), scale, softcap, p,
    )  # fmt: skip
    _cuda.launch("attention", record, torch.empty(1, dtype=torch.int32, device=q.device), q.device)
    return out, lse
