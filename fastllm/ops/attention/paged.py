"""paged_attention: attention of packed sequences over a paged KV cache: a decode step, a chunk of a prefill, or a mix.

Shapes: q [T, H, D], the sequences' new tokens one after another; cache: KVPages with Hk heads, of q's dtype or
quantised; block_table [B, max_pages] int32, the page of each 16 tokens; context_len [B] int32, the keys of each
sequence, its new tokens (appended already) included; cu_q [B + 1] int32, where each sequence's tokens begin in q.
Result [T, H, D]. Query i of n in a sequence stands at position context_len - n + i. Rows of q that no sequence claims
are zeros, as are rows of a sequence with context_len 0.

The spec's bias and dropout are not for decoding. Dtypes: float32, bfloat16, float16, one for q and the cache. q may be
a view of a fused qkv. Arithmetic: that of ops.attention, bit for bit. Of a quantised cache a score is the chain over
its bytes as numbers, times scale times the key's own scale, and a weight is multiplied by its value's scale: the bits
depend on neither page order, chunks nor threads there either. Entries of the block table and slots of a page past
context_len are never used, whatever they hold.
Lengths are read when the kernel runs: a plan may replay with new ones. A length below 0 or beyond the block table, or a
page outside the cache, raises IndexError; on a GPU, which a check would make wait, it makes its sequence NaN.

On a GPU the bits are those of ops.attention only with the spec's `exact`; else keys are split over programs as fits the
batch. There a value of NaN or infinity also reaches rows that do not see its key, if their block of keys holds it.
"""

import torch
from torch import Tensor

from ... import _C
from .._op import DTYPES, Op, check, check_dtype, pointer
from ..kv_cache import PAGE, PAGE_DTYPES, KVPages, check_pages
from ..rope import unit_stride
from . import decode, dense
from .dense import as_float
from .reference import reference as dense_reference
from .spec import CAUSAL, AttentionSpec, Settings
from .triton_paged import gpu

# ---------------------------------------------------------------------------------------------------------- reference


def reference(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None, block_table: Tensor, context_len: Tensor, cu_q: Tensor,
    alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, exact: bool,
) -> Tensor:  # fmt: skip
    settings = Settings(causal, window, scale, softcap, 0.0, 0, 0, exact)
    k_pages, v_pages, _ = KVPages(k_pages, v_pages, scales).as_numbers().floats()
    pieces, ends, done = [], cu_q.tolist(), 0
    for b, keys in enumerate(context_len.tolist()):
        pages = block_table[b, : -(-keys // PAGE)].long()
        k = k_pages[pages].permute(0, 3, 1, 2).reshape(-1, *k_pages.shape[1:3])[:keys]
        v = v_pages[pages].transpose(1, 2).reshape(-1, k_pages.shape[1], k_pages.shape[2])[:keys]
        rows = q[ends[b] : ends[b + 1]]
        pieces.append(q.new_zeros(ends[b] - done, *q.shape[1:]))
        out, _ = dense_reference(
            rows[None], k[None].to(q.dtype), v[None].to(q.dtype), None, None, None, alibi, sinks, *settings
        )
        pieces.append(out[0])
        done = ends[b + 1]
    return torch.cat((*pieces, q.new_zeros(q.shape[0] - done, *q.shape[1:])))


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(q: Tensor) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def cpu(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None, block_table: Tensor, context_len: Tensor, cu_q: Tensor,
    alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, exact: bool,
) -> Tensor:  # fmt: skip
    out = _output(q)
    if out.numel():
        q, block_table, alibi, sinks = unit_stride(q), unit_stride(block_table), as_float(alibi), as_float(sinks)
        rows, heads, dim = q.shape
        status = _C.paged_attention(
            out.data_ptr(), q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(),
            block_table.data_ptr(), context_len.data_ptr(), cu_q.data_ptr(), pointer(alibi), pointer(sinks),
            pointer(scales), block_table.shape[0], rows, heads, k_pages.shape[1], dim, k_pages.shape[0],
            block_table.shape[1], block_table.stride(0), q.stride(0), q.stride(1),
            k_pages.stride(0), v_pages.stride(0), 0 if scales is None else scales.stride(0),
            DTYPES[q.dtype], PAGE_DTYPES[k_pages.dtype], causal, window, scale, softcap,
        )  # fmt: skip
        if status:
            raise IndexError(
                f"paged_attention: context_len {context_len.tolist()} and cu_q {cu_q.tolist()} must fit {rows} rows "
                f"and {block_table.shape[1]} pages of {PAGE} tokens a sequence, and pages in use lie in 0 .. "
                f"{k_pages.shape[0] - 1}; one is out of range"
            )
    return out


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? scales, Tensor block_table, Tensor context_len, "
    "Tensor cu_q, Tensor? alibi, Tensor? sinks, bool causal, int window, float scale, float softcap, bool exact) -> Tensor",
    reference=reference,
    fake=lambda q, *others: _output(q),
    cpu=cpu,
    triton=gpu,
    cuda=decode.cuda,
    cuda_name=decode.NAME,
)


def paged_attention(
    q: Tensor,
    cache: KVPages,
    block_table: Tensor,
    context_len: Tensor,
    cu_q: Tensor,
    spec: AttentionSpec = CAUSAL,
) -> Tensor:
    """Attention of q [T, H, D] over the pages of its sequences: [T, H, D]. See the head of this file.

    Raises ValueError for shapes or head counts that do not fit, TypeError for dtypes, IndexError for lengths or pages
    out of range.
    """
    check_dtype("paged_attention", "q", q)
    check(q.dim() == 3, lambda: f"paged_attention: q {tuple(q.shape)} must be [T, H, D]")
    for name, tensor in (("block_table", block_table), ("context_len", context_len), ("cu_q", cu_q)):
        check_dtype("paged_attention", name, tensor, (torch.int32,))
    batch = context_len.shape[0] if context_len.dim() == 1 else -1
    check(
        block_table.dim() == 2 and block_table.shape[0] == batch and cu_q.shape == (batch + 1,),
        lambda: (
            f"paged_attention: block_table {tuple(block_table.shape)}, context_len {tuple(context_len.shape)}, cu_q "
            f"{tuple(cu_q.shape)} must be [B, max_pages], [B], [B + 1]"
        ),
    )
    check(
        context_len.is_contiguous() and cu_q.is_contiguous(),
        lambda: "paged_attention: context_len and cu_q must be contiguous; call .contiguous()",
    )
    check_pages("paged_attention", cache, "q", q, None, q.shape[2])
    dense.check_heads("paged_attention", q.shape[1], cache.k.shape[1], q.shape[2])
    check(
        spec.bias is None and spec.dropout is None,
        lambda: "paged_attention: the spec has a bias or dropout, which only attention and attention_varlen take",
    )
    spec.check_tensors("paged_attention", q, q.shape[1])
    s = spec.settings(q.shape[2])
    shaping = (spec.alibi, spec.sinks, s.causal, s.window, s.scale, s.softcap, s.exact)
    return forward(q, *cache.as_bits(), block_table, context_len, cu_q, *shaping)
