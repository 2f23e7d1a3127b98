"""token_logprobs against torch's linear, log_softmax and gather."""

import torch

from ... import ops
from ...ops.token_logprobs import reference
from ..case import Case, Suite


def plain(x, weight, target, kept=None, temperature=1.0, exact=False):
    if kept is not None:
        return reference(x, weight, target, kept, temperature)
    logits = torch.nn.functional.linear(x, weight)
    logits = logits.float() if logits.dtype.itemsize == 2 else logits
    logp = (logits / temperature).log_softmax(1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def case(
    rows: int, depth: int, vocab: int, *, kept: int = 0, temperature: float = 1.0, strided=False, exact=False
) -> Case:  # fmt: skip
    """kept: of every row some number up to this; the target is then among the kept, nearly always the first."""

    def inputs(make):
        x, weight = make.normal(rows, depth), make.normal(vocab, depth, scale=2 * depth**-0.5)
        if strided:
            x, weight = make.normal(depth, rows + 3).t()[3:], make.normal(2 * vocab, depth + 5)[::2, 5:]
        drawn = {"x": x, "weight": weight, "target": make.integers(0, vocab, rows)}
        if temperature != 1:
            drawn["temperature"] = temperature
        if kept:
            drawn["kept"] = make.integers(1, kept + 1, rows, dtype=torch.int32)
            if make.device != "meta" and rows:
                drawn["target"] = (x.double() @ weight.double().t()).argmax(1)
        return {**drawn, "exact": True} if exact else drawn

    words = [f"kept {kept}"] * (kept > 0) + [f"temperature {temperature:g}"] * (temperature != 1) + ["exact"] * exact
    product = 2 * rows * depth * vocab
    return Case(
        " ".join([f"{rows}x{depth} to {vocab}", *words, *["strided"] * strided]),
        inputs,
        bytes=lambda size: (rows + vocab) * depth * size,
        backward_bytes=lambda size: 2 * (rows + vocab) * depth * size,
        flops=product,
        backward_flops=3 * product,  # the logits again, then both gradients
    )


SUITE = Suite(
    op="token_logprobs",
    run=ops.token_logprobs,
    reference=plain,
    gradients=("x", "weight"),
    rows=("x", "target", "kept"),
    error=3.0,  # sums over K in chains of 128; how torch adds depends on the processor
    gradient_error=3.0,
    correct=(
        *(case(*shape) for shape in ((1, 1, 1), (3, 7, 5), (5, 33, 130), (70, 40, 300), (4, 16, 5003), (0, 8, 9))),
        case(6, 24, 1030, temperature=0.7),
        case(6, 24, 1030, temperature=2.5),
        case(6, 24, 1030, kept=20),
        case(6, 24, 1030, kept=2000, temperature=0.8),
        case(9, 24, 77, kept=3, temperature=1.5),
        case(8, 24, 50, strided=True),
        case(2, 3, 1, exact=True),
        case(70, 24, 1030, exact=True),
        case(6, 24, 77, kept=20, temperature=0.7, exact=True, strided=True),
    ),
    benchmark=(
        case(512, 576, 49152),
        case(512, 576, 49152, kept=50, temperature=0.8),
    ),
    gpu=(
        case(8192, 4096, 128256),
        *(case(2048, 4096, 128256, kept=50, temperature=0.8, exact=exact) for exact in (False, True)),
    ),
)
