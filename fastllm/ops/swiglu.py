"""swiglu: y = silu(gate) * up with silu(g) = g / (1 + e^-g) (Shazeer 2020, arXiv 2002.05202).

Shapes: gate, up, y [..., N]. Dtypes: float32, bfloat16, float16, one for both. The halves of one fused [..., 2N] tensor
are read where they lie; only inputs whose last dimension is not of unit stride are copied.
Rounding: fp32 within, y rounded once, at the end. silu(-inf) is -0, its limit; a NaN stays in its place.
Backward, with s = sigmoid(g): dgate = dy * up * s * (1 + g * (1 - s)), dup = dy * g * s, both rounded once.
"""

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, as_rows, check_dtype, check_like, empty_like, row_stride
from ._triton import tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(gate: Tensor, up: Tensor) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(wide).clamp(min=torch.finfo(wide).min)
    return (g * torch.sigmoid(g) * up.to(wide)).to(gate.dtype)


def reference_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(gate.dtype, torch.float32)
    limits = torch.finfo(wide)
    g = gate.to(wide).clamp(limits.min, limits.max)
    s, d = torch.sigmoid(g), dy.to(wide)
    dgate = d * up.to(wide) * (s * (1 + g * torch.sigmoid(-g)))
    return dgate.to(gate.dtype).contiguous(), (d * (g * s)).to(gate.dtype).contiguous()


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x) from e^-|x|, which overflows on neither side."""
    t = tl.exp(-tl.abs(x))
    near_one = 1.0 / (1.0 + t)
    near_zero = t * near_one
    return tl.where(x >= 0, near_one, near_zero), tl.where(x >= 0, near_zero, near_one)


@triton.jit
def forward_kernel(y, gate, up, cols, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(g < -3.4028234e38, -3.4028234e38, g)  # -inf * 0 would be NaN
    s, _ = sigmoids(g)
    tl.store(y + row * cols + col, (g * s * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dgate, dup, dy, gate, up, cols, dy_stride, gate_stride, up_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.where(g < -3.4028234e38, -3.4028234e38, g)
    g = tl.where(g > 3.4028234e38, 3.4028234e38, g)
    s, s_negative = sigmoids(g)
    tl.store(dgate + row * cols + col, (d * u * (s * (1.0 + g * s_negative))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * cols + col, (d * (g * s)).to(dup.dtype.element_ty), mask=inside)


BLOCK = 1024  # columns a program: 8 a thread of 4 warps, one or two 16-byte loads from each input

# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(gate: Tensor, up: Tensor) -> Tensor:
    y, count = empty_like(gate), gate.numel()
    if count:
        cols, ((g, g_stride), (u, u_stride)) = gate.shape[-1], (row_stride(gate), row_stride(up))
        _C.swiglu(y.data_ptr(), g.data_ptr(), u.data_ptr(), count // cols, cols, g_stride, u_stride, DTYPES[gate.dtype])
    return y


def cpu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup, count = empty_like(gate), empty_like(gate), gate.numel()
    if count:
        cols, (d, d_stride) = gate.shape[-1], row_stride(dy)
        (g, g_stride), (u, u_stride) = row_stride(gate), row_stride(up)
        _C.swiglu_backward(
            dgate.data_ptr(), dup.data_ptr(), d.data_ptr(), g.data_ptr(), u.data_ptr(),
            count // cols, cols, d_stride, g_stride, u_stride, DTYPES[gate.dtype],
        )  # fmt: skip
    return dgate, dup


def gpu(gate: Tensor, up: Tensor) -> Tensor:
    y = empty_like(gate)
    if gate.numel():
        g, u = as_rows(gate), as_rows(up)
        rows, cols = g.shape
        forward_kernel[(rows, triton.cdiv(cols, BLOCK))](y, g, u, cols, g.stride(0), u.stride(0), BLOCK=BLOCK)
    return y


def gpu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = empty_like(gate), empty_like(gate)
    if gate.numel():
        d, g, u = as_rows(dy), as_rows(gate), as_rows(up)
        rows, cols = g.shape
        backward_kernel[(rows, triton.cdiv(cols, BLOCK))](
            dgate, dup, d, g, u, cols, d.stride(0), g.stride(0), u.stride(0), BLOCK=BLOCK
        )
    return dgate, dup


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return backward(dy, *ctx.saved_tensors)


forward = Op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    reference=reference,
    fake=lambda gate, up: empty_like(gate),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dy, gate, up: (empty_like(gate), empty_like(gate)),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for gate and up [..., N]; both may be views of one fused tensor.

    Raises ValueError for shapes or devices that differ, TypeError for dtypes. See the head of this file for rounding.
    """
    check_dtype("swiglu", "gate", gate)
    check_like("swiglu", "up", up, "gate", gate)
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must be one shape [..., N]")
    return forward(gate, up)
