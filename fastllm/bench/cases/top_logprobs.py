"""top_logprobs against log_softmax and topk."""

import torch

from ... import ops
from ...ops.top_logprobs import reference
from ..case import Case, Suite


def case(batch: int, vocab: int, n: int, scale: float = 3.0) -> Case:
    return Case(
        f"{batch}x{vocab} n={n}",
        lambda make: {"logits": make.normal(batch, vocab, scale=scale), "n": n},
        bytes=lambda size: batch * vocab * size,
        flops=18 * batch * vocab,
    )


def plain(logits, n):
    logprob, token = logits.log_softmax(-1).topk(n)
    return token, logprob


SUITE = Suite(
    op="top_logprobs",
    run=ops.top_logprobs,
    reference=reference,
    rows=("logits",),
    dtypes=(torch.float32,),
    correct=(
        *(case(*shape) for shape in ((1, 1, 1), (3, 7, 20), (2, 300, 20), (5, 33001, 5), (4, 50257, 20), (0, 9, 3))),
        case(2, 600, 20, scale=0.0),
    ),
    benchmark=(case(1, 50257, 5), case(1, 128256, 20), case(16, 50257, 5)),
    peers={"torch": plain},
)
