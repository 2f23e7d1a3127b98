"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

With a residual, s = x + residual is normalised instead and returned beside y: the two reads and one write of a
transformer block's addition come for free.

Shapes: x, residual, y, s [..., N]; weight [N]. Dtypes: float32, bfloat16, float16, one for all.
Rounding: s is rounded to the dtype before it is normalised; sums and products are fp32; y is rounded once, at the end.
Backward, with h = s * rstd and g = dy * weight: dx = rstd * (g - h * mean(g * h)) + ds, dweight = sum(dy * h)
in fp32, dresidual = dx. A row's forward never depends on other rows; on the CPU no result depends on the number of
threads. Zeros give zeros; a NaN stays in its row.
"""

from typing import overload

import torch
from torch import Tensor

from .. import _C
from ._add_up import add_up
from ._op import DTYPES, Op, as_rows, check, check_dtype, check_like, empty_like, pointer, row_stride
from ._triton import programs, row_warps, tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x if residual is None else x + residual
    rstd = torch.rsqrt(s.to(wide).square().mean(-1) + eps)
    y = (s.to(wide) * rstd[..., None] * weight.to(wide)).to(x.dtype)
    return y, s if residual is not None else x.new_empty(0), rstd


def reference_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(s.dtype, torch.float32)
    h, g = s.to(wide) * rstd[..., None], dy.to(wide) * weight.to(wide)
    dx = rstd[..., None] * (g - h * (g * h).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds.to(wide)
    dweight = (dy.to(wide) * h).reshape(-1, s.shape[-1]).sum(0)
    return dx.to(s.dtype).contiguous(), dweight.to(weight.dtype)


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def forward_kernel(
    y, s, rstd, x, residual, weight, cols, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < cols
    v = tl.load(x + row * x_stride + col, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        r = tl.load(residual + row * residual_stride + col, mask=inside, other=0.0)
        v = (v.to(tl.float32) + r.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(s + row * cols + col, v, mask=inside)
    v = v.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 0) / cols + eps)
    tl.store(rstd + row, scale)
    w = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * cols + col, (v * scale * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dx, dweight, dy, ds, s, weight, rstd, rows, cols, dy_stride, ds_stride, s_stride,
    HAS_DS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program takes every num_programs-th row and keeps its share of dweight in registers: one [programs, N] partial
    # instead of atomics, so the sum has one order.
    col = tl.arange(0, BLOCK)
    inside = col < cols
    w = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        h = tl.load(s + row * s_stride + col, mask=inside, other=0.0).to(tl.float32) * scale
        partial += d * h
        g = d * w
        out = (g - h * (tl.sum(g * h, 0) / cols)) * scale
        if HAS_DS:
            out += tl.load(ds + row * ds_stride + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * cols + col, out.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * cols + col, partial, mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def _outputs(x: Tensor, residual: Tensor | None, train: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    s = rstd = None  # left out where nothing reads them
    if train:
        rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if residual is not None:
        s = empty_like(x)
    elif train:
        s = torch.empty(0, dtype=x.dtype, device=x.device)
    return empty_like(x), s, rstd


def cpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, train: bool = False):
    y, s, rstd = outputs = _outputs(x, residual, train)
    count, cols = x.numel(), x.shape[-1]
    if count:
        (x, stride), weight = row_stride(x), weight.contiguous()
        other, other_stride = (None, 0) if residual is None else row_stride(residual)
        _C.rms_norm(
            y.data_ptr(), 0 if residual is None else s.data_ptr(), pointer(rstd),
            x.data_ptr(), pointer(other), weight.data_ptr(),
            count // cols, cols, stride, other_stride, DTYPES[x.dtype], eps,
        )  # fmt: skip
    return outputs


def gpu(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = _outputs(x, residual)
    if x.numel():
        rows, other = as_rows(x), x if residual is None else as_rows(residual)
        block = triton.next_power_of_2(rows.shape[1])
        forward_kernel[(rows.shape[0],)](
            y, s, rstd, rows, other, weight.contiguous(), rows.shape[1], rows.stride(0), other.stride(0), eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=row_warps(block, x.element_size()),
        )  # fmt: skip
    return y, s, rstd


def cpu_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, count, cols = empty_like(s), s.numel(), s.shape[-1]
    dweight = (torch.empty if count else torch.zeros)(weight.shape, dtype=torch.float32)
    if count:
        (d, d_stride), (s, s_stride), weight = row_stride(dy), row_stride(s), weight.contiguous()
        e, e_stride = (None, 0) if ds is None else row_stride(ds)
        _C.rms_norm_backward(
            dx.data_ptr(), dweight.data_ptr(),
            d.data_ptr(), pointer(e), s.data_ptr(), weight.data_ptr(), rstd.data_ptr(),
            count // cols, cols, d_stride, e_stride, s_stride, DTYPES[s.dtype],
        )  # fmt: skip
    return dx, dweight.to(weight.dtype)


PROGRAMS = 3  # of the backward, a multiprocessor: so many rows are on their way


def gpu_backward(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx = empty_like(s)
    if not s.numel():
        return dx, torch.zeros_like(weight)
    d, rows = as_rows(dy), as_rows(s)
    e = d if ds is None else as_rows(ds)
    count = min(PROGRAMS * programs(s.device), rows.shape[0])
    partial = torch.empty(count, rows.shape[1], dtype=torch.float32, device=s.device)
    block = triton.next_power_of_2(rows.shape[1])
    backward_kernel[(count,)](
        dx, partial, d, e, rows, weight.contiguous(), rstd,
        rows.shape[0], rows.shape[1], d.stride(0), e.stride(0), rows.stride(0),
        HAS_DS=ds is not None, BLOCK=block, num_warps=row_warps(block, s.element_size()),
    )  # fmt: skip
    return dx, add_up(empty_like(weight), partial)


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    x, weight, _, residual = inputs
    _, s, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, rstd)
    ctx.mark_non_differentiable(rstd, *([] if ctx.has_residual else [s]))
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    dx, dweight = backward(dy, ds if ctx.has_residual else None, s, weight, rstd)
    return dx, dweight, None, dx if ctx.has_residual else None


forward = Op(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=lambda x, weight, eps, residual: _outputs(x, residual),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dy, ds, s, weight, rstd: (
        torch.empty_like(s, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
    ),
    cpu=cpu_backward,
    triton=gpu_backward,
)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., residual: None = ...) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = ..., residual: Tensor | None = ...
) -> Tensor | tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm of x [..., N] by weight [N]; with a residual [..., N], of x + residual.

    Returns y [..., N], or (y, x + residual) when a residual is given. Raises ValueError for shapes or devices that do
    not fit, TypeError for dtypes. See the head of this file for rounding.
    """
    check_dtype("rms_norm", "x", x)
    check_like("rms_norm", "weight", weight, "x", x)
    if weight.dim() != 1 or x.dim() == 0 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} must be the last dimension of x {tuple(x.shape)}")
    if residual is not None:
        check_like("rms_norm", "residual", residual, "x", x)
        check(residual.shape == x.shape, lambda: f"rms_norm: residual {tuple(residual.shape)} != x {tuple(x.shape)}")
    y, s, _ = forward(x, weight, eps, residual)
    return y if residual is None else (y, s)
