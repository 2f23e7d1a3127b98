"""cross_entropy: how unlikely logits make their targets, one read of the logits forward, one read and one write backward.

For a row of logits l [V] with target t, y = softcap * tanh(l / softcap) where a softcap is given, else y = l, and
L = logsumexp(y):

    loss = L - (1 - s) y_t - s mean(y) + z L^2           s: label_smoothing (Szegedy et al. 2016), z: z_loss (PaLM)
    dl_j = dloss * ((1 + 2 z L) softmax(y)_j - s / V - (1 - s) [j = t]) * (1 - (y_j / softcap)^2)

Shapes: logits [T, V] of any row stride, target int64 [T], token_weight [T]. Dtypes: logits float32, bfloat16, float16;
the loss is float32, computed in fp32, differences from the largest logit first; dlogits are rounded once.
Reductions: "none" gives [T], each loss times its weight; "sum" adds these; "mean" divides that sum by the sum of the
weights (1 where none are given) of the rows that count. Where that is 0, none is left, the mean is 0 and so is its
gradient. (torch: NaN, which ends a training for one batch of masked tokens.)
A row counts unless its target is ignore_index or its weight is 0: the others are not looked at, their loss and their
gradient are 0. Between forward and backward only two numbers a row are kept, beside the logits themselves.
-inf is a token that cannot come: no mass, no gradient, and as a target a loss of +inf. A NaN, a +inf or nothing above -inf
in a row makes its loss and its gradient NaN, and leaves other rows alone (with a softcap infinities are capped).
A row's bits depend on nothing but the row.
Errors: IndexError for a target outside [0, V) that is not ignore_index; on a GPU, where asking would stall the stream,
its loss is NaN instead.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, as_rows, check, check_dtype, pointer
from ._triton import grid_of, place, tl, triton

REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class LossSpec:
    """How a cross-entropy is formed; one record for `cross_entropy` and `linear_cross_entropy`.

    ignore_index: the target of rows that do not count. label_smoothing: in [0, 1], the share of the target's mass that
    goes to all tokens alike. softcap: logits become softcap * tanh(logit / softcap) (Gemma 2). z_loss: weight of
    logsumexp^2, which keeps logits from drifting. reduction: "mean" (weighted), "sum" or "none"."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None
    z_loss: float = 0.0
    reduction: str = "mean"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"LossSpec: label_smoothing is {self.label_smoothing}, allowed: 0 to 1")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"LossSpec: softcap is {self.softcap}, allowed: a positive number, or None for no cap")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"LossSpec: z_loss is {self.z_loss}, allowed: a number >= 0")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"LossSpec: reduction is {self.reduction!r}, allowed: {', '.join(REDUCTIONS)}")

    def arguments(self) -> tuple[int, float, float, float]:
        """ignore_index, label_smoothing, softcap (0: none), z_loss as the raw ops take them."""
        return self.ignore_index, float(self.label_smoothing), float(self.softcap or 0.0), float(self.z_loss)


PLAIN = LossSpec()

# ---------------------------------------------------------------------------------------------------------- reference


def reference(logits, target, ignore_index, label_smoothing, softcap, z_loss) -> tuple[Tensor, Tensor]:
    y = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        y = softcap * torch.tanh(y / softcap)
    counts = target != ignore_index
    t = torch.where(counts, target, 0)
    if logits.device.type == "cpu":
        check_targets(target, y.shape[1], "cross_entropy", ignore_index)
    largest = y.detach().amax(1) if y.numel() else y.new_zeros(len(y))
    log_sum = (y - largest[:, None]).exp().sum(1).log()
    loss = (1 - label_smoothing) * (largest - y.gather(1, t[:, None])[:, 0]) + log_sum
    if label_smoothing:
        loss = loss + label_smoothing * (largest - y.mean(1))
    loss = loss + z_loss * (largest + log_sum).square() if z_loss else loss
    stats = torch.stack((largest, log_sum), 1).detach()
    return torch.where(counts, loss, 0.0), torch.where(counts[:, None], stats, 0.0)


def reference_backward(dloss, logits, target, stats, ignore_index, label_smoothing, softcap, z_loss) -> Tensor:
    y = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        y = softcap * torch.tanh(y / softcap)
    counts = (target != ignore_index)[:, None]
    largest, log_sum = stats[:, :1].to(y.dtype), stats[:, 1:].to(y.dtype)
    hit = torch.zeros_like(y).scatter(1, torch.where(counts, target[:, None], 0), 1 - label_smoothing)
    d = (1 + 2 * z_loss * (largest + log_sum)) * (y - largest - log_sum).exp() - label_smoothing / y.shape[1] - hit
    if softcap:
        d = d * (1 - (y / softcap).square())
    return torch.where(counts, d * dloss[:, None].to(y.dtype), 0.0).to(logits.dtype)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def soft_cap(x, cap):
    """cap * tanh(x / cap): a polynomial near zero, where 1 - 2 / (e^2t + 1) would cancel."""
    t = x / cap
    size = tl.abs(t)
    q = t * t
    p = ((-5.70498872745e-3 * q + 2.06390887954e-2) * q - 5.37397155531e-2) * q + 1.33314422036e-1
    near = t + t * q * (p * q - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 40.0, propagate_nan=tl.PropagateNan.ALL)) + 1.0)
    return cap * tl.where(size < 0.625, near, tl.where(t < 0, -far, far))


