"""paged_attention in Triton.

The rows of a block are TOKENS tokens of a sequence times GROUP query heads of one KV head, so that a decode step uses the
matrix units and reads each key once. Keys are split over programs where rows alone do not fill the device: each writes its
part, and a second kernel folds them. How many programs is decided from the width of the block table and the number of
sequences, so the host never waits for lengths, and a captured step replays with others.

The split follows the sequence: of n blocks of keys each program takes n / splits. In exact mode a program takes whole
tiles of 256 keys and writes a part for each, and parts are folded left to right: the bits of ops.attention in exact mode,
for any page order, chunk or split.
"""

import torch
from torch import Tensor

from .._dot import accumulate
from .._e4m3 import decode
from .._triton import multiprocessors, tl, triton
from ..kv_cache import PAGE
from ..rope import unit_stride
from .triton_tile import (
    DECODE,
    EXACT,
    TILE,
    finish,
    fold,
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

MAX_SPLITS = 64  # as many parts as one combining program holds
MAX_PARTS = 1 << 28  # bytes


@triton.jit
def length(context_len, b, batch, capacity):
    """Keys of sequence b, and whether the number is one that its block table can hold."""
    n = tl.load(context_len + b, mask=(b >= 0) & (b < batch), other=0)
    good = (n >= 0) & (n <= capacity)
    return tl.where(good, n, 0), good


@triton.jit
def share(begin, end, splits, STEP: tl.constexpr):
    """Keys that each of `splits` programs takes of [begin, end)."""
    return tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), STEP), splits) * STEP


