"""adamw against its formula in plain PyTorch, and against torch's fused AdamW."""

import torch

from ... import ops
from ...ops import AdamWSpec, AdamWState
from ..case import Case, Suite

SPEC = AdamWSpec(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def run(param, grad, exp_avg, exp_avg_sq, master=None, step=7, grad_scale=None, skip=None, rates=None, in_place=False):
    """What the op changed: param, the moments, the master. On copies, unless in_place. rates: one for each row, which is a
    tensor of its own then."""
    changed = [param, exp_avg, exp_avg_sq, *([] if master is None else [master])]
    if not in_place:
        changed = [t.detach().clone(memory_format=torch.contiguous_format) for t in changed]
    param, grads, states = changed[0], grad, AdamWState(*changed[1:])
    if rates is not None:
        param, grads = param.unbind(), grad.unbind()
        states = [AdamWState(*row) for row in zip(*(t.unbind() for t in changed[1:]), strict=True)]
    ops.adamw(param, grads, states, step, SPEC, grad_scale, skip, rates)
    return tuple(changed)


def plain(
    param, grad, exp_avg, exp_avg_sq, master=None, step=7, grad_scale=None, skip=None, rates=None, in_place=False
):
    step = float(step)
    weight = param if master is None else master
    wide = torch.promote_types(weight.dtype, torch.float32)
    lr = SPEC.lr if rates is None else SPEC.lr * rates.to(wide).reshape(-1, *[1] * (param.dim() - 1))
    share = 1 / (1 - SPEC.beta1**step)
    g = grad.to(wide) if grad_scale is None else grad.to(wide) * grad_scale
    m = exp_avg.to(wide).lerp(g, 1 - SPEC.beta1)
    v = (exp_avg_sq.to(wide) * SPEC.beta2).addcmul(g, g, value=1 - SPEC.beta2)
    denominator = (v.sqrt() / (1 - SPEC.beta2**step) ** 0.5).add(SPEC.eps)
    w = weight.to(wide) * (1 - lr * SPEC.weight_decay)
    w = w.addcdiv(m, denominator, value=-lr * share) if rates is None else w - lr * share * (m / denominator)
    old = (param, exp_avg, exp_avg_sq, *([] if master is None else [master]))
    new = tuple(x.to(o.dtype) for x, o in zip((w, m, v, w), old, strict=False))
    if in_place:
        for o, n in zip(old, new, strict=True):
            o.copy_(n)
    return old if in_place else new


def fused(
    param, grad, exp_avg, exp_avg_sq, master=None, step=7, grad_scale=None, skip=None, rates=None, in_place=False
):
    """torch's fused step in one dtype: it has neither a master nor moments of another dtype."""
    count = torch.full((), float(step), device=param.device)
    torch._fused_adamw_(
        [param], [grad], [exp_avg], [exp_avg_sq], [], [count], amsgrad=False, lr=SPEC.lr, beta1=SPEC.beta1,
        beta2=SPEC.beta2, weight_decay=SPEC.weight_decay, eps=SPEC.eps, maximize=False,
    )  # fmt: skip
    return param


def scalars(make):
    scale = make.normal(1, dtype=torch.float32).square()
    return {"step": make.integers(7, 8, 1), "grad_scale": scale, "skip": torch.zeros_like(scale)}


def case(
    *shape: int, master: bool = False, moments: torch.dtype = torch.float32, wide_grad: bool = False,
    grad_scale: float | None = None, tensors: bool = False, rates: bool = False, in_place: bool = False,
) -> Case:  # fmt: skip
    """tensors: step, grad_scale and skip are tensors beside the parameters, as clipping without a wait has them. rates: each
    row is a tensor, with a rate of its own."""
    count = torch.Size(shape).numel()
    notes = (" master" if master else "") + (" bf16 moments" if moments != torch.float32 else "")
    notes += (" fp32 grad" if wide_grad else "") + (f" scale {grad_scale:g}" if grad_scale is not None else "")
    notes += (" by tensors" if tensors else "") + (" rates" if rates else "")

    def inputs(make):
        param = make.normal(*shape)
        with_master = master and param.dtype != torch.float32
        return {
            "param": param,
            "grad": make.normal(*shape, scale=0.1, dtype=torch.float32 if wide_grad else None),
            "exp_avg": make.normal(*shape, scale=0.05, dtype=moments),
            "exp_avg_sq": make.normal(*shape, scale=0.1, dtype=moments).square(),
            **({"master": param.float() + make.normal(*shape, scale=1e-4, dtype=torch.float32)} if with_master else {}),
            **({"grad_scale": grad_scale} if grad_scale is not None else {}),
            **(scalars(make) if tensors else {}),
            **({"rates": make.normal(shape[0], dtype=torch.float32).square()} if rates else {}),
            **({"in_place": True} if in_place else {}),
        }

    def total(size):
        weights = 8 + size if master and size < 4 else 2 * size  # read and written; a 16-bit one is written alone
        return count * (weights + (4 if wide_grad else size) + 4 * moments.itemsize)

    return Case("x".join(map(str, shape)) + notes, inputs, bytes=total, flops=15 * count)


def strided(make):
    """A gradient whose layout is not the parameter's."""
    drawn = case(6, 40).inputs(make)
    return {**drawn, "grad": make.normal(40, 6).t()}


SUITE = Suite(
    op="adamw",
    run=run,
    reference=plain,
    rows=("param", "grad", "exp_avg", "exp_avg_sq", "master", "rates"),
    peers={"fused": fused},
    correct=(
        *(case(*shape) for shape in ((1,), (17,), (3, 7), (4, 576), (2, 3, 64), (0, 8))),
        *(case(*shape, master=True) for shape in ((3, 7), (4, 576))),
        case(5, 33, moments=torch.bfloat16),
        case(5, 33, moments=torch.bfloat16, master=True, wide_grad=True),
        case(5, 33, grad_scale=0.37),
        case(5, 33, master=True, tensors=True),
        case(5, 33, rates=True),
        case(4, 7, 3, master=True, tensors=True, rates=True),
        case(3, 16384 + 3, rates=True),
        case(3, 16384 + 3),  # more than one block, and a tail
        Case("transposed gradient", strided),
    ),
    benchmark=(
        case(4096, 2048, in_place=True),
        case(4096, 2048, master=True, in_place=True),
        case(4096, 2048, moments=torch.bfloat16, in_place=True),
        case(4096, 2048, master=True, tensors=True, in_place=True),
        case(8192, 16384, master=True, in_place=True),
    ),
    gpu=(  # 403 M parameters
        case(16384, 24576, in_place=True),
        case(16384, 24576, moments=torch.bfloat16, in_place=True),
        case(16384, 24576, master=True, in_place=True),
    ),
)
