"""The Triton kernels of `lora_linear`, whose formula is in lora_linear.py.

The base and dx come from cuBLAS: fused into a Triton product they lose more than the fusion gains (a plain one reaches
.71-.79 of cuBLAS). What is left is skinny: [T, R] = x A^T, y += s B^T, the two sums over the rows, and the norms of
W + scale * B A.
"""

import torch
from torch import Tensor

from ._add_up import add_up
from ._dot import accumulate
from ._dropout import keep_tile, threshold
from ._linear_exact import LEAST_ROWS, rank_block
from ._triton import grid_of, programs, row_of_grid, tl, triton


@triton.jit
def shrink_kernel(
    s, x, a, rows, depth, rank, x_stride, a_stride_r, a_stride_k, scale, seed, call, threshold,
    DROP: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # s[t, r] = scale * sum over k of (kept) x[t, k] * a(r, k)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    r = tl.program_id(1) * R + tl.arange(0, R)
    acc = tl.zeros((M, R), tl.float32)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        v = tl.load(
            x + row[:, None] * x_stride + k[None, :], mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0
        )
        if DROP:
            v = tl.where(keep_tile(row, start, seed, call, threshold, K), v, 0.0)
        w = tl.load(
            a + r[None, :].to(tl.int64) * a_stride_r + k[:, None].to(tl.int64) * a_stride_k,
            mask=(r < rank)[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        acc = accumulate(acc, v, w)
    tl.store(s + row[:, None] * rank + r[None, :], acc * scale, mask=(row < rows)[:, None] & (r < rank)[None, :])


@triton.jit
def expand_kernel(
    y, s, b, gain, bias, rows, cols, rank, b_stride_n, b_stride_r, scale, seed, call, threshold,
    DROP: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # y[t, n] = (y[t, n] + scale * (kept) sum over r of s[t, r] * b(n, r)) * gain[n] + bias[n]
    row, first = row_of_grid() * M + tl.arange(0, M), tl.program_id(0) * N
    n = first + tl.arange(0, N)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, rank, R):
        r = start + tl.arange(0, R)
        p = tl.load(s + row[:, None] * rank + r[None, :], mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)
        w = tl.load(
            b + n[None, :].to(tl.int64) * b_stride_n + r[:, None].to(tl.int64) * b_stride_r,
            mask=(n < cols)[None, :] & (r < rank)[:, None],
            other=0.0,
        )
        acc = accumulate(acc, p.to(w.dtype), w)
    if DROP:
        acc = tl.where(keep_tile(row, first, seed, call, threshold, N), acc, 0.0)
    at, inside = y + row[:, None] * cols + n[None, :], (row < rows)[:, None] & (n < cols)[None, :]
    v = tl.load(at, mask=inside, other=0.0).to(tl.float32) + acc * scale
    if HAS_GAIN:
        v = v * tl.load(gain + n, mask=n < cols, other=0.0)[None, :]
    if HAS_BIAS:
        v = v + tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    partial, q, p, rows, cols, rank, stride_n, stride_r, q_stride, scale, seed, call, threshold,
    DROP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # partial(split, n, r) = scale * sum of (kept) q[t, n] * p[t, r] over this program's rows: each reads its columns of q
    # once, and the splits are added up in one order
    first = tl.program_id(0) * N
    n, r = first + tl.arange(0, N), tl.program_id(2) * R + tl.arange(0, R)
    acc = tl.zeros((N, R), tl.float32)
    for start in range(tl.program_id(1) * M, rows, tl.num_programs(1) * M):
        row = start + tl.arange(0, M).to(tl.int64)
        v = tl.load(
            q + row[:, None] * q_stride + n[None, :], mask=(row < rows)[:, None] & (n < cols)[None, :], other=0.0
        )
        if DROP:
            v = tl.where(keep_tile(row, first, seed, call, threshold, N), v, 0.0)
        w = tl.load(p + row[:, None] * rank + r[None, :], mask=(row < rows)[:, None] & (r < rank)[None, :], other=0.0)
        acc = accumulate(acc, tl.trans(v), w.to(v.dtype))
    at = partial + tl.program_id(1).to(tl.int64) * cols * rank
    at += n[:, None] * stride_n + r[None, :] * stride_r
    tl.store(at, acc * scale, mask=(n < cols)[:, None] & (r < rank)[None, :])


@triton.jit
def norms_kernel(
    norms, weight, a, b, cols, depth, rank, weight_stride, a_stride_r, a_stride_k, b_stride_n, b_stride_r, scale,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    # norms[n] = ||weight[n] + scale * b[n] a||
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        acc = tl.zeros((N, K), tl.float32)
        for first in range(0, rank, R):
            r = first + tl.arange(0, R)
            p = tl.load(
                b + n[:, None] * b_stride_n + r[None, :].to(tl.int64) * b_stride_r,
                mask=(n < cols)[:, None] & (r < rank)[None, :],
                other=0.0,
            )
            q = tl.load(
                a + r[:, None].to(tl.int64) * a_stride_r + k[None, :].to(tl.int64) * a_stride_k,
                mask=(r < rank)[:, None] & (k < depth)[None, :],
                other=0.0,
            )
            acc = accumulate(acc, p.to(tl.float32), q.to(tl.float32))
        w = tl.load(
            weight + n[:, None] * weight_stride + k[None, :],
            mask=(n < cols)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        acc = w.to(tl.float32) + scale * acc
        total += tl.sum(acc * acc, 1)
    tl.store(norms + n, tl.sqrt(total), mask=n < cols)


def _dropping(p: float, seed: int, call: int) -> tuple[float, tuple[int, int, int], bool]:
    """The scale of what is kept, what draws the mask, and whether anything is dropped."""
    return 1 / (1 - p), (seed, call, threshold(p) if p else 0), p > 0


# Of 16 bits: as much of a row at once as hides the latency of memory.
SHRINK_K, SHRINK_STAGES = 128, 3
# By the bytes of an element; sums of `multi_lora` have this order too.
EXACT_ROWS, EXACT_K = {2: LEAST_ROWS, 4: 16}, {2: 64, 4: 32}


def shrink(x: Tensor, a: Tensor, scale: float, p: float = 0.0, seed: int = 0, call: int = 0, exact=False) -> Tensor:
    """scale * drop(x) a^T, float32; a [R, K] of any strides."""
    (rows, depth), rank = x.shape, a.shape[0]
    s = torch.empty((rows, rank), dtype=torch.float32, device=x.device)
    kept, mask, drop = _dropping(p, seed, call)
    narrow, block = x.dtype != torch.float32, rank_block(rank)
    m, k = 16 if narrow and rows < 32 * programs(x.device) else 32, SHRINK_K if narrow else 32
    if exact:
        m, k = EXACT_ROWS[x.itemsize], EXACT_K[x.itemsize]
    shrink_kernel[(triton.cdiv(rows, m), triton.cdiv(rank, block))](
        s, x, a, rows, depth, rank, x.stride(0), *a.stride(), scale * kept, *mask,
        DROP=drop, M=m, K=k, R=block, num_warps=8 if narrow and block > 32 else 4, num_stages=SHRINK_STAGES,
    )  # fmt: skip
    return s


def expand(y: Tensor, s: Tensor, b: Tensor, gain=None, bias=None, p: float = 0.0, seed: int = 0, call: int = 0) -> None:
    """y = (y + mask * (s b^T)) * gain + bias, in place; b [N, R] of any strides."""
    (rows, cols), rank = y.shape, s.shape[1]
    kept, mask, drop = _dropping(p, seed, call)
    expand_kernel[grid_of(triton.cdiv(rows, 64), cols, 64)](
        y, s, b, s if gain is None else gain, s if bias is None else bias, rows, cols, rank, *b.stride(), kept, *mask,
        DROP=drop, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None, M=64, N=64, R=min(32, rank_block(rank)),
        num_warps=4,
    )  # fmt: skip


def sum_over_rows(
    q: Tensor, s: Tensor, dtype: torch.dtype, across: bool = False, p: float = 0.0, seed: int = 0, call: int = 0
) -> Tensor:
    """drop(q)^T s, [cols of q, R]; across: [R, cols of q]."""
    (rows, cols), rank = q.shape, s.shape[1]
    kept, mask, drop = _dropping(p, seed, call)
    blocks, block, narrow = triton.cdiv(cols, 64), rank_block(rank), q.dtype != torch.float32
    splits = max(1, min(triton.cdiv(programs(q.device), blocks), triton.cdiv(rows, 64)))
    out = torch.empty((rank, cols) if across else (cols, rank), dtype=dtype, device=q.device)
    partial = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
    gradient_kernel[(blocks, splits, triton.cdiv(rank, block))](
        partial, q, s, rows, cols, rank, *((1, cols) if across else (rank, 1)), q.stride(0), kept, *mask,
        DROP=drop, M=32 if narrow else 16, N=64, R=block, num_warps=8 if narrow and block > 32 else 4,
    )  # fmt: skip
    return add_up(out, partial)


def row_norms(norms: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Of weight [N, K] with unit stride in K; a and b of any strides."""
    (cols, rank), depth = b.shape, a.shape[1]
    norms_kernel[(triton.cdiv(cols, 32),)](
        norms, weight, a, b, cols, depth, rank, weight.stride(0), *a.stride(), *b.stride(), scale,
        N=32, K=64, R=min(32, rank_block(rank)), num_warps=4,
    )  # fmt: skip
