"""lora_linear: y = x W^T + scale * drop(x) A^T B^T + bias, W frozen (Hu et al. 2021, arXiv 2106.09685).

With a magnitude m [N], y = m * (x W^T + scale * drop(x) A^T B^T) / ||W + scale * B A|| + bias, the norm over each row and
without a gradient (DoRA: Liu et al. 2024, arXiv 2402.09353, section 4.3).

x [..., K], A [R, K], B [N, R], bias and magnitude [N], y [..., N], of one dtype: float32, bfloat16 or float16. The weight
is a tensor [N, K] of that dtype, `Panels`, or a `QWeight` (then x is float32, and rounded to 8 bits for W alone).
Dropout is drawn from counters, row: the flat index of x's rows, column: of K (`_dropout.py`); never stored.

The contract: s = scale * (drop(x) A^T), summed as by ops.linear, in float32; y's sum goes on after its k (its groups,
for a QWeight) with acc = fma(s[r], B[n, r], acc), r ascending; then times magnitude / norm, then + bias, rounded once.
`multi_lora` gives the same bits, so training and serving agree. drop(x) is not rounded. On a GPU the base comes from
cuBLAS, rounded, and s B^T is added to it and rounded again; exact=True holds the contract there, in the order of
`linear(exact=True)`: s, rounded to x's dtype, goes on in its chain, and y is rounded once.

Backward, an op of its own, with g = magnitude / norm and dz = g * dy: ds = scale * dz B; dx = dz W + mask * (ds A);
dA = ds^T drop(x); dB = dz^T s; dbias = sum dy; dmagnitude = sum dy * z / norm, for which z, the product before g, is
made again: a third product in the place of a saved [..., N]. Saved are x, as by any linear that trains, and s: one
float32 [rows, R] more than a frozen layer saves.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ._dropout import Dropout, keep, threshold
from ._linear_exact import exact_product
from ._lora_gpu import expand, shrink, sum_over_rows
from ._lora_gpu import row_norms as row_norms_of
from ._op import DTYPES, Op, as_rows, check, check_dtype, check_like, pointer, wants_gradient
from .linear import (
    GATE_UP,
    PANELS,
    PANELS_ACROSS,
    ROWS,
    ROWS_ACROSS,
    WHOLE,
    Panels,
    fields,
    unit_stride,
    unpack,
)
from .quant_linear import QWeight, form_of, group_of, unpack_panels
from .quant_linear import gpu as quant_gpu
from .quant_linear import gpu_backward as quant_gpu_backward
from .quant_linear import gpu_rows as quant_rows
from .quant_linear import reference as quant_reference

# A base weight in a raw schema: its data, and `form`: [] row-major, [N] Panels, [N, K, bits, has_min] QWeight.


def split(weight: Tensor | Panels | QWeight) -> tuple[Tensor, list[int]]:
    """Data and form of a base weight."""
    if isinstance(weight, Panels):
        return weight.data, [weight.rows]
    if isinstance(weight, QWeight):
        return weight.data, [weight.rows, weight.depth, weight.bits, int(weight.has_min)]
    return weight, []


def code(form: list[int], across: bool = False) -> int:
    """The form in csrc/records/linear.h."""
    if not form:
        return ROWS_ACROSS if across else ROWS
    if len(form) == 1:
        return PANELS_ACROSS if across else PANELS
    return form_of(form[2], bool(form[3]), across)


def group(weight: Tensor, form: list[int]) -> int:
    """What a scale of a QWeight stands for; 0 for another base."""
    return group_of(weight, form[2], bool(form[3])) if len(form) == 4 else 0


def height(weight: Tensor, form: list[int]) -> int:
    return form[0] if form else weight.shape[0]


# ---------------------------------------------------------------------------------------------------------- reference


def dense(weight: Tensor, form: list[int], alternate: bool = False) -> Tensor:
    """The row-major weight again, of a QWeight dequantised. alternate: its panels are those of swiglu."""
    if not form:
        return weight
    if len(form) == 1:
        return unpack(weight, form[0], alternate)
    q, s, m = unpack_panels(weight, form[0], form[2], bool(form[3]), alternate)
    return (q * s.unsqueeze(-1) + (0 if m is None else m.unsqueeze(-1))).flatten(1)[:, : form[1]]


def base_reference(x: Tensor, weight: Tensor, form: list[int], alternate: bool = False) -> Tensor:
    """x W^T in the wide dtype."""
    wide, halves = torch.promote_types(x.dtype, torch.float32), GATE_UP if alternate else WHOLE
    if len(form) == 4:
        return quant_reference(x, weight, *form[:3], bool(form[3]), None, None, 0.0, None, halves).to(wide)
    return x.to(wide) @ dense(weight, form, alternate).to(wide).t()


def dropped(x: Tensor, p: float, seed: int, call: int) -> Tensor:
    """drop(x) in the wide dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not p:
        return x.to(wide)
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    mask = keep(rows, torch.arange(x.shape[-1], device=x.device), p, seed, call)
    return torch.where(mask, x.to(wide) * torch.tensor(1 / (1 - p), dtype=wide, device=x.device), 0.0)


