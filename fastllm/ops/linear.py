"""linear: y = norm(x) W^T + bias (+ residual, or silu(gate) * up), fp32 accumulation in one fixed order.

x [..., K], weight [N, K] or `Panels` of it, bias [N], y [..., N]. float32; bfloat16 and float16 are widened to float32 first
(a copy), norm(x) is rounded as `ops.rms_norm` rounds it, and y once, at the end.
The contract: every output element is one chain of fused multiply-adds, k ascending, starting from zero; then + bias, then
+ residual. One row alone and the same row among a thousand give the same bits, on any number of threads.

A transformer block needs four linears, with these around them, so that no pass over memory is spent on them:
- norm, eps: x is normalised first, exactly as `ops.rms_norm(x, norm, eps)`;
- residual [..., N]: added last;
- swiglu: weight [2F, K] stacks gate over up, and y [..., F] = silu(x W_gate^T) * (x W_up^T).

On a CPU the weights are read in panels of 16 output columns, [N/16, K, 16]: `Panels.pack(weight)` once, or row-major weights
are packed on every call (5-12 % of it at 500 rows, most of it at one row). Without a backward kernel of its own yet: asked for
a gradient, the reference runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ._op import Op, as_rows, check_dtype, check_like, pointer
from .rms_norm import rms_norm


@dataclass(frozen=True)
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
        """weight [N, K] (swiglu: [2F, K], gate rows first), any float dtype; into `out` (uint8 [nbytes_for(...)]) when given.

        Raises ValueError for another rank, or an odd N with swiglu.
        """
        if weight.dim() != 2 or (swiglu and weight.shape[0] % 2):
            raise ValueError(
                f"Panels.pack: weight has shape {tuple(weight.shape)}; it must be [N, K], N even for swiglu"
            )
        weight = weight.detach().float().contiguous()
        rows, depth = weight.shape
        halves = weight.chunk(2) if swiglu else (weight,)
        shape = (-(-halves[0].shape[0] // 16) * len(halves), depth, 16)
        data = torch.empty(shape) if out is None else out.view(torch.float32).view(shape)
        for i, half in enumerate(halves):
            stride = depth * 16 * len(halves)
            _C.pack_panels(
                data.data_ptr() + i * depth * 64, half.data_ptr(), half.shape[0], depth, half.stride(0), stride
            )
        return cls(data, rows, swiglu)

    def rows_at(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids int64 [...] -> [..., K]. IndexError for an id outside [0, N), ValueError for swiglu."""
        check_rows_at(ids, self.swiglu)
        return forward_rows(ids, self.data, self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.numel() * 4


# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, bias, norm, eps, residual, swiglu) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    if norm is not None:
        v = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * norm.to(wide)).to(x.dtype).to(wide)
    y = v @ weight.to(wide).t()
    if bias is not None:
        y = y + bias.to(wide)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(x.dtype)


