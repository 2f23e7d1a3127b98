"""attention: softmax(scale * q k^T) v, with grouped heads, causal, window and softcap; dense tensors.

Shapes: q [B, Sq, H, D]; k, v [B, Sk, Hk, D], H a multiple of Hk (query head h reads KV head h // (H / Hk)); result
[B, Sq, H, D]. Sk != Sq is cross attention; causal is aligned to the end: query i stands at Sk - Sq + i.
Dtype: float32. D up to 256 (multiples of 16 are fast). Any strides: a copy is made only where a head's elements are
not contiguous.

Arithmetic: keys are cut in tiles of 256 at absolute positions; in a tile a score is one FMA chain over D ascending,
times scale, then capped; the tile gives (highest, sum of exp(score - highest), FMA chain of the values over keys
ascending); tiles are folded left to right. So a row has the same bits in paged_attention, whatever the chunks, the
batch and the threads. A row that sees no key, or only scores of -inf, is zeros. A NaN or +inf score makes its row NaN.
Keys out of a row's sight never reach it, NaN or not.
"""

import torch
from torch import Tensor

from ... import _C
from .._op import Op, check, check_dtype, check_like
from ..rope import unit_stride
from .spec import CAUSAL, AttentionSpec

MAX_DIM = 256  # csrc/records/attention.h: kMaxHeadDim

# ---------------------------------------------------------------------------------------------------------- reference


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, softcap: float) -> Tensor:
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(keys - queries, keys, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden |= j > i
    if window:
        hidden |= j <= i - window
    scores = scores.masked_fill(hidden, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(q: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, softcap: float) -> Tensor:
    out = _output(q)
    if out.numel():
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        batch, queries, heads, dim = q.shape
        _C.attention(
            out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
            batch, queries, k.shape[1], heads, k.shape[2], dim, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            causal, window, scale, softcap,
        )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, int window, float scale, float softcap) -> Tensor",
    reference=reference,
    fake=lambda q, k, v, causal, window, scale, softcap: _output(q),
    cpu=cpu,
)


def check_heads(op: str, heads: int, kv_heads: int, dim: int) -> None:
    check(
        kv_heads > 0 and heads % kv_heads == 0,
        lambda: f"{op}: {heads} query heads over {kv_heads} KV heads; the first must be a multiple of the second",
    )
    check(1 <= dim <= MAX_DIM, lambda: f"{op}: head dim {dim}, allowed: 1 to {MAX_DIM}")


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = CAUSAL) -> Tensor:
    """softmax(scale * q k^T) v for q [B, Sq, H, D], k and v [B, Sk, Hk, D]: [B, Sq, H, D]. See the head of this file.

    Raises ValueError for shapes or head counts that do not fit, TypeError for dtypes.
    """
    check_dtype("attention", "q", q, (torch.float32,))
    check_like("attention", "k", k, "q", q)
    check_like("attention", "v", v, "q", q)
    fits = q.dim() == 4 and k.dim() == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]
    check(
        fits,
        lambda: (
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [B, Sq, H, D] and twice "
            "[B, Sk, Hk, D] with the same B and D"
        ),
    )
    check_heads("attention", q.shape[2], k.shape[2], q.shape[3])
    return forward(q, k, v, *spec.arguments(q.shape[3]))
