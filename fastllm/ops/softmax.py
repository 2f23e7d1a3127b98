"""softmax: y = exp(x / T) / sum(exp(x / T)) over the last dimension, with the temperature T.

Shapes: x, y [..., N]. Dtypes: float32, bfloat16, float16. Rounding: e = exp((x - max(x)) * (1/T)) and its sum in fp32,
in one fixed order, so that a row does not depend on its neighbours; y = e * (1 / sum), rounded once, at the end.
A row of nothing but -inf gives zeros (as in attention: who sees nothing gets nothing); a row with a NaN or +inf gives
NaN throughout, and in no other row.
Backward: dx = y * (dy - sum(dy * y)) / T from the rounded y, as PyTorch does; rounded once. T receives no gradient.
"""

import math

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, as_rows, check, check_dtype, empty_like, row_stride
from ._triton import row_warps, tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x: Tensor, scale: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = torch.softmax((wide * scale), -1)
    if x.shape[-1]:
        y = torch.where((wide == -math.inf).all(-1, keepdim=True), torch.zeros_like(y), y)
    return y.to(x.dtype)


def reference_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    d, p = dy.to(wide), y.to(wide)
    return (p * (d - (d * p).sum(-1, keepdim=True)) * scale).to(y.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------------- Triton
# A row of up to WIDEST elements is held in registers and read once; a wider one is walked in blocks: a running maximum
# and sum, then the outputs.


@triton.jit
def forward_kernel(y, x, cols, x_stride, scale, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    y += row * cols
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        v = tl.load(x + lane, mask=lane < cols, other=float("-inf")).to(tl.float32)
        top = tl.max(v, 0)
        e = tl.exp((v - tl.where(top == float("-inf"), 0.0, top)) * scale)
        total = tl.sum(e, 0)
        share = tl.where(total == 0.0, 0.0, 1.0 / total)
        tl.store(y + lane, (e * share).to(y.dtype.element_ty), mask=lane < cols)
    else:
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, cols, BLOCK):
            col = begin + lane
            v = tl.load(x + col, mask=col < cols, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, v)
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp((top - finite) * scale) + tl.exp((v - finite) * scale)
            top = higher
        most = tl.max(top, 0)
        most = tl.where(most == float("-inf"), 0.0, most)
        whole = tl.sum(total * tl.exp((top - most) * scale), 0)
        share = tl.where(whole == 0.0, 0.0, 1.0 / whole)
        for begin in range(0, cols, BLOCK):
            col = begin + lane
            v = tl.load(x + col, mask=col < cols, other=float("-inf")).to(tl.float32)
            tl.store(y + col, (tl.exp((v - most) * scale) * share).to(y.dtype.element_ty), mask=col < cols)


@triton.jit
def backward_kernel(dx, dy, y, cols, dy_stride, y_stride, scale, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dx += row * cols
    dy += row * dy_stride
    y += row * y_stride
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        d = tl.load(dy + lane, mask=lane < cols, other=0.0).to(tl.float32)
        p = tl.load(y + lane, mask=lane < cols, other=0.0).to(tl.float32)
        out = (d - tl.sum(d * p, 0)) * p * scale
        tl.store(dx + lane, out.to(dx.dtype.element_ty), mask=lane < cols)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, cols, BLOCK):
            col = begin + lane
            d = tl.load(dy + col, mask=col < cols, other=0.0).to(tl.float32)
            total += d * tl.load(y + col, mask=col < cols, other=0.0).to(tl.float32)
        dot = tl.sum(total, 0)
        for begin in range(0, cols, BLOCK):
            col = begin + lane
            d = tl.load(dy + col, mask=col < cols, other=0.0).to(tl.float32)
            p = tl.load(y + col, mask=col < cols, other=0.0).to(tl.float32)
            tl.store(dx + col, ((d - dot) * p * scale).to(dx.dtype.element_ty), mask=col < cols)


WIDEST = 16384


def _options(cols: int, itemsize: int) -> dict[str, int | bool]:
    whole = cols <= WIDEST
    block = triton.next_power_of_2(cols) if whole else 4096
    return {"BLOCK": block, "WHOLE": whole, "num_warps": row_warps(block, itemsize)}


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(x: Tensor, scale: float) -> Tensor:
    y, count = empty_like(x), x.numel()
    if count:
        cols, (x, stride) = x.shape[-1], row_stride(x)
        _C.softmax(y.data_ptr(), x.data_ptr(), count // cols, cols, stride, DTYPES[x.dtype], scale)
    return y


def cpu_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    dx, count = empty_like(y), y.numel()
    if count:
        cols, (d, d_stride), (y, y_stride) = y.shape[-1], row_stride(dy), row_stride(y)
        _C.softmax_backward(
            dx.data_ptr(), d.data_ptr(), y.data_ptr(), count // cols, cols, d_stride, y_stride, DTYPES[y.dtype], scale
        )
    return dx


def gpu(x: Tensor, scale: float) -> Tensor:
    y = empty_like(x)
    if x.numel():
        rows = as_rows(x)
        count, cols = rows.shape
        forward_kernel[(count,)](y, rows, cols, rows.stride(0), scale, **_options(cols, x.element_size()))
    return y


def gpu_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    dx = empty_like(y)
    if y.numel():
        d, p = as_rows(dy), as_rows(y)
        count, cols = p.shape
        options = _options(cols, y.element_size())
        backward_kernel[(count,)](dx, d, p, cols, d.stride(0), p.stride(0), scale, **options)
    return dx


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    ctx.scale = inputs[1]
    ctx.save_for_backward(output)


def _backward(ctx, dy):
    return backward(dy, *ctx.saved_tensors, ctx.scale), None


forward = Op(
    "softmax(Tensor x, float scale) -> Tensor",
    reference=reference,
    fake=lambda x, scale: empty_like(x),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "softmax_backward(Tensor dy, Tensor y, float scale) -> Tensor",
    reference=reference_backward,
    fake=lambda dy, y, scale: empty_like(y),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def softmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(x / temperature) over the last dimension of x [..., N].

    Raises ValueError for a scalar or for a temperature that is not positive and finite, TypeError for dtypes. See the
    head of this file for rounding and for rows of -inf, +inf and NaN.
    """
    check_dtype("softmax", "x", x)
    check(x.dim() > 0, lambda: "softmax: x is a scalar; it must be [..., N], make it one with x[None]")
    check(
        0 < temperature < math.inf,
        lambda: f"softmax: temperature is {temperature}; it must be positive and finite (for greedy choice use argmax)",
    )
    return forward(x, min(1 / temperature, torch.finfo(torch.float32).max))
