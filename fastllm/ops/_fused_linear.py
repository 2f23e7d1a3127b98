"""What linear, quant_linear and multi_lora share around their product: the checks, and the fused call as ops that have a
backward.
"""

import torch
from torch import Tensor

from ._op import check_like, wants_gradient
from .rms_norm import rms_norm
from .swiglu import swiglu as swiglu_op


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
            raise ValueError(f"{op}: the weight is on {weight.data.device}, x on {x.device}; move one with .to(device)")
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


def check_plain(plain: bool, op: str) -> None:
    """The public op composes a fused call that needs a gradient; the raw one, called so, has no backward."""
    if not plain:
        raise RuntimeError(f"fastllm::{op}: with norm, residual or swiglu it has no backward; call ops.{op}")


def must_compose(x, weight, bias, norm, residual, swiglu) -> bool:
    """Whether a call is fused and needs a gradient."""
    fused = norm is not None or residual is not None or swiglu
    return fused and wants_gradient(x, weight, bias, norm, residual)


def compose(plain, x: Tensor, norm, eps: float, residual, swiglu: bool) -> Tensor:
    """The fused call as ops that have a backward, around plain(x, wide): the product, in float32 where wide."""
    behind = swiglu or residual is not None
    y = plain(x if norm is None else rms_norm(x, norm, eps), behind and x.dtype != torch.float32)
    if swiglu:
        y = swiglu_op(*y.chunk(2, -1))
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)
