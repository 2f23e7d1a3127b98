"""layer_norm: y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension (Ba et al. 2016, arXiv
1607.06450); var is the biased variance.

With a residual, s = x + residual is normalised instead and returned beside y, as in rms_norm.

Shapes: x, residual, y, s [..., N]; weight, bias [N]. Dtypes: float32, bfloat16, float16, one for all.
Rounding: s is rounded to the dtype before it is normalised; sums and products are fp32. Mean and variance are of the
differences from a first mean (no cancellation, whatever it is), of which the mean says what rounding took from the first; y
is rounded once, at the end.
Backward, with h = (s - mean) * rstd and g = dy * weight: dx = rstd * (g - mean(g) - h * mean(g * h)) + ds,
dweight = sum(dy * h), dbias = sum(dy), both in fp32, dresidual = dx. On the CPU no result depends on the number of
threads, and a row's forward on any device depends on no other row. A constant row gives the bias; a NaN stays in its row.
"""

from typing import overload

import torch
from torch import Tensor

from .. import _C
from ._add_up import add_up
from ._op import DTYPES, Op, as_rows, check, check_dtype, check_like, empty_like, pointer, row_stride
from ._triton import programs, row_warps, tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x if residual is None else x + residual
    mean = s.to(wide).mean(-1)
    centred = s.to(wide) - mean[..., None]
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd[..., None] * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype), s if residual is not None else x.new_empty(0), mean, rstd