def reference(x, weight, form, a, b, scale, bias, gain, p, seed, call, exact) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    s = scale * (dropped(x, p, seed, call) @ a.to(wide).t())
    z = base_reference(x, weight, form) + s @ b.to(wide).t()
    if gain is not None:
        z = z * gain.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    return z.to(x.dtype).contiguous(), s.reshape(-1, a.shape[0])


def reference_backward(dz, x, s, weight, form, a, b, scale, p, seed, call, dx) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = as_rows(x)
    d = as_rows(dz).to(wide)
    ds = scale * (d @ b.to(wide))
    low = dropped(torch.ones_like(rows), p, seed, call) * (ds @ a.to(wide)) if dx else None
    return (
        (d @ dense(weight, form).to(wide) + low).view(x.shape).to(x.dtype) if dx else x.new_empty(0),
        (ds.t() @ dropped(rows, p, seed, call)).to(a.dtype),
        (d.t() @ s).to(b.dtype),
    )


def reference_norms(weight, form, a, b, scale) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return (dense(weight, form).to(wide) + scale * (b.to(wide) @ a.to(wide))).norm(dim=1)


# ------------------------------------------------------------------------------------------------------ GPU launchers


def gpu_base(x: Tensor, weight: Tensor, form: list[int], alternate: bool = False, exact: bool = False) -> Tensor:
    """x W^T of rows, rounded; exact: float32, in one order for any number of rows. `Panels`, which are a CPU's, are unpacked."""
    if len(form) == 4:
        halves = GATE_UP if alternate else WHOLE
        return quant_gpu(x, weight, *form[:3], bool(form[3]), None, None, 0.0, None, halves)
    rows = dense(weight, form, alternate).to(x.dtype)
    if not exact:
        return torch.mm(x, rows.t())
    y = torch.empty((x.shape[0], rows.shape[0]), dtype=torch.float32, device=x.device)
    return exact_product(y, x, unit_stride(rows))


def gpu_base_backward(dz: Tensor, weight: Tensor, form: list[int]) -> Tensor:
    """dz W of rows."""
    if len(form) == 4:
        return quant_gpu_backward(dz, weight, *form[:3], bool(form[3]), 0)
    return torch.mm(dz, dense(weight, form).to(dz.dtype))


