"""lora_linear against plain torch: the frozen linear, a dropout and two linears; and against the frozen linear alone."""

import torch

from ... import ops
from ...ops import Dropout, LoraSpec, Panels, QWeight
from ...ops._dropout import keep
from ..case import Case, Suite
from .quant_linear import FORMATS, GROUPED, random_weight
from .quant_linear import plain as quant_linear

functional = torch.nn.functional


def run(x, a, b, weight=None, packed=None, frozen=None, scale=1.0, dropout=None, exact=False, **more):
    return ops.lora_linear(x, weight if packed is None else packed, a, b, LoraSpec(scale, dropout, exact), **more)


def plain(
    x, a, b, weight=None, packed=None, frozen=None, scale=1.0, bias=None, magnitude=None, dropout=None, exact=False
):  # fmt: skip
    """packed: the weight as Panels or QWeight; frozen: as a tensor."""
    weight = frozen if weight is None else weight
    base = quant_linear(packed, x) if isinstance(packed, QWeight) else functional.linear(x, weight)
    y = base + scale * functional.linear(functional.linear(drop(x, dropout), a), b)
    if magnitude is not None:
        y = y * (magnitude / (weight + scale * b @ a).norm(dim=1).detach())
    return y if bias is None else y + bias


def drop(x, spec):
    if spec is None or not spec.p:
        return x
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    kept = keep(rows, torch.arange(x.shape[-1], device=x.device), *spec.arguments())
    return torch.where(kept, x / (1 - spec.p), 0)


class Beside(torch.autograd.Function):
    """y as it is, and gradients of zeros for what stands beside it: no pass over y, which would be counted."""

    @staticmethod
    def forward(ctx, y, *others):
        ctx.others = others
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *(t.new_zeros(()).expand(t.shape) for t in ctx.others)


def frozen(x, a, b, weight=None, packed=None, frozen=None, magnitude=None, exact=False, **more):
    """What there was before the adapter, with gradients for those who ask."""
    y = ops.linear(x, weight if packed is None else packed, exact=exact)
    return Beside.apply(y, a, b, *(() if magnitude is None else (magnitude,))) if y.requires_grad else y


def torch_dropout(
    x, a, b, weight=None, packed=None, frozen=None, scale=1.0, bias=None, magnitude=None, dropout=None, exact=False
):  # fmt: skip
    """As adapters are written in torch: its own dropout draws and stores the mask."""
    weight = frozen if weight is None else weight
    low = functional.dropout(x, dropout.p) if dropout else x
    y = functional.linear(x, weight) + scale * functional.linear(functional.linear(low, a), b)
    if magnitude is not None:
        y = y * (magnitude / (weight + scale * b @ a).norm(dim=1).detach())
    return y if bias is None else y + bias


def case(
    *shape: int, cols: int, rank: int, form: str = "rows", p: float = 0.0, bias=False, magnitude=False, exact=False
) -> Case:  # fmt: skip
    """form: "rows" (a tensor), "panels", or a format of quant_linear."""
    rows, depth = torch.Size(shape[:-1]).numel(), shape[-1]
    words = {form: form != "rows", f"p {p}": p, "+bias": bias, "+magnitude": magnitude, "exact": exact}

    def inputs(make):
        drawn = {"x": make.normal(*shape), "scale": 1.5, "a": make.normal(rank, depth, scale=depth**-0.5)}
        drawn["b"] = make.normal(cols, rank, scale=rank**-0.5)
        if form in FORMATS or form in GROUPED:
            packed = random_weight(make, cols, depth, form)
            drawn |= {"packed": packed, "frozen": packed.dequantize()}
        else:
            weight = make.normal(cols, depth, scale=depth**-0.5)
            drawn |= (
                {"packed": Panels.pack(weight), "frozen": weight}
                if form == "panels" and make.device == "cpu"
                else {"weight": weight}
            )
        if p:
            drawn["dropout"] = Dropout(p, seed=7, call=3)
        if bias:
            drawn["bias"] = make.normal(cols)
        if magnitude:
            drawn["magnitude"] = make.normal(cols).abs() + 0.5
        return {**drawn, "exact": True} if exact else drawn

    low = rank * (depth + cols)
    return Case(
        " ".join(["x".join(map(str, shape)), f"to {cols} r {rank}", *(word for word, given in words.items() if given)]),
        inputs,
        bytes=lambda size: (rows * (depth + cols) + depth * cols + low) * size,
        flops=2 * rows * (depth * cols + low),
        backward_bytes=lambda size: (rows * (2 * depth + cols) + depth * cols + 2 * low) * size,
        backward_flops=2 * rows * (depth * cols + 2 * low),
        apart=not p,
    )


