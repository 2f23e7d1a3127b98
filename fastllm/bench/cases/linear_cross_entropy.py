"""linear_cross_entropy against torch's linear and cross_entropy, on the whole and on chunks of rows."""

import torch

from ... import ops
from ...ops import LossSpec
from ..case import Case, Suite
from . import cross_entropy as on_logits


def plain(x, weight, target, bias=None, token_weight=None, spec=None, exact=False):
    logits = torch.nn.functional.linear(x, weight, bias)
    return on_logits.plain(logits, target, token_weight, spec)


def chunked(x, weight, target, spec=None, exact=False, chunk: int = 512):
    """What a careful user writes: chunks of rows under activation checkpointing. The mean of all targets, or each one's."""
    from torch.utils.checkpoint import checkpoint

    def part(rows, wanted):
        return torch.nn.functional.cross_entropy((rows @ weight.t()).float(), wanted, reduction="none")

    parts = zip(x.split(chunk), target.split(chunk), strict=True)
    losses = torch.cat([checkpoint(part, *p, use_reentrant=False) for p in parts])
    return losses if spec is not None and spec.reduction == "none" else losses.mean()


def case(
    rows: int, depth: int, vocab: int, *, bias=False, frozen=False, ignored=False, weighted=False, strided=False,
    exact=False, **fields,
) -> Case:  # fmt: skip
    """x [rows, depth], weight [vocab, depth]; frozen: the weight gets no gradient, and goes in as a constant."""

    def inputs(make):
        x, weight = make.normal(rows, depth), make.normal(vocab, depth, scale=2 * depth**-0.5)
        if strided:
            x, weight = make.normal(depth, rows + 3).t()[3:], make.normal(2 * vocab, depth + 5)[::2, 5:]
        drawn = {"x": x, "weight": weight, "target": on_logits.targets(make, vocab, rows, ignored)}
        if frozen:
            drawn["frozen"] = drawn.pop("weight")
        if bias:
            drawn["bias"] = make.normal(vocab)
        if weighted:
            weight = make.normal(rows, dtype=torch.float32).abs()
            drawn["token_weight"] = weight * (weight > 0.3)
        drawn |= {"exact": True} if exact else {}
        return {**drawn, "spec": LossSpec(**fields)} if fields else drawn

    given = {"+bias": bias, "frozen": frozen, "ignored": ignored, "weighted": weighted, "strided": strided}
    given["exact"] = exact
    words = [word for word, is_given in given.items() if is_given] + [f"{k} {v}" for k, v in fields.items()]
    product = 2 * rows * depth * vocab
    return Case(
        " ".join([f"{rows}x{depth} to {vocab}", *words]),
        inputs,
        bytes=lambda size: (rows + vocab) * depth * size,
        backward_bytes=lambda size: (rows + vocab * (not frozen)) * depth * size,
        flops=product,
        backward_flops=product * (1 if frozen else 2),
    )


def with_frozen(function):
    def call(x, target, weight=None, frozen=None, **rest):
        return function(x, weight if frozen is None else frozen.detach(), target, **rest)

    return call


EVERY = on_logits.EVERY
SUITE = Suite(
    op="linear_cross_entropy",
    run=with_frozen(ops.linear_cross_entropy),
    reference=with_frozen(plain),
    gradients=("x", "weight", "bias"),
    rows=("x", "target", "token_weight"),
    error=3.0,  # sums over K in chains of 128; how torch adds depends on the processor
    gradient_error=3.0,
    correct=(
        *(case(*shape) for shape in ((1, 1, 1), (3, 7, 5), (5, 33, 130), (70, 40, 300))),
        *(
            case(9, 48, 1030, ignored=True, weighted=weighted, reduction=reduction)
            for reduction in ("none", "mean", "sum")
            for weighted in (False, True)
        ),
        case(13, 20, 77, bias=True),
        case(13, 20, 77, bias=True, ignored=True, reduction="none", **EVERY),
        case(13, 20, 77, bias=True, ignored=True, weighted=True, **EVERY),
        case(6, 20, 77, frozen=True),
        case(6, 20, 77, frozen=True, bias=True, reduction="none"),
        case(8, 24, 50, strided=True),
        case(70, 24, 50, bias=True, exact=True),
        case(9, 20, 77, exact=True, ignored=True, reduction="none", **EVERY),
        case(0, 8, 9, reduction="sum"),
        case(0, 8, 9, bias=True, reduction="none"),
    ),
    benchmark=(
        case(2048, 768, 50257),
        case(256, 576, 49152),
        case(256, 576, 49152, frozen=True),
        case(256, 576, 49152, reduction="none"),
    ),
    gpu=(
        case(8192, 2048, 32000),
        case(8192, 4096, 128256),
        case(8192, 4096, 128256, frozen=True),
        case(8192, 4096, 128256, exact=True),
    ),
    peers={"chunked": with_frozen(chunked)},
)