def gpu(x, weight, form, a, b, scale, bias, gain, p, seed, call, exact) -> tuple[Tensor, Tensor]:
    rows, (cols, rank) = as_rows(x), b.shape
    if not rows.shape[0] * cols:
        s = torch.zeros((rows.shape[0], rank), dtype=torch.float32, device=x.device)
        return x.new_empty((*x.shape[:-1], cols)), s
    s = shrink(rows, a, scale, p, seed, call, exact)
    if not exact:
        y = gpu_base(rows, weight, form)
        expand(y, s, b, gain, bias)
    elif len(form) == 4:
        y = exact_product(gpu_base(rows, weight, form), None, None, bias, low=(s, b), gain=gain)
    else:
        y, held = rows.new_empty((rows.shape[0], cols)), unit_stride(dense(weight, form).to(x.dtype))
        exact_product(y, rows, held, bias, low=(s, b), gain=gain)
    return y.view(*x.shape[:-1], cols), s


def gpu_backward(dz, x, s, weight, form, a, b, scale, p, seed, call, dx) -> tuple[Tensor, Tensor, Tensor]:
    d, rows = as_rows(dz), as_rows(x)
    if not d.numel():
        return torch.zeros_like(x) if dx else x.new_empty(0), torch.zeros_like(a), torch.zeros_like(b)
    ds, out = shrink(d, b.t(), scale), x.new_empty(0)
    if dx:
        out = gpu_base_backward(d, weight, form)
        expand(out, ds, a.t(), p=p, seed=seed, call=call)
        out = out.view(x.shape)
    return out, sum_over_rows(rows, ds, a.dtype, True, p, seed, call), sum_over_rows(d, s, b.dtype)


def gpu_norms(weight, form, a, b, scale) -> Tensor:
    cols, depth = b.shape[0], a.shape[1]
    norms = torch.empty(cols, dtype=torch.float32, device=a.device)
    if len(form) < 4:
        row_norms_of(norms, unit_stride(dense(weight, form)), a, b, scale)
        return norms
    step = max(16, (1 << 24) // max(depth, 1))  # some 16 million weights are in memory at a time
    for first in range(0, cols, step):
        count = min(step, cols - first)
        rows = quant_rows(weight, *form[:3], bool(form[3]), first, count)
        row_norms_of(norms[first:], rows, a, b[first : first + count], scale)
    return norms


# ----------------------------------------------------------------------------------------------------- CPU launchers


def cpu(x, weight, form, a, b, scale, bias, gain, p, seed, call, exact, train=False) -> tuple[Tensor, Tensor | None]:
    rows = as_rows(x)
    y = torch.empty((*x.shape[:-1], b.shape[0]), dtype=x.dtype, device=x.device)
    s = torch.empty((rows.shape[0], a.shape[0]), dtype=torch.float32, device=x.device) if train else None
    if y.numel():
        weight, a, b = unit_stride(weight) if not form else weight, unit_stride(a), unit_stride(b)
        _C.lora_linear(
            *fields(y, rows, weight, code(form), bias, group=group(weight, form)), pointer(s), a.data_ptr(), b.data_ptr(),
            pointer(gain), a.shape[0], a.stride(0), b.stride(0), seed, call, threshold(p) if p else 0, scale, p,
        )  # fmt: skip
    return y, s


def cpu_backward(dz, x, s, weight, form, a, b, scale, p, seed, call, dx) -> tuple[Tensor, Tensor, Tensor]:
    d, rows = as_rows(dz), as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx else x.new_empty(0)
    da, db = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (a, b))
    if rows.shape[0] and b.shape[0]:
        weight, a, b = unit_stride(weight) if not form else weight, unit_stride(a), unit_stride(b)
        record = fields(out if dx else rows, d, weight, code(form, across=True), group=group(weight, form))
        _C.lora_linear_backward(
            *record if dx else (0, *record[1:]), da.data_ptr(), db.data_ptr(), rows.data_ptr(), s.data_ptr(),
            a.data_ptr(), b.data_ptr(), rows.stride(0), a.shape[0], a.stride(0), b.stride(0),
            seed, call, threshold(p) if p else 0, scale, p,
        )  # fmt: skip
    elif dx:
        out.zero_()
    return out, da.to(a.dtype), db.to(b.dtype)


