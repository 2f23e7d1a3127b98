"""target_logprobs against log_softmax and gather."""

import torch

from ... import ops
from ...ops.target_logprobs import reference
from ..case import Case, Suite


def case(batch: int, vocab: int, scale: float = 3.0) -> Case:
    return Case(
        f"{batch}x{vocab}" + (f" scale {scale:g}" if scale != 3 else ""),
        lambda make: {"logits": make.normal(batch, vocab, scale=scale), "target": make.integers(0, vocab, batch)},
        bytes=lambda size: batch * (vocab * size + 12),
        flops=18 * batch * vocab,
    )


def strided(label: str, view) -> Case:
    def inputs(make):
        logits = view(make.normal(40, 700, scale=3.0))
        return {"logits": logits, "target": make.integers(0, logits.shape[1], logits.shape[0])}

    return Case(label, inputs)


def plain(logits, target):
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


SUITE = Suite(
    op="target_logprobs",
    run=ops.target_logprobs,
    reference=reference,
    rows=("logits", "target"),
    dtypes=(torch.float32,),
    correct=(
        *(case(*shape) for shape in ((1, 1), (3, 7), (2, 256), (2, 257), (5, 33001), (4, 50257), (70, 300), (0, 9))),
        case(2, 600, scale=0.0),
        case(3, 600, scale=60.0),
        strided("columns of a wider tensor", lambda t: t[:, 5:600]),
        strided("every second row", lambda t: t[::2]),
        strided("transposed", lambda t: t.t()[:60]),
        strided("broadcast row", lambda t: t[:1].expand(5, -1)),
    ),
    benchmark=(case(1, 49152), case(512, 49152), case(64, 128256)),
    gpu=(case(64, 128256), case(8192, 128256)),
    peers={"torch fp32": plain},
)
