"""adamw: one step of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over one tensor or a list of them, in place: the
one op whose contract is to change its arguments. One pass over memory, one launch for the whole list.

In fp32, with g = grad * grad_scale, t the number of this step, from 1:
  m = m + (1 - beta1) * (g - m)
  v = beta2 * v + (1 - beta2) * g * g
  w = w * (1 - lr * weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
w is the fp32 master where there is one (param is then its rounding), else param itself. With `rates` lr is lr * rates[i] for
tensor i of the list.

Dtypes: param float32, bfloat16 or float16; grad as param or float32; exp_avg (m) and exp_avg_sq (v) float32 or bfloat16;
master float32, or None (where param is float32 it must be None). Within a list each of them has one dtype.
Rounding: fp32, products into FMAs: m = fma(1 - beta1, g - m, m), v = fma((1 - beta2) * g, g, beta2 * v),
w = fma(-step_size, m / fma(sqrt(v), root, eps), w * keep); the five constants are computed in fp64 and rounded once.
A value stored in another dtype is rounded once, after it was used. With bfloat16 moments v cannot decay by less than a
half unit, 2^-9 of itself: choose beta2 below .996.
A NaN or infinite gradient goes into m, v and w, element by element, unless `skip` (a float32 tensor, read where the
tensors are, so that nothing waits) is not zero: then nothing at all is written.
Every element is computed alone: a list gives the bits of its tensors one by one, with any number of threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, check, check_dtype, pointer
from ._tensor_list import BLOCK, blocks, check_lists, device_table, element_type, pointer_at, table
from ._triton import tl, triton


@dataclass(frozen=True)
class AdamWSpec:
    """The hyper-parameters; lr, eps and weight_decay ≥ 0, the betas in [0, 1)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            check(0 <= value < math.inf, lambda n=name, v=value: f"AdamWSpec: {n} is {v}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, lambda n=name, v=value: f"AdamWSpec: {n} is {v}; it must be in [0, 1)")


@dataclass(frozen=True, eq=False)
class AdamWState:
    """What the optimizer keeps of one parameter: the moments m and v, and the fp32 weights beside a 16-bit one."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None = None

    @classmethod
    def new(cls, param: Tensor, moments: torch.dtype = torch.float32, master: bool = True) -> "AdamWState":
        """Before the first step: zero moments, and a master copy where param is not float32 (master=False: never)."""
        m, v = (torch.zeros_like(param, dtype=moments, memory_format=torch.contiguous_format) for _ in range(2))
        copied = master and param.dtype != torch.float32
        return cls(m, v, param.detach().float().contiguous() if copied else None)


def constants(t, lr: float, beta1: float, beta2: float, decay: float):
    """(step_size, root, keep) of step t: a number, or a float64 tensor."""
    return lr / (1 - beta1**t), 1 / (1 - beta2**t) ** 0.5, 1 - lr * decay


def constants_of_each(t, rates: Tensor, lr: float, beta1: float, decay: float) -> Tensor:
    """[count, 2] float32: step_size and keep of each tensor."""
    step_size, _, keep = constants(t, lr * rates.double(), beta1, 0.0, decay)
    return torch.stack((step_size, keep), dim=1).float()


# ---------------------------------------------------------------------------------------------------------- reference


def reference(
    param: list[Tensor], grad: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], master: list[Tensor],
    step_at: Tensor | None, step: int, grad_scale: Tensor | None, skip: Tensor | None, rates: Tensor | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    t = step if step_at is None else step_at.double()
    first, second = 1 - beta1**t, 1 - beta2**t
    for i, p in enumerate(param):
        w = master[i] if master else p
        wide = torch.promote_types(w.dtype, torch.float32)
        g = grad[i].to(wide)
        if grad_scale is not None:
            g = g * grad_scale
        old_m, old_v = exp_avg[i].to(wide), exp_avg_sq[i].to(wide)
        m = old_m + (1 - beta1) * (g - old_m)
        v = beta2 * old_v + (1 - beta2) * g.square()
        rate = lr if rates is None else lr * rates[i].double()
        new = w.to(wide) * (1 - rate * weight_decay) - rate / first * (m / (v.sqrt() / second**0.5 + eps))
        for target, value in ((exp_avg[i], m), (exp_avg_sq[i], v), (p, new), *([(w, new)] if master else [])):
            value = value.to(target.dtype)
            target.copy_(value if skip is None else torch.where(skip != 0, target, value))


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def update(
    param, grad, exp_avg, exp_avg_sq, master, i, mask, scale, step_size, root, keep, eps, new1, new2, old2,
    MASTER: tl.constexpr,
):  # fmt: skip
    g = tl.load(grad + i, mask=mask).to(tl.float32) * scale
    m = tl.load(exp_avg + i, mask=mask).to(tl.float32)
    v = tl.load(exp_avg_sq + i, mask=mask).to(tl.float32)
    w = tl.load(master + i, mask=mask) if MASTER else tl.load(param + i, mask=mask).to(tl.float32)
    m = tl.fma(new1, g - m, m)
    v = tl.fma(new2 * g, g, old2 * v)
    w = tl.fma(-step_size, tl.div_rn(m, tl.fma(tl.sqrt_rn(v), root, eps)), w * keep)
    tl.store(exp_avg + i, m.to(exp_avg.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq + i, v.to(exp_avg_sq.dtype.element_ty), mask=mask)
    if MASTER:
        tl.store(master + i, w, mask=mask)
    tl.store(param + i, w.to(param.dtype.element_ty), mask=mask)


@triton.jit
def kernel(
    tensors, owner, grad_scale, skip, corrections, rates, step_size, root, keep, eps, new1, new2, old2,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_STEP: tl.constexpr, HAS_RATES: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # A program updates one block (CHUNK elements) of one tensor.
    scale = tl.load(grad_scale) if HAS_SCALE else 1.0
    if HAS_STEP:
        step_size, root = tl.load(corrections), tl.load(corrections + 1)
    entry = tl.load(owner + tl.program_id(0))
    if HAS_RATES:
        step_size, keep = tl.load(rates + (entry >> 32) * 2), tl.load(rates + (entry >> 32) * 2 + 1)
    row = tensors + (entry >> 32) * 6
    begin = (entry & 0xFFFFFFFF) * CHUNK
    param, grad = pointer_at(row, 0, PARAM, ALIGNED) + begin, pointer_at(row, 1, GRAD, ALIGNED) + begin
    exp_avg, exp_avg_sq = pointer_at(row, 2, MOMENT, ALIGNED) + begin, pointer_at(row, 3, MOMENT, ALIGNED) + begin
    master = pointer_at(row, 4, tl.float32, ALIGNED) + begin
    left = tl.minimum(tl.load(row + 5) - begin, CHUNK).to(tl.int32)
    if HAS_SKIP:
        left = tl.where(tl.load(skip) != 0, 0, left)
    lane = tl.arange(0, BLOCK)
    if left == CHUNK:  # without a mask the loads are vectors
        for first in range(0, CHUNK, BLOCK):
            update(
                param, grad, exp_avg, exp_avg_sq, master, first + lane, None,
                scale, step_size, root, keep, eps, new1, new2, old2, MASTER,
            )  # fmt: skip
    else:
        for first in range(0, left, BLOCK):
            update(
                param, grad, exp_avg, exp_avg_sq, master, first + lane, first + lane < left,
                scale, step_size, root, keep, eps, new1, new2, old2, MASTER,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- launchers

LANES, WARPS = 1024, 8  # elements that a program holds at a time


def _columns(param, grad, exp_avg, exp_avg_sq, master):
    return param, [g.contiguous() for g in grad], exp_avg, exp_avg_sq, master or [None] * len(param)


def _changed(*lists: list[Tensor]) -> None:
    """What reads a version counter (autograd, weights packed for another layout) sees that these have changed."""
    for tensors in lists:
        for t in tensors:
            if not t.is_inference():
                torch.autograd.graph.increment_version(t)


def cpu(
    param, grad, exp_avg, exp_avg_sq, master, step_at, step, grad_scale, skip, rates,
    lr, beta1, beta2, eps, weight_decay,
) -> None:  # fmt: skip
    t = step if step_at is None else step_at.item()
    step_size, root, keep = constants(t, lr, beta1, beta2, weight_decay)
    each = None if rates is None else constants_of_each(t, rates, lr, beta1, weight_decay)
    columns = _columns(param, grad, exp_avg, exp_avg_sq, master)
    tensors = table(columns)
    _C.adamw(
        tensors.data_ptr(), pointer(grad_scale), pointer(skip), pointer(each),
        len(param), blocks(param), DTYPES[param[0].dtype], DTYPES[grad[0].dtype], DTYPES[exp_avg[0].dtype],
        step_size, root, beta1, beta2, eps, keep,
    )  # fmt: skip
    _changed(param, exp_avg, exp_avg_sq, master)


def gpu(
    param, grad, exp_avg, exp_avg_sq, master, step_at, step, grad_scale, skip, rates,
    lr, beta1, beta2, eps, weight_decay,
) -> None:  # fmt: skip
    count = blocks(param)
    if not count:
        return
    columns = _columns(param, grad, exp_avg, exp_avg_sq, master)
    tensors, owner, aligned = device_table(columns)
    t = step if step_at is None else step_at.double()
    if step_at is None:
        corrections, (step_size, root, keep) = tensors, constants(t, lr, beta1, beta2, weight_decay)
    else:  # on the device, without asking it
        first, second, keep = constants(t, lr, beta1, beta2, weight_decay)
        corrections, step_size, root = torch.stack((first, second)).float(), 0.0, 0.0
    each = tensors if rates is None else constants_of_each(t, rates, lr, beta1, weight_decay)
    kernel[(count,)](
        tensors, owner, tensors if grad_scale is None else grad_scale, tensors if skip is None else skip, corrections, each,
        step_size, root, keep, eps, 1 - beta1, 1 - beta2, beta2,
        PARAM=element_type(param[0].dtype), GRAD=element_type(grad[0].dtype), MOMENT=element_type(exp_avg[0].dtype),
        MASTER=bool(master), HAS_SCALE=grad_scale is not None, HAS_SKIP=skip is not None, HAS_STEP=step_at is not None,
        HAS_RATES=rates is not None, ALIGNED=aligned, CHUNK=BLOCK, BLOCK=LANES, num_warps=WARPS,
    )  # fmt: skip
    _changed(param, exp_avg, exp_avg_sq, master)


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "adamw(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] master, "
    "Tensor? step_at, int step, Tensor? grad_scale, Tensor? skip, Tensor? rates, "
    "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    reference=reference,
    fake=lambda *args: None,
    cpu=cpu,
    triton=gpu,
)


def _scalar(name: str, value: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    check_dtype("adamw", name, value, dtypes)
    check(
        value.numel() == 1 and value.device == device,
        lambda: f"adamw: {name} is {tuple(value.shape)} on {value.device}; it must be one number on {device}",
    )
    return value


def adamw(
    param: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    state: AdamWState | Sequence[AdamWState],
    step: int | Tensor,
    spec: AdamWSpec,
    grad_scale: float | Tensor | None = None,
    skip: Tensor | None = None,
    rates: Tensor | None = None,
) -> None:
    """Updates param and state, one tensor or a list of them, in place; grad is only read.

    step: this step's number, from 1, or a tensor of one that lies beside the parameters. grad_scale: a factor of the
    gradients, for clipping or unscaling, a number or a float32 tensor. skip: float32, not zero: nothing is written. rates:
    float32, beside the parameters, a factor of spec.lr for each tensor of the list.
    Raises ValueError for shapes, devices or layouts that do not fit, TypeError for dtypes. See the head of this file.
    """
    params, grads, states = ([x] if isinstance(x, (Tensor, AdamWState)) else list(x) for x in (param, grad, state))
    check(len(states) == len(params), lambda: f"adamw: {len(states)} states for {len(params)} parameters; one for each")
    m, v = [s.exp_avg for s in states], [s.exp_avg_sq for s in states]
    masters = [s.master for s in states if s.master is not None]
    named = {"param": params, "grad": grads, "exp_avg": m, "exp_avg_sq": v, **({"master": masters} if masters else {})}
    check_lists("adamw", named)
    dtype, device = params[0].dtype, params[0].device
    check_dtype("adamw", "param", params[0])
    check_dtype("adamw", "grad", grads[0], tuple(dict.fromkeys((dtype, torch.float32))))
    check_dtype("adamw", "exp_avg", m[0], (torch.float32, torch.bfloat16))
    check_dtype("adamw", "exp_avg_sq", v[0], (m[0].dtype,))
    if masters:
        check_dtype("adamw", "master", masters[0], (torch.float32,))
        check(dtype != torch.float32, lambda: "adamw: a float32 parameter is its own master; pass master=None")
    for name, tensors in named.items():
        for i, x in enumerate(tensors):
            check(
                name == "grad" or x.is_contiguous(),
                lambda n=name, i=i: f"adamw: {n}[{i}] is not contiguous, and is written in place; use .contiguous()",
            )
    at = _scalar("step", step, device, (torch.float32, torch.int64, torch.int32)) if isinstance(step, Tensor) else None
    number = 0 if at is not None else step
    check(at is not None or number >= 1, lambda: f"adamw: step is {step}; the first is 1")
    if isinstance(grad_scale, (int, float)):
        grad_scale = torch.full((), float(grad_scale), dtype=torch.float32, device=device)
    if grad_scale is not None:
        _scalar("grad_scale", grad_scale, device, (torch.float32,))
    if skip is not None:
        _scalar("skip", skip, device, (torch.float32,))
    if rates is not None:
        check_dtype("adamw", "rates", rates, (torch.float32,))
        check(
            rates.shape == (len(params),) and rates.device == device,
            lambda: f"adamw: rates is {tuple(rates.shape)} on {rates.device}; it must be ({len(params)},) on {device}",
        )
    with torch.no_grad():
        forward(
            params, grads, m, v, masters, at, number, grad_scale, skip, rates,
            spec.lr, spec.beta1, spec.beta2, spec.eps, spec.weight_decay,
        )  # fmt: skip