def strided(label: str, view) -> Case:
    """x, weight, a and b are views of larger tensors."""

    def inputs(make):
        x, weight, a, b = (view(make.normal(60, 60)) for _ in range(4))
        return {"x": x[:6, :33], "weight": weight[:21, :33], "a": a[:5, :33], "b": b[:21, :5], "scale": 0.5}

    return Case(label, inputs)


SUITE = Suite(
    op="lora_linear",
    run=run,
    reference=plain,
    gradients=("x", "a", "b", "bias", "magnitude"),
    rows=("x",),
    error=3.0,  # sums over K in chains of 128; how torch adds depends on the processor
    gradient_error=3.0,
    correct=(
        *(
            case(*shape, cols=cols, rank=rank)
            for shape, cols, rank in (
                ((1, 1), 1, 1), ((3, 33), 17, 1), ((4, 16), 16, 3), ((5, 100), 40, 16), ((13, 65), 130, 64),
                ((97, 64), 33, 16), ((2, 3, 48), 31, 8), ((2, 2100), 40, 17), ((60, 96), 80, 256), ((0, 8), 4, 2),
                ((2, 0, 8), 4, 2), ((3, 8), 0, 2), ((1, 576), 96, 16), ((130, 200), 48, 32),
            )
        ),
        *(
            case(13, 100, cols=40, rank=16, **more)
            for more in (
                {"bias": True}, {"p": 0.1}, {"p": 0.5, "bias": True}, {"magnitude": True},
                {"magnitude": True, "bias": True, "p": 0.5}, {"form": "panels"}, {"form": "panels", "p": 0.5, "bias": True},
                {"form": "panels", "magnitude": True},
            )
        ),
        case(3, 200, cols=33, rank=3, p=0.5),
        case(60, 200, cols=33, rank=64, p=0.1),
        case(2, 100, cols=70, rank=16, form="panels"),
        case(2, 100, cols=70, rank=20, exact=True),
        case(70, 100, cols=48, rank=100, exact=True, bias=True, magnitude=True),
        case(9, 40, cols=33, rank=4, exact=True, p=0.5),
        strided("columns of wider tensors", lambda t: t[:, 5:50]),
        strided("transposed", lambda t: t.t()),
    ),
    benchmark=(
        *(case(2048, 2048, cols=2048, rank=rank, p=p) for rank in (8, 16, 64) for p in (0.0, 0.1)),
        case(2048, 2048, cols=2048, rank=16, form="panels"),
        case(2048, 2048, cols=2048, rank=16, magnitude=True),
    ),
    gpu=(
        *(case(rows, 4096, cols=cols, rank=16) for rows, cols in ((8192, 4096), (8192, 14336), (2048, 4096))),
        case(8192, 4096, cols=4096, rank=64, p=0.1),
        case(8192, 4096, cols=4096, rank=16, exact=True),
    ),
    peers={"torch dropout": torch_dropout, "frozen linear": frozen},
)  # fmt: skip

QUANTISED = tuple(  # float32 alone
    case(*shape, cols=cols, rank=rank, form=form, **more)
    for form in (*FORMATS, "int4 g128", "8 bits + minimum g64")
    for shape, cols, rank, more in (
        ((13, 96), 40, 16, {}), ((2, 64), 33, 3, {"p": 0.5}), ((5, 64), 48, 64, {"bias": True, "magnitude": True}),
        ((1, 160), 17, 1, {}), ((70, 64), 48, 20, {"bias": True, "magnitude": True, "exact": True}),
    )
)  # fmt: skip
