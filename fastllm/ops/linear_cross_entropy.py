"""linear_cross_entropy: cross_entropy(x W^T + bias, target), without the logits ever lying in memory as a whole.

Shapes: x [T, H], weight [V, H], bias [V], target int64 [T], token_weight [T]; the loss as in `ops.cross_entropy`, whose
options (LossSpec), reductions, special rows and errors are meant here too. Dtypes: float32, bfloat16, float16, one for
x, weight and bias; the loss is float32.
Blocks of rows (`_head.py`): a block's logits become their own gradient, row by row while the row is in cache, and the
three products of the block follow. For "mean" and "sum" all of this happens in the forward, for an upstream gradient of 1,
and the backward multiplies by the one that comes: three products in all, and only dx and dW are kept. For "none" the
backward makes the logits again, with the upstream gradient of each row: four products, exact.
What needs no gradient costs nothing: no dW for a frozen head, no block kept in inference. Ignored rows leave before the
products (on a CPU; on a GPU asking how many there are would stall the stream).
Rounding: on a CPU logits are fp32, summed as by ops.linear, so that a row's loss has the same bits in any batch; so are
they on a GPU with exact=True, and else rounded there to the inputs' dtype. dW and dbias are added up in fp32, block after
block. In float16 the gradients are made, and kept for the backward, times a power of two: neither 1 / T nor a loss
scale that comes later leaves any of them behind.
"""

import torch
from torch import Tensor

from .. import _C
from ._head import check_head, outputs, over_blocks, power_of_two
from ._op import Op, is_plain
from ._triton import tl, triton
from .cross_entropy import PLAIN, LossSpec, check_target, check_targets, reduced, rows_and_weights
from .cross_entropy import gpu as logits_gpu
from .cross_entropy import gpu_backward as logits_gpu_backward
from .cross_entropy import reference as losses_of

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, bias, target, ignore_index, label_smoothing, softcap, z_loss, exact) -> Tensor:
    logits = torch.nn.functional.linear(x, weight, bias)
    return losses_of(logits, target, ignore_index, label_smoothing, softcap, z_loss)[0]


def reference_gradients(coefficient, x, weight, bias, target, *rest) -> tuple[Tensor, ...]:
    *spec, needs = rest
    inputs = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        total = (reference(*inputs, target, *spec) * coefficient).sum()
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(total, wanted)) if wanted else iter(())
    empty = outputs(x, weight, bias, [False] * 3)
    return total.detach(), *(next(found) if need else e for need, e in zip(needs, empty, strict=True))


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def scale_kernel(x, factor, count, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:  # the host, which would have to wait for it, does not know
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
        tl.store(x + at, (v * by).to(x.dtype.element_ty), mask=at < count)


# ----------------------------------------------------------------------------------------------------------- launchers

# float16 ends at 6e-8: what 1 / T leaves of a gradient would be lost before a loss scale comes. Within, dlogits are near 1;
# dx and dweight are kept for losses whose weights add up to this, which |x| above 500 is needed to overflow.
HALF_ROOM = 32


def _rows_cpu(x, weight, bias, target, spec, coefficient=None, needs=(False, False, False)):
    """(losses [T], dx, dweight, dbias). Ignored rows leave first."""
    loss = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    counted = (target != spec[0]).nonzero()[:, 0]
    some = counted.shape[0] < x.shape[0]
    part = x[counted] if some else x
    goal = target[counted] if some else target.contiguous()
    rows = torch.empty(part.shape[0], dtype=torch.float32, device=x.device)
    if coefficient is not None:
        coefficient = (coefficient[counted] if some else coefficient).float().contiguous()

    def step(block: slice, logits: Tensor) -> None:
        if _C.linear_cross_entropy(
            rows[block].data_ptr(), logits.data_ptr(), goal[block].data_ptr(),
            0 if coefficient is None else coefficient[block].data_ptr(), *logits.shape, logits.stride(0), *spec[:-1],
        ):  # fmt: skip
            check_targets(target, weight.shape[0], "linear_cross_entropy", spec[0])

    dx, dweight, dbias = over_blocks(part, weight, bias, needs, step, cpu=True)
    if some:
        loss[counted] = rows
        if needs[0]:
            dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device).index_copy_(0, counted, dx)
    return (loss if some else rows), dx, dweight, dbias


def _rows_gpu(x, weight, bias, target, spec, coefficient=None, needs=(False, False, False)):
    loss, (*spec, exact) = torch.empty(x.shape[0], dtype=torch.float32, device=x.device), spec
    unit = None
    if x.dtype == torch.float16 and coefficient is not None and len(coefficient):
        unit = power_of_two(coefficient.float().abs().amax())
        coefficient = coefficient / unit

    def step(block: slice, logits: Tensor) -> None:
        loss[block], stats = logits_gpu(logits, target[block], *spec)
        if coefficient is not None:
            logits_gpu_backward(coefficient[block], logits, target[block], stats, *spec, out=logits)

    return loss, *over_blocks(x, weight, bias, needs, step, cpu=False, exact=exact, unit=unit)


def cpu(x, weight, bias, target, *spec) -> Tensor:
    return _rows_cpu(x, weight, bias, target, spec)[0]