def reference_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(s.dtype, torch.float32)
    d, h = dy.to(wide), (s.to(wide) - mean[..., None]) * rstd[..., None]
    g = d * weight.to(wide)
    dx = rstd[..., None] * (g - g.mean(-1, keepdim=True) - h * (g * h).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds.to(wide)
    dweight = (d * h).reshape(-1, s.shape[-1]).sum(0)
    dbias = d.reshape(-1, s.shape[-1]).sum(0).to(weight.dtype) if has_bias else weight.new_empty(0)
    return dx.to(s.dtype).contiguous(), dweight.to(weight.dtype), dbias


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def forward_kernel(
    y, s, mean, rstd, x, residual, weight, bias, cols, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
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
    about = tl.sum(v, 0) / cols
    d = tl.where(inside, v - about, 0.0)
    lost = tl.sum(d, 0) / cols
    variance = tl.sum(d * d, 0) / cols - lost * lost
    variance = tl.where(variance < 0, 0.0, variance)  # of a constant row it may round below
    centre, scale = about + lost, 1.0 / tl.sqrt(variance + eps)
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)
    out = (v - centre) * scale * tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * cols + col, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dx, partial, dy, ds, s, weight, mean, rstd, rows, cols, dy_stride, ds_stride, s_stride,
    HAS_DS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program takes every num_programs-th row and keeps its shares of dweight and dbias in registers: partial
    # [programs, 2, N] instead of atomics, so the sums have one order.
    col = tl.arange(0, BLOCK)
    inside = col < cols
    w = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    if not HAS_DS:
        next_d = tl.load(dy + first * dy_stride + col, mask=inside, other=0.0)
        next_s = tl.load(s + first * s_stride + col, mask=inside, other=0.0)
    for row in range(first, rows, tl.num_programs(0)):
        centre, scale = tl.load(mean + row), tl.load(rstd + row)
        if HAS_DS:  # a third row leaves no registers for the next ones
            d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0)
            v = tl.load(s + row * s_stride + col, mask=inside, other=0.0)
            e = tl.load(ds + row * ds_stride + col, mask=inside, other=0.0)
        else:  # the next row is on its way while this one is summed up
            d, v, ahead = next_d, next_s, row + tl.num_programs(0)
            next_d = tl.load(dy + ahead * dy_stride + col, mask=inside & (ahead < rows), other=0.0)
            next_s = tl.load(s + ahead * s_stride + col, mask=inside & (ahead < rows), other=0.0)
        d, h = d.to(tl.float32), (v.to(tl.float32) - centre) * scale
        dweight += d * h
        if HAS_BIAS:
            dbias += d
        g = d * w
        out = (g - tl.sum(g, 0) / cols - h * (tl.sum(g * h, 0) / cols)) * scale
        if HAS_DS:
            out += e.to(tl.float32)
        tl.store(dx + row * cols + col, out.to(dx.dtype.element_ty), mask=inside)
    partial += tl.program_id(0).to(tl.int64) * 2 * cols
    tl.store(partial + col, dweight, mask=inside)
    if HAS_BIAS:
        tl.store(partial + cols + col, dbias, mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def _outputs(x: Tensor, residual: Tensor | None, train: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = mean = rstd = None  # left out where nothing reads them
    if train:
        mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    if residual is not None:
        s = empty_like(x)
    elif train:
        s = torch.empty(0, dtype=x.dtype, device=x.device)
    return empty_like(x), s, mean, rstd


def cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, train: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = outputs = _outputs(x, residual, train)
    count, cols = x.numel(), x.shape[-1]
    if count:
        (x, stride), weight = row_stride(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        other, other_stride = (None, 0) if residual is None else row_stride(residual)
        _C.layer_norm(
            y.data_ptr(), 0 if residual is None else s.data_ptr(), pointer(mean), pointer(rstd),
            x.data_ptr(), pointer(other), weight.data_ptr(), pointer(bias),
            count // cols, cols, stride, other_stride, DTYPES[x.dtype], eps,
        )  # fmt: skip
    return outputs


def gpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = outputs = _outputs(x, residual)
    if x.numel():
        rows, other = as_rows(x), x if residual is None else as_rows(residual)
        weight = weight.contiguous()
        block = triton.next_power_of_2(rows.shape[1])
        forward_kernel[(rows.shape[0],)](
            y, s, mean, rstd, rows, other, weight, weight if bias is None else bias.contiguous(),
            rows.shape[1], rows.stride(0), other.stride(0), eps,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, BLOCK=block,
            num_warps=row_warps(block, x.element_size()),
        )  # fmt: skip
    return outputs


def cpu_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, count, cols = empty_like(s), s.numel(), s.shape[-1]
    sums = (torch.empty if count else torch.zeros)((2, cols), dtype=torch.float32)
    if count:
        (d, d_stride), (s, s_stride), weight = row_stride(dy), row_stride(s), weight.contiguous()
        e, e_stride = (None, 0) if ds is None else row_stride(ds)
        _C.layer_norm_backward(
            dx.data_ptr(), sums[0].data_ptr(), sums[1].data_ptr(),
            d.data_ptr(), pointer(e), s.data_ptr(), weight.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            count // cols, cols, d_stride, e_stride, s_stride, DTYPES[s.dtype],
        )  # fmt: skip
    return dx, *_narrow(sums, weight, has_bias)


PROGRAMS = 2  # of the backward, a multiprocessor: so many rows are on their way


def gpu_backward(
    dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = empty_like(s)
    if not s.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(weight) if has_bias else weight.new_empty(0)
    d, rows = as_rows(dy), as_rows(s)
    e = d if ds is None else as_rows(ds)
    count = min(PROGRAMS * programs(s.device), rows.shape[0])
    partial = torch.empty(count, 2, rows.shape[1], dtype=torch.float32, device=s.device)
    block = triton.next_power_of_2(rows.shape[1])
    backward_kernel[(count,)](
        dx, partial, d, e, rows, weight.contiguous(), mean, rstd,
        rows.shape[0], rows.shape[1], d.stride(0), e.stride(0), rows.stride(0),
        HAS_DS=ds is not None, HAS_BIAS=has_bias, BLOCK=block, num_warps=row_warps(block, s.element_size()),
    )  # fmt: skip
    dweight = add_up(empty_like(weight), partial[:, 0])
    return dx, dweight, add_up(empty_like(weight), partial[:, 1]) if has_bias else weight.new_empty(0)


def _narrow(sums: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """dweight and dbias in the dtype of weight: two tensors of their own, empty where there is no bias."""
    dbias = sums[1].to(weight.dtype, copy=True) if has_bias else weight.new_empty(0)
    return sums[0].to(weight.dtype, copy=True), dbias


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    x, weight, bias, _, residual = inputs
    _, s, mean, rstd = output
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(s if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd, *([] if ctx.has_residual else [s]))
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, ds, *_):
    s, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(s)
    dx, dweight, dbias = backward(dy, ds if ctx.has_residual else None, s, weight, mean, rstd, ctx.has_bias)
    return dx, dweight, dbias if ctx.has_bias else None, None, dx if ctx.has_residual else None


forward = Op(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=lambda x, weight, bias, eps, residual: _outputs(x, residual),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "layer_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dy, ds, s, weight, mean, rstd, has_bias: (
        empty_like(s),
        torch.empty_like(weight),
        torch.empty_like(weight) if has_bias else weight.new_empty(0),
    ),
    cpu=cpu_backward,
    triton=gpu_backward,
)


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., eps: float = ..., residual: None = ...
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., eps: float = ..., *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = ..., eps: float = ..., residual: Tensor | None = ...
) -> Tensor | tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of x [..., N] by weight [N] and bias [N] or None; with a residual [..., N], of x + residual.

    Returns y [..., N], or (y, x + residual) when a residual is given. Raises ValueError for shapes or devices that do
    not fit, TypeError for dtypes. See the head of this file for rounding.
    """
    check_dtype("layer_norm", "x", x)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_like("layer_norm", name, t, "x", x)
            if t.dim() != 1 or x.dim() == 0 or t.shape[0] != x.shape[-1]:
                raise ValueError(
                    f"layer_norm: {name} {tuple(t.shape)} must be the last dimension of x {tuple(x.shape)}"
                )
    if residual is not None:
        check_like("layer_norm", "residual", residual, "x", x)
        check(residual.shape == x.shape, lambda: f"layer_norm: residual {tuple(residual.shape)} != x {tuple(x.shape)}")
    y, s, *_ = forward(x, weight, bias, eps, residual)
    return y if residual is None else (y, s)
