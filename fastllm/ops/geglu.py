"""geglu: y = gelu(gate) * up (Shazeer 2020, arXiv 2002.05202), gelu as in gelu.py, exact or by tanh.

Shapes: gate, up, y [..., N]. Dtypes: float32, bfloat16, float16, one for both. The halves of one fused [..., 2N] tensor
are read where they lie; only inputs whose last dimension is not of unit stride are copied.
Rounding: fp32 within, y rounded once, at the end. gelu(-inf) is -0, its limit; a NaN stays in its place.
Backward: dgate = dy * up * gelu'(gate), dup = dy * gelu(gate), both rounded once.
"""

from torch import Tensor

from . import _gated, gelu
from ._op import Op, empty_like

# ---------------------------------------------------------------------------------------------------------- reference


def reference(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    g = _gated.bounded(gate)
    return (gelu.value(g, tanh) * up.to(g.dtype)).to(gate.dtype)


def reference_backward(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    g = _gated.bounded(gate)
    d = dy.to(g.dtype)
    dgate, dup = d * up.to(g.dtype) * gelu.slope(g, tanh), d * gelu.value(g, tanh)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return _gated.cpu("geglu", gate, up, tanh)


def cpu_backward(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return _gated.cpu_backward("geglu_backward", dy, gate, up, tanh)


def gpu(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return _gated.gpu(_gated.GELU_TANH if tanh else _gated.GELU, gate, up)


def gpu_backward(dy: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return _gated.gpu_backward(_gated.GELU_TANH if tanh else _gated.GELU, dy, gate, up)


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    gate, up, ctx.tanh = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, dy):
    return *backward(dy, *ctx.saved_tensors, ctx.tanh), None


forward = Op(
    "geglu(Tensor gate, Tensor up, bool tanh) -> Tensor",
    reference=reference,
    fake=lambda gate, up, tanh: empty_like(gate),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "geglu_backward(Tensor dy, Tensor gate, Tensor up, bool tanh) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dy, gate, up, tanh: (empty_like(gate), empty_like(gate)),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up for gate and up [..., N]; both may be views of one fused tensor. approximate: "none" or "tanh".

    Raises ValueError for shapes or devices that differ and for another `approximate`, TypeError for dtypes. See the
    head of this file for rounding.
    """
    _gated.check_pair("geglu", gate, up)
    return forward(gate, up, _gated.is_tanh("geglu", approximate))
