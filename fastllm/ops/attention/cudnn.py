"""attention by cuDNN, through torch: faster than our kernels on the shapes that it takes (benchmarks/LOG.md), until they
win. `refusal` is the one place that decides; the Triton kernels serve everything else.

cuDNN's backward adds dq with atomics: under torch.use_deterministic_algorithms(True) ours runs, and so it does
under torch.backends.cuda.enable_cudnn_sdp(False).
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .spec import Settings, beyond_plain

REASON = "cuDNN through torch: dense 16-bit, causal or full, no bias, window, cap, sinks, dropout; Triton: all else"
MAX_DIM = 128  # of cuDNN's backward


def refusal(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor | None,
    bias: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    s: Settings,
) -> str | None:
    """Why cuDNN does not take this call; None when it does. The same for a forward and its backward."""
    queries, keys, dim = q.shape[1], k.shape[1], q.shape[3]
    if q.device.type != "cuda":
        return f"device {q.device.type}"
    if (reason := beyond_plain(q, k, cu_q, bias, alibi, sinks, s)) is not None:
        return reason
    if s.window > 0:
        return "window"
    if dim % 8 or dim > MAX_DIM:
        return f"head dim {dim}: multiples of 8 up to {MAX_DIM}"
    if queries < 2 or keys < 2:
        return "a single query or key"
    if s.causal and queries != keys:
        return "causal with Sq != Sk: torch aligns the mask to the first key, we to the last"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False)"
    return None if _available(q.device.index or 0) else "no cuDNN attention on this GPU"


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Our own kernels for a while, as torch.backends.cuda.enable_cudnn_sdp(False) has them."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@functools.cache
def _available(index: int) -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _lse_dims(device: torch.device) -> int:
    """torch has given lse as [B, H, Sq] and as [B, H, Sq, 1], and wants back what it gave: a call of one tile tells."""
    x = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim()


def forward(q: Tensor, k: Tensor, v: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, s.causal, False, scale=s.scale
    )
    return out.transpose(1, 2).contiguous(), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, s: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    dout, query, key, value, out = (t.transpose(1, 2) for t in (dout.contiguous(), q, k, v, out))
    lse = lse if _lse_dims(q.device) == 3 else lse.unsqueeze(-1)
    unused = torch.empty(0, dtype=torch.int64, device=q.device)  # seed and offset of a dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, query, key, value, out, lse, unused, unused, None, None, None, q.shape[1], k.shape[1], 0.0, s.causal,
        scale=s.scale,
    )  # fmt: skip
    return tuple(t.transpose(1, 2).contiguous() for t in gradients)
