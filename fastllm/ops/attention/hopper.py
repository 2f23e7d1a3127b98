"""attention and its gradients in CUDA C++ for sm_90a (csrc/cuda/attention_sm90a.cu, attention_backward_sm90a.cu), in the place of
cuDNN's and Triton's. `refusal` says what they cannot do, `ahead` where cuDNN is not faster; the lse is the same whoever
computes it.

dq is summed by atomics, as cuDNN's: under torch.use_deterministic_algorithms(True) Triton computes the gradients.
"""

import functools

import torch
from torch import Tensor

from .. import _cuda
from .._dropout import threshold
from .._op import DTYPES, pointer
from ..rope import unit_stride
from . import cudnn
from .spec import Settings, beyond_plain, extents
from .triton_backward import gpu_backward
from .triton_forward import gpu

NAME = "CUDA C++ (sm_90: dense 16-bit, heads of 64 and 128, no bias, cap, sinks, dropout; else cuDNN or Triton)"
DIMS = (64, 128)
MOST = 1 << 30  # rows or keys
ROWS = {64: 128, 128: 64}  # of a tile of the gradients' kernel, by head dim
# Keys for which they are ahead of cuDNN on an H100 (benchmarks/LOG.md), by head dim and causality, and of the gradients
# by whether query heads share KV heads.
FORWARD = {(64, True): range(2048, MOST), (64, False): range(1024, MOST)}
FORWARD |= {(128, True): range(1024, MOST), (128, False): range(2048, MOST)}
BACKWARD = {(64, True, False): range(2048, MOST), (64, True, True): range(512, MOST)}
BACKWARD |= {(64, False, False): range(4096, MOST), (64, False, True): range(4096, MOST)}
BACKWARD |= {(128, True, False): range(0), (128, True, True): range(512, 8193)}
BACKWARD |= {(128, False, False): range(0), (128, False, True): range(0)}


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


def ahead(q: Tensor, k: Tensor, s: Settings, keys: range) -> bool:
    """Of cuDNN, or cuDNN does not take the call. Where the user has named the kernel it runs whatever it can."""
    if k.shape[1] in keys or _cuda.asked():
        return True
    return cudnn.refusal(q, k, None, None, None, None, s) is not None


def cuda(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
    train: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    settings = Settings(causal, window, scale, softcap, p, seed, call, exact)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    refused = refusal(q, k, v, cu_q, bias, alibi, sinks, settings) is not None
    if refused or not ahead(q, k, settings, FORWARD[q.shape[3], causal]):
        return gpu(q, k, v, cu_q, cu_k, bias, alibi, sinks, *settings)
    return forward(q, k, v, settings, train)


def forward(q: Tensor, k: Tensor, v: Tensor, s: Settings, train: bool) -> tuple[Tensor, Tensor | None]:
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), None  # lse: read by the backward alone
    if train:
        lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    record = (
        out.data_ptr(), pointer(lse), q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, 0, 0, 0, *extents(q, k),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plainly(q, s),
    )  # fmt: skip
    _cuda.launch("attention", record, torch.empty(1, dtype=torch.int32, device=q.device), q.device)
    return out, lse


def plainly(q: Tensor, s: Settings) -> tuple:
    """The end of a record: strides of no bias, dtypes, settings."""
    return (*(0,) * 6, DTYPES[q.dtype], 0, s.causal, s.window, s.seed, s.call, threshold(s.p), s.scale, s.softcap, s.p)


def cuda_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    bias_gradient: bool,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = Settings(causal, window, scale, softcap, p, seed, call, exact)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    refused = refusal(q, k, v, cu_q, bias, alibi, sinks, settings) is not None
    refused = refused or torch.are_deterministic_algorithms_enabled()
    if refused or not ahead(q, k, settings, BACKWARD[q.shape[3], causal, q.shape[2] > k.shape[2]]):
        return gpu_backward(dout, q, k, v, out, lse, cu_q, cu_k, bias, alibi, sinks, bias_gradient, *settings)
    nothing = q.new_empty(0)
    return *backward(dout, q, k, v, out, lse, settings), nothing, nothing


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    if not copyable(dout):
        dout = dout.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    rows = -(-q.shape[1] // ROWS[q.shape[3]]) * ROWS[q.shape[3]] * q.shape[0] * q.shape[2]  # a whole number of tiles
    scratch = torch.empty(rows * (2 + q.shape[3]), dtype=torch.float32, device=q.device)  # lse and delta; dq
    record = (
        dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), 0, 0, dout.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
        out.data_ptr(), lse.data_ptr(), 0, 0, 0, 0, 0, *extents(q, k),
        *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plainly(q, s),
    )  # fmt: skip
    _cuda.launch("attention_backward", record, scratch, q.device)
    return dq, dk, dv