@triton.jit
def part(
    q, k_pages, v_pages, scales, table, row, slope, begin, end, keys, pages, dim,
    k_page, v_page, scale_page, window, scale, softcap,
    PAGE: tl.constexpr, BYTES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, SHAPED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What keys [begin, end) give the rows; pages of one KV head."""
    acc, total, top = nothing(BLOCK_M, BLOCK_D)
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        # a load a page: one a key is made by every thread that needs it
        number = start // PAGE + tl.arange(0, BLOCK_N // PAGE)
        page = tl.load(table + number, mask=number * PAGE < keys, other=0)
        page = tl.reshape(tl.broadcast_to(page[:, None], (BLOCK_N // PAGE, PAGE)), (BLOCK_N,)).to(tl.int64)
        known = (page >= 0) & (page < pages)
        inside = ((key < keys) & known)[:, None] & (d < dim)
        offset = (key % PAGE)[:, None] * dim + d
        k = tl.load(k_pages + page[:, None] * k_page + offset, mask=inside, other=0.0)
        v = tl.load(v_pages + page[:, None] * v_page + offset, mask=inside, other=0.0)
        if BYTES:
            own = scales + page * scale_page + key % PAGE
            k_scale = tl.load(own, mask=(key < keys) & known, other=0.0)
            v_scale = tl.load(own + PAGE, mask=(key < keys) & known, other=0.0)
            if k.dtype == tl.uint8:
                k, v, k_scale, v_scale = decode(k), decode(v), k_scale * 256.0, v_scale * 256.0
            k, v = k.to(tl.float32).to(q.dtype), v.to(tl.float32).to(q.dtype)  # exact
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if BYTES:
            s = s * k_scale[None, :]
        unit = scale * 1.4426950408889634
        if SHAPED:
            distance = row[:, None] - key[None, :]
            s, _ = shaped(s, scale, softcap, 0.0, slope[:, None], distance, SOFTCAP, False, ALIBI)
            unit = 1.0
        s = tl.where(known[None, :], s, float("nan"))  # a page outside the cache
        s = tl.where(sight(row[:, None], key[None, :], keys, window, CAUSAL, WINDOW), s, -float("inf"))
        p, fade, total, top = weigh(total, top, s, unit)
        if BYTES:
            p = tl.where(p > 0, p * v_scale[None, :], 0.0)  # what is not seen stays out, whatever its scale
        acc = accumulate(acc * fade[:, None], p.to(v.dtype), v)
    return acc, total, top


@triton.jit
def paged_kernel(
    out, accs, totals, tops, q, k_pages, v_pages, scales, table, context_len, cu_q, alibi, sinks,
    batch, rows, heads, group, dim, pages, max_pages, table_row, q_row, q_head, k_page, v_page, scale_page,
    parts, splits, window, scale, softcap,
    PAGE: tl.constexpr, BYTES: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, SHAPED: tl.constexpr, EXACT: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    at = tl.num_programs(0) - 1 - tl.program_id(0)  # later rows see more keys: they begin first
    blocks = tl.cdiv(group, GROUP)
    kv_head, split = (tl.program_id(1) // blocks).to(tl.int64), tl.program_id(2)
    b, _, end_row, token = owner(cu_q, batch, rows, at, TOKENS, BATCH)
    if token >= end_row:
        return
    keys, good = length(context_len, b, batch, max_pages * PAGE)
    r = tl.arange(0, BLOCK_M)
    token_r, member = token + r // GROUP, tl.program_id(1) % blocks * GROUP + r % GROUP
    valid = (r < TOKENS * GROUP) & (token_r < end_row) & (member < group)
    head, token_r = kv_head * group + member, token_r.to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    rows_q = tl.load(
        q + token_r[:, None] * q_row + head[:, None] * q_head + d, mask=valid[:, None] & (d < dim), other=0.0
    )
    slope = tl.load(alibi + head, mask=valid, other=0.0) if ALIBI else tl.zeros((BLOCK_M,), tl.float32)
    shift = keys - end_row  # a row's position is its index in q plus this
    row = token_r.to(tl.int32) + shift
    STEP: tl.constexpr = TILE if EXACT else BLOCK_N
    begin, end = span(
        token + shift, tl.minimum(token + TOKENS, end_row) - 1 + shift, keys, window, CAUSAL, WINDOW, STEP
    )  # fmt: skip
    each = share(begin, end, splits, STEP)
    start, stop = begin + split * each, tl.minimum(begin + (split + 1) * each, end)
    k_head, v_head = k_pages + kv_head * PAGE * dim, v_pages + kv_head * PAGE * dim
    scales_head = scales + kv_head * 2 * PAGE if BYTES else None
    entries = table + tl.maximum(tl.minimum(b, batch - 1), 0).to(tl.int64) * table_row
    at_part = (token_r * heads + head) * parts
    if EXACT:
        acc, total, top = nothing(BLOCK_M, BLOCK_D)
        for tile in range(start, stop, TILE):
            acc_b, total_b, top_b = part(
                rows_q, k_head, v_head, scales_head, entries, row, slope, tile, tl.minimum(tile + TILE, stop), keys,
                pages, dim, k_page, v_page, scale_page, window, scale, softcap,
                PAGE, BYTES, CAUSAL, WINDOW, SOFTCAP, ALIBI, SHAPED, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            if SPLIT:
                to = at_part + tile // TILE
                tl.store(tops + to, top_b, mask=valid)
                tl.store(totals + to, total_b, mask=valid)
                tl.store(accs + to[:, None] * dim + d, acc_b, mask=valid[:, None] & (d < dim))
            else:
                acc, total, top = fold(acc, total, top, acc_b, total_b, top_b)
    else:
        acc, total, top = part(
            rows_q, k_head, v_head, scales_head, entries, row, slope, start, stop, keys, pages, dim,
            k_page, v_page, scale_page, window, scale, softcap,
            PAGE, BYTES, CAUSAL, WINDOW, SOFTCAP, ALIBI, SHAPED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if SPLIT and start < stop:
            to = at_part + split
            tl.store(tops + to, top, mask=valid)
            tl.store(totals + to, total, mask=valid)
            tl.store(accs + to[:, None] * dim + d, acc, mask=valid[:, None] & (d < dim))
    if not SPLIT:
        if SINKS:
            acc, total, top = with_sink(acc, total, top, tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32))
        y = tl.where(good, finish(acc, total), float("nan")).to(out.dtype.element_ty)
        tl.store(out + (token_r * heads + head)[:, None] * dim + d, y, mask=valid[:, None] & (d < dim))


@triton.jit
def combine_kernel(
    out, accs, totals, tops, context_len, cu_q, sinks, batch, rows, heads, dim, max_pages, parts, splits, window,
    PAGE: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    EXACT: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, BATCH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of one head: its parts folded, left to right in exact mode, at once else."""
    token, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, BATCH)
    b = tl.sum(((tl.load(cu_q + i, mask=i <= batch, other=0) <= token) & (i <= batch)).to(tl.int32), 0) - 1
    first = tl.load(cu_q + b, mask=b >= 0, other=0)
    end_row = tl.minimum(tl.load(cu_q + b + 1, mask=b < batch, other=rows), rows)
    keys, good = length(context_len, b, batch, max_pages * PAGE)
    # the span of the block that this row was in
    block = first + (token - first) // TOKENS * TOKENS
    shift = keys - end_row
    STEP: tl.constexpr = TILE if EXACT else BLOCK_N
    begin, end = span(
        block + shift, tl.minimum(block + TOKENS, end_row) - 1 + shift, keys, window, CAUSAL, WINDOW, STEP
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    at = (token.to(tl.int64) * heads + head) * parts
    if EXACT:
        acc, total, top = nothing(1, BLOCK_D)
        one = tl.arange(0, 1)
        for tile in range(begin // TILE, tl.cdiv(end, TILE)):
            acc_b = tl.load(accs + (at + tile) * dim + d, mask=d < dim, other=0.0)[None, :]
            acc, total, top = fold(
                acc, total, top, acc_b, tl.load(totals + at + tile + one), tl.load(tops + at + tile + one)
            )
    else:
        each = tl.maximum(share(begin, end, splits, STEP), 1)
        j = tl.arange(0, PARTS)
        used = j < tl.cdiv(tl.maximum(end - begin, 0), each)
        t = tl.load(tops + at + j, mask=used, other=-float("inf"))
        highest = tl.max(t, 0)
        w = tl.exp2(t - tl.where(highest == -float("inf"), 0.0, highest))
        total = tl.sum(w * tl.load(totals + at + j, mask=used, other=0.0), 0)[None]
        inside = used[:, None] & (d < dim)[None, :]
        acc = tl.load(accs + (at + j)[:, None] * dim + d[None, :], mask=inside, other=0.0)
        acc, top = tl.sum(w[:, None] * acc, 0)[None, :], highest[None]
    if SINKS:
        acc, total, top = with_sink(acc, total, top, tl.load(sinks + head).to(tl.float32))
    y = tl.where(good, finish(acc, total), float("nan")).to(out.dtype.element_ty)
    to = (token.to(tl.int64) * heads + head) * dim + d
    tl.store(out + to[None, :], y, mask=(d < dim)[None, :])


# ------------------------------------------------------------------------------------------------------------ launcher


def plan(blocks: int, row_bytes: int, keys: int, step: int, exact: bool, device: torch.device) -> tuple[int, int]:
    """(programs that share a block's keys, parts that they leave): two programs for each multiprocessor."""
    tiles = triton.cdiv(keys, step)
    room = 2 * (multiprocessors(device.index or 0) if device.type == "cuda" else 66)
    splits = max(1, min(room // max(blocks, 1), tiles, MAX_SPLITS))
    parts = tiles if exact else splits
    return (1, 1) if splits == 1 or parts * row_bytes > MAX_PARTS else (splits, parts)


def gpu(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None, block_table: Tensor, context_len: Tensor, cu_q: Tensor,
    alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, exact: bool,
) -> Tensor:  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q, block_table = unit_stride(q), unit_stride(block_table)
    rows, heads, dim = q.shape
    batch, max_pages = block_table.shape
    kv_heads = k_pages.shape[1]
    group = heads // kv_heads
    few = rows <= batch * max(1, 16 // group)  # about one token a sequence
    size = sizes(DECODE, dim, q.dtype) if few and not exact else sizes(EXACT, dim, q.dtype, heavy=scales is not None)
    members = min(group, size.rows)  # heads of a block
    tokens = size.rows // members
    blocks = max(batch, triton.cdiv(rows, tokens)) * kv_heads * triton.cdiv(group, members)
    keys = min(max_pages * PAGE, window + tokens if window and causal else max_pages * PAGE)
    step = TILE if exact else 2 * size.keys
    splits, parts = plan(blocks, rows * heads * dim * 4, max_pages * PAGE if exact else keys, step, exact, q.device)
    accs = totals = tops = None
    if splits > 1:
        accs = torch.empty((rows, heads, parts, dim), dtype=torch.float32, device=q.device)
        totals, tops = torch.empty((2, rows, heads, parts), dtype=torch.float32, device=q.device)
    modes = {
        "PAGE": PAGE, "TILE": TILE, "CAUSAL": causal, "WINDOW": window > 0, "SINKS": sinks is not None, "EXACT": exact,
        "TOKENS": tokens, "BATCH": triton.next_power_of_2(batch + 1), "BLOCK_N": size.keys, "BLOCK_D": padded(dim),
    }  # fmt: skip
    paged_kernel[(rows // tokens + batch + 2, kv_heads * triton.cdiv(group, members), splits)](
        out, accs, totals, tops, q, k_pages, v_pages, scales, block_table, context_len, cu_q, alibi, sinks,
        batch, rows, heads, group, dim, k_pages.shape[0], max_pages, block_table.stride(0), q.stride(0), q.stride(1),
        k_pages.stride(0), v_pages.stride(0), 0 if scales is None else scales.stride(0), parts, splits, window, scale,
        softcap, BYTES=scales is not None,
        SOFTCAP=softcap > 0, ALIBI=alibi is not None, SHAPED=softcap > 0 or alibi is not None or scale <= 0,
        SPLIT=splits > 1, GROUP=members, BLOCK_M=size.rows, **modes, num_warps=size.warps, num_stages=max(size.stages, 3),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(rows, heads)](
            out, accs, totals, tops, context_len, cu_q, sinks, batch, rows, heads, dim, max_pages, parts, splits,
            window, PARTS=triton.next_power_of_2(splits), **modes, num_warps=4,
        )  # fmt: skip
    return out
