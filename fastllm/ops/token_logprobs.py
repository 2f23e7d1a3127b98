"""token_logprobs: log p(target) and the entropy of the distribution that a token was drawn from, with their gradient, for
logits x W^T that never lie in memory as a whole.

Let the logits of a row be l [V], K its kept tokens, and p = softmax of l / temperature on K, 0 elsewhere. Then

    logprob = log p(target)           dl_j = ([j = target] - p_j) dlogprob / temperature
    entropy = -sum p log p            dl_j = -p_j (log p_j + entropy) dentropy / temperature,       both for j in K

The kept set is named by its size alone: it is the first kept[t] tokens in the sampler's order, larger logit first and
the lower index first among equals, which is what top-k, top-p, min-p and any mixture of them keep. So the `kept` that
`ops.sample` returned is all that a trainer stores of a truncated draw. It is a constant here, as the sampler's choice.
kept=None is all of V, and so is any kept >= V. A target outside the kept set has logprob -inf.

Shapes: x [T, H], weight [V, H], target int64 [T], kept int32 [T]; logprob and entropy [T], nats, float32.
Dtypes: float32, bfloat16, float16, one for x and weight.
Arithmetic, on a CPU: the logits of `ops.linear` and the fixed-point softmax of `ops.sample`, so that the bits are those
that the sampler reports: at temperature 1 without kept its logprob and entropy (and `ops.target_logprobs`), with its
temperature and kept its truncated_logprob. Penalties change the sampler's logits and are not known here.
On a GPU: logits and sums in fp32, the gradient of a block's logits rounded to the inputs' dtype for its products. exact=True
holds the contract there: the logits of `exact_logits` and the fixed-point sums of `ops.sample`, so that the bits are again
those that the sampler reports, of a `Decoder` that is exact.
Errors: IndexError for a target outside [0, V) or a kept below 1; LogitsError for rows with a NaN or nothing above -inf; on
a GPU, where asking would stall the stream, NaN for both, and for rows that hold +inf.
"""

import math

import torch
from torch import Tensor

from .. import _C
from ._head import check_head, outputs, over_blocks
from ._logits import (
    OPTIONS,
    any_nan,
    exponent,
    exponential,
    finite_top,
    fixed,
    log_probability,
    log_weight,
    maxima,
    total,
)
from ._op import Op, check, check_dtype, pointer
from ._triton import tl, triton
from .cross_entropy import check_target
from .sample import MAX_VOCAB, LogitsError

_INDEX_OUT_OF_RANGE = 1  # csrc/common.h: Status

# ---------------------------------------------------------------------------------------------------------- reference


def reference(x, weight, target, kept, temperature, exact=False) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (x.to(wide) @ weight.to(wide).t()) / temperature
    if kept is not None:
        place = y.detach().sort(dim=1, descending=True, stable=True).indices.argsort(1)
        y = y.masked_fill(place >= kept[:, None], -math.inf)
    logp = y.log_softmax(1)
    finite = torch.where(logp > -math.inf, logp, 0.0)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * finite).sum(1)


def reference_backward(dlogprob, dentropy, x, weight, target, kept, temperature, exact, needs) -> tuple[Tensor, Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, weight)]
    with torch.enable_grad():
        found = reference(*inputs, target, kept, temperature)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        given = iter(torch.autograd.grad(found, wanted, (dlogprob, dentropy)) if wanted else ())
    return tuple(next(given) if need else x.new_empty(0) for need in needs)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def ordered(y):
    """A float as an integer of the same order; both zeros are 0."""
    bits = y.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def count_from(x, vocab, bound, BLOCK: tl.constexpr):
    """How many logits of the row reach the bound, an ordered value."""
    count = 0
    for begin in range(0, vocab, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        y = tl.load(x + col, mask=col < vocab, other=0.0).to(tl.float32)
        count += tl.sum(((ordered(y) >= bound) & (col < vocab)).to(tl.int32), 0)
    return count


@triton.jit
def cut_kernel(cut, logits, kept, vocab, stride, BLOCK: tl.constexpr):
    # cut[row] = (the smallest kept logit, as an ordered value; how many that equal it are kept). Halving between -inf and
    # +inf: 33 reads of a row, which lies in cache after the first.
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    wanted = tl.minimum(tl.load(kept + row), vocab)
    low = tl.full((), -0x7F800000, tl.int64)  # at least `wanted` reach low, fewer reach high
    high = tl.full((), 0x7F800001, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = count_from(x, vocab, middle, BLOCK) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tl.store(cut + 2 * row, low.to(tl.int32))
    tl.store(cut + 2 * row + 1, wanted - count_from(x, vocab, low + 1, BLOCK))


@triton.jit
def kept_logits(x, col, vocab, value, ties, seen, KEPT: tl.constexpr):
    """(logits, -inf where not kept; which are kept; how many equal to the cut were seen so far)"""
    inside = col < vocab
    y = tl.load(x + col, mask=inside, other=-float("inf")).to(tl.float32)
    keep = inside
    if KEPT:
        rank = ordered(y)
        equal = ((rank == value) & inside).to(tl.int32)
        keep = inside & ((rank > value) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= ties)))
        seen += tl.sum(equal, 0)
        y = tl.where(keep | (y != y), y, -float("inf"))  # a NaN stays: it spoils its row
    return y, keep, seen


