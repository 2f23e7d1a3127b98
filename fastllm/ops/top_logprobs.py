"""top_logprobs: the n most likely tokens of every row of logits with their log-probabilities at temperature 1.

Order: the larger logit first, the lower index first among equals. The arithmetic is that of `sample` (fp32 exp, weights
in fixed point): a token that both report has the same bits in both. Logits of -inf are not listed: places that are left
over get token -1 and -inf.
Shapes: logits [B, V] fp32 with any row stride; token int64 [B, n], logprob fp32 [B, n].
Errors: LogitsError for rows with a NaN or nothing above -inf. On a GPU nothing waits for the device, so nothing is
raised: such rows have token -1 and NaN.
"""

import math

import torch
from torch import Tensor

from .. import _C
from ._logits import (
    BLOCK,
    LIST,
    OPTIONS,
    any_nan,
    bound_of_best,
    collect,
    finite_top,
    key,
    load_list,
    log_probability,
    mass,
    maxima,
    order,
    sum_ahead,
    value,
)
from ._op import Op, check
from ._triton import tl, triton
from .sample import LogitsError, check_logits

MAX_BEST = 20


def reference(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    token, logprob = _outputs(logits, n)
    token.fill_(-1)
    logprob.fill_(-math.inf)
    no_distribution = logits.isnan().any(1) | ~(logits > -math.inf).any(1)
    if no_distribution.any():
        raise LogitsError(no_distribution.nonzero().flatten().tolist())
    infinite = (logits == math.inf).any(1, keepdim=True)
    wide = torch.where(infinite, torch.where(logits == math.inf, 0.0, -math.inf), logits.double())
    every, order = wide.log_softmax(1), torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :n]
    k = order.shape[1]
    listed = logits.gather(1, order) > -math.inf
    token[:, :k] = torch.where(listed, order, -1)
    logprob[:, :k] = torch.where(listed, every.gather(1, order), -math.inf).to(logits.dtype)
    return token, logprob


def _outputs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], n)
    return (
        torch.empty(shape, dtype=torch.int64, device=logits.device),
        torch.empty(shape, dtype=logits.dtype, device=logits.device),
    )


@triton.jit(do_not_specialize=["vocab", "stride", "best"])
def top_kernel(
    token, logprob, scratch, logits, vocab, stride, best, BLOCK: tl.constexpr, LIST: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """One program a row: maxima; the sum of weights; a list of the logits that reach a bound; ranks on the list."""
    row = tl.program_id(0).to(tl.int64)
    x, words, zero = logits + row * stride, scratch + row * WORDS, tl.zeros_like(vocab)
    lanes = maxima(x, zero, vocab, BLOCK)
    nan, top = any_nan(lanes), tl.max(lanes, 0)
    place = tl.arange(0, LIST)
    token += row * best
    logprob += row * best
    nothing = nan | (top == float("-inf"))
    tl.store(token + place, -1, mask=place < best)
    tl.store(logprob + place, tl.where(nothing, float("nan"), float("-inf")) + 0.0 * place, mask=place < best)
    if nothing == False:  # noqa: E712
        sum = mass(x, zero, vocab, finite_top(top), BLOCK)
        low = order(key(bound_of_best(lanes, best, finite_top(top))), vocab)  # below all that reach the bound
        lo, hi, least = low, order(key(top), zero) + 1, low
        count, searching = zero, vocab > 0
        while searching:  # again only where more logits tie or crowd above the bound than the list holds
            tl.debug_barrier()
            tl.store(words + 2 * LIST, 0)
            tl.debug_barrier()
            for start in range(0, vocab, BLOCK):
                at = start + tl.arange(0, BLOCK)
                v = tl.load(x + at, mask=at < vocab, other=float("-inf"))
                keep = (order(key(v), at) >= least) & (v > float("-inf"))
                collect(v, at, keep, words, words + LIST, words + 2 * LIST, LIST)
            tl.debug_barrier()
            count = tl.load(words + 2 * LIST)
            few, many = (count < best) & (least > low), count > LIST
            lo, hi = tl.where(many, least, lo), tl.where(few, least, hi)
            searching = few | many
            least = tl.where(searching, lo + (hi - lo) // 2, least)
        keys, orders, exist = load_list(words, words + LIST, count, LIST)
        rank = sum_ahead(orders, exist.to(tl.int64))
        listed = exist & (rank < best)
        tl.store(token + rank, -orders & 0xFFFFFF, mask=listed)
        one = tl.full((), 1.0, tl.float32)
        tl.store(logprob + rank, log_probability(value(keys), top, sum, one), mask=listed)


def cpu(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    token, logprob = _outputs(logits, n)
    if token.numel():
        x = logits if logits.stride(1) == 1 else logits.contiguous()
        if _C.top_logprobs(token.data_ptr(), logprob.data_ptr(), x.data_ptr(), *x.shape, x.stride(0), n):
            raise LogitsError(logprob.isnan().any(1).nonzero().flatten().tolist())
    return token, logprob


def gpu(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    token, logprob = _outputs(logits, n)
    if token.numel():
        x = logits if logits.stride(1) == 1 else logits.contiguous()
        words = 2 * LIST + 8
        scratch = torch.empty(x.shape[0], words, dtype=torch.int32, device=x.device)
        top_kernel[(x.shape[0],)](
            token, logprob, scratch, x, x.shape[1], x.stride(0), n, BLOCK=BLOCK, LIST=LIST, WORDS=words, **OPTIONS
        )  # fmt: skip
    return token, logprob


forward = Op(
    "top_logprobs(Tensor logits, int n) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    cpu=cpu,
    triton=gpu,
)


def top_logprobs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n (at most 20) most likely tokens of every row of logits [B, V], best first: token and logprob, [B, n]."""
    check_logits("top_logprobs", logits)
    check(0 <= n <= MAX_BEST, lambda: f"top_logprobs: n is {n}, allowed: 0 to {MAX_BEST}")
    return forward(logits.detach() if logits.requires_grad else logits, n)