def unpack(panels: Tensor, rows: int, swiglu: bool) -> Tensor:
    """The row-major weight again."""
    parts = (panels[0::2], panels[1::2]) if swiglu else (panels,)
    return torch.cat([p.transpose(1, 2).reshape(-1, panels.shape[1])[: rows // len(parts)] for p in parts])


def reference_panels(x, panels, rows, bias, norm, eps, residual, swiglu) -> Tensor:
    return reference(x, unpack(panels, rows, swiglu), bias, norm, eps, residual, swiglu)


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(x: Tensor, cols: int) -> Tensor:
    return torch.empty((*x.shape[:-1], cols), dtype=x.dtype, device=x.device)


def _launch(x, panels, weight, cols, bias, norm, eps, residual, swiglu) -> Tensor:
    if x.dtype != torch.float32:
        if norm is not None:
            x, norm = rms_norm(x, norm, eps), None
        widened = [None if t is None else t.float() for t in (x, weight, bias, norm, residual)]
        x32, weight, bias, norm, residual = widened
        return _launch(x32, panels, weight, cols, bias, norm, eps, residual, swiglu).to(x.dtype)
    y = _output(x, cols)
    if not y.numel():
        return y
    rows = as_rows(x)
    other = None if residual is None else as_rows(residual)
    if weight is not None and weight.stride(1) != 1:
        weight = weight.contiguous()
    _C.linear(
        y.data_ptr(), rows.data_ptr(), pointer(panels), pointer(weight),
        pointer(bias), pointer(other), pointer(norm),
        rows.shape[0], cols, x.shape[-1], rows.stride(0), cols, 0 if weight is None else weight.stride(0),
        0 if other is None else other.stride(0), swiglu, eps,
    )  # fmt: skip
    return y


def cpu(x, weight, bias, norm, eps, residual, swiglu) -> Tensor:
    return _launch(x, None, weight, weight.shape[0] // (1 + swiglu), bias, norm, eps, residual, swiglu)


def cpu_panels(x, panels, rows, bias, norm, eps, residual, swiglu) -> Tensor:
    return _launch(x, panels, None, rows // (1 + swiglu), bias, norm, eps, residual, swiglu)


def cpu_rows(ids: Tensor, panels: Tensor, rows: int) -> Tensor:
    y = torch.empty((*ids.shape, panels.shape[1]))
    ids = ids.contiguous()
    if _C.panel_rows(y.data_ptr(), ids.data_ptr(), panels.data_ptr(), ids.numel(), rows, panels.shape[1]):
        bad = ids[(ids < 0) | (ids >= rows)]
        raise IndexError(f"embedding: id {bad.flatten()[0].item()} is outside the vocabulary [0, {rows})")
    return y


# -------------------------------------------------------------------------------------------------------- registration

forward_rows = Op(
    "panel_rows(Tensor ids, Tensor panels, int rows) -> Tensor",
    reference=lambda ids, panels, rows: panels[ids // 16, :, ids % 16],
    fake=lambda ids, panels, rows: panels.new_empty((*ids.shape, panels.shape[1])),
    cpu=cpu_rows,
)
forward = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool swiglu) -> Tensor",
    reference=reference,
    fake=lambda x, weight, bias, norm, eps, residual, swiglu: _output(x, weight.shape[0] // (1 + swiglu)),
    cpu=cpu,
)
forward_panels = Op(
    "linear_panels(Tensor x, Tensor panels, int rows, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool swiglu)"
    " -> Tensor",
    reference=reference_panels,
    fake=lambda x, panels, rows, bias, norm, eps, residual, swiglu: _output(x, rows // (1 + swiglu)),
    cpu=cpu_panels,
)


def check_rows_at(ids: Tensor, swiglu: bool) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"embedding: ids are {ids.dtype}; convert them with .long()")
    if swiglu:
        raise ValueError("embedding: the weight was packed with swiglu, its rows are no table; pack it without")


def check_fusion(op: str, x: Tensor, weight, bias, norm, residual, swiglu: bool) -> None:
    """Shapes, dtypes and devices around a weight [N, K]: a tensor, Panels or QWeight."""
    rows, depth = weight.shape
    if not isinstance(weight, Tensor):
        if weight.data.device != x.device:
            raise ValueError(
                f"{op}: the weight is on {weight.data.device}, x on {x.device}; packed weights are for the CPU"
            )
        if swiglu != weight.swiglu:
            raise ValueError(f"{op}: swiglu={swiglu}, but the weight was packed with swiglu={weight.swiglu}")
    if x.dim() == 0 or x.shape[-1] != depth:
        raise ValueError(
            f"{op}: x {tuple(x.shape)} must end in the weight's input size {depth} (weight {(rows, depth)})"
        )
    if swiglu and (rows % 2 or bias is not None):
        raise ValueError(f"{op}: swiglu takes a weight of 2F rows (gate over up) without bias; it has {rows} rows")
    cols = rows // (1 + swiglu)
    for name, tensor, wanted in (
        ("bias", bias, (cols,)),
        ("norm", norm, (depth,)),
        ("residual", residual, (*x.shape[:-1], cols)),
    ):
        if tensor is not None:
            check_like(op, name, tensor, "x", x)
            if tensor.shape != wanted:
                raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, want {tuple(wanted)}")
            if name != "residual" and not tensor.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous; call .contiguous()")


def linear(
    x: Tensor,
    weight: Tensor | Panels,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """norm(x) W^T + bias + residual (or swiglu), x [..., K], weight [N, K] or Panels -> [..., N]; see the file's head.

    Raises ValueError for shapes and devices that do not fit, TypeError for dtypes.
    """
    check_dtype("linear", "x", x)
    if isinstance(weight, Panels):
        check_fusion("linear", x, weight, bias, norm, residual, swiglu)
        return forward_panels(x, weight.data, weight.rows, bias, norm, eps, residual, swiglu)
    check_like("linear", "weight", weight, "x", x)
    if weight.dim() != 2:
        raise ValueError(f"linear: weight has shape {tuple(weight.shape)}; it must be [N, K]")
    check_fusion("linear", x, weight, bias, norm, residual, swiglu)
    return forward(x, weight, bias, norm, eps, residual, swiglu)