def cpu_norms(weight, form, a, b, scale) -> Tensor:
    norms = torch.empty(b.shape[0], dtype=torch.float32, device=b.device)
    if norms.numel():
        weight, a, b = unit_stride(weight) if not form else weight, unit_stride(a), unit_stride(b)
        _C.lora_row_norms(
            norms.data_ptr(), weight.data_ptr(), a.data_ptr(), b.data_ptr(), b.shape[0], a.shape[1], weight.stride(0),
            code(form), DTYPES[a.dtype], group(weight, form), a.shape[0], a.stride(0), b.stride(0), scale,
        )  # fmt: skip
    return norms


# -------------------------------------------------------------------------------------------------------- registration


def _outputs(x, weight, form, a) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    y = torch.empty((*x.shape[:-1], height(weight, form)), dtype=x.dtype, device=x.device)
    return y, torch.empty((rows, a.shape[0]), dtype=torch.float32, device=x.device)


def _save(ctx, inputs, output) -> None:
    x, weight, form, a, b, scale, bias, gain, *ctx.drop, ctx.exact = inputs
    ctx.form, ctx.scale = form, scale
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, a, b, output[1], gain)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 12
    x, weight, a, b, s, gain = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, _, needs_bias, needs_gain = ctx.needs_input_grad[:8]
    dx = da = db = dbias = dgain = None
    flat = as_rows(dy)
    if needs_bias:
        dbias = flat.sum(0)
    if needs_gain:
        z, _ = forward(x, weight, ctx.form, a, b, ctx.scale, None, None, *ctx.drop, ctx.exact)
        dgain = (flat.float() * z.reshape(flat.shape).float()).sum(0)
    if needs_x or needs_a or needs_b:
        dz = dy if gain is None else (dy.float() * gain).to(dy.dtype)
        dx, da, db = backward(dz, x, s, weight, ctx.form, a, b, ctx.scale, *ctx.drop, needs_x)
    return (
        dx if needs_x else None, None, None, da if needs_a else None, db if needs_b else None, None, dbias, dgain,
        None, None, None, None,
    )  # fmt: skip


forward = Op(
    "lora_linear(Tensor x, Tensor weight, int[] form, Tensor a, Tensor b, float scale, Tensor? bias, Tensor? gain,"
    " float p, SymInt seed, SymInt call, bool exact) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda x, weight, form, a, b, scale, bias, gain, p, seed, call, exact: _outputs(x, weight, form, a),
    cpu=cpu,
    triton=gpu,
    triton_name="cuBLAS, Triton",
    triton_reason="the products with the weight by torch, what stands around them in Triton",
    save=_save,
    backward=_backward,
)
backward = Op(
    "lora_linear_backward(Tensor dz, Tensor x, Tensor s, Tensor weight, int[] form, Tensor a, Tensor b, float scale,"
    " float p, SymInt seed, SymInt call, bool dx) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dz, x, s, weight, form, a, b, scale, p, seed, call, dx: (
        torch.empty_like(x, memory_format=torch.contiguous_format) if dx else x.new_empty(0),
        torch.empty_like(a, memory_format=torch.contiguous_format),
        torch.empty_like(b, memory_format=torch.contiguous_format),
    ),
    cpu=cpu_backward,
    triton=gpu_backward,
)


forward_norms = Op(
    "lora_row_norms(Tensor weight, int[] form, Tensor a, Tensor b, float scale) -> Tensor",
    reference=reference_norms,
    fake=lambda weight, form, a, b, scale: torch.empty(b.shape[0], dtype=torch.float32, device=a.device),
    cpu=cpu_norms,
    triton=gpu_norms,
)


