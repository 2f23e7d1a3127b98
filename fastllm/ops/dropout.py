"""dropout: y = x / (1 - p) where (row, column) is kept, else 0 (Srivastava et al. 2014), the mask drawn from counters.

Shapes: x, y [..., N]; a row is a flat index over all dimensions but the last. Dtypes: float32, bfloat16, float16.
Rounding: x * float32(1 / (1 - p)) in fp32, rounded once. What is dropped is 0, whatever it was, NaN included.
The mask is a function of (seed, call, row, column): _dropout.py. Nothing is saved: the backward is the same op on dy.
"""

import torch
from torch import Tensor

from .. import _C
from ._dropout import Dropout, keep, keep_tile, threshold
from ._op import DTYPES, Op, as_rows, check_dtype, empty_like, row_stride
from ._triton import tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x: Tensor, p: float, seed: int, call: int) -> Tensor:
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    mask = keep(rows, torch.arange(x.shape[-1], device=x.device), p, seed, call)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.tensor(1 / (1 - p), dtype=wide, device=x.device)
    return torch.where(mask, x.to(wide) * scale, 0.0).to(x.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------------- Triton

BLOCK = 1024  # columns a program: 256 counters


@triton.jit
def kernel(y, x, cols, x_stride, seed, call, threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    col = start + tl.arange(0, BLOCK)
    inside = col < cols
    kept = tl.reshape(keep_tile(row + tl.zeros((1,), tl.int64), start, seed, call, threshold, BLOCK), (BLOCK,))
    v = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * cols + col, tl.where(kept, v * scale, 0.0).to(y.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(x: Tensor, p: float, seed: int, call: int) -> Tensor:
    y, cols = empty_like(x), x.shape[-1]
    if x.numel():
        rows, stride = row_stride(x)
        _C.dropout(
            y.data_ptr(), rows.data_ptr(), x.numel() // cols, cols, stride, DTYPES[x.dtype], seed, call, threshold(p), p
        )
    return y


def gpu(x: Tensor, p: float, seed: int, call: int) -> Tensor:
    y = empty_like(x)
    if x.numel():
        rows = as_rows(x)
        kernel[(rows.shape[0], triton.cdiv(rows.shape[1], BLOCK))](
            y, rows, rows.shape[1], rows.stride(0), seed, call, threshold(p), 1 / (1 - p), BLOCK=BLOCK, num_warps=4
        )
    return y


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    ctx.settings = inputs[1:]


def _backward(ctx, dy: Tensor):
    return forward(dy, *ctx.settings), None, None, None


forward = Op(
    "dropout(Tensor x, float p, SymInt seed, SymInt call) -> Tensor",
    reference=reference,
    fake=lambda x, p, seed, call: empty_like(x),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)


def dropout(x: Tensor, spec: Dropout) -> Tensor:
    """x [..., N] with elements dropped as `spec` says: [..., N].

    Raises TypeError for the dtype or what is no spec, ValueError for a tensor without dimensions. See the head of this file.
    """
    check_dtype("dropout", "x", x)
    if not isinstance(spec, Dropout):
        raise TypeError(f"dropout: spec is {spec!r}; it must be a Dropout(p, seed, call), which says what is drawn")
    if not x.dim():
        raise ValueError("dropout: x is a scalar; it must be [..., N]")
    return forward(x, *spec.arguments()) if spec.p else x.clone(memory_format=torch.contiguous_format)
