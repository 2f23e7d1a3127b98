"""cross_entropy against torch.nn.functional.cross_entropy."""

import torch

from ... import ops
from ...ops import LossSpec
from ..case import Case, Suite

F = torch.nn.functional


def plain(logits, target, token_weight=None, spec=None):
    spec = spec or LossSpec()
    y = logits.float() if logits.dtype.itemsize == 2 else logits
    if spec.softcap:
        y = spec.softcap * torch.tanh(y / spec.softcap)
    options = {"ignore_index": spec.ignore_index, "label_smoothing": spec.label_smoothing}
    if token_weight is None and not spec.z_loss:
        return F.cross_entropy(y, target, reduction=spec.reduction, **options)
    loss, counts = F.cross_entropy(y, target, reduction="none", **options), target != spec.ignore_index
    if spec.z_loss:
        loss = loss + torch.where(counts, spec.z_loss * y.logsumexp(1).square(), 0.0)
    weight = counts * (1 if token_weight is None else token_weight)
    loss = torch.where(weight == 0, 0.0, loss * weight)
    if spec.reduction == "none":
        return loss
    return loss.sum() / (weight.sum() if spec.reduction == "mean" else 1)


def targets(make, vocab: int, rows: int, ignored: bool, index: int = -100) -> torch.Tensor:
    """Random; every third ignored where asked for, but never the first."""
    target = make.integers(0, vocab, rows)
    if ignored and make.device != "meta":
        target[2::3] = index
    return target


def case(
    rows: int, vocab: int, *, scale: float = 3.0, ignored: bool = False, weighted: bool = False, view=None,
    label: str = "", **fields,
) -> Case:  # fmt: skip
    """logits [rows, vocab]; view: a function that makes them from a larger tensor [rows + 8, 2 vocab + 8]."""

    def inputs(make):
        logits = make.normal(rows, vocab, scale=scale) if view is None else view(make.normal(rows + 8, 2 * vocab + 8))
        drawn = {"logits": logits, "target": targets(make, logits.shape[1], logits.shape[0], ignored)}
        if weighted:
            weight = make.normal(logits.shape[0], dtype=torch.float32).abs()
            drawn["token_weight"] = weight * (weight > 0.3)
        return {**drawn, "spec": LossSpec(**fields)} if fields else drawn

    words = [f"{k} {v}" for k, v in fields.items()] + ["ignored"] * ignored + ["weighted"] * weighted
    words += [f"scale {scale:g}"] * (scale != 3)
    return Case(
        label or " ".join([f"{rows}x{vocab}", *words]),
        inputs,
        bytes=lambda size: rows * (vocab * size + 20),
        backward_bytes=lambda size: rows * (2 * vocab * size + 20),
        flops=18 * rows * vocab,
        backward_flops=18 * rows * vocab,
    )


EVERY = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2}
SUITE = Suite(
    op="cross_entropy",
    run=ops.cross_entropy,
    reference=plain,
    gradients=("logits",),
    rows=("logits", "target", "token_weight"),
    correct=(
        *(
            case(rows, vocab, reduction="none")
            for rows, vocab in ((1, 1), (3, 7), (2, 16), (5, 1023), (4, 1025), (6, 5003), (0, 9))
        ),
        *(case(7, 1100, ignored=True, weighted=True, reduction=r) for r in ("none", "mean", "sum")),
        case(5, 300),
        case(5, 300, ignored=True),
        case(9, 40, ignored=True, reduction="sum"),
        case(6, 2100, scale=0.0, reduction="none"),
        case(6, 2100, scale=100.0, reduction="none"),
        *(case(6, 2100, ignored=True, reduction="none", **{name: value}) for name, value in EVERY.items()),
        case(6, 2100, ignored=True, reduction="none", **EVERY),
        case(6, 130, ignored=True, weighted=True, **EVERY),
        case(6, 130, label_smoothing=1.0),
        case(40, 33001, reduction="none"),  # 4 MB: stores past the cache
        case(40, 33001, softcap=20.0),
        *(
            case(4, 150, view=view, label=label, reduction="none")
            for label, view in (
                ("columns of a wider tensor", lambda t: t[:, 5:200]),
                ("every second row", lambda t: t[::2]),
                ("transposed", lambda t: t.t()),
                ("broadcast row", lambda t: t[:1].expand(5, -1)),
            )
        ),
    ),
    benchmark=(case(2048, 50257), case(256, 50257), case(2048, 50257, ignored=True, **EVERY)),
    gpu=(case(8192, 128256), case(8192, 128256, ignored=True, **EVERY)),
)
