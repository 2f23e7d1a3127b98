"""The Triton kernels of `quant_linear`, whose meaning and arithmetic are in quant_linear.py.

Weights keep the CPU's layout: panels of 16 rows, 32 of k after 32 of k, four consecutive k of a row in a word and, of 4
bits, the next four in its high nibbles. A load takes the bytes [rows, 16] of half a group of 8 bits, or of a whole one
of 4; its low and its high half lie one after the other in what is multiplied, and the activations are put in the same
order: so a thread of a tensor core gets its operands as it loaded them, with two or three instructions for eight weights.

Up to 16 rows, where a product is a pass over the weights, a warp takes a panel and walks down its groups: no warp waits
for another, and what it will read is on its way (`num_stages`). More rows are tiles. Both sum groups in one order.
"""

import os

import torch
from torch import Tensor

from ._gated import silu
from ._op import as_rows
from ._triton import tl, triton
from .rms_norm import rms_norm

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_EXACT = {"enable_fp_fusion": False}
_PIECE = 1 << 24  # weights that a backward dequantises at a time


@triton.jit(do_not_specialize=["depth", "groups", "x_stride"])
def quantise_kernel(
    quants, scales, starts, moments, x, depth, groups, x_stride,
    BITS: tl.constexpr, HAS_MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of x as s8; beside each group its scale, what its sum starts with, and what multiplies the minimum."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, 32)[None, :]
    column = group[:, None] * 32 + k
    v = tl.load(x + row * x_stride + column, mask=column < depth, other=0.0)
    finite = tl.max((tl.abs(v) < float("inf")).to(tl.int32) ^ 1, 1) == 0
    top = tl.max(tl.where(finite[:, None], tl.abs(v), 0.0), 1)
    plain = top >= 1e-35
    some = tl.where(plain, top, 1.0)
    scale = tl.where(plain, tl.div_rn(top, 127.0 + tl.zeros_like(top)), tl.where(finite, 0.0, float("nan")))
    inverse = tl.where(plain, tl.div_rn(127.0 + tl.zeros_like(top), some), 0.0)
    v = tl.where(plain[:, None], v, 0.0) * inverse[:, None] + 12582912.0  # 1.5 * 2^23: rounds to an integer
    q = v.to(tl.int32, bitcast=True) - 0x4B400000
    total = tl.sum(q, 1)
    place = k
    if BITS == 4:  # low nibbles, then high ones
        place = k % 8 // 4 * 16 + k // 8 * 4 + k % 4
    inside, at = group < groups, row * groups + group
    tl.store(quants + at[:, None] * 32 + place, q.to(tl.int8), mask=inside[:, None])
    tl.store(scales + at, scale, mask=inside)
    if HAS_MIN:
        tl.store(moments + at, scale * total.to(tl.float32), mask=inside)
    if (BITS == 8) == HAS_MIN:  # quants are taken as s8: u4, and u8 less 128
        tl.store(starts + at, total * (128 if HAS_MIN else -8), mask=inside)


@triton.jit
def _high_nibbles(b):
    """Of int8: (b >> 4) & 15, four at a time. Triton shifts bytes one by one."""
    if _INTERPRETED:
        return (b >> 4) & 15
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0f0f0f0f; }", "=r,r", [b], tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _quants(at, inside, BITS: tl.constexpr):
    """32 of k of some rows as s8 [rows, 32]: u4, or u8 less 128. at: where their panel's are, plus 4 times the lane."""
    t = tl.arange(0, 16)[None, :]
    at = at.to(tl.pointer_type(tl.int8))[:, None] + (t // 4 * 64 + t % 4)
    low = tl.load(at, mask=inside[:, None], other=0)
    if BITS == 4:
        high = _high_nibbles(low)
        low = low & 15
    else:
        high = tl.load(at + 256, mask=inside[:, None], other=0) ^ -128
        low = low ^ -128
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [at.shape[0], 32])


