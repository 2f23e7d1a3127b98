"""grad_norm: the 2-norm of all elements of a list of tensors, sqrt(sum of squares), as one float32 scalar tensor: what
clipping needs, in one pass, and on a GPU without waiting for it.

    norm = ops.grad_norm(grads)
    scale, bad = (limit / (norm + 1e-6)).clamp(max=1), 1 - norm.isfinite().float()
    ops.adamw(params, grads, states, step, spec, grad_scale=scale, skip=bad)

Dtypes: float32, bfloat16, float16, one for the list. Rounding: squares are added in fp32 within a block of 16,384
elements, in one fixed order, the blocks in fp64, and the root is rounded once: the same bits for any number of threads.
A NaN gives NaN, an infinity (or an element beyond 1.8e19, whose square overflows) +inf; no elements give 0.
Backward: through the reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, check_dtype
from ._tensor_list import BLOCK, blocks, check_lists, device_table, element_type, pointer_at, table
from ._triton import tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(tensors: list[Tensor]) -> Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([t.to(wide).square().sum(dtype=torch.float64) for t in tensors]).sum().sqrt().to(wide)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def kernel(
    squares, tensors, owner, TYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.load(owner + tl.program_id(0))
    row = tensors + (entry >> 32) * 2
    begin = (entry & 0xFFFFFFFF) * CHUNK
    left = tl.minimum(tl.load(row + 1) - begin, CHUNK).to(tl.int32)
    x = pointer_at(row, 0, TYPE, ALIGNED) + begin
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if left == CHUNK:  # without a mask the loads are vectors
        for first in range(0, CHUNK, BLOCK):
            v = tl.load(x + first + lane).to(tl.float32)
            total = tl.fma(v, v, total)
    else:
        for first in range(0, left, BLOCK):
            v = tl.load(x + first + lane, mask=first + lane < left, other=0.0).to(tl.float32)
            total = tl.fma(v, v, total)
    tl.store(squares + tl.program_id(0), tl.sum(total, 0))


# ----------------------------------------------------------------------------------------------------------- launchers


def _scalar(tensors: list[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=tensors[0].device)


def cpu(tensors: list[Tensor]) -> Tensor:
    norm, tensors = _scalar(tensors), [t.contiguous() for t in tensors]
    pointers = table([tensors])
    _C.grad_norm(norm.data_ptr(), pointers.data_ptr(), len(tensors), blocks(tensors), DTYPES[tensors[0].dtype])
    return norm


def gpu(tensors: list[Tensor]) -> Tensor:
    tensors = [t.contiguous() for t in tensors]
    squares = torch.empty(blocks(tensors), dtype=torch.float32, device=tensors[0].device)
    if squares.numel():
        pointers, owner, aligned = device_table([tensors])
        kernel[(squares.numel(),)](
            squares, pointers, owner, TYPE=element_type(tensors[0].dtype), ALIGNED=aligned, CHUNK=BLOCK, BLOCK=2048
        )
    return squares.double().sum().sqrt().float()


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "grad_norm(Tensor[] tensors) -> Tensor",
    reference=reference,
    fake=_scalar,
    cpu=cpu,
    triton=gpu,
)


def grad_norm(tensors: Tensor | Sequence[Tensor]) -> Tensor:
    """sqrt(sum of squares) over one tensor or a list of them: a float32 scalar tensor on their device.

    Raises ValueError for an empty list or several devices, TypeError for dtypes. See the head of this file.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    check_lists("grad_norm", {"tensors": tensors})
    check_dtype("grad_norm", "tensors[0]", tensors[0])
    return forward(tensors)