def row_norms(weight: Tensor | Panels | QWeight, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + scale * B A|| of each row, float32 [N], without a gradient."""
    return forward_norms(*split(weight), a.detach(), b.detach(), scale)


def check_base(
    op: str, x: Tensor, weight: Tensor | Panels | QWeight, bias: Tensor | None, swiglu: bool = False
) -> None:
    """A frozen weight [N, K], x [..., K] and bias [N]. swiglu: it may be packed so."""
    check_dtype(op, "x", x)
    if isinstance(weight, (Panels, QWeight)):
        check(
            swiglu or not weight.swiglu,
            lambda: f"{op}: the weight was packed with swiglu; pack its halves apart, an adapter each",
        )
        check(
            weight.data.device == x.device,
            lambda: f"{op}: the weight is on {weight.data.device}, x on {x.device}; packed weights are for the CPU",
        )
        if isinstance(weight, QWeight):
            check_dtype(op, "x beside a QWeight", x, (torch.float32,))
    else:
        check(
            isinstance(weight, Tensor) and weight.dim() == 2,
            lambda: f"{op}: weight must be [N, K], Panels or QWeight; it is {getattr(weight, 'shape', type(weight))}",
        )
        check_like(op, "weight", weight, "x", x)
        check(
            not wants_gradient(weight),
            lambda: (
                f"{op}: the weight requires a gradient, but the base is frozen; pass weight.detach(), or train it "
                "as ops.linear(x, weight) + the two products of the adapter"
            ),
        )
    rows, depth = weight.shape
    check(
        x.dim() > 0 and x.shape[-1] == depth,
        lambda: f"{op}: x {tuple(x.shape)} must end in the weight's input size {depth} (weight {(rows, depth)})",
    )
    check_vector(op, "bias", bias, x, rows)


def check_vector(op: str, name: str, vector: Tensor | None, x: Tensor, rows: int) -> None:
    if vector is not None:
        check_like(op, name, vector, "x", x)
        check(vector.shape == (rows,), lambda: f"{op}: {name} has shape {tuple(vector.shape)}, want {(rows,)}")
        check(vector.is_contiguous(), lambda: f"{op}: {name} must be contiguous; call .contiguous()")


@dataclass(frozen=True)
class LoraSpec:
    """How an adapter is added. scale: alpha / rank; dropout: of its input alone; exact: hold the contract on a GPU too, as on a
    CPU it always is."""

    scale: float = 1.0
    dropout: Dropout | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        check(
            -math.inf < self.scale < math.inf,
            lambda: f"LoraSpec: scale is {self.scale}, allowed: a finite number, alpha / rank",
        )


PLAIN = LoraSpec()


def lora_linear(
    x: Tensor,
    weight: Tensor | Panels | QWeight,
    a: Tensor,
    b: Tensor,
    spec: LoraSpec = PLAIN,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor:
    """x W^T + scale * drop(x) A^T B^T + bias: x [..., K], a frozen W [N, K], a [R, K], b [N, R] -> [..., N].

    magnitude [N] makes it DoRA. Raises ValueError for shapes, devices, or a weight that requires a gradient, TypeError
    for dtypes. See the head of this file.
    """
    check(isinstance(spec, LoraSpec), lambda: f"lora_linear: spec is {spec}; pass LoraSpec(scale={spec})", TypeError)
    check_base("lora_linear", x, weight, bias)
    rows, depth = weight.shape
    for name, matrix in (("a", a), ("b", b)):
        check_like("lora_linear", name, matrix, "x", x)
    check(
        a.dim() == 2 and b.dim() == 2 and a.shape[0] == b.shape[1] > 0 and a.shape[1] == depth and b.shape[0] == rows,
        lambda: (
            f"lora_linear: a {tuple(a.shape)} and b {tuple(b.shape)} must be [R, {depth}] and [{rows}, R] of one rank "
            f"R >= 1, for a weight {(rows, depth)}"
        ),
    )
    check_vector("lora_linear", "magnitude", magnitude, x, rows)
    scale, drop = float(spec.scale), spec.dropout
    gain = None if magnitude is None else magnitude.float() / row_norms(weight, a, b, scale)
    dropping = (0.0, 0, 0) if drop is None or not drop.p else drop.arguments()
    return forward(x, *split(weight), a, b, scale, bias, gain, *dropping, spec.exact)[0]
