"""attention forward in Triton: dense and packed.

A program takes BLOCK_M rows of one head and walks the keys that they see, in blocks: first those that some row does not
see, which are masked, then those that all see, then the rest. Rows that see most keys begin first. In exact mode the
keys are walked tile by tile of 256 at absolute positions, each tile a part of its own, folded left to right: the bits
of paged_attention in exact mode. A weight is rounded to the dtype of v before its product.
"""

import torch
from torch import Tensor

from .._dot import accumulate
from .._dropout import keep_tile, threshold
from .._triton import tl, triton
from ..rope import unit_stride
from . import cudnn
from .spec import Settings
from .triton_tile import (
    EXACT,
    LENGTHS,
    TILE,
    begin_of,
    clear,
    finish,
    fitting,
    fold,
    heads_of_rows,
    nothing,
    owner,
    padded,
    shaped,
    sight,
    sizes,
    span,
    weigh,
    with_sink,
)


@triton.jit
def sweep(
    acc, total, top, q, k, v, bias, row, slope, drop_row, begin, end, keys, dim, k_row, v_row, bias_key,
    window, scale, softcap, seed, call, threshold, k_rows, v_rows, at_row, at_col,
    BULK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The part after keys [begin, end). k, v point at the sequence's first key, bias [BLOCK_M] at the rows' first. BULK:
    from the descriptors k_rows and v_rows, where the sequence begins at (at_row, at_col)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inside = (key < keys)[:, None] & (d < dim)
        at = key[:, None].to(tl.int64)
        if BULK:
            keys_t = tl.trans(k_rows.load([at_row + start, at_col]))
        else:
            keys_t = tl.trans(tl.load(k + at * k_row + d, mask=inside, other=0.0))
        s = tl.dot(q, keys_t, input_precision="ieee")
        unit = scale * 1.4426950408889634
        if SHAPED:
            b = 0.0
            if BIAS:
                seen = (key < keys)[None, :]
                b = tl.load(bias[:, None] + key[None, :].to(tl.int64) * bias_key, mask=seen, other=0.0).to(tl.float32)
            s, _ = shaped(s, scale, softcap, b, slope, row[:, None] - key[None, :], SOFTCAP, BIAS, ALIBI)
            unit = 1.0
        if MASKED:
            s = tl.where(sight(row[:, None], key[None, :], keys, window, CAUSAL, WINDOW), s, -float("inf"))
        p, fade, total, top = weigh(total, top, s, unit)
        if DROPOUT:
            p = tl.where(keep_tile(drop_row, start, seed, call, threshold, BLOCK_N), p, 0.0)
        values = v_rows.load([at_row + start, at_col]) if BULK else tl.load(v + at * v_row + d, mask=inside, other=0.0)
        acc = accumulate(acc * fade[:, None], p.to(values.dtype), values)
    return acc, total, top


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    out, lse, q, k, v, k_rows, v_rows, cu_q, cu_k, bias, alibi, sinks,
    batch, queries, keys, heads, group, dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    bias_batch, bias_head, bias_row, bias_key, window, scale, softcap, seed, call, threshold, rescale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr, BULK: tl.constexpr,
    EXACT: tl.constexpr, TILE: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.num_programs(0) - 1 - tl.program_id(0)  # later rows see more keys: they begin first
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    total_rows = queries
    first = 0  # of the sequence's rows in q, and of its keys in k and v
    first_key = 0
    start = at * BLOCK_M
    if PACKED:
        b, first, end_row, start = owner(cu_q, batch, queries, at, BLOCK_M, BATCH)
        if start >= end_row:
            return
        known = (b >= 0) & (b < batch)  # else rows that nobody claims
        first_key = tl.load(cu_k + b, mask=known, other=0)
        keys = tl.load(cu_k + b + 1, mask=known, other=0) - first_key
        queries, start = end_row - first, start - first
    b_at = tl.program_id(2).to(tl.int64)  # the batch of q, k, v and out; b that of the bias
    i = start + tl.arange(0, BLOCK_M)
    valid = i < queries
    token, d = (first + i).to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    inside = valid[:, None] & (d < dim)
    rows = tl.load(q + b_at * q_batch + token[:, None] * q_row + head * q_head + d, mask=inside, other=0.0)
    kv_head = head // group
    at_row, at_col = tl.program_id(2) * keys + first_key, kv_head.to(tl.int32) * dim  # of its keys, in the descriptors
    k = begin_of(k, b_at, k_batch, kv_head, k_head, first_key, k_row, PACKED)
    v = begin_of(v, b_at, v_batch, kv_head, v_head, first_key, v_row, PACKED)
    drop_row = (b_at * heads + head) * queries + i + first.to(tl.int64) * heads if PACKED else (
        b_at * heads + head
    ) * queries + i  # fmt: skip
    slope = tl.load(alibi + head) if ALIBI else 0.0
    bias_at = None
    if BIAS:
        bias_at = bias + b.to(tl.int64) * bias_batch + head * bias_head + tl.where(valid, i, 0).to(tl.int64) * bias_row
    shift = keys - queries
    row = i + shift
    low, high = start + shift, tl.minimum(start + BLOCK_M, queries) - 1 + shift
    acc, total, top = nothing(BLOCK_M, BLOCK_D)
    if EXACT:
        begin, end = span(low, high, keys, window, CAUSAL, WINDOW, TILE)
        for tile in range(begin, end, TILE):
            acc_b, total_b, top_b = nothing(BLOCK_M, BLOCK_D)
            acc_b, total_b, top_b = sweep(
                acc_b, total_b, top_b, rows, k, v, bias_at, row, slope, drop_row, tile, tl.minimum(tile + TILE, end),
                keys, dim, k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold,
                None, None, 0, 0, False, True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            acc, total, top = fold(acc, total, top, acc_b, total_b, top_b)
    else:
        begin, end = span(low, high, keys, window, CAUSAL, WINDOW, BLOCK_N)
        start, stop = clear(begin, end, low, high, keys, window, CAUSAL, WINDOW, BLOCK_N)
        if WINDOW:
            acc, total, top = sweep(
                acc, total, top, rows, k, v, bias_at, row, slope, drop_row, begin, start,
                keys, dim, k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold,
                None, None, 0, 0, False, True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        acc, total, top = sweep(
            acc, total, top, rows, k, v, bias_at, row, slope, drop_row, start, stop,
            keys, dim, k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold,
            k_rows, v_rows, at_row, at_col, BULK, False, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        acc, total, top = sweep(
            acc, total, top, rows, k, v, bias_at, row, slope, drop_row, stop, end,
            keys, dim, k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold,
            None, None, 0, 0, False, True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if SINKS:
        acc, total, top = with_sink(acc, total, top, tl.load(sinks + head).to(tl.float32))
    y = finish(acc, total)
    if DROPOUT:
        y *= rescale
    tl.store(
        out + ((b_at * total_rows + token) * heads + head)[:, None] * dim + d, y.to(out.dtype.element_ty), mask=inside
    )
    if PACKED:  # a row that nobody claims has no sink either
        top = tl.where(known, top, -float("inf"))
    log = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + (b_at * heads + head) * total_rows + token, log, mask=valid)


# ------------------------------------------------------------------------------------------------------------ launcher


def common(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, bias: Tensor | None, batch: int) -> tuple[int, ...]:
    """The sizes and strides that forward and backward kernels take first."""
    strides = (
        (0, 0, 0, 0)
        if bias is None
        else tuple(s if n > 1 else 0 for s, n in zip(bias.stride(), bias.shape, strict=True))
    )
    return (
        batch, q.shape[1], k.shape[1], q.shape[2], q.shape[2] // k.shape[2], q.shape[3],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
    )  # fmt: skip


def modes(
    packed: bool,
    bias: Tensor | None,
    alibi: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float,
    p: float,
    batch: int,
) -> dict[str, bool | int]:
    """The features that a kernel is compiled for."""
    return {
        "PACKED": packed, "CAUSAL": causal, "WINDOW": window > 0, "SOFTCAP": softcap > 0, "BIAS": bias is not None,
        "ALIBI": alibi is not None, "DROPOUT": p > 0,
        "SHAPED": softcap > 0 or bias is not None or alibi is not None or scale <= 0,
        "BATCH": triton.next_power_of_2(batch + 1) if packed else 1,
    }  # fmt: skip


def gpu(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    settings = Settings(causal, window, scale, softcap, p, seed, call, exact)
    if cudnn.refusal(q, k, cu_q, bias, alibi, sinks, settings) is None:
        return cudnn.forward(q, k, v, settings)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    plain = window == softcap == p == 0 and bias is None and alibi is None
    table = EXACT if exact else fitting("DENSE", q.device, plain)
    size = sizes(table, q.shape[3], q.dtype, heavy=bias is not None or p > 0)
    k_rows, v_rows = (None, None) if exact else (heads_of_rows(t, size.keys) for t in (k, v))
    rows = q.shape[1]
    blocks = triton.cdiv(rows, size.rows) if cu_q is None else rows // size.rows + batch + 2
    forward_kernel[(blocks, q.shape[2], q.shape[0])](
        out, lse, q, k, v, k_rows, v_rows, cu_q, cu_k, bias, alibi, sinks, *common(q, k, v, cu_q, bias, batch),
        window, scale, softcap, seed, call, threshold(p), 1 / (1 - p),
        **modes(cu_q is not None, bias, alibi, causal, window, scale, softcap, p, batch),
        SINKS=sinks is not None, BULK=k_rows is not None and v_rows is not None, EXACT=exact, TILE=TILE,
        BLOCK_M=size.rows, BLOCK_N=size.keys, BLOCK_D=padded(q.shape[3]), num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return out, lse