def gpu(x, weight, bias, target, *spec) -> Tensor:
    return _rows_gpu(x, weight, bias, target, spec)[0]


def cpu_gradients(coefficient, x, weight, bias, target, *rest) -> tuple[Tensor, ...]:
    *spec, needs = rest
    loss, *gradients = _rows_cpu(x, weight, bias, target, spec, coefficient, needs)
    return (loss * coefficient).sum(), *gradients


def gpu_gradients(coefficient, x, weight, bias, target, *rest) -> tuple[Tensor, ...]:
    *spec, needs = rest
    loss, *gradients = _rows_gpu(x, weight, bias, target, spec, coefficient, needs)
    return (loss * coefficient).sum(), *gradients


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a float32 number, which float16 may not hold."""
    return (x.float() * factor).to(x.dtype) if x.dtype == torch.float16 else x * factor


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x times a float32 number, in place; on a GPU nothing is read where that is 1."""
    if gradients.kernel(x.device.type).name != "Triton":
        return x.copy_(scaled(x, factor)) if x.dtype == torch.float16 else x.mul_(factor)
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), 8192),)](x, factor, x.numel(), BLOCK=8192, num_warps=8)
    return x


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    x, weight, bias, target, *ctx.spec = inputs
    ctx.save_for_backward(x, weight, bias, target)


def _backward(ctx, dloss):
    x, weight, bias, target = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    _, *found = gradients(dloss, x, weight, bias, target, *ctx.spec, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 6


def _traces(tensors) -> list[Tensor]:
    """No elements of them: enough for a second derivative to be refused, which hangs on what was saved, without their memory."""
    with torch.enable_grad():
        return [t[:0].clone() for t in tensors if t is not None and t.requires_grad]


def _save_gradients(ctx, inputs, output) -> None:
    ctx.needs = inputs[-1]
    ctx.save_for_backward(*output[1:], *(inputs[:4] if not is_plain(inputs[1]) else _traces(inputs[1:4])))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale(ctx, dtotal, *_):
    """The gradients, made for an upstream of 1, times the one that came. Nothing is written over that a second backward
    could still ask for; where this is the last one, they are scaled in place, since a copy would double the memory."""
    found = ctx.saved_tensors[:3]
    if dtotal is None:
        given = (None,) * 3
    elif not is_plain(dtotal):
        given = [(g.float() * dtotal).to(g.dtype) for g in found]  # under vmap it has dimensions, and would widen them
    elif dtotal.is_cpu and dtotal.item() == 1:
        given = found
    elif torch._C._autograd._get_current_graph_task_keep_graph():
        given = [scaled(g, dtotal) for g in found]
    else:
        given = [scale_(g, dtotal) for g in found]
    kept = (g if need else None for g, need in zip(given, ctx.needs, strict=True))
    return None, *kept, *(None,) * 7


def _fake_gradients(coefficient, x, weight, bias, target, *rest):
    return coefficient.new_empty((), dtype=torch.float32), *outputs(x, weight, bias, rest[-1])


_SPEC = "int ignore_index, float label_smoothing, float softcap, float z_loss, bool exact"
forward = Op(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, {_SPEC}) -> Tensor",
    reference=reference,
    fake=lambda x, *rest: x.new_empty(x.shape[0], dtype=torch.float32),
    cpu=cpu,
    triton=gpu,
    triton_name="cuBLAS, Triton",
    triton_reason="the products with the weight by torch, what stands around them in Triton",
    save=_save,
    backward=_backward,
)
gradients = Op(
    f"linear_cross_entropy_gradients(Tensor coefficient, Tensor x, Tensor weight, Tensor? bias, Tensor target, {_SPEC}, "
    "bool[3] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_gradients,
    fake=_fake_gradients,
    cpu=cpu_gradients,
    triton=gpu_gradients,
    save=_save_gradients,
    backward=_scale,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    spec: LossSpec = PLAIN,
    exact: bool = False,
) -> Tensor:
    """Cross-entropy of x [T, H] weight [V, H]^T + bias [V] and target [T]: a scalar, or [T] with reduction "none".

    exact: a row's loss has the same bits in any batch on a GPU too; on a CPU it always has.
    Raises IndexError for a target outside [0, V), ValueError for shapes and devices, TypeError for dtypes. See the head
    of this file.
    """
    check_head("linear_cross_entropy", x, weight, bias)
    check_target("linear_cross_entropy", "x", x, target)
    target, coefficient = rows_and_weights("linear_cross_entropy", target, token_weight, spec)
    needs = [t is not None and t.requires_grad for t in (x, weight, bias)]
    if spec.reduction == "none" or not any(needs) or not torch.is_grad_enabled():
        return reduced(forward(x, weight, bias, target, *spec.arguments(), exact), coefficient, spec)
    if coefficient is None:
        coefficient = torch.ones(target.shape, dtype=torch.float32, device=target.device)
    if x.dtype != torch.float16:
        return gradients(coefficient, x, weight, bias, target, *spec.arguments(), exact, needs)[0]
    unit = power_of_two(coefficient.abs().sum()) / HALF_ROOM
    total, *_ = gradients(coefficient / unit, x, weight, bias, target, *spec.arguments(), exact, needs)
    return total * unit
