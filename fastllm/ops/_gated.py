"""What swiglu, geglu and gelu share: y = act(gate) * up, or act(gate) where `up` is None. The Triton kernels, and the
launchers of both devices; an op's file states its formula, its reference and its registration."""

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, as_rows, check_dtype, check_like, empty_like, pointer, row_stride
from ._triton import grid_of, place, tl, triton

SILU, GELU, GELU_TANH = 0, 1, 2  # the activations

# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x) from e^-|x|, which overflows on neither side."""
    t = tl.exp(-tl.abs(x))
    near_one = 1.0 / (1.0 + t)
    near_zero = t * near_one
    return tl.where(x >= 0, near_one, near_zero), tl.where(x >= 0, near_zero, near_one)


@triton.jit
def normal(x):
    """Phi(x) and e^(-x^2/2), as in csrc/cpu/gelu.h: Phi(-t) = e^(-t^2/2) u P(u) with u = 1 / (t + 5/2), or near
    zero 1/2 + x Q(x^2)."""
    t = tl.abs(x)
    t = tl.where(t > 20.0, 20.0, t)
    square = t * t
    e = tl.exp(-0.5 * square)
    bell = tl.fma(e, -0.5 * tl.fma(t, t, -square), e)
    u = 1.0 / (t + 2.5)
    p = u * 41.578006744384766 - 45.514671325683594
    p = p * u + 10.289381980895996
    p = p * u + 2.169550895690918
    p = p * u + 2.1719112396240234
    p = p * u + 0.9943749308586121
    p = p * u + 0.3989894688129425
    tail = p * u * bell
    q = square * -7.662608368264046e-06 + 0.0001135074780904688
    q = q * square - 0.0011863484978675842
    q = q * square + 0.009973330423235893
    q = q * square - 0.06649035960435867
    q = q * square + 0.3989422917366028
    return tl.where(t < 1.0, 0.5 + x * q, tl.where(x >= 0, 1.0 - tail, tail)), bell


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation and its derivative at a finite x (or NaN); what a kernel does not use is not computed."""
    if ACT == 0:
        s, s_negative = sigmoids(x)
        value, slope = x * s, s * (1.0 + x * s_negative)
    elif ACT == 1:
        below, bell = normal(x)
        value, slope = x * below, below + x * 0.3989422804014327 * bell
    else:
        near = tl.where(x < -30.0, -30.0, x)
        near = tl.where(near > 30.0, 30.0, near)
        s, s_negative = sigmoids(near * (1.5957691216057308 + 0.07135481627159664 * near * near))
        value = x * s
        slope = s * (1.0 + near * (1.5957691216057308 + 3.0 * 0.07135481627159664 * near * near) * s_negative)
    return value, slope


@triton.jit
def finite(x):
    x = tl.where(x < -3.4028234e38, -3.4028234e38, x)
    return tl.where(x > 3.4028234e38, 3.4028234e38, x)


@triton.jit
def silu(x):
    """As the forward of swiglu has it, at any x, for kernels that fuse it."""
    value, _ = activate(finite(x), 0)
    return tl.where(x > 3.4028234e38, x, value)


# Loads stand together at the beginning, and FLAT tensors have no rows to find: the assembler, which saves registers, else begins
# a load when the one before it has come, at a latency each.


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    y, gate, up, rows, cols, gate_stride, up_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, inside = place(rows, cols, BLOCK, FLAT)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    out, _ = activate(finite(g), ACT)
    out = tl.where(g > 3.4028234e38, g, out)
    if GATED:
        out *= u
    tl.store(y + row * cols + col, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dgate, dup, dy, gate, up, rows, cols, dy_stride, gate_stride, up_stride,
    ACT: tl.constexpr, GATED: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, inside = place(rows, cols, BLOCK, FLAT)
    d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    value, slope = activate(finite(g), ACT)
    if GATED:
        tl.store(dup + row * cols + col, (d * value).to(dup.dtype.element_ty), mask=inside)
        d *= u
    tl.store(dgate + row * cols + col, (d * slope).to(dgate.dtype.element_ty), mask=inside)


BLOCK, WARPS = 1024, 4  # columns a program: 8 a thread, one or two 16-byte loads from each input

# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(kernel: str, gate: Tensor, up: Tensor | None, *options: int) -> Tensor:
    """kernel: its name in _C; options: what its record has beyond dtype."""
    y, count = empty_like(gate), gate.numel()
    if count:
        cols, (g, g_stride), (u, u_stride) = (
            gate.shape[-1],
            row_stride(gate),
            (None, 0) if up is None else row_stride(up),
        )
        getattr(_C, kernel)(
            y.data_ptr(),
            g.data_ptr(),
            pointer(u),
            count // cols,
            cols,
            g_stride,
            u_stride,
            DTYPES[gate.dtype],
            *options,
        )
    return y


def cpu_backward(
    kernel: str, dy: Tensor, gate: Tensor, up: Tensor | None, *options: int
) -> tuple[Tensor, Tensor | None]:
    dgate, dup, count = empty_like(gate), None if up is None else empty_like(gate), gate.numel()
    if count:
        cols, (d, d_stride) = gate.shape[-1], row_stride(dy)
        (g, g_stride), (u, u_stride) = row_stride(gate), (None, 0) if up is None else row_stride(up)
        getattr(_C, kernel)(
            dgate.data_ptr(), pointer(dup), d.data_ptr(), g.data_ptr(), pointer(u),
            count // cols, cols, d_stride, g_stride, u_stride, DTYPES[gate.dtype], *options,
        )  # fmt: skip
    return dgate, dup


def _shape(*tensors: Tensor) -> tuple[int, int, bool]:
    """Rows and columns of [rows, cols], and whether they lie in one piece, which is one row then."""
    rows, cols = tensors[0].shape
    flat = rows * cols < 1 << 31 and all(t.is_contiguous() for t in tensors)
    return (1, rows * cols, True) if flat else (rows, cols, False)


def gpu(act: int, gate: Tensor, up: Tensor | None) -> Tensor:
    y = empty_like(gate)
    if gate.numel():
        g = as_rows(gate)
        u = g if up is None else as_rows(up)
        rows, cols, flat = _shape(g, u)
        forward_kernel[grid_of(rows, cols, BLOCK)](
            y, g, u, rows, cols, g.stride(0), u.stride(0),
            ACT=act, GATED=up is not None, FLAT=flat, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y


def gpu_backward(act: int, dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dgate, dup = empty_like(gate), None if up is None else empty_like(gate)
    if gate.numel():
        d, g = as_rows(dy), as_rows(gate)
        u = g if up is None else as_rows(up)
        rows, cols, flat = _shape(g, u, d)
        backward_kernel[grid_of(rows, cols, BLOCK)](
            dgate, dgate if dup is None else dup, d, g, u, rows, cols, d.stride(0), g.stride(0), u.stride(0),
            ACT=act, GATED=up is not None, FLAT=flat, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dgate, dup


# ---------------------------------------------------------------------------------------------------------- validation


def check_pair(op: str, gate: Tensor, up: Tensor) -> None:
    check_dtype(op, "gate", gate)
    check_like(op, "up", up, "gate", gate)
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} and up {tuple(up.shape)} must be one shape [..., N]")


def is_tanh(op: str, approximate: str) -> bool:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate is {approximate!r}; allowed: 'none' (by the error function), 'tanh'")
    return approximate == "tanh"


def bounded(x: Tensor) -> Tensor:
    """For references: x in at least fp32, its infinities at the largest number, so that 0 times them is 0."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide).clamp(torch.finfo(wide).min, torch.finfo(wide).max)
