"""top_logprobs: the n most likely tokens of every row of logits with their log-probabilities at temperature 1.

Order: the larger logit first, the lower index first among equals. The arithmetic is that of `sample` (fp32 exp, weights
in fixed point): a token that both report has the same bits in both. Logits of -inf are not listed: places that are left
over get token -1 and -inf.
Shapes: logits [B, V] fp32 with any row stride; token int64 [B, n], logprob fp32 [B, n].
Errors: LogitsError for rows with a NaN or nothing above -inf.
"""

import math

import torch
from torch import Tensor

from .. import _C
from ._op import Op, check
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


def cpu(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    token, logprob = _outputs(logits, n)
    if token.numel():
        x = logits if logits.stride(1) == 1 else logits.contiguous()
        if _C.top_logprobs(token.data_ptr(), logprob.data_ptr(), x.data_ptr(), *x.shape, x.stride(0), n):
            raise LogitsError(logprob.isnan().any(1).nonzero().flatten().tolist())
    return token, logprob


forward = Op(
    "top_logprobs(Tensor logits, int n) -> (Tensor, Tensor)",
    reference=reference,
    fake=_outputs,
    cpu=cpu,
)


def top_logprobs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n (at most 20) most likely tokens of every row of logits [B, V], best first: token and logprob, [B, n]."""
    check_logits("top_logprobs", logits)
    check(0 <= n <= MAX_BEST, lambda: f"top_logprobs: n is {n}, allowed: 0 to {MAX_BEST}")
    return forward(logits.detach() if logits.requires_grad else logits, n)
