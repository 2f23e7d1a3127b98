"""sample against transformers' logits processors and the quickest pipeline of torch ops (top-k first)."""

import torch

from ... import ops
from ...ops.sample import SampleState, reference
from ..case import Case, Suite


def case(
    batch: int, vocab: int, label: str = "", scale: float = 3.0, history: int = 0, view=None, plain: bool = True,
    entropy: bool = True, **fields,
) -> Case:  # fmt: skip
    """entropy: of what is drawn from, beside its log-probability; a decode step leaves it out."""

    def inputs(make):
        logits = make.normal(batch, vocab, scale=scale)
        state = SampleState.create(batch, history=history, device=make.device, **fields)
        state.seed.copy_(make.integers(0, 1 << 40, batch))
        state.history.copy_(make.integers(0, vocab, batch, history, dtype=torch.int32))
        drawn = {"logits": view(logits) if view else logits, "state": state}
        return drawn if entropy else {**drawn, "entropy": False}

    return Case(
        (label or f"{batch}x{vocab}") + " no entropy" * (not entropy),
        inputs,
        bytes=lambda size: batch * vocab * size,
        flops=20 * batch * vocab,
        plain=plain,
    )


def plain(logits, state, entropy=True):
    return reference(logits, state.settings, state.history, state.suppress, state.rows, entropy)


def topk_first(logits, state, entropy=True):
    """One sort of k values instead of one of V; the first record's settings hold for all rows."""
    temperature, k, p = (float(f[0]) for f in (state.temperature, state.top_k, state.top_p))
    values, ids = torch.topk(logits, int(k))
    q = (values / temperature).softmax(-1)
    running = q.cumsum(-1)
    q = q.masked_fill(running - q >= p, 0.0)
    token = ids.gather(-1, torch.multinomial(q, 1))
    return token, logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True)


def transformers_pipeline(logits, state, entropy=True):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, k, p = (float(f[0]) for f in (state.temperature, state.top_k, state.top_p))
    x = logits
    for processor in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(int(k)), TopPLogitsWarper(p)):
        x = processor(None, x)
    token = torch.multinomial(x.softmax(-1), 1)
    return token, logits.log_softmax(-1).gather(-1, token)


PENALTIES = {
    "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "prompt_len": 5, "history_len": 12,
}  # fmt: skip
USUAL = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}

SUITE = Suite(
    op="sample",
    run=ops.sample,
    reference=plain,
    rows=("logits", "state"),
    dtypes=(torch.float32,),
    correct=(
        case(1, 1),
        case(3, 7),
        case(2, 255, "all off"),
        case(2, 257, "greedy", temperature=0.0),
        case(3, 1000, "temperature", temperature=0.7),
        case(5, 1000, "usual", **USUAL),
        case(5, 33000, "usual, two threads", **USUAL),
        case(1, 33000, "one row", **USUAL),
        case(1, 33000, "one row, flat, off", scale=0.0),
        case(3, 50257, "nucleus", top_p=0.9, temperature=1.1),
        case(3, 50257, "min_p", min_p=0.05, temperature=1.5),
        case(2, 20001, "large k", top_k=15000),
        case(3, 40001, "penalties", history=16, **PENALTIES),
        case(3, 400, "penalties, usual", history=16, **PENALTIES, **USUAL),
        case(2, 512, "flat", scale=0.0, top_k=100, top_p=0.5),
        case(4, 300, "columns of a wider tensor", view=lambda t: t[:, 7:206], **USUAL),
        case(1, 300, "every second logit", view=lambda t: t[:, ::2], **USUAL),
        case(3, 1000, entropy=False, **USUAL),
        case(0, 8),
    ),
    benchmark=(
        *(case(b, v, **USUAL) for v in (32000, 50257, 128256) for b in (1, 16)),
        case(16, 50257, "16x50257 penalties", history=16, **PENALTIES, **USUAL),
    ),
    gpu=tuple(
        case(b, v, plain=False, entropy=entropy, **USUAL)  # the reference goes row by row
        for entropy, v, rows in (
            (False, 32000, (1, 64, 256)), (False, 128256, (1, 8, 64, 256)), (False, 151936, (1, 64, 256)),
            (True, 128256, (1, 64, 256)),
        )
        for b in rows
    ),
    peers={"torch top-k first": topk_first, "transformers": transformers_pipeline},
)  # fmt: skip