@triton.jit
def _place(n, cols, HALVES: tl.constexpr):
    """Panel and lane of column n of y."""
    if HALVES == 1:  # SWIGLU: the gate's; the next is up's
        return n // 16 * 2, n % 16
    if HALVES == 2:  # GATE_UP: y is [gate, up]
        return n % (cols // 2) // 16 * 2 + n // (cols // 2), n % (cols // 2) % 16
    return n // 16, n % 16


@triton.jit
def _chain(
    panel, lane, inside, quants, scales, starts, moments, m, held, blocks,
    BITS: tl.constexpr, HAS_MIN: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The scaled sums over groups ascending: [BN, BM], or [BM, BN] where WIDE. STEP divides blocks, a weight's groups."""
    BYTES: tl.constexpr = 64 * BITS * PARTS + (64 if HAS_MIN else 32)
    at = m.to(tl.int64) * (blocks * PARTS)
    x, k = quants + at * 32, tl.arange(0, 32)
    scales += at
    if (BITS == 8) == HAS_MIN:
        starts += at
    if HAS_MIN:
        moments += at
    word, half = panel + lane * 4, panel.to(tl.pointer_type(tl.float16)) + 32 * BITS * PARTS + lane
    acc = tl.zeros([BM, BN] if WIDE else [BN, BM], tl.float32)
    for _ in range(0, blocks, STEP):
        for i in tl.static_range(STEP):
            scale = tl.load(half + i * (BYTES // 2), mask=inside, other=0.0).to(tl.float32)
            if HAS_MIN:
                minimum = tl.load(half + (i * (BYTES // 2) + 16), mask=inside, other=0.0).to(tl.float32)
            for j in tl.static_range(PARTS):
                g = i * PARTS + j
                q = _quants(word + (i * BYTES + j * (64 * BITS)), inside, BITS)
                x_scale = tl.load(scales + g, mask=held, other=0.0)
                if WIDE:
                    v = tl.load(x[:, None] + (g * 32 + k)[None, :], mask=held[:, None], other=0)
                    total = tl.dot(v, tl.trans(q), out_dtype=tl.int32)
                else:
                    v = tl.load(x[None, :] + (g * 32 + k)[:, None], mask=held[None, :], other=0)
                    total = tl.dot(q, v, out_dtype=tl.int32)
                if (BITS == 8) == HAS_MIN:
                    start = tl.load(starts + g, mask=held, other=0)
                    total += start[:, None] if WIDE else start[None, :]
                both = x_scale[:, None] * scale[None, :] if WIDE else scale[:, None] * x_scale[None, :]
                acc = tl.fma(total.to(tl.float32), both, acc)
                if HAS_MIN:
                    moment, none = tl.load(moments + g, mask=held, other=0.0), tl.zeros_like(acc)
                    if WIDE:
                        acc = tl.fma(minimum[None, :] + none, moment[:, None] + none, acc)
                    else:
                        acc = tl.fma(minimum[:, None] + none, moment[None, :] + none, acc)
        word += STEP * BYTES
        half += STEP * (BYTES // 2)
        x += STEP * PARTS * 32
        scales += STEP * PARTS
        if (BITS == 8) == HAS_MIN:
            starts += STEP * PARTS
        if HAS_MIN:
            moments += STEP * PARTS
    return acc


@triton.jit(do_not_specialize=["rows", "cols", "blocks", "residual_stride"])
def linear_kernel(
    y, quants, scales, starts, moments, weight, bias, residual, rows, cols, blocks, residual_stride,
    BITS: tl.constexpr, HAS_MIN: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, STEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = BM > 16  # else weights stand where tensor cores have 16 rows, and rows of x where they have 8
    BYTES: tl.constexpr = 64 * BITS * PARTS + (64 if HAS_MIN else 32)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    held, inside = m < rows, n < cols
    panel, lane = _place(n, cols, HALVES)
    panel = weight + panel.to(tl.int64) * blocks * BYTES
    acc = _chain(
        panel, lane, inside, quants, scales, starts, moments, m, held, blocks,
        BITS, HAS_MIN, PARTS, STEP, WIDE, BM, BN,
    )  # fmt: skip
    if bias is not None:
        added = tl.load(bias + n, mask=inside, other=0.0)
        acc += added[None, :] if WIDE else added[:, None]
    if HALVES == 1:
        up = _chain(
            panel + blocks.to(tl.int64) * BYTES, lane, inside, quants, scales, starts, moments, m, held, blocks,
            BITS, HAS_MIN, PARTS, STEP, WIDE, BM, BN,
        )  # fmt: skip
        acc = silu(acc) * up
    mask = held[:, None] & inside[None, :] if WIDE else inside[:, None] & held[None, :]
    if residual is not None:
        at = m * residual_stride
        acc += tl.load(
            residual + (at[:, None] + n[None, :] if WIDE else n[:, None] + at[None, :]), mask=mask, other=0.0
        )
    at = m * cols
    tl.store(y + (at[:, None] + n[None, :] if WIDE else n[:, None] + at[None, :]), acc, mask=mask)


@triton.jit(do_not_specialize=["first", "count", "rows", "depth", "blocks"])
def dequantise_kernel(
    out, weight, first, count, rows, depth, blocks,
    BITS: tl.constexpr, HAS_MIN: tl.constexpr, PARTS: tl.constexpr, HALVES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + count) as float32 [count, depth]; a program takes a group of BN rows."""
    BYTES: tl.constexpr = 64 * BITS * PARTS + (64 if HAS_MIN else 32)
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    inside, block = i < count, tl.program_id(1)
    panel, lane = _place(first + i, rows, HALVES)
    panel = weight + (panel.to(tl.int64) * blocks + block) * BYTES
    half = panel.to(tl.pointer_type(tl.float16)) + 32 * BITS * PARTS + lane
    scale = tl.load(half, mask=inside, other=0.0).to(tl.float32)
    p = tl.arange(0, 32)
    k = p % 16 // 4 * 8 + p // 16 * 4 + p % 4 if BITS == 4 else p
    ZERO: tl.constexpr = (8 if BITS == 4 else 0) if not HAS_MIN else (0 if BITS == 4 else -128)
    for j in tl.static_range(PARTS):
        q = _quants(panel + (j * (64 * BITS)) + lane * 4, inside, BITS)
        v = (q.to(tl.int32) - ZERO).to(tl.float32) * scale[:, None]  # exact
        if HAS_MIN:
            v += tl.load(half + 16, mask=inside, other=0.0).to(tl.float32)[:, None]
        column = (block * PARTS + j) * 32 + k
        to = out + i.to(tl.int64)[:, None] * depth + column[None, :]
        tl.store(to, v, mask=inside[:, None] & (column < depth)[None, :])


@triton.jit(do_not_specialize=["rows", "depth", "blocks"])
def embedding_kernel(
    y, ids, weight, rows, depth, blocks,
    BITS: tl.constexpr, HAS_MIN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = 64 * BITS * PARTS + (64 if HAS_MIN else 32)
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + i)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = (row + 0 * k >= 0) & (row + 0 * k < rows)
    inside = known & (k < depth)
    block = weight + (row // 16 * blocks + k // (32 * PARTS)) * BYTES
    j, lane = k % 32, row % 16
    half = block.to(tl.pointer_type(tl.float16)) + 32 * BITS * PARTS + lane
    scale = tl.load(half, mask=inside, other=0.0).to(tl.float32)
    EACH: tl.constexpr = 32 // BITS  # quants a word of four bytes
    at = block + k // 32 % PARTS * (64 * BITS) + j // EACH * 64 + lane * 4 + j % 4
    q = tl.load(at, mask=inside, other=0).to(tl.int32)
    q = (q >> (j % EACH // 4 * 4)) & (2**BITS - 1)
    if HAS_MIN:
        v = q.to(tl.float32) * scale + tl.load(half + 16, mask=inside, other=0.0).to(tl.float32)
    else:
        v = (q - 2 ** (BITS - 1)).to(tl.float32) * scale + 0.0
    tl.store(y + i * depth + k, tl.where(known, v, float("nan")), mask=k < depth)


# ----------------------------------------------------------------------------------------------------------- launchers


def linear(y: Tensor, x, weight, group: int, depth, bits, has_min, bias, norm, eps, residual, halves) -> Tensor:
    if not y.numel():
        return y
    if norm is not None:
        x = rms_norm(x, norm, eps)
    rows, other = as_rows(x), None if residual is None else as_rows(residual)
    count, blocks, parts, device = rows.shape[0], weight.shape[1], group // 32, x.device
    groups = blocks * parts
    quants = torch.empty(count, groups, 32, dtype=torch.int8, device=device)
    scales = torch.empty(count, groups, dtype=torch.float32, device=device)
    moments = torch.empty_like(scales) if has_min else scales
    starts = torch.empty(count, groups, dtype=torch.int32, device=device) if (bits == 8) == has_min else scales
    form = {"BITS": bits, "HAS_MIN": has_min}
    quantise_kernel[(count, triton.cdiv(groups, 32))](
        quants, scales, starts, moments, rows, depth, groups, rows.stride(0), **form, BLOCK=32, num_warps=4, **_EXACT
    )
    step = next(s for s in (8, 4, 2, 1) if s * parts <= 8 and blocks % s == 0)
    if count <= 16:
        bm, bn, warps, stages = 1 if count == 1 else 8 if count <= 8 else 16, 16, 1, 4
    else:
        bm, bn, warps, stages, step = 64, 32 if halves == 1 else 64, 4, 4, 1
    linear_kernel[(triton.cdiv(y.shape[-1], bn), triton.cdiv(count, bm))](
        y, quants, scales, starts, moments, weight, bias, other, count, y.shape[-1], blocks,
        0 if other is None else other.stride(0),
        **form, PARTS=parts, HALVES=halves, STEP=step, BM=bm, BN=bn, num_warps=warps, num_stages=stages, **_EXACT,
    )  # fmt: skip
    return y


def dequantise(weight, group: int, first, count, rows, depth, bits, has_min, halves) -> Tensor:
    """Rows [first, first + count) of a weight of `rows` rows, float32 [count, depth]."""
    out = torch.empty(count, depth, dtype=torch.float32, device=weight.device)
    dequantise_kernel[(triton.cdiv(count, 32), weight.shape[1])](
        out, weight, first, count, rows, depth, weight.shape[1],
        BITS=bits, HAS_MIN=has_min, PARTS=group // 32, HALVES=halves and 2, BN=32, num_warps=4,
    )  # fmt: skip
    return out


def backward(dy: Tensor, weight, group: int, rows, depth, bits, has_min, halves) -> Tensor:
    """dy W, some 16 million weights at a time in float32; cuBLAS multiplies, as it does behind a plain linear."""
    flat, empty = as_rows(dy), torch.empty if rows else torch.zeros
    dx = empty((flat.shape[0], depth), dtype=dy.dtype, device=dy.device)
    step = max(16, _PIECE // max(depth, 1))
    for first in range(0, rows if dx.numel() else 0, step):
        some = dequantise(weight, group, first, min(step, rows - first), rows, depth, bits, has_min, halves)
        dx.addmm_(flat[:, first : first + step], some, beta=1 if first else 0)
    return dx.view(*dy.shape[:-1], depth)


def embedding(y: Tensor, ids, weight, group: int, rows, depth, bits, has_min) -> Tensor:
    """An id outside the vocabulary gives NaN: nothing waits for the device."""
    if y.numel():
        embedding_kernel[(ids.numel(), triton.cdiv(depth, 512))](
            y, ids.contiguous(), weight, rows, depth, weight.shape[1],
            BITS=bits, HAS_MIN=has_min, PARTS=group // 32, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return y
