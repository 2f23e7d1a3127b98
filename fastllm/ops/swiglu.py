"""swiglu: y = silu(gate) * up with silu(g) = g / (1 + e^-g) (Shazeer 2020, arXiv 2002.05202).

Shapes: gate, up, y [..., N]. Dtypes: float32, bfloat16, float16, one for both. The halves of one fused [..., 2N] tensor
are read where they lie; only inputs whose last dimension is not of unit stride are copied.
Rounding: fp32 within, y rounded once, at the end. silu(-inf) is -0, its limit; a NaN stays in its place.
Backward, with s = sigmoid(g): dgate = dy * up * s * (1 + g * (1 - s)), dup = dy * g * s, both rounded once.
"""

import torch
from torch import Tensor

from . import _gated
from ._op import Op, empty_like

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


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated.cpu("swiglu", gate, up)


def cpu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _gated.cpu_backward("swiglu_backward", dy, gate, up)


def gpu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated.gpu(_gated.SILU, gate, up)


def gpu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _gated.gpu_backward(_gated.SILU, dy, gate, up)


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
    _gated.check_pair("swiglu", gate, up)
    return forward(gate, up)
