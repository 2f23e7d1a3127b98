"""linear(exact=True) on a GPU: y = x W^T + s B^T, then gain, bias, swiglu, residual; one order of k for any number of rows.

Tiles of M and N alone may differ with the shapes; every sum of a tile goes on from the one before it, 16 of k at a time, and
then, for an adapter, through r. Tensor cores of Hopper take tiles of 64 rows and more; smaller ones run on other instructions,
which add in an order of their own: so no tile here has fewer, nor has one of `_lora_gpu.py` or `multi_lora.py` in this mode.
"""

import torch
from torch import Tensor

from ._gated import silu
from ._triton import matrix, roomy, tl, triton

LEAST_ROWS = 64  # of a tile of tensor cores
RANKS = 64  # of B that the chain goes on through at a time, at most


@triton.jit
def _product(acc, x, weight, k, depth, held, inside, x_rows, weight_rows, m, n, BULK: tl.constexpr, K: tl.constexpr):
    """acc += x[:, k:k+K] weight[:, k:k+K]^T. BULK: from descriptors, rows from m and n on."""
    if BULK:
        a, b = x_rows.load([m, k]), tl.trans(weight_rows.load([n, k]))
    else:
        column = k + tl.arange(0, K)
        a = tl.load(x[:, None] + column[None, :], mask=held[:, None] & (column < depth)[None, :], other=0.0)
        b = tl.load(weight[None, :] + column[:, None], mask=inside[None, :] & (column < depth)[:, None], other=0.0)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def go_on(acc, s, b, m, n, held, inside, first, rank, b_stride_n, b_stride_r, R: tl.constexpr):
    """acc + s B^T over r from `first` on: s [rows, rank] float32, b [cols, rank] of any strides."""
    r = first + tl.arange(0, R)
    p = tl.load(s + m[:, None] * rank + r[None, :], mask=held[:, None] & (r < rank)[None, :], other=0.0)
    w = tl.load(
        b + n[None, :] * b_stride_n + r[:, None].to(tl.int64) * b_stride_r,
        mask=inside[None, :] & (r < rank)[:, None],
        other=0.0,
    )
    return tl.dot(p.to(w.dtype), w, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "cols"])
def exact_kernel(
    y, x, weight, x_rows, weight_rows, s, b, gain, bias, residual, rows, cols, depth, rank, y_stride, x_stride,
    weight_stride, residual_stride, b_stride_n, b_stride_r,
    SWIGLU: tl.constexpr, BULK: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    # WHOLE: rows of y are multiples of 16 long, so that they are written 16 bytes at a time. Without x, y holds the product.
    if WHOLE:
        cols = cols // 16 * 16  # what the compiler sees
    # Eight tiles down, then the next column: what they share stays in L2.
    tile, down, across = tl.program_id(0), tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    first = tile // (8 * across) * 8
    height = tl.minimum(down - first, 8)
    inner = tile % (8 * across)
    at_m, at_n = (first + inner % height) * BM, (inner // height) * BN
    m, n = at_m.to(tl.int64) + tl.arange(0, BM), at_n.to(tl.int64) + tl.arange(0, BN)
    held, inside = m < rows, n < cols
    mask = held[:, None] & inside[None, :]
    y += m[:, None] * y_stride + n[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    above = acc
    if x is None:
        acc = tl.load(y, mask=mask, other=0.0)
    else:
        its_x = x + m * x_stride
        weight += n * weight_stride
        for k in range(0, depth, BK):
            acc = _product(acc, its_x, weight, k, depth, held, inside, x_rows, weight_rows, at_m, at_n, BULK, BK)
            if SWIGLU:
                up, at_up = weight + cols.to(tl.int64) * weight_stride, at_n + cols
                above = _product(above, its_x, up, k, depth, held, inside, x_rows, weight_rows, at_m, at_up, BULK, BK)
    if s is not None:
        for start in range(0, rank, R):
            acc = go_on(acc, s, b, m, n, held, inside, start, rank, b_stride_n, b_stride_r, R)
    if gain is not None:
        acc *= tl.load(gain + n, mask=inside, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:  # of rounded halves, as training keeps them
        acc, above = acc.to(x.dtype.element_ty).to(tl.float32), above.to(x.dtype.element_ty).to(tl.float32)
        acc = silu(acc) * above
    if residual is not None:
        acc += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y, acc.to(y.dtype.element_ty), mask=mask)


# Rows, columns and depth of a tile, warps, steps on their way.
MANY_ROWS, FEW_ROWS = (128, 128, 32, 8, 4), (64, 32, 32, 4, 4)
MANY_ROWS_ROOMY, FEW_ROWS_ROOMY = (128, 256, 64, 8, 3), (64, 64, 128, 4, 4)  # see `roomy`; measured on an H200
FLOAT32 = (32, 32, 32, 4, 4)  # plain multiply-adds, in the order of k whatever the tile


def rank_block(rank: int) -> int:
    return min(RANKS, max(16, triton.next_power_of_2(rank)))


def exact_product(
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    low: tuple[Tensor, Tensor] | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Fills y [T, N], of x's dtype or float32, rounded once; x [T, K], weight [N, K] (swiglu: [2N, K]) and residual [T, N] with
    unit strides, low: s [T, R] float32 and b [N, R]. x None: to the product in y, float32, comes what else is given."""
    if not y.numel():
        return y
    rows, cols = y.shape
    s, b = (None, None) if low is None else low
    many, few = (MANY_ROWS_ROOMY, FEW_ROWS_ROOMY) if roomy(y.device) else (MANY_ROWS, FEW_ROWS)
    bm, bn, step, warps, stages = many if rows > LEAST_ROWS and not swiglu else few
    pair, (depth, x_stride, weight_stride) = (None, None), (0, 0, 0)
    if x is not None:
        depth, x_stride, weight_stride = x.shape[1], x.stride(0), weight.stride(0)
    if x is None or x.dtype == torch.float32:
        bm, bn, step, warps, stages = FLOAT32
    else:
        pair = matrix(x, bm, step), matrix(weight, bn, step)
    exact_kernel[(triton.cdiv(rows, bm) * triton.cdiv(cols, bn),)](
        y, x, weight, *pair, s, b, gain, bias, residual, rows, cols, depth, 0 if b is None else b.shape[1], y.stride(0),
        x_stride, weight_stride, 0 if residual is None else residual.stride(0), *((0, 0) if b is None else b.stride()),
        SWIGLU=swiglu, BULK=None not in pair, WHOLE=cols % 16 == 0 and y.stride(0) % 16 == 0, BM=bm, BN=bn, BK=step,
        R=16 if b is None else rank_block(b.shape[1]), num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y
