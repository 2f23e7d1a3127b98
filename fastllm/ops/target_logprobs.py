"""target_logprobs: the log-probability of one given token in every row of logits, at temperature 1.

The arithmetic is that of `sample` (fp32 exp, weights in fixed point): scoring a text reports the bits that decoding it
would have reported, whatever the batch.
Shapes: logits [B, V] fp32 with any row stride; target int64 [B]; result fp32 [B].
Errors: IndexError for a target outside [0, V); LogitsError for rows with a NaN or nothing above -inf. On a GPU nothing
waits for the device, so nothing is raised: such rows are NaN.
"""

import torch
from torch import Tensor

from .. import _C
from ._logits import BLOCK, OPTIONS, any_nan, finite_top, log_probability, mass, maxima
from ._op import Op, as_rows, check, check_dtype
from ._triton import tl, triton
from .sample import LogitsError, check_logits


def reference(logits: Tensor, target: Tensor) -> Tensor:
    return logits.double().log_softmax(1).gather(1, target[:, None])[:, 0].to(logits.dtype)


@triton.jit(do_not_specialize=["vocab", "stride"])
def target_kernel(logprob, logits, target, vocab, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    lanes = maxima(x, tl.zeros_like(vocab), vocab, BLOCK)
    nan, top = any_nan(lanes), tl.max(lanes, 0)
    at = tl.load(target + row)
    inside = (at >= 0) & (at < vocab)
    if nan | (top == float("-inf")) | (inside == False):  # noqa: E712
        tl.store(logprob + row, float("nan"))
    else:
        sum = mass(x, tl.zeros_like(vocab), vocab, finite_top(top), BLOCK)
        tl.store(logprob + row, log_probability(tl.load(x + at), top, sum, tl.full((), 1.0, tl.float32)))


def cpu(logits: Tensor, target: Tensor) -> Tensor:
    logprob = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        x, target = as_rows(logits), target.contiguous()
        if _C.target_logprobs(logprob.data_ptr(), x.data_ptr(), target.data_ptr(), *x.shape, x.stride(0)):
            outside = (target < 0) | (target >= x.shape[1])
            if outside.any():
                row = int(outside.nonzero()[0])
                raise IndexError(
                    f"target_logprobs: target {int(target[row])} of row {row} is outside [0, {x.shape[1]})"
                )
            raise LogitsError(logprob.isnan().nonzero().flatten().tolist())
    return logprob


def gpu(logits: Tensor, target: Tensor) -> Tensor:
    logprob = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        x = as_rows(logits)
        target_kernel[(x.shape[0],)](
            logprob, x, target.contiguous(), x.shape[1], x.stride(0), BLOCK=BLOCK, **OPTIONS
        )  # fmt: skip
    return logprob


forward = Op(
    "target_logprobs(Tensor logits, Tensor target) -> Tensor",
    reference=reference,
    fake=lambda logits, target: torch.empty(logits.shape[0], dtype=logits.dtype, device=logits.device),
    cpu=cpu,
    triton=gpu,
)


def target_logprobs(logits: Tensor, target: Tensor) -> Tensor:
    """log p(target[b]) under row b of logits [B, V]: float32 [B]. See the head of this file."""
    check_logits("target_logprobs", logits)
    check_dtype("target_logprobs", "target", target, (torch.int64,))
    check(
        target.shape == logits.shape[:1],
        lambda: (
            f"target_logprobs: target {tuple(target.shape)} must be [{logits.shape[0]}], one for each row of logits"
        ),
    )
    return forward(logits, target)