@triton.jit
def read_row(x, vocab, target, inverse, value, ties, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """With z = (y - largest) / temperature over the kept logits y: largest, sum of e^z, sum of z e^z, whether the target is
    kept; in one read."""
    largest = -float("inf")
    total, moment = 0.0, 0.0
    seen, hit = 0, 0
    for begin in range(0, vocab, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        y, keep, seen = kept_logits(x, col, vocab, value, ties, seen, KEPT)
        hit += tl.sum(((col == target) & keep).to(tl.int32), 0)
        highest = tl.maximum(largest, tl.max(y, 0))
        offset = tl.where(highest > -float("inf"), highest, 0.0)
        z = (y - offset) * inverse
        e = tl.exp(z)
        fall = tl.where(largest > -float("inf"), (largest - offset) * inverse, 0.0)
        shrink = tl.exp(fall)
        moment = shrink * (moment + fall * total) + tl.sum(tl.where(e == 0.0, 0.0, z * e), 0)
        total = total * shrink + tl.sum(e, 0)
        largest = highest
    return largest, total, moment, hit


@triton.jit
def forward_kernel(
    logprob, entropy, stats, logits, target, cut, vocab, stride, inverse, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x, t = logits + row * stride, tl.load(target + row)
    value, ties = 0, 0
    if KEPT:
        value, ties = tl.load(cut + 2 * row), tl.load(cut + 2 * row + 1)
    largest, total, moment, hit = read_row(x, vocab, t, inverse, value, ties, KEPT, BLOCK)
    inside = (t >= 0) & (t < vocab)
    defined = (total >= 1.0) & (total < float("inf")) & inside
    log_sum = tl.where(defined, tl.log(total), float("nan"))
    y = tl.load(x + t, mask=inside, other=0.0).to(tl.float32)
    found = tl.where(hit > 0, (y - largest) * inverse, -float("inf")) - log_sum
    tl.store(logprob + row, found)
    tl.store(entropy + row, log_sum - moment / total)
    tl.store(stats + 2 * row, largest)
    tl.store(stats + 2 * row + 1, log_sum)


@triton.jit
def exact_kernel(
    logprob, entropy, stats, logits, target, cut, vocab, stride, temperature, scale,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The same as forward_kernel in the arithmetic of `sample`, in two reads: weights are integers once the maximum is known.
    row = tl.program_id(0).to(tl.int64)
    x, t = logits + row * stride, tl.load(target + row)
    lanes = maxima(x, 0, vocab, BLOCK)
    most = tl.max(lanes, 0)
    if any_nan(lanes) | (most < -3.4028234663852886e38) | (t < 0) | (t >= vocab):
        tl.store(logprob + row, float("nan"))
        tl.store(entropy + row, float("nan"))
        tl.store(stats + 2 * row, float("nan"))
        tl.store(stats + 2 * row + 1, float("nan"))
    else:
        value, ties, seen, hit = 0, 0, 0, 0
        if KEPT:
            value, ties = tl.load(cut + 2 * row), tl.load(cut + 2 * row + 1)
        top, none = finite_top(most), tl.zeros([BLOCK], tl.int32)
        sum, moment = tl.zeros_like(row), tl.zeros_like(row)
        for first in range(0, vocab, 1 << 21):  # lanes of 32 bits hold the sum of as many
            last = tl.minimum(first + (1 << 21), vocab)
            high, low, moment_high, moment_low = none, none, none, none
            for begin in range(first, last, BLOCK):
                col = begin + tl.arange(0, BLOCK)
                y, keep, seen = kept_logits(x, col, last, value, ties, seen, KEPT)
                hit += tl.sum(((col == t) & keep).to(tl.int32), 0)
                z = exponent(y, top, scale)
                e = exponential(z)
                a, b = fixed(e)
                high += a
                low += b
                a, b = fixed(e * (0.0 - z))
                moment_high += a
                moment_low += b
            sum += total(high, low)
            moment += total(moment_high, moment_low)
        some = tl.maximum(sum, 1)  # 0: kept is below 1
        log_sum = tl.where(sum > 0, log_weight(some), float("nan"))
        heat = tl.full((), 1.0, tl.float32) * temperature
        found = tl.where(hit > 0, log_probability(tl.load(x + t), most, some, heat), -float("inf"))
        tl.store(logprob + row, tl.where(sum > 0, found, float("nan")))
        tl.store(entropy + row, (log_sum + moment.to(tl.float64) / some.to(tl.float64)).to(tl.float32))
        tl.store(stats + 2 * row, top)
        tl.store(stats + 2 * row + 1, log_sum.to(tl.float32))


@triton.jit
def backward_kernel(
    logits, dlogprob, dentropy, entropy, stats, target, cut, vocab, stride, inverse,
    KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The gradient overwrites the logits. One program walks the row: ties count from its beginning.
    row = tl.program_id(0).to(tl.int64)
    x, t = logits + row * stride, tl.load(target + row)
    value, ties, seen = 0, 0, 0
    if KEPT:
        value, ties = tl.load(cut + 2 * row), tl.load(cut + 2 * row + 1)
    g, h, spread = tl.load(dlogprob + row), tl.load(dentropy + row), tl.load(entropy + row)
    largest, log_sum = tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1)
    for begin in range(0, vocab, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        y, keep, seen = kept_logits(x, col, vocab, value, ties, seen, KEPT)
        logp = (y - largest) * inverse - log_sum
        p = tl.exp(logp)
        d = tl.where(p == 0.0, 0.0, -p * (g + h * (logp + spread)))
        d = tl.where((col == t) & keep, d + g, d) * inverse
        tl.store(x + col, d.to(logits.dtype.element_ty), mask=col < vocab)


BLOCK = 4096  # logits that a program holds: 16 a thread of 8 warps
LARGEST = torch.finfo(torch.float32).max

# ----------------------------------------------------------------------------------------------------------- launchers


def _raise_for(status: int, logprob: Tensor, target: Tensor, kept: Tensor | None, vocab: int) -> None:
    bad = logprob.isnan().nonzero().flatten().tolist()
    if status != _INDEX_OUT_OF_RANGE:
        raise LogitsError(bad, "token_logprobs")
    for row in bad:
        if not 0 <= target[row] < vocab:
            raise IndexError(f"token_logprobs: target {int(target[row])} of row {row} is outside [0, {vocab})")
        if kept is not None and kept[row] < 1:
            raise IndexError(f"token_logprobs: kept is {int(kept[row])} in row {row}; every draw keeps a token or more")


def _rows_cpu(x, weight, target, kept, temperature, exact, upstream=(None, None), needs=(False, False)):
    logprob, entropy = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    target, kept = target.contiguous(), None if kept is None else kept.contiguous()
    dlogprob, dentropy = (None if u is None else u.float().contiguous() for u in upstream)

    def step(block: slice, logits: Tensor) -> None:
        def at(t: Tensor | None) -> int:
            return 0 if t is None else pointer(t[block])

        status = _C.token_logprobs(
            at(logprob), at(entropy), logits.data_ptr(), at(target), at(kept), at(dlogprob), at(dentropy),
            *logits.shape, logits.stride(0), temperature,
        )  # fmt: skip
        if status:
            logprob[block.stop :] = 0  # rows that no kernel saw yet
            _raise_for(status, logprob, target, kept, weight.shape[0])

    return (logprob, entropy), over_blocks(x, weight, None, [*needs, False], step, cpu=True)[:2]


def _rows_gpu(x, weight, target, kept, temperature, exact, upstream=(None, None), needs=(False, False)):
    logprob, entropy = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    target, inverse, vocab = target.contiguous(), 1 / temperature, weight.shape[0]
    kept = None if kept is None else kept.contiguous()
    dlogprob, dentropy = (None if u is None else u.contiguous() for u in upstream)
    options = {"KEPT": kept is not None, "BLOCK": BLOCK}

    def step(block: slice, logits: Tensor) -> None:
        rows, stride, cut = (logits.shape[0],), logits.stride(0), None
        stats = torch.empty((*rows, 2), dtype=torch.float32, device=x.device)
        if kept is not None:
            cut = torch.empty((*rows, 2), dtype=torch.int32, device=x.device)
            cut_kernel[rows](cut, logits, kept[block], vocab, stride, BLOCK=BLOCK, num_warps=8)
        outputs = logprob[block], entropy[block], stats
        if exact:
            numbers = temperature, min(float(1 / torch.tensor(temperature, dtype=torch.float32, device="cpu")), LARGEST)
            exact_kernel[rows](*outputs, logits, target[block], cut, vocab, stride, *numbers, **options, **OPTIONS)
        else:
            forward_kernel[rows](*outputs, logits, target[block], cut, vocab, stride, inverse, **options, num_warps=8)
        if dlogprob is not None:
            backward_kernel[rows](
                logits, dlogprob[block], dentropy[block], entropy[block], stats, target[block], cut,
                vocab, stride, inverse, **options, num_warps=8,
            )  # fmt: skip

    gradients = over_blocks(x, weight, None, [*needs, False], step, cpu=False, wide=True, exact=exact)
    return (logprob, entropy), gradients[:2]


def cpu(*inputs) -> tuple[Tensor, Tensor]:
    return _rows_cpu(*inputs)[0]


def gpu(*inputs) -> tuple[Tensor, Tensor]:
    return _rows_gpu(*inputs)[0]


def cpu_backward(dlogprob, dentropy, *inputs) -> tuple[Tensor, Tensor]:
    return _rows_cpu(*inputs[:-1], (dlogprob, dentropy), inputs[-1])[1]


def gpu_backward(dlogprob, dentropy, *inputs) -> tuple[Tensor, Tensor]:
    return _rows_gpu(*inputs[:-1], (dlogprob, dentropy), inputs[-1])[1]


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    x, weight, target, kept, *ctx.spec = inputs
    ctx.save_for_backward(x, weight, target, kept)


def _backward(ctx, dlogprob, dentropy):
    needs = list(ctx.needs_input_grad[:2])
    found = backward(dlogprob, dentropy, *ctx.saved_tensors, *ctx.spec, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None, None


forward = Op(
    "token_logprobs(Tensor x, Tensor weight, Tensor target, Tensor? kept, float temperature, bool exact)"
    " -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda x, *rest: tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)),
    cpu=cpu,
    triton=gpu,
    triton_name="cuBLAS, Triton",
    triton_reason="the products with the weight by torch, what stands around them in Triton",
    save=_save,
    backward=_backward,
)
backward = Op(
    "token_logprobs_backward(Tensor dlogprob, Tensor dentropy, Tensor x, Tensor weight, Tensor target, Tensor? kept, "
    "float temperature, bool exact, bool[2] needs) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dlogprob, dentropy, x, weight, target, kept, temperature, exact, needs: outputs(
        x, weight, None, [*needs, False]
    )[:2],
    cpu=cpu_backward,
    triton=gpu_backward,
)


def token_logprobs(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    kept: Tensor | None = None,
    temperature: float = 1.0,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logprob [T], entropy [T]) of target [T] under softmax(x weight^T / temperature) on the first kept [T] tokens.

    exact: hold the contract on a GPU too; on a CPU it always is.
    Raises IndexError for a target or a kept out of range, LogitsError for rows without a distribution, ValueError for
    shapes, devices and the temperature, TypeError for dtypes. See the head of this file.
    """
    check_head("token_logprobs", x, weight)
    check_target("token_logprobs", "x", x, target)
    if kept is not None:
        check_dtype("token_logprobs", "kept", kept, (torch.int32,))
        check(
            kept.shape == target.shape and kept.device == x.device,
            lambda: (
                f"token_logprobs: kept {tuple(kept.shape)} on {kept.device} must be like target, {tuple(target.shape)}"
            ),
        )
    check(weight.shape[0] <= MAX_VOCAB, lambda: f"token_logprobs: V is {weight.shape[0]}, allowed: up to {MAX_VOCAB}")
    check(
        0 < temperature < math.inf,
        lambda: (
            f"token_logprobs: temperature is {temperature}, allowed: a positive number; a greedy choice has no gradient"
        ),
    )
    return forward(x, weight, target, kept, float(temperature), exact)