@triton.jit
def read_row(x, vocab, cap, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit, sum of exp(logit - largest) and sum of the row, in one read."""
    largest = -float("inf")
    total, plain = 0.0, 0.0
    for begin in range(0, vocab, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        inside = col < vocab
        y = tl.load(x + col, mask=inside, other=-float("inf")).to(tl.float32)
        if CAPPED:
            y = tl.where(inside, soft_cap(y, cap), -float("inf"))
        highest = tl.maximum(largest, tl.max(y, 0))
        offset = tl.where(highest > -float("inf"), highest, 0.0)
        total = total * tl.exp(largest - offset) + tl.sum(tl.exp(y - offset), 0)
        if SMOOTHED:
            plain += tl.sum(tl.where(inside, y, 0.0), 0)
        largest = highest
    return largest, total, plain


@triton.jit
def forward_kernel(
    loss, stats, logits, target, vocab, stride, ignore_index, smoothing, cap, z,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target + row)
    if t == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(stats + 2 * row, 0.0)
        tl.store(stats + 2 * row + 1, 0.0)
    else:
        x = logits + row * stride
        largest, total, plain = read_row(x, vocab, cap, CAPPED, SMOOTHED, BLOCK)
        defined = (total >= 1.0) & (total < float("inf")) & (t >= 0) & (t < vocab)
        log_sum = tl.where(defined, tl.log(total), float("nan"))
        y = tl.load(x + t, mask=(t >= 0) & (t < vocab), other=0.0).to(tl.float32)
        if CAPPED:
            y = soft_cap(y, cap)
        value = (1.0 - smoothing) * (largest - y) + log_sum
        if SMOOTHED:
            value += smoothing * (largest - plain / vocab)
        lse = largest + log_sum
        tl.store(loss + row, value + z * lse * lse)
        tl.store(stats + 2 * row, largest)
        tl.store(stats + 2 * row + 1, log_sum)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dlogits, dloss, logits, target, stats, rows, vocab, d_stride, dloss_stride, stride, ignore_index, smoothing, cap, z,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Every element is read before it is written, by the same program: dlogits may be logits.
    row, col, inside = place(rows, vocab, BLOCK)
    if row >= rows:
        return
    t = tl.load(target + row)
    if t == ignore_index:
        tl.store(dlogits + row * d_stride + col, tl.zeros((BLOCK,), dlogits.dtype.element_ty), mask=inside)
    else:
        upstream = tl.load(dloss + row * dloss_stride)
        largest, log_sum = tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1)
        y = tl.load(logits + row * stride + col, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            y = soft_cap(y, cap)
        d = (1.0 + 2.0 * z * (largest + log_sum)) * tl.exp(y - largest - log_sum) - smoothing / vocab
        d = tl.where(col == t, d - (1.0 - smoothing), d) * upstream
        if CAPPED:
            d *= 1.0 - (y / cap) * (y / cap)
        tl.store(dlogits + row * d_stride + col, d.to(dlogits.dtype.element_ty), mask=inside)


READ, WRITE = (4096, 8), (4096, 8)  # logits that a program holds, warps


# ----------------------------------------------------------------------------------------------------------- launchers


def check_targets(target: Tensor, vocab: int, op: str, ignore_index: int) -> None:
    """Raises for the first target that no row has; on the CPU, after a kernel met one."""
    outside = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise IndexError(
            f"{op}: target {int(target[row])} of row {row} is outside [0, {vocab}) and is not ignore_index; "
            "set LossSpec(ignore_index=...) or mend the labels"
        )


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    return tuple(torch.empty(shape, dtype=dtype, device=logits.device) for shape in ((rows,), (rows, 2)))


def _dlogits(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def cpu(logits, target, ignore_index, label_smoothing, softcap, z_loss) -> tuple[Tensor, Tensor]:
    loss, stats = outputs = _outputs(logits)
    if logits.shape[0]:
        x, target = as_rows(logits), target.contiguous()
        if _C.cross_entropy(
            loss.data_ptr(), stats.data_ptr(), x.data_ptr(), target.data_ptr(),
            *x.shape, x.stride(0), ignore_index, DTYPES[x.dtype], label_smoothing, softcap, z_loss,
        ):  # fmt: skip
            check_targets(target, x.shape[1], "cross_entropy", ignore_index)
    return outputs


def cpu_backward(dloss, logits, target, stats, ignore_index, label_smoothing, softcap, z_loss) -> Tensor:
    d = _dlogits(logits)
    if d.numel():
        x, target, dloss = as_rows(logits), target.contiguous(), dloss.float()
        _C.cross_entropy_backward(
            d.data_ptr(), dloss.data_ptr(), x.data_ptr(), target.data_ptr(), pointer(stats.contiguous()),
            *x.shape, dloss.stride(0), x.stride(0), ignore_index, DTYPES[x.dtype], label_smoothing, softcap, z_loss,
        )  # fmt: skip
    return d


def gpu(logits, target, ignore_index, label_smoothing, softcap, z_loss) -> tuple[Tensor, Tensor]:
    loss, stats = outputs = _outputs(logits)
    if logits.shape[0]:
        x = as_rows(logits)
        forward_kernel[(x.shape[0],)](
            loss, stats, x, target.contiguous(), x.shape[1], x.stride(0), ignore_index, label_smoothing, softcap, z_loss,
            CAPPED=softcap != 0, SMOOTHED=label_smoothing != 0, BLOCK=READ[0], num_warps=READ[1],
        )  # fmt: skip
    return outputs


def gpu_backward(
    dloss, logits, target, stats, ignore_index, label_smoothing, softcap, z_loss, out: Tensor | None = None
) -> Tensor:
    d = _dlogits(logits) if out is None else out
    if d.numel():
        x = as_rows(logits)
        backward_kernel[grid_of(*x.shape, WRITE[0])](
            d, dloss, x, target.contiguous(), stats, *x.shape, d.stride(0), dloss.stride(0), x.stride(0), ignore_index,
            label_smoothing, softcap, z_loss, CAPPED=softcap != 0, BLOCK=WRITE[0], num_warps=WRITE[1],
        )  # fmt: skip
    return d


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    logits, target, *ctx.spec = inputs
    ctx.save_for_backward(logits, target, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, _):
    logits, target, stats = ctx.saved_tensors
    d = None if dloss is None else backward(dloss, logits, target, stats, *ctx.spec)
    return d, None, None, None, None, None


_SPEC = "int ignore_index, float label_smoothing, float softcap, float z_loss"
forward = Op(
    f"cross_entropy(Tensor logits, Tensor target, {_SPEC}) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda logits, *rest: _outputs(logits),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor stats, {_SPEC}) -> Tensor",
    reference=reference_backward,
    fake=lambda dloss, logits, *rest: _dlogits(logits),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def check_target(op: str, name: str, rows: Tensor, target: Tensor) -> None:
    """One int64 target for each row of `rows` [T, ...]."""
    check_dtype(op, "target", target, (torch.int64,))
    check(
        target.shape == rows.shape[:1],
        lambda: f"{op}: target {tuple(target.shape)} must be [{rows.shape[0]}], one for each row of {name}",
    )
    check(target.device == rows.device, lambda: f"{op}: target is on {target.device}, {name} on {rows.device}")


def rows_and_weights(
    op: str, target: Tensor, token_weight: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor | None]:
    """(target, what each loss is multiplied by, or None for 1): rows of weight 0 become ignored ones, and for "mean" the
    weights add up to 1, or are 0."""
    if token_weight is not None:
        check_dtype(op, "token_weight", token_weight, (torch.float32,))
        check(
            token_weight.shape == target.shape and token_weight.device == target.device,
            lambda: (
                f"{op}: token_weight {tuple(token_weight.shape)} on {token_weight.device} must be like target, "
                f"{tuple(target.shape)} on {target.device}"
            ),
        )
        check(
            not token_weight.requires_grad,
            lambda: f'{op}: token_weight gets no gradient here; take reduction="none" and multiply the losses by it',
        )
        target = torch.where(token_weight == 0, spec.ignore_index, target)
    elif spec.reduction != "mean":
        return target, None
    weight = target != spec.ignore_index
    if token_weight is not None:
        weight = weight * token_weight
    if spec.reduction == "mean":
        total = weight.sum()
        weight = weight * torch.where(total == 0, 0.0, 1 / total.float())
    return target, weight


def reduced(loss: Tensor, weight: Tensor | None, spec: LossSpec) -> Tensor:
    """Losses [T] times their weights, added up unless the reduction is "none"."""
    loss = loss if weight is None else loss * weight
    return loss if spec.reduction == "none" else loss.sum()


def cross_entropy(logits: Tensor, target: Tensor, token_weight: Tensor | None = None, spec: LossSpec = PLAIN) -> Tensor:
    """Cross-entropy of logits [T, V] and target [T], times token_weight [T]: a scalar, or [T] with reduction "none".

    Raises IndexError for a target outside [0, V), ValueError for shapes and devices, TypeError for dtypes. See the head
    of this file.
    """
    check_dtype("cross_entropy", "logits", logits)
    check(
        logits.dim() == 2 and logits.shape[1] > 0,
        lambda: f"cross_entropy: logits {tuple(logits.shape)} must be [T, V]; flatten what comes before V",
    )
    check_target("cross_entropy", "logits", logits, target)
    target, weight = rows_and_weights("cross_entropy", target, token_weight, spec)
    loss, _ = forward(logits, target, *spec.arguments())
    return reduced(loss, weight, spec)
