"""attention backward in Triton, without atomics: every sum has one order.

delta_kernel: rowsum(dout * out). keys_kernel: dk and dv of one block of keys, over the query heads of its KV head and the
rows that see it. queries_kernel: dq of one block of rows. bias_kernel: dbias of one block of the bias as it is stored,
over the batch, heads, rows or keys for which it is the same. The three compute the weights again from lse and, like the
forward, round them (and dscore) to the dtype before their products.
"""

import torch
from torch import Tensor

from .._dropout import keep_tile, threshold
from .._triton import tl, triton
from ..rope import unit_stride
from . import cudnn
from .spec import Settings
from .triton_forward import common, modes
from .triton_tile import BACKWARD, BIAS, owner, padded, shaped, sight, sizes, span, stages


@triton.jit
def delta_kernel(
    delta, out, dout, queries, heads, dim, out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, d = i[:, None].to(tl.int64), tl.arange(0, BLOCK_D)[None, :]
    inside = (row < queries) & (d < dim)
    y = tl.load(out + b * out_batch + row * out_row + head * out_head + d, mask=inside, other=0.0)
    dy = tl.load(dout + b * dout_batch + row * dout_row + head * dout_head + d, mask=inside, other=0.0)
    total = tl.sum(y.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(delta + (b * heads + head) * queries + i, total, mask=i < queries)


@triton.jit
def gradients(
    s, dp, lse, delta, bias, slope, row, key, keys, kept, window, scale, softcap, rescale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """From s = q . k and dp = dout . v, rows down and keys across or the other way: what weights are left by dropout, the
    gradient of the score, and that of q . k, both without `scale`."""
    s, damp = shaped(s, scale, softcap, bias, slope, row - key, SOFTCAP, BIAS, ALIBI)
    p = tl.exp2(tl.where(sight(row, key, keys, window, CAUSAL, WINDOW), s, -float("inf")) - lse)
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
def keys_kernel(
    dk, dv, q, k, v, dout, lse, delta, cu_q, cu_k, bias, alibi,
    batch, queries, keys, heads, group, dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    bias_batch, bias_head, bias_row, bias_key, dout_batch, dout_row, dout_head,
    window, scale, softcap, seed, call, threshold, rescale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
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
    k_tile = tl.load(k + b_at * k_batch + token * k_row + kv_head * k_head + d, mask=inside, other=0.0)
    v_tile = tl.load(v + b_at * v_batch + token * v_row + kv_head * v_head + d, mask=inside, other=0.0)
    shift = keys - queries  # a row's position is its index plus this
    begin, end = 0, queries
    if CAUSAL:
        begin = tl.maximum(start - shift, 0)
    if WINDOW:
        end = tl.minimum(end, start + BLOCK_N - 1 + window - shift)
        if not CAUSAL:
            begin = tl.maximum(start - window + 1 - shift, 0)
    begin = begin // BLOCK_M * BLOCK_M
    dk_tile, dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        slope = tl.load(alibi + head) if ALIBI else 0.0
        at_row = (b_at * heads + head) * all_rows + first
        for row_start in range(begin, end, BLOCK_M):
            i = row_start + tl.arange(0, BLOCK_M)
            valid = i < queries
            row_at, row_inside = (first + i)[:, None].to(tl.int64), valid[:, None] & (d < dim)
            q_tile = tl.load(q + b_at * q_batch + row_at * q_row + head * q_head + d, mask=row_inside, other=0.0)
            dy = tl.load(
                dout + b_at * dout_batch + row_at * dout_row + head * dout_head + d, mask=row_inside, other=0.0
            )
            m = base2(tl.load(lse + at_row + i, mask=valid, other=-float("inf")))
            mean = tl.load(delta + at_row + i, mask=valid, other=0.0)
            s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [keys, rows]
            dp = tl.dot(v_tile, tl.trans(dy), input_precision="ieee")
            kept, add = True, 0.0
            if DROPOUT:
                drop_row = (b_at * heads + head) * queries + i + first * heads
                kept = tl.trans(keep_tile(drop_row, start, seed, call, threshold, BLOCK_N).to(tl.int8)) != 0
            if BIAS:
                at = bias + b.to(tl.int64) * bias_batch + head * bias_head + i[None, :].to(tl.int64) * bias_row
                seen = valid[None, :] & (key < keys)[:, None]
                add = tl.load(at + key[:, None].to(tl.int64) * bias_key, mask=seen, other=0.0).to(tl.float32)
            w, _, ds = gradients(
                s, dp, m[None, :], mean[None, :], add, slope, (i + shift)[None, :], key[:, None], keys, kept,
                window, scale, softcap, rescale, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT,
            )  # fmt: skip
            dv_tile = tl.dot(w.to(dy.dtype), dy, dv_tile, input_precision="ieee")
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    at = ((b_at * all_keys + token) * (heads // group) + kv_head) * dim + d
    tl.store(dk + at, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dv_tile.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def queries_kernel(
    dq, q, k, v, dout, lse, delta, cu_q, cu_k, bias, alibi,
    batch, queries, keys, heads, group, dim, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    bias_batch, bias_head, bias_row, bias_key, dout_batch, dout_row, dout_head,
    window, scale, softcap, seed, call, threshold, rescale,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.num_programs(0) - 1 - tl.program_id(0)
    head, b = tl.program_id(1), tl.program_id(2)
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
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for key_start in range(begin, end, BLOCK_N):
        key = key_start + tl.arange(0, BLOCK_N)
        key_at, key_inside = (first_key + key)[:, None].to(tl.int64), (key < keys)[:, None] & (d < dim)
        k_tile = tl.load(k + b_at * k_batch + key_at * k_row + kv_head * k_head + d, mask=key_inside, other=0.0)
        v_tile = tl.load(v + b_at * v_batch + key_at * v_row + kv_head * v_head + d, mask=key_inside, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(dy, tl.trans(v_tile), input_precision="ieee")
        kept, add = True, 0.0
        if DROPOUT:
            drop_row = (b_at * heads + head) * queries + i + first * heads
            kept = keep_tile(drop_row, key_start, seed, call, threshold, BLOCK_N)
        if BIAS:
            bias_at = bias + b.to(tl.int64) * bias_batch + head * bias_head + i[:, None].to(tl.int64) * bias_row
            seen = valid[:, None] & (key < keys)[None, :]
            add = tl.load(bias_at + key[None, :].to(tl.int64) * bias_key, mask=seen, other=0.0).to(tl.float32)
        _, _, ds = gradients(
            s, dp, m[:, None], mean[:, None], add, slope, (i + shift)[:, None], key[None, :], keys, kept,
            window, scale, softcap, rescale, CAUSAL, WINDOW, SOFTCAP, BIAS, ALIBI, DROPOUT,
        )  # fmt: skip
        dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision="ieee")
    to = ((b_at * all_rows + token) * heads + head) * dim + d
    tl.store(dq + to, (dq_tile * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
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
        b_at = tl.to_tensor(b).to(tl.int64)
        first, first_key = 0, 0
        if PACKED:
            b_at = b_at * 0
            first, first_key = tl.load(cu_q + b), tl.load(cu_k + b)
            queries, keys = tl.load(cu_q + b + 1) - first, tl.load(cu_k + b + 1) - first_key
        shift = keys - queries
        for head in range(tl.where(bias_heads == 1, 0, own_head), tl.where(bias_heads == 1, heads, own_head + 1)):
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
                    bias_at = bias + b * bias_batch + head * bias_head + i[:, None].to(tl.int64) * bias_row
                    seen = valid[:, None] & (key < keys)[None, :]
                    add = tl.load(bias_at + key[None, :].to(tl.int64) * bias_key, mask=seen, other=0.0).to(tl.float32)
                    kept = True
                    if DROPOUT:
                        drop_row = (b_at * heads + head) * queries + i + first * heads
                        kept = keep_tile(drop_row, key_start, seed, call, threshold, BLOCK_N)
                    _, ds, _ = gradients(
                        s, dp, m[:, None], mean[:, None], add, 0.0, (i + shift)[:, None], key[None, :], keys, kept,
                        window, scale, softcap, rescale, CAUSAL, WINDOW, SOFTCAP, True, False, DROPOUT,
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
    size, block_d = sizes(BACKWARD, dim, q.dtype, heavy=bias is not None or p > 0), padded(dim)
    delta = torch.empty_like(lse)
    rows, keys, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    delta_kernel[(triton.cdiv(rows, 32), heads, q.shape[0])](
        delta, out, dout, rows, heads, dim, *out.stride()[:3], *dout.stride()[:3],
        BLOCK_M=32, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    inputs = (q, k, v, dout, lse, delta, cu_q, cu_k, bias)
    shape = (*common(q, k, v, cu_q, bias, batch), *dout.stride()[:3])
    shaping = (window, scale, softcap, seed, call, threshold(p), 1 / (1 - p))
    options = modes(packed, bias, alibi, causal, window, softcap, p, batch)
    blocks = {
        "BLOCK_M": size.rows,
        "BLOCK_N": size.keys,
        "BLOCK_D": block_d,
        "num_warps": size.warps,
        "num_stages": stages(q.dtype),
    }

    def count(length: int, block: int) -> int:
        return length // block + batch + 2 if packed else triton.cdiv(length, block)

    keys_kernel[(count(keys, size.keys), kv_heads, q.shape[0])](
        dk, dv, *inputs, alibi, *shape, *shaping, **options, **blocks
    )  # fmt: skip
    queries_kernel[(count(rows, size.rows), heads, q.shape[0])](
        dq, *inputs, alibi, *shape, *shaping, **options, **blocks
    )  # fmt: skip
    if dbias.numel():
        for unused in ("BIAS", "ALIBI", "BATCH"):
            options.pop(unused)
        size = sizes(BIAS, dim, q.dtype)
        blocks |= {"BLOCK_M": size.rows, "BLOCK_N": size.keys, "num_warps": size.warps}
        grid = (
            triton.cdiv(bias.shape[2], size.rows) * triton.cdiv(bias.shape[3], size.keys),
            bias.shape[1],
            bias.shape[0],
        )
        bias_kernel[grid](
            dbias, *inputs, *shape, *bias.shape, *shaping, **options,
            ONE_ROW=bias.shape[2] == 1, ONE_COLUMN=bias.shape[3] == 1, **blocks,
        )  # fmt: skip
    dsinks = q.new_empty(0)
    if sinks is not None:
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float()[:, None] - lse))  # [B, H, Sq]
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks
