"""Sums of what the programs of a kernel left in memory, each its part, in one order: a sum and a rounding in one launch."""

from torch import Tensor

from ._triton import tl, triton


@triton.jit
def kernel(out, partial, rows, cols, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rows, ROWS):
        at = partial + (first + row)[:, None].to(tl.int64) * stride + col[None, :]
        total += tl.load(at, mask=(first + row < rows)[:, None] & (col < cols)[None, :], other=0.0)
    tl.store(out + col, tl.sum(total, 0).to(out.dtype.element_ty), mask=col < cols)


TILE, COLS = 4096, 32  # numbers that a program holds at a time; of a row at least so many


def add_up(out: Tensor, partial: Tensor) -> Tensor:
    """out, contiguous, = sum of partial [n, ...], float32, whose rows lie in one piece."""
    rows, cols = partial.shape[0], out.numel()
    if cols:
        tall = min(TILE // COLS, triton.next_power_of_2(rows))
        block = TILE // tall
        kernel[(triton.cdiv(cols, block),)](
            out, partial, rows, cols, partial.stride(0), ROWS=tall, BLOCK=block, num_warps=4
        )  # fmt: skip
    return out
