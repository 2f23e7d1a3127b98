"""linear: y = norm(x) W^T + bias (+ residual, or silu(gate) * up), fp32 accumulation in one fixed order.

x [..., K], weight [N, K] or `Panels` of it, bias [N], y [..., N]. float32; bfloat16 and float16 are widened to float32
first (a copy), norm(x) is rounded as `ops.rms_norm` rounds it, and y once, at the end.
The contract: every output element is a sum of chains of fused multiply-adds over 128 k each, k ascending, each starting
from zero, added in order; then + bias, then + residual. One row alone and the same row among a thousand give the same
bits, on any number of threads.

A transformer block needs four linears, with these around them, so that no pass over memory is spent on them:
- norm, eps: x is normalised first, exactly as `ops.rms_norm(x, norm, eps)`;
- residual [..., N]: added last;
- swiglu: weight [2F, K] stacks gate over up, and y [..., F] = silu(x W_gate^T) * (x W_up^T), as `ops.swiglu`.

On a GPU cuBLAS multiplies, by the algorithm that it likes best for a number of rows, and rounds y before residual and
swiglu: quick, and a row may differ in its last bits from the same row in another batch. exact=True holds the contract
there (`_linear_exact.py`): one order of K for any number of rows, fp32 until the one rounding at the end, but for gate and
up, which are rounded before swiglu as training keeps them.
Up to 16 rows of 16 bits have a kernel in CUDA C++, which rounds once too (`cuda` below).

On a CPU the weights are read in panels of 16 output columns, [N/16, K, 16]: `Panels.pack(weight)` once, or row-major
weights are packed on every call, 2-12 % of it at 500 rows, most of it at one row.

Backward: dx = dy W, dweight = dy^T x, dbias = sum of dy over the rows, each rounded once to its dtype: on a CPU by the
kernel of the forward, which packs or transposes on the way, on a GPU by cuBLAS. A weight in `Panels` is frozen: dx
alone, read from the panels as they lie. A fused call that needs a gradient runs as the
ops that it fuses, one after another, each with its own backward: the same bits (what stands behind the product stays in
float32 until the end), and their intermediates are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from . import _cuda
from ._fused_linear import check_fusion, check_plain, check_rows_at, compose, must_compose
from ._linear_exact import exact_product
from ._op import DTYPES, Op, as_rows, check_dtype, check_like, is_plain, pointer
from .rms_norm import rms_norm
from .swiglu import swiglu as swiglu_op

# csrc/records/linear.h: how a weight lies and which side of it a product takes, and its stacked halves, gate over up
PANELS, ROWS, ROWS_ACROSS, PANELS_ACROSS, OUTER = 0, 1, 2, 3, 12
WHOLE, SWIGLU, GATE_UP = 0, 1, 2  # GATE_UP: the panels alternate as for swiglu, but y is [gate, up]


@dataclass(frozen=True, eq=False)
class Panels:
    """A weight [N, K] in panels of 16 output columns, float32: what a decoding CPU reads.

    data [ceil(N/16), K, 16], the columns beyond N are zeros; with swiglu, gate and up panels alternate and rows is 2F.
    """

    data: Tensor
    rows: int
    swiglu: bool = False

    @staticmethod
    def nbytes_for(rows: int, depth: int, swiglu: bool = False) -> int:
        halves = 2 if swiglu else 1
        return halves * -(-rows // halves // 16) * depth * 64

    @classmethod
    def pack(cls, weight: Tensor, swiglu: bool = False, out: Tensor | None = None) -> "Panels":
        """weight [N, K] (swiglu: [2F, K], gate rows first) of any float dtype; into `out`, uint8 [nbytes_for(...)],
        when given.

        Raises ValueError for another rank, or an odd N with swiglu.
        """
        if weight.dim() != 2 or (swiglu and weight.shape[0] % 2):
            raise ValueError(
                f"Panels.pack: weight has shape {tuple(weight.shape)}; it must be [N, K], N even for swiglu"
            )
        weight = weight.detach()
        if weight.dtype not in DTYPES or weight.stride(1) != 1:
            weight = weight.float().contiguous()
        rows, depth = weight.shape
        halves = weight.chunk(2) if swiglu else (weight,)
        shape = (-(-halves[0].shape[0] // 16) * len(halves), depth, 16)
        if out is None:
            data = torch.empty(shape, dtype=torch.float32, device=weight.device)
        else:
            data = out.view(torch.float32).view(shape)
        for i, half in enumerate(halves):
            stride = depth * 16 * len(halves)
            _C.pack_panels(
                data.data_ptr() + i * depth * 64, half.data_ptr(),
                half.shape[0], depth, half.stride(0), stride, DTYPES[half.dtype],
            )  # fmt: skip
        return cls(data, rows, swiglu)

    def rows_at(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids int64 [...] -> [..., K]. IndexError for an id outside [0, N)."""
        check_rows_at(ids, self.swiglu)
        return forward_rows(ids, self.data, self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * 4


_CPU_LAYOUT = "panels are a CPU's; on a GPU a weight stays row-major for cuBLAS, and this unpacks it"

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, bias, norm, eps, residual, swiglu, wide) -> Tensor:
    return _finish(_normalised(x, norm, eps) @ _wide(weight, x).t(), x, bias, residual, swiglu, wide)


