"""attention backward in Triton, without atomics: every sum has one order.

delta_kernel: rowsum(dout * out). keys_kernel: dk and dv of one block of keys, over the query heads of its KV head and the
rows that see it. queries_kernel: dq of one block of rows. bias_kernel: dbias of one block of the bias as it is stored,
over the batch, heads, rows or keys for which it is the same. The three compute the weights again from lse and, like the
forward, round them (and dscore) to the dtype before their products.
"""

import torch
from torch import Tensor

from .._dot import accumulate
from .._dropout import keep_tile, threshold
from .._triton import tl, triton
from ..rope import unit_stride
from . import cudnn
from .spec import Settings
from .triton_forward import common, modes
from .triton_tile import (
    BIAS,
    LENGTHS,
    Sizes,
    begin_of,
    clear,
    fitting,
    heads_of_rows,
    owner,
    padded,
    shaped,
    sight,
    sizes,
    span,
)


@triton.jit
def delta_kernel(
    delta, out, dout, queries, heads, dim, out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row, d = i[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    inside = (row < queries) & (d < dim)
    y = tl.load(out + b * out_batch + row * out_row + head * out_head + d, mask=inside, other=0.0)
    dy = tl.load(dout + b * dout_batch + row * dout_row + head * dout_head + d, mask=inside, other=0.0)
    total = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(delta + (b * heads + head) * queries + i, total, mask=i < queries)


@triton.jit
def gradients(
    s, dp, lse, delta, bias, slope, row, key, keys, kept, window, scale, softcap, rescale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr,
):  # fmt: skip
    """From s = q . k and dp = dout . v, rows down and keys across or the other way: what weights are left by dropout, the
    gradient of the score, and that of q . k, both without `scale`."""
    damp = 1.0
    if SHAPED:
        s, damp = shaped(s, scale, softcap, bias, slope, row - key, SOFTCAP, BIAS, ALIBI)
        s -= lse
    else:
        s = tl.fma(s, scale * 1.4426950408889634, -lse)
    if MASKED:
        s = tl.where(sight(row, key, keys, window, CAUSAL, WINDOW), s, -float("inf"))
    p = tl.exp2(s)
    w = p
    if DROPOUT:
        factor = tl.where(kept, rescale, 0.0)
        w, dp = p * factor, dp * factor
    ds = p * (dp - delta)
    return w, ds, ds * damp


@triton.jit
def base2(lse):
    """In base 2, and such that a row without a key has no weights."""
    return tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)


@triton.jit
def keys_sweep(
    dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, bias, slope, drop_row, start, begin, end, queries, keys, dim,
    q_row, dout_row, bias_row, bias_key, window, scale, softcap, seed, call, threshold, rescale,
    q_rows, dout_rows, at_row, at_col,
    BULK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What rows [begin, end) add to dk and dv of the keys from `start`. q, dout, lse, delta point at the head's first row,
    bias [keys of the block] at that row's entries. BULK: q and dout from descriptors, where that row is (at_row, at_col)."""
    key, d = start + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)[None, :]
    shift = keys - queries  # a row's position is its index plus this
    for row_start in range(begin, end, BLOCK_M):
        i = row_start + tl.arange(0, BLOCK_M)
        valid = i < queries
        at, inside = i[:, None].to(tl.int64), valid[:, None] & (d < dim)
        if BULK:
            q_tile = q_rows.load([at_row + row_start, at_col])
            dy = dout_rows.load([at_row + row_start, at_col])
        else:
            q_tile = tl.load(q + at * q_row + d, mask=inside, other=0.0)
            dy = tl.load(dout + at * dout_row + d, mask=inside, other=0.0)
        m = base2(tl.load(lse + i, mask=valid, other=-float("inf")))
        mean = tl.load(delta + i, mask=valid, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [keys, rows]
        dp = tl.dot(v_tile, tl.trans(dy), input_precision="ieee")
        kept, add = True, 0.0
        if DROPOUT:
            kept = tl.trans(keep_tile(drop_row + i, start, seed, call, threshold, BLOCK_N).to(tl.int8)) != 0
        if BIAS:
            seen = valid[None, :] & (key < keys)[:, None]
            at_bias = bias[:, None] + i[None, :].to(tl.int64) * bias_row
            add = tl.load(at_bias, mask=seen, other=0.0).to(tl.float32)
        w, _, ds = gradients(
            s, dp, m[None, :], mean[None, :], add, slope, (i + shift)[None, :], key[:, None], keys, kept,
            window, scale, softcap, rescale, MASKED, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED,
        )  # fmt: skip
        dv_tile = accumulate(dv_tile, w.to(dy.dtype), dy)
        dk_tile = accumulate(dk_tile, ds.to(q_tile.dtype), q_tile)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    dk, dv, q_rows, dout_rows, q, k, v, dout, lse, delta, cu_q, cu_k, bias, alibi,
    batch, queries, keys, heads, group, dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    bias_batch, bias_head, bias_row, bias_key, dout_batch, dout_row, dout_head,
    window, scale, softcap, seed, call, threshold, rescale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr, BULK: tl.constexpr, BATCH: tl.constexpr,
    APART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kv_head, b = tl.program_id(1), tl.program_id(2)
    b_at = b.to(tl.int64)
    all_rows, all_keys = queries, keys
    first = 0  # of the sequence's rows in q, and of its keys in k and v
    first_key = 0
    start = tl.program_id(0) * BLOCK_N
    if PACKED:
        b, first_key, end_key, start = owner(cu_k, batch, keys, tl.program_id(0), BLOCK_N, BATCH)
        if start >= end_key:
            return
        known = (b >= 0) & (b < batch)
        first = tl.load(cu_q + b, mask=known, other=0)
        queries = tl.load(cu_q + b + 1, mask=known, other=0) - first
        keys, start = end_key - first_key, start - first_key
    key = start + tl.arange(0, BLOCK_N)
    token, d = (first_key + key)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    inside = (key < keys)[:, None] & (d < dim)
    far_head = kv_head.to(tl.int64)
    k_tile = tl.load(k + b_at * k_batch + token * k_row + far_head * k_head + d, mask=inside, other=0.0)
    v_tile = tl.load(v + b_at * v_batch + token * v_row + far_head * v_head + d, mask=inside, other=0.0)
    shift = keys - queries  # a row's position is its index plus this
    begin, end = 0, queries
    if CAUSAL:
        begin = tl.maximum(start - shift, 0)
    if WINDOW:
        end = tl.minimum(end, start + BLOCK_N - 1 + window - shift)
        if not CAUSAL:
            begin = tl.maximum(start - window + 1 - shift, 0)
    begin = begin // BLOCK_M * BLOCK_M
    end = tl.maximum(end, begin)
    # rows [from_row, to_row) see all keys of the block
    from_row, to_row = begin, end
    if CAUSAL:
        from_row = tl.maximum(start + BLOCK_N - 1 - shift, 0)
    if WINDOW:
        to_row = tl.minimum(to_row, start + window - shift)
        if not CAUSAL:
            from_row = tl.maximum(start + BLOCK_N - window - shift, 0)
    from_row = tl.where(start + BLOCK_N > keys, end, tl.cdiv(from_row, BLOCK_M) * BLOCK_M)
    from_row = tl.minimum(tl.maximum(from_row, begin), end)
    if WINDOW or BULK:  # whole blocks: of those in bulk no row may be another sequence's
        to_row = tl.minimum(tl.maximum(tl.maximum(to_row, 0) // BLOCK_M * BLOCK_M, from_row), end)
    first_row = tl.program_id(2) * queries + first  # in the descriptors
    dk_tile, dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q = begin_of(q, b_at, q_batch, far_head * group, q_head, first, q_row, PACKED)
    dout = begin_of(dout, b_at, dout_batch, far_head * group, dout_head, first, dout_row, PACKED)
    for member in range(0, group):
        head = kv_head * group + member
        slope = tl.load(alibi + head) if ALIBI else 0.0
        own_dk, own_dv = dk_tile, dv_tile
        if APART:
            own_dk, own_dv = tl.zeros_like(dk_tile), tl.zeros_like(dv_tile)
        at_row = (b_at * heads + head) * all_rows + first
        drop_row = (b_at * heads + head) * queries + first * heads
        bias_at = None
        if BIAS:
            bias_at = bias + b.to(tl.int64) * bias_batch + head.to(tl.int64) * bias_head + key.to(tl.int64) * bias_key
        own_dk, own_dv = keys_sweep(
            own_dk, own_dv, k_tile, v_tile, q, dout, lse + at_row, delta + at_row, bias_at, slope, drop_row,
            start, begin, from_row, queries, keys, dim, q_row, dout_row, bias_row, bias_key,
            window, scale, softcap, seed, call, threshold, rescale, None, None, 0, 0, False,
            True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        own_dk, own_dv = keys_sweep(
            own_dk, own_dv, k_tile, v_tile, q, dout, lse + at_row, delta + at_row, bias_at, slope, drop_row,
            start, from_row, to_row, queries, keys, dim, q_row, dout_row, bias_row, bias_key,
            window, scale, softcap, seed, call, threshold, rescale, q_rows, dout_rows, first_row, head * dim, BULK,
            False, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if WINDOW or BULK:
            own_dk, own_dv = keys_sweep(
                own_dk, own_dv, k_tile, v_tile, q, dout, lse + at_row, delta + at_row, bias_at, slope, drop_row,
                start, to_row, end, queries, keys, dim, q_row, dout_row, bias_row, bias_key,
                window, scale, softcap, seed, call, threshold, rescale, None, None, 0, 0, False,
                True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        q += q_head  # not head * q_head, which takes 64 bits and more registers
        dout += dout_head
        dk_tile, dv_tile = (dk_tile + own_dk, dv_tile + own_dv) if APART else (own_dk, own_dv)
    at = ((b_at * all_keys + token) * (heads // group) + kv_head) * dim + d
    tl.store(dk + at, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def queries_sweep(
    dq_tile, q_tile, dy, m, mean, k, v, bias, row, slope, drop_row, begin, end, keys, dim,
    k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold, rescale,
    k_rows, v_rows, at_row, at_col,
    BULK: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What keys [begin, end) add to dq. k, v point at the sequence's first key, bias [rows] at the rows' first. BULK: k and v
    from descriptors, where that key is (at_row, at_col)."""
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        at, inside = key[:, None].to(tl.int64), (key < keys)[:, None] & (d < dim)
        if BULK:
            k_tile, v_tile = k_rows.load([at_row + start, at_col]), v_rows.load([at_row + start, at_col])
        else:
            k_tile = tl.load(k + at * k_row + d, mask=inside, other=0.0)
            v_tile = tl.load(v + at * v_row + d, mask=inside, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(dy, tl.trans(v_tile), input_precision="ieee")
        kept, add = True, 0.0
        if DROPOUT:
            kept = keep_tile(drop_row, start, seed, call, threshold, BLOCK_N)
        if BIAS:
            at_bias = bias[:, None] + key[None, :].to(tl.int64) * bias_key
            add = tl.load(at_bias, mask=(key < keys)[None, :], other=0.0).to(tl.float32)
        _, _, ds = gradients(
            s, dp, m[:, None], mean[:, None], add, slope, row[:, None], key[None, :], keys, kept,
            window, scale, softcap, rescale, MASKED, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED,
        )  # fmt: skip
        dq_tile = accumulate(dq_tile, ds.to(k_tile.dtype), k_tile)
    return dq_tile


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    dq, k_rows, v_rows, q, k, v, dout, lse, delta, cu_q, cu_k, bias, alibi,
    batch, queries, keys, heads, group, dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    bias_batch, bias_head, bias_row, bias_key, dout_batch, dout_row, dout_head,
    window, scale, softcap, seed, call, threshold, rescale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SHAPED: tl.constexpr, BULK: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.num_programs(0) - 1 - tl.program_id(0)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b_at = b.to(tl.int64)
    all_rows = queries
    first = 0
    first_key = 0
    start = at * BLOCK_M
    if PACKED:
        b, first, end_row, start = owner(cu_q, batch, queries, at, BLOCK_M, BATCH)
        if start >= end_row:
            return
        known = (b >= 0) & (b < batch)
        first_key = tl.load(cu_k + b, mask=known, other=0)
        keys = tl.load(cu_k + b + 1, mask=known, other=0) - first_key
        queries, start = end_row - first, start - first
    i = start + tl.arange(0, BLOCK_M)
    valid = i < queries
    token, d = (first + i)[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    inside = valid[:, None] & (d < dim)
    q_tile = tl.load(q + b_at * q_batch + token * q_row + head * q_head + d, mask=inside, other=0.0)
    dy = tl.load(dout + b_at * dout_batch + token * dout_row + head * dout_head + d, mask=inside, other=0.0)
    at_row = (b_at * heads + head) * all_rows + first
    m = base2(tl.load(lse + at_row + i, mask=valid, other=-float("inf")))
    mean = tl.load(delta + at_row + i, mask=valid, other=0.0)
    kv_head = head // group
    slope = tl.load(alibi + head) if ALIBI else 0.0
    shift = keys - queries
    begin, end = span(
        start + shift, tl.minimum(start + BLOCK_M, queries) - 1 + shift, keys, window, CAUSAL, WINDOW, BLOCK_N
    )  # fmt: skip
    from_key, to_key = clear(
        begin, end, start + shift, tl.minimum(start + BLOCK_M, queries) - 1 + shift, keys, window, CAUSAL, WINDOW, BLOCK_N
    )  # fmt: skip
    k = begin_of(k, b_at, k_batch, kv_head, k_head, first_key, k_row, PACKED)
    v = begin_of(v, b_at, v_batch, kv_head, v_head, first_key, v_row, PACKED)
    drop_row = (b_at * heads + head) * queries + i + first * heads
    bias_at = None
    if BIAS:
        own_row = tl.where(valid, i, 0).to(tl.int64)
        bias_at = bias + b.to(tl.int64) * bias_batch + head * bias_head + own_row * bias_row
    first_row = tl.program_id(2) * keys + first_key  # in the descriptors
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW:
        dq_tile = queries_sweep(
            dq_tile, q_tile, dy, m, mean, k, v, bias_at, i + shift, slope, drop_row, begin, from_key, keys, dim,
            k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold, rescale,
            None, None, 0, 0, False,
            True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq_tile = queries_sweep(
        dq_tile, q_tile, dy, m, mean, k, v, bias_at, i + shift, slope, drop_row, from_key, to_key, keys, dim,
        k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold, rescale,
        k_rows, v_rows, first_row, kv_head.to(tl.int32) * dim, BULK,
        False, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_tile = queries_sweep(
        dq_tile, q_tile, dy, m, mean, k, v, bias_at, i + shift, slope, drop_row, to_key, end, keys, dim,
        k_row, v_row, bias_key, window, scale, softcap, seed, call, threshold, rescale,
        None, None, 0, 0, False,
        True, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT, SHAPED, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    to = ((b_at * all_rows + token) * heads + head) * dim + d
    tl.store(dq + to, (dq_tile * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def bias_kernel(
    dbias, q, k, v, dout, lse, delta, cu_q, cu_k, bias,
    batch, queries, keys, heads, group, dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    bias_batch, bias_head, bias_row, bias_key, dout_batch, dout_row, dout_head,
    batches, bias_heads, rows, columns, window, scale, softcap, seed, call, threshold, rescale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # dbias and bias are [batches, bias_heads, rows, columns]; a dimension of 1 is summed over here.
    blocks = tl.cdiv(columns, BLOCK_N)
    row_block, column_block = tl.program_id(0) // blocks * BLOCK_M, tl.program_id(0) % blocks * BLOCK_N
    own_head, own = tl.program_id(1), tl.program_id(2)
    all_rows, d = queries, tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(tl.where(batches == 1, 0, own), tl.where(batches == 1, batch, own + 1)):
        own_b = tl.cast(b, tl.int64)  # the batch of the bias; b_at that of q, k and v
        b_at, first, first_key = own_b, 0, 0
        if PACKED:
            b_at = own_b * 0
            first, first_key = tl.load(cu_q + b), tl.load(cu_k + b)
            queries, keys = tl.load(cu_q + b + 1) - first, tl.load(cu_k + b + 1) - first_key
        shift = keys - queries
        for h in range(tl.where(bias_heads == 1, 0, own_head), tl.where(bias_heads == 1, heads, own_head + 1)):
            head = tl.cast(h, tl.int64)
            at_row = (b_at * heads + head) * all_rows + first
            kv_head = head // group
            for start in range(row_block, queries if ONE_ROW else tl.minimum(row_block + BLOCK_M, queries), BLOCK_M):
                i = start + tl.arange(0, BLOCK_M)
                valid = i < queries
                token, inside = (first + i)[:, None].to(tl.int64), valid[:, None] & (d < dim)
                q_tile = tl.load(q + b_at * q_batch + token * q_row + head * q_head + d, mask=inside, other=0.0)
                dy = tl.load(dout + b_at * dout_batch + token * dout_row + head * dout_head + d, mask=inside, other=0.0)
                m = base2(tl.load(lse + at_row + i, mask=valid, other=-float("inf")))
                mean = tl.load(delta + at_row + i, mask=valid, other=0.0)
                stop = keys if ONE_COLUMN else tl.minimum(column_block + BLOCK_N, keys)
                for key_start in range(column_block, stop, BLOCK_N):
                    key = key_start + tl.arange(0, BLOCK_N)
                    key_at, key_inside = (first_key + key)[:, None].to(tl.int64), (key < keys)[:, None] & (d < dim)
                    k_at = k + b_at * k_batch + key_at * k_row + kv_head * k_head + d
                    v_at = v + b_at * v_batch + key_at * v_row + kv_head * v_head + d
                    s = tl.dot(q_tile, tl.trans(tl.load(k_at, mask=key_inside, other=0.0)), input_precision="ieee")
                    dp = tl.dot(dy, tl.trans(tl.load(v_at, mask=key_inside, other=0.0)), input_precision="ieee")
                    bias_at = bias + own_b * bias_batch + head * bias_head + i[:, None].to(tl.int64) * bias_row
                    seen = valid[:, None] & (key < keys)[None, :]
                    add = tl.load(bias_at + key[None, :].to(tl.int64) * bias_key, mask=seen, other=0.0).to(tl.float32)
                    kept = True
                    if DROPOUT:
                        drop_row = (b_at * heads + head) * queries + i + first * heads
                        kept = keep_tile(drop_row, key_start, seed, call, threshold, BLOCK_N)
                    _, ds, _ = gradients(
                        s, dp, m[:, None], mean[:, None], add, 0.0, (i + shift)[:, None], key[None, :], keys, kept,
                        window, scale, softcap, rescale, True, CAUSAL, WINDOW, SOFTCAP, True, False, DROPOUT, True,
                    )  # fmt: skip
                    total += ds
    i, j = row_block + tl.arange(0, BLOCK_M), column_block + tl.arange(0, BLOCK_N)
    if ONE_ROW:
        total = tl.where(i[:, None] == 0, tl.sum(total, 0)[None, :], total)
    if ONE_COLUMN:
        total = tl.where(j[None, :] == 0, tl.sum(total, 1)[:, None], total)
    to = dbias + ((own.to(tl.int64) * bias_heads + own_head) * rows + i[:, None]) * columns + j[None, :]
    tl.store(to, total.to(dbias.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


# ------------------------------------------------------------------------------------------------------------ launcher


def gpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor | None, cu_k: Tensor | None, bias: Tensor | None, alibi: Tensor | None, sinks: Tensor | None,
    bias_gradient: bool,
    causal: bool, window: int, scale: float, softcap: float, p: float, seed: int, call: int, exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = Settings(causal, window, scale, softcap, p, seed, call, exact)
    if cudnn.refusal(q, k, cu_q, bias, alibi, sinks, settings) is None:
        nothing = q.new_empty(0)
        return *cudnn.backward(dout, q, k, v, out, lse, settings), nothing, nothing
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    dbias = (
        q.new_empty(0)
        if bias is None or not bias_gradient
        else torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
    )
    if not dq.numel() or not dk.numel():
        dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_(), dsinks
    q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(dout)
    packed, dim = cu_q is not None, q.shape[3]
    batch = cu_q.shape[0] - 1 if packed else q.shape[0]
    block_d, heavy = padded(dim), bias is not None or p > 0
    plain = window == softcap == p == 0 and bias is None and alibi is None
    delta = torch.empty_like(lse)
    rows, keys, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    delta_kernel[(triton.cdiv(rows, 32), heads, q.shape[0])](
        delta, out, dout, rows, heads, dim, *out.stride()[:3], *dout.stride()[:3],
        BLOCK_M=32, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    inputs = (q, k, v, dout, lse, delta, cu_q, cu_k, bias)
    shape = (*common(q, k, v, cu_q, bias, batch), *dout.stride()[:3])
    shaping = (window, scale, softcap, seed, call, threshold(p), 1 / (1 - p))
    options = modes(packed, bias, alibi, causal, window, scale, softcap, p, batch)

    def blocks(size: Sizes) -> dict[str, int]:
        shape = {"BLOCK_M": size.rows, "BLOCK_N": size.keys, "BLOCK_D": block_d}
        return {**shape, "num_warps": size.warps, "num_stages": size.stages}

    def count(length: int, block: int) -> int:
        return length // block + batch + 2 if packed else triton.cdiv(length, block)

    size = sizes(fitting("KEYS", q.device, plain), dim, q.dtype, heavy)
    pair = heads_of_rows(q, size.rows), heads_of_rows(dout, size.rows)
    keys_kernel[(count(keys, size.keys), kv_heads, q.shape[0])](
        dk, dv, *pair, *inputs, alibi, *shape, *shaping, **options, BULK=None not in pair,
        APART=heads > kv_heads and q.dtype == torch.float32, **blocks(size),
    )  # fmt: skip
    size = sizes(fitting("QUERIES", q.device, plain), dim, q.dtype, heavy)
    pair = heads_of_rows(k, size.keys), heads_of_rows(v, size.keys)
    queries_kernel[(count(rows, size.rows), heads, q.shape[0])](
        dq, *pair, *inputs, alibi, *shape, *shaping, **options, BULK=None not in pair, **blocks(size)
    )  # fmt: skip
    if dbias.numel():
        for unused in ("BIAS", "ALIBI", "SHAPED", "BATCH"):
            options.pop(unused)
        size = sizes(BIAS, dim, q.dtype)
        grid = (
            triton.cdiv(bias.shape[2], size.rows) * triton.cdiv(bias.shape[3], size.keys),
            bias.shape[1],
            bias.shape[0],
        )
        bias_kernel[grid](
            dbias, *inputs, *shape, *bias.shape, *shaping, **options,
            ONE_ROW=bias.shape[2] == 1, ONE_COLUMN=bias.shape[3] == 1, **blocks(size),
        )  # fmt: skip
    dsinks = q.new_empty(0)
    if sinks is not None:
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float()[:, None] - lse))  # [B, H, Sq]
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks
