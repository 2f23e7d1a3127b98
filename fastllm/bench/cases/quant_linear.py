"""quant_linear against its own arithmetic in plain PyTorch; timed, it stands beside torch's float32 linear."""

import torch

from ... import ops
from ...ops import QWeight
from ...ops.quant_linear import GROUP, STORED, reference, reference_embedding
from ..case import Case, Suite
from .linear import plain as dense_linear

# bits, minimum, group
FORMATS = {"int4": (4, False), "q4_1": (4, True), "int8": (8, False), "8 bits + minimum": (8, True)}  # in groups of 32
GROUPED = {f"{name} g{group}": (*form, group) for group in (64, 128) for name, form in FORMATS.items()}


def layout(form: str) -> tuple[int, bool, int]:
    """Bits, minimum and group of a format's name."""
    return GROUPED.get(form) or (*FORMATS[form], GROUP)


def run(weight, x=None, ids=None, dense=None, **fused):
    return ops.quant_linear(weight.rows_at(ids) if x is None else x, weight, **fused)


def plain(weight, x=None, ids=None, dense=None, bias=None, norm=None, eps=1e-6, residual=None, swiglu=False):
    if x is None:
        x = reference_embedding(ids, weight.data, weight.rows, weight.depth, weight.bits, weight.has_min)
    if dense is not None:
        return dense_linear(x, dense, bias=bias, norm=norm, eps=eps, residual=residual, swiglu=swiglu)
    w = weight
    return reference(x, w.data, w.rows, w.depth, w.bits, w.has_min, bias, norm, eps, residual, int(swiglu))


def random_weight(make, rows: int, depth: int, form: str, swiglu: bool = False) -> QWeight:
    """Quants over their full range, scales of either sign."""
    bits, has_min, group = layout(form)
    weight = QWeight.empty(rows, depth, bits, has_min, swiglu, group=group)
    if make.device == "meta":
        return weight.to("meta")
    if group != GROUP:  # no stored type has such groups
        weight.data.copy_(make.integers(0, 256, *weight.data.shape, dtype=torch.uint8))
        halves = weight.data[:, :, 2 * bits * group :].view(torch.float16)
        halves.copy_(make.normal(*halves.shape, scale=depth**-0.5 / (4 if bits == 4 else 50)))
        return weight.to(make.device)
    weight.data.zero_()
    groups, first = depth // GROUP, 0
    kinds = {4: ("Q4_1",) if has_min else ("Q4_0",), 8: ("Q8_0", "Q4_1", "Q4_0") if has_min else ("Q8_0", "Q4_0")}[bits]
    for i, kind in enumerate(kinds):  # 8 bits hold every stored type, side by side
        count = rows // len(kinds) if i + 1 < len(kinds) else rows - first
        if not count:
            continue
        head = 4 if STORED[kind][1] else 2
        scale = make.normal(count, groups, head // 2, scale=depth**-0.5 / (50 if kind == "Q8_0" else 4))
        scale = scale.half().cpu().contiguous().view(torch.uint8)
        quants = make.integers(0, 256, count, groups, STORED[kind][2] - head, dtype=torch.uint8).cpu()
        first = weight.fill(first, torch.cat([scale, quants], -1).flatten(1), kind)
    return weight.to(make.device)


def case(
    *shape: int, cols: int, form: str, bias=False, norm=False, residual=False, swiglu: bool = False, timed=False
) -> Case:
    rows, depth = torch.Size(shape[:-1]).numel(), shape[-1]
    height = cols * (1 + swiglu)
    words = {"+bias": bias, "+norm": norm, "+residual": residual, "+swiglu": swiglu}
    bits, has_min, group = layout(form)

    def inputs(make):
        drawn = {"x": make.normal(*shape), "weight": random_weight(make, height, depth, form, swiglu), "swiglu": swiglu}
        if timed:
            drawn["dense"] = make.normal(height, depth)
        if bias:
            drawn["bias"] = make.normal(cols)
        if norm:
            drawn["norm"] = make.normal(depth)
        if residual:
            drawn["residual"] = make.normal(*shape[:-1], cols)
        return drawn

    stored = QWeight.nbytes_for(height, depth, bits, has_min, swiglu, group)
    return Case(
        " ".join(["x".join(map(str, shape)), f"to {cols}", form, *(word for word, given in words.items() if given)]),
        inputs,
        bytes=lambda size: stored + rows * (depth + cols * (1 + residual)) * size,
        flops=2 * rows * height * depth,
        backward_bytes=lambda size: stored + rows * (depth + cols) * size,
        backward_flops=2 * rows * height * depth,
    )


def strided(label: str, view) -> Case:
    """x of 64 columns seen through a view of a [60, 80]."""

    def inputs(make):
        return {"x": view(make.normal(60, 80)), "weight": random_weight(make, 37, 64, "q4_1")}

    return Case(label, inputs)


def tied(count: int, cols: int, depth: int, form: str) -> Case:
    """Rows of the weight times the weight, as where an embedding is the output layer too."""

    def inputs(make):
        return {"weight": random_weight(make, cols, depth, form), "ids": make.integers(0, cols, count)}

    stored = QWeight.nbytes_for(cols, depth, *FORMATS[form])
    return Case(
        f"tied {count} of {cols}x{depth} {form}",
        inputs,
        bytes=lambda size: stored + count * cols * size,
        flops=2 * count * cols * depth,
    )


SUITE = Suite(
    op="quant_linear",
    run=run,
    reference=plain,
    gradients=("x", "bias", "norm", "residual"),
    rows=("x", "ids", "residual"),
    error=8.0,  # one chain over the groups
    gradient_error=8.0,  # dx is one chain too
    dtypes=(torch.float32,),
    peak="dot",
    correct=(
        *(
            case(*shape, cols=cols, form=form)
            for form in FORMATS
            for shape, cols in (
                ((1, 32), 1), ((2, 64), 5), ((3, 96), 17), ((4, 576), 48), ((5, 160), 33), ((12, 64), 40),
                ((13, 96), 31), ((97, 64), 20), ((2, 3, 64), 19), ((1, 4992), 130), ((9, 4992), 18),
                ((0, 32), 4), ((2, 0, 32), 4), ((3, 32), 0),
            )
        ),
        *(
            case(rows, depth, cols=cols, form=form, **fused)
            for form in ("int4", "q4_1", "int8")
            for rows, depth, cols, fused in (
                (1, 96, 130, {"bias": True}), (13, 64, 17, {"bias": True}),
                (1, 96, 40, {"norm": True}), (6, 64, 40, {"norm": True}),
                (1, 96, 35, {"residual": True}), (13, 96, 35, {"residual": True}),
                (1, 64, 40, {"swiglu": True}), (3, 64, 7, {"swiglu": True}), (4, 64, 144, {"swiglu": True}),
                (13, 96, 33, {"swiglu": True}), (66, 32, 16, {"swiglu": True}), (63, 2560, 33, {"swiglu": True}),
                (5, 64, 33, {"norm": True, "residual": True, "bias": True}),
                (2, 64, 33, {"norm": True, "residual": True, "swiglu": True}),
            )
        ),
        *(
            case(*shape, cols=cols, form=form)
            for form in GROUPED
            for shape, cols in (((1, 576), 48), ((3, 128), 17), ((9, 160), 33), ((97, 64), 20))
        ),
        *(
            case(rows, depth, cols=cols, form=form, **fused)
            for form in ("int4 g128", "q4_1 g64", "int8 g128")
            for rows, depth, cols, fused in (
                (13, 192, 17, {"bias": True}), (5, 256, 33, {"norm": True, "residual": True, "bias": True}),
                (2, 192, 33, {"norm": True, "residual": True, "swiglu": True}), (18, 128, 40, {"swiglu": True}),
                (13, 2560, 20, {"residual": True}),
            )
        ),
        *(tied(5, 37, 64, form) for form in FORMATS),
        strided("columns of a wider tensor", lambda t: t[:6, 5:69]),
        strided("transposed", lambda t: t.reshape(80, 60)[:64].t()),
        strided("every second row", lambda t: t[::2, :64]),
        strided("broadcast row", lambda t: t[:1, :64].expand(9, -1)),
    ),
    benchmark=(
        case(512, 2048, cols=2048, form="q4_1", timed=True),
        tied(1, 49152, 576, "int8"),
        *(case(rows, 4096, cols=14336, form=form, timed=True) for rows in (1, 8, 16) for form in ("int4 g128", "int8 g128")),
        *(
            case(rows, depth, cols=cols, form=form, timed=True, **fused)
            for rows in (1, 512)
            for form, depth, cols, fused in (
                ("q4_1", 576, 960, {"norm": True}),
                ("q4_1", 576, 1536, {"norm": True, "swiglu": True}),
                ("q4_1", 1536, 576, {"residual": True}),
                ("int4", 576, 1536, {"norm": True, "swiglu": True}),
                ("int8", 576, 1536, {"norm": True, "swiglu": True}),
                ("int8", 576, 49152, {"norm": True}),
            )
        ),
    ),
    gpu=tuple(
        case(rows, 4096, cols=14336, form=form, timed=True) for rows in (1, 8, 16, 512) for form in ("int4 g128", "int8 g128")
    ),
)  # fmt: skip