def _wide(t: Tensor, x: Tensor) -> Tensor:
    return t.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x, norm, eps) -> Tensor:
    v = _wide(x, x)
    if norm is None:
        return v
    return _wide((v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * _wide(norm, x)).to(x.dtype), x)


def _finish(y, x, bias, residual, swiglu, wide) -> Tensor:
    if bias is not None:
        y = y + _wide(bias, x)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + _wide(residual, x)
    return y if wide else y.to(x.dtype)


def unpack(panels: Tensor, rows: int, alternate: bool) -> Tensor:
    """The row-major weight again."""
    parts = (panels[0::2], panels[1::2]) if alternate else (panels,)
    return torch.cat([p.transpose(1, 2).reshape(-1, panels.shape[1])[: rows // len(parts)] for p in parts])


def reference_panels(x, panels, rows, bias, norm, eps, residual, halves, wide) -> Tensor:
    return reference(x, unpack(panels, rows, halves != WHOLE), bias, norm, eps, residual, halves == SWIGLU, wide)


def reference_backward(dy, x, weight, bias, dx, dweight) -> tuple[Tensor, Tensor, Tensor]:
    d, rows = as_rows(dy), as_rows(x)
    return (
        (d @ weight).view_as(x) if dx else x.new_empty(0),
        d.t() @ rows if dweight else x.new_empty(0),
        d.sum(0) if bias else x.new_empty(0),
    )


def reference_panels_backward(dy, panels, rows, halves) -> Tensor:
    return (_wide(dy, dy) @ _wide(unpack(panels, rows, halves != WHOLE), dy)).to(dy.dtype)


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(x: Tensor, cols: int, wide: bool = False) -> Tensor:
    return torch.empty((*x.shape[:-1], cols), dtype=torch.float32 if wide else x.dtype, device=x.device)


def unit_stride(weight: Tensor) -> Tensor:
    """A matrix whose rows lie in one piece: itself, or a copy."""
    return weight if weight.stride(1) == 1 or weight.shape[1] <= 1 else weight.contiguous()


def fields(y, x, weight, form, bias=None, norm=None, eps=0.0, residual=None, halves=WHOLE, group=0) -> tuple:
    """The record of a product x W^T, x W or x^T W (csrc/records/linear.h): y [rows, ...] or contiguous, x and residual
    [rows, ...], with unit stride; the weight of x's dtype or packed. Of pointers: the caller holds the tensors until the
    kernel is done."""
    cols, (rows, depth) = y.shape[-1], x.shape[::-1] if form == OUTER else x.shape
    return (
        y.data_ptr(), x.data_ptr(), weight.data_ptr(), pointer(bias), pointer(residual), pointer(norm),
        rows, cols, depth, x.stride(0), y.stride(0) if y.dim() == 2 else cols, weight.stride(0),
        0 if residual is None else residual.stride(0), form, halves, DTYPES[x.dtype], DTYPES[x.dtype],
        DTYPES[y.dtype], group, eps,
    )  # fmt: skip


def product(
    y, x, weight, form, bias=None, norm=None, eps=0.0, residual=None, halves=WHOLE, kernel=_C.linear, group=0
) -> Tensor:
    if y.numel():
        x, residual = as_rows(x), None if residual is None else as_rows(residual)
        kernel(*fields(y, x, weight, form, bias, norm, eps, residual, halves, group))
    return y


def cpu(x, weight, bias, norm, eps, residual, swiglu, wide) -> Tensor:
    weight = unit_stride(weight)
    y = _output(x, weight.shape[0] // (1 + swiglu), wide)
    return product(y, x, weight, ROWS, bias, norm, eps, residual, SWIGLU if swiglu else WHOLE)


def cpu_panels(x, panels, rows, bias, norm, eps, residual, halves, wide) -> Tensor:
    y = _output(x, rows // (1 + (halves == SWIGLU)), wide)
    return product(y, x, panels, PANELS, bias, norm, eps, residual, halves)


MOST_TRANSPOSED = 1 << 20  # elements of dy that `add_outer` lays out anew at a time, to stay in cache


def add_outer(y: Tensor, dy: Tensor, x: Tensor, add: bool = False) -> Tensor:
    """y [N, K] = dy^T x (add: y += dy^T x), dy [T, N] and x [T, K], on a CPU."""
    step = max(768, MOST_TRANSPOSED // max(1, x.shape[0]))
    for n in range(0, len(y), step):
        part = y[n : n + step]
        product(part, dy[:, n : n + step], x, OUTER, residual=part if add else None)
    return y


def cpu_backward(dy, x, weight, bias, dx, dweight) -> tuple[Tensor, Tensor, Tensor]:
    d, rows = as_rows(dy), as_rows(x)
    return (
        product(_output(dy, x.shape[-1]), dy, unit_stride(weight), ROWS_ACROSS) if dx else x.new_empty(0),
        add_outer(x.new_empty(weight.shape), d, rows) if dweight else x.new_empty(0),
        d.sum(0) if bias else x.new_empty(0),
    )


def cpu_panels_backward(dy, panels, rows, halves) -> Tensor:
    return product(_output(dy, panels.shape[1]), dy, panels, PANELS_ACROSS, halves=GATE_UP if halves else WHOLE)


def cpu_rows(ids: Tensor, panels: Tensor, rows: int) -> Tensor:
    y = torch.empty((*ids.shape, panels.shape[1]), dtype=torch.float32, device=panels.device)
    ids = ids.contiguous()
    if _C.panel_rows(y.data_ptr(), ids.data_ptr(), panels.data_ptr(), ids.numel(), rows, panels.shape[1]):
        bad = ids[(ids < 0) | (ids >= rows)]
        raise IndexError(f"embedding: id {bad.flatten()[0].item()} is outside the vocabulary [0, {rows})")
    return y


def gpu(x, weight, bias, norm, eps, residual, swiglu, wide) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = torch.nn.functional.linear(x, weight, bias)
    if swiglu:
        y = swiglu_op(*(y if residual is None else y.float()).chunk(2, -1))
    y = y if residual is None else y + residual
    return y.to(torch.float32 if wide else x.dtype)


CUDA_ROWS = 16


def cuda_refusal(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, swiglu: bool) -> str | None:
    """Why csrc/cuda/linear.cu does not take rows x [T, K]; None when it does."""
    if x.dtype == torch.float32:
        return "float32"
    if not 0 < x.shape[0] <= CUDA_ROWS:
        return f"{x.shape[0]} rows: 1 to {CUDA_ROWS}"
    if not x.shape[1] or any(n % 8 for n in (x.shape[1], x.stride(0), weight.stride(0))) or weight.stride(1) != 1:
        return "rows whose lengths or distances are no multiples of 8"
    if any(t.data_ptr() % 16 for t in (x, weight, x if norm is None else norm)):
        return "rows that do not begin at multiples of 16 bytes"
    return "a bias of gate and up" if swiglu and bias is not None else None


def cuda(x, weight, bias, norm, eps, residual, swiglu, wide) -> Tensor:
    """Few rows in CUDA C++: one pass over the weight, and all around it on its way."""
    rows, norm = as_rows(x), None if norm is None else norm.contiguous()
    if not weight.shape[0] or cuda_refusal(rows, weight, bias, norm, swiglu) is not None:
        return gpu(x, weight, bias, norm, eps, residual, swiglu, wide)
    y, other = _output(x, weight.shape[0] // (1 + swiglu), wide), None if residual is None else as_rows(residual)
    halves = SWIGLU if swiglu else WHOLE
    _cuda.launch("linear", fields(y, rows, weight, ROWS, bias, norm, eps, other, halves), None, x.device)
    return y


def one_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None, swiglu: bool = False) -> bool:
    """Whether linear(x, weight), without a gradient, is one kernel on this GPU that takes a norm and a residual along."""
    few = x.is_cuda and x.shape[:-1].numel() <= CUDA_ROWS and forward.kernel("cuda").name == forward.cuda_name
    return few and cuda_refusal(as_rows(x), weight, bias, None, swiglu) is None


def gpu_exact(x, weight, bias, norm, eps, residual, swiglu, wide) -> Tensor:
    rows = as_rows(x if norm is None else rms_norm(x, norm, eps))
    y, other = _output(x, weight.shape[0] // (1 + swiglu), wide), None if residual is None else as_rows(residual)
    exact_product(y.view(rows.shape[0], y.shape[-1]), rows, unit_stride(weight), bias, other, swiglu)
    return y


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    x, weight, _, norm, _, residual, swiglu, _ = inputs
    ctx.plain = norm is None and residual is None and not swiglu
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    check_plain(ctx.plain, "linear")
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dweight, dbias = backward(dy.to(x.dtype), x, weight, needs_bias, needs_x, needs_weight)
    given = zip((dx, dweight, dbias), (needs_x, needs_weight, needs_bias), strict=True)
    return *(g if needed else None for g, needed in given), None, None, None, None, None


def _save_panels(ctx, inputs, output) -> None:
    x, panels, rows, _, norm, _, residual, halves, _ = inputs
    ctx.plain = norm is None and residual is None and halves != SWIGLU
    ctx.shape, ctx.dtype = (rows, halves), x.dtype
    ctx.save_for_backward(panels)


def _backward_panels(ctx, dy):
    check_plain(ctx.plain, "linear")
    dy = dy.to(ctx.dtype)
    dx = backward_panels(dy, *ctx.saved_tensors, *ctx.shape) if ctx.needs_input_grad[0] else None
    dbias = as_rows(dy).sum(0) if ctx.needs_input_grad[3] else None
    return dx, None, None, dbias, None, None, None, None, None


forward_rows = Op(
    "panel_rows(Tensor ids, Tensor panels, int rows) -> Tensor",
    reference=lambda ids, panels, rows: panels[ids // 16, :, ids % 16],
    fake=lambda ids, panels, rows: panels.new_empty((*ids.shape, panels.shape[1])),
    cpu=cpu_rows,
    no_triton=_CPU_LAYOUT,
)
forward = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool swiglu, bool wide)"
    " -> Tensor",
    reference=reference,
    fake=lambda x, weight, bias, norm, eps, residual, swiglu, wide: _output(x, weight.shape[0] // (1 + swiglu), wide),
    cpu=cpu,
    triton=gpu,
    triton_name="cuBLAS",
    triton_reason="the matmul by torch, norm and swiglu around it in Triton; exact=True has a kernel of its own",
    cuda=cuda,
    cuda_name=f"CUDA C++ (up to {CUDA_ROWS} rows of 16 bits; else cuBLAS)",
    save=_save,
    backward=_backward,
)
forward_exact = Op(
    forward.schema.replace("linear", "linear_exact"),
    reference=reference,
    fake=forward.fake,
    cpu=cpu,
    triton=gpu_exact,
    triton_reason="one order of K for any number of rows",
    save=_save,
    backward=_backward,
)
backward = Op(
    "linear_backward(Tensor dy, Tensor x, Tensor weight, bool bias, bool dx, bool dweight) -> (Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dy, x, weight, bias, dx, dweight: (
        _output(x, x.shape[-1]) if dx else x.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if dweight else x.new_empty(0),
        x.new_empty(weight.shape[0] if bias else 0),
    ),
    cpu=cpu_backward,
    no_triton="its two products are torch's, by cuBLAS",
)
forward_panels = Op(
    "linear_panels(Tensor x, Tensor panels, int rows, Tensor? bias, Tensor? norm, float eps, Tensor? residual,"
    " int halves, bool wide) -> Tensor",
    reference=reference_panels,
    fake=lambda x, panels, rows, bias, norm, eps, residual, halves, wide: _output(
        x, rows // (1 + (halves == SWIGLU)), wide
    ),
    cpu=cpu_panels,
    no_triton=_CPU_LAYOUT,
    save=_save_panels,
    backward=_backward_panels,
)
backward_panels = Op(
    "linear_panels_backward(Tensor dy, Tensor panels, int rows, int halves) -> Tensor",
    reference=reference_panels_backward,
    fake=lambda dy, panels, rows, halves: _output(dy, panels.shape[1]),
    cpu=cpu_panels_backward,
    no_triton=_CPU_LAYOUT,
)


def rounds(x: Tensor, weight: Tensor, bias: Tensor | None, exact: bool, swiglu: bool) -> bool:
    """Whether the kernel that runs without a gradient rounds the product of x and weight before what comes behind it."""
    if exact or not x.is_cuda:
        return x.is_cuda and swiglu
    return not (is_plain(x) and is_plain(weight) and one_kernel(x, weight, bias, swiglu))


def linear(
    x: Tensor,
    weight: Tensor | Panels,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
    exact: bool = False,
) -> Tensor:
    """norm(x) W^T + bias + residual (or swiglu), x [..., K], weight [N, K] or Panels -> [..., N]; see the file's head.

    exact: hold the contract on a GPU too; on a CPU it always is.
    Raises ValueError for shapes and devices that do not fit, TypeError for dtypes.
    """
    check_dtype("linear", "x", x)
    if isinstance(weight, Panels):
        check_fusion("linear", x, weight, bias, norm, residual, swiglu)
        if must_compose(x, None, bias, norm, residual, swiglu):
            halves = GATE_UP if swiglu else WHOLE

            def plain(v, wide):
                return forward_panels(v, weight.data, weight.rows, bias, None, 0.0, None, halves, wide)

            return compose(plain, x, norm, eps, residual, swiglu)
        return forward_panels(x, weight.data, weight.rows, bias, norm, eps, residual, int(swiglu), False)
    check_like("linear", "weight", weight, "x", x)
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}; it must be [N, K]")
    check_fusion("linear", x, weight, bias, norm, residual, swiglu)
    op = forward_exact if exact else forward
    if must_compose(x, weight, bias, norm, residual, swiglu):

        def product_of(v, wide):
            rounded = rounds(x, weight, bias, exact, swiglu)  # then what comes behind need not keep it in float32
            y = op(v, weight, bias, None, 0.0, None, False, wide and not rounded)
            return y.float() if rounded and swiglu and residual is not None else y

        return compose(product_of, x, norm, eps, residual, swiglu)
    return op(x, weight, bias, norm, eps, residual, swiglu, False)


def few_logits(x: Tensor, weight: Tensor, norm: Tensor, eps: float) -> Tensor:
    """linear(x, weight, norm=norm, eps=eps) of few rows on a GPU, without a gradient, where that is `one_kernel`: in float32, as
    its sums are, not rounded to x's dtype."""
    return forward(x, weight, None, norm, eps, None, False, True)


def exact_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H] weight [V, H]^T as `linear(exact=True)` sums it, in float32, not rounded to x's dtype: what a sampler reads of
    an exact model, and what its losses make of the same states."""
    return forward_exact(x, weight, None, None, 0.0, None, False, True)
