"""gelu: y = x * Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016, arXiv 1606.08415), or its
approximation by tanh: y = x / 2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), which GPT-2, BERT's descendants and
Gemma were trained with.

Shapes: x, y [..., N]. Dtypes: float32, bfloat16, float16. Rounding: fp32 within, y rounded once, at the end. Phi of a
negative number comes from its own tail, so that it is not lost in 1 - 1: y is within 2 ulp above 0, 3 above -1, 7 below.
gelu(-inf) is -0, its limit; a NaN stays in its place.
Backward: dx = dy * (Phi(x) + x phi(x)), phi the density; by tanh, with s = sigmoid(z), z = 2 sqrt(2/pi) (x + ...):
dx = dy * s * (1 + x z' (1 - s)). Rounded once.
"""

import math

import torch
from torch import Tensor

from . import _gated
from ._op import Op, check, check_dtype, empty_like

# ---------------------------------------------------------------------------------------------------------- reference

SCALE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def value(x: Tensor, tanh: bool) -> Tensor:
    """gelu of a bounded x, differentiable."""
    if tanh:
        return x * torch.sigmoid(SCALE * (x + CUBIC * x**3))
    return x * (0.5 * torch.special.erfc(x * -math.sqrt(0.5)))


def slope(x: Tensor, tanh: bool) -> Tensor:
    """Its derivative."""
    if tanh:
        near = x.clamp(-30, 30)
        z, rise = SCALE * (near + CUBIC * near**3), SCALE * (1 + 3 * CUBIC * near**2)
        return torch.sigmoid(z) * (1 + near * rise * torch.sigmoid(-z))
    near = x.clamp(-100, 100)
    bell = torch.exp(-0.5 * near.square()) / math.sqrt(2 * math.pi)
    return 0.5 * torch.special.erfc(x * -math.sqrt(0.5)) + near * bell


def reference(x: Tensor, tanh: bool) -> Tensor:
    return value(_gated.bounded(x), tanh).to(x.dtype)


def reference_backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    wide = _gated.bounded(x)
    return (dy.to(wide.dtype) * slope(wide, tanh)).to(x.dtype).contiguous()


# ----------------------------------------------------------------------------------------------------------- launchers


def cpu(x: Tensor, tanh: bool) -> Tensor:
    return _gated.cpu("gelu", x, None, tanh)


def cpu_backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    return _gated.cpu_backward("gelu_backward", dy, x, None, tanh)[0]


def gpu(x: Tensor, tanh: bool) -> Tensor:
    return _gated.gpu(_gated.GELU_TANH if tanh else _gated.GELU, x, None)


def gpu_backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    return _gated.gpu_backward(_gated.GELU_TANH if tanh else _gated.GELU, dy, x, None)[0]


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    x, ctx.tanh = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    return backward(dy, *ctx.saved_tensors, ctx.tanh), None


forward = Op(
    "gelu(Tensor x, bool tanh) -> Tensor",
    reference=reference,
    fake=lambda x, tanh: empty_like(x),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "gelu_backward(Tensor dy, Tensor x, bool tanh) -> Tensor",
    reference=reference_backward,
    fake=lambda dy, x, tanh: empty_like(x),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """gelu of x [..., N]; approximate: "none" (by the error function) or "tanh".

    Raises ValueError for a scalar and for another `approximate`, TypeError for dtypes. See the head of this file for
    rounding.
    """
    check_dtype("gelu", "x", x)
    check(x.dim() > 0, lambda: "gelu: x is a scalar; it must be [..., N], make it one with x[None]")
    return forward(x, _gated.is_tanh("gelu", approximate))
