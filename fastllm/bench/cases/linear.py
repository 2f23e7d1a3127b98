"""linear against torch.nn.functional.linear, with torch's own norm, residual and swiglu around it."""

import torch

from ... import ops
from ...ops import Panels
from ..case import Case, Suite


def run(x, weight=None, panels=None, frozen=None, **fused):
    return ops.linear(x, weight if panels is None else panels, **fused)


def plain(
    x, weight=None, panels=None, frozen=None, bias=None, norm=None, eps=1e-6, residual=None, swiglu=False,
    exact=False,
):  # fmt: skip
    """With panels, `frozen` is the weight that they hold."""
    functional, weight = torch.nn.functional, weight if panels is None else frozen
    if norm is not None:
        x = functional.rms_norm(x, norm.shape, norm, eps)
    y = functional.linear(x, weight, bias)
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = functional.silu(gate) * up
    return y if residual is None else y + residual


def held(weight, packed: bool, swiglu: bool = False) -> dict:
    return {"panels": Panels.pack(weight, swiglu), "frozen": weight} if packed else {"weight": weight}


def case(
    *shape: int, cols: int, packed: bool = False, bias=False, norm=False, residual=False, swiglu: bool = False,
    exact: bool = False,
) -> Case:  # fmt: skip
    """x of `shape`, y of `cols` columns; packed: the weight comes as Panels too, made beforehand (on a CPU)."""
    rows, depth = torch.Size(shape[:-1]).numel(), shape[-1]
    height = cols * (1 + swiglu)
    words = {"+bias": bias, "+norm": norm, "+residual": residual, "+swiglu": swiglu, "packed": packed, "exact": exact}

    def inputs(make):
        weight = make.normal(height, depth, scale=max(depth, 1) ** -0.5)
        drawn = {"x": make.normal(*shape), "swiglu": swiglu, **held(weight, packed and make.device == "cpu", swiglu)}
        if exact:
            drawn["exact"] = True
        if bias:
            drawn["bias"] = make.normal(cols)
        if norm:
            drawn["norm"] = make.normal(depth)
        if residual:
            drawn["residual"] = make.normal(*shape[:-1], cols)
        return drawn

    return Case(
        " ".join(["x".join(map(str, shape)), f"to {cols}", *(word for word, given in words.items() if given)]),
        inputs,
        bytes=lambda size: (rows * depth + height * depth + rows * cols * (1 + residual)) * size,
        flops=2 * rows * height * depth,
        backward_bytes=lambda size: (2 * rows * depth + (2 - packed) * height * depth + rows * cols) * size,
        backward_flops=2 * (2 - packed) * rows * height * depth,
    )


def strided(label: str, view_x, view_weight, *, packed: bool = False) -> Case:
    """x [6, 40] and a weight [21, 33] out of larger tensors, seen through views that end in 33 columns."""

    def inputs(make):
        weight = view_weight(make.normal(60, 60))
        return {"x": view_x(make.normal(60, 60)), **held(weight, packed and make.device == "cpu")}

    return Case(label, inputs)


def columns(t):
    return t[:21, 5:38]


EVERY = {"norm": True, "residual": True}
SUITE = Suite(
    op="linear",
    run=run,
    reference=plain,
    gradients=("x", "weight", "bias", "norm", "residual"),
    rows=("x", "residual"),
    error=3.0,  # sums over K in chains of 128; how torch adds depends on the processor
    gradient_error=3.0,
    correct=(
        *(
            case(*shape, cols=cols, packed=packed)
            for packed in (False, True)
            for shape, cols in (
                ((1, 1), 1), ((2, 3), 5), ((3, 33), 15), ((4, 16), 16), ((5, 17), 17), ((12, 64), 48), ((13, 100), 130),
                ((97, 65), 33), ((2, 3, 48), 31), ((1, 5000), 40), ((2, 5000), 40), ((5, 5000), 17), ((14, 4097), 16),
                ((200, 9), 7), ((0, 8), 4), ((2, 0, 8), 4), ((3, 8), 0),
            )
        ),
        *(
            case(rows, depth, cols=cols, packed=packed, **fused)
            for packed in (False, True)
            for rows, depth, cols, fused in (
                (1, 100, 130, {"bias": True}), (13, 33, 17, {"bias": True}),
                (1, 576, 40, {"norm": True}), (5, 33, 40, {"norm": True}), (97, 65, 20, {"norm": True}),
                (1, 96, 35, {"residual": True}), (13, 96, 35, {"residual": True}),
                (1, 64, 40, {"swiglu": True}), (3, 65, 7, {"swiglu": True}), (4, 64, 144, {"swiglu": True}),
                (13, 2100, 33, {"swiglu": True}), (97, 40, 16, {"swiglu": True}),
                (4, 65, 33, {**EVERY, "bias": True}), (6, 65, 33, {**EVERY, "bias": True}),
                (2, 65, 33, {**EVERY, "swiglu": True}), (25, 65, 33, {**EVERY, "swiglu": True}),
            )
        ),
        case(1, 70, cols=45, exact=True, norm=True),
        case(5, 64, cols=33, exact=True, bias=True, residual=True),
        case(130, 96, cols=150, exact=True),
        case(70, 65, cols=20, exact=True, swiglu=True),
        strided("columns of wider tensors", columns, columns),
        strided("columns of a wider x, packed", columns, columns, packed=True),
        strided("transposed", lambda t: t[5:38].t(), lambda t: t[5:38].t()),
        strided("every second row", lambda t: t[::2, :33], lambda t: t[::2, :33]),
        strided("broadcast row", lambda t: t[:1, :33].expand(9, -1), columns),
        strided("broadcast column", lambda t: t[:7, :1].expand(-1, 33), columns),
    ),
    benchmark=(
        case(512, 2048, cols=2048),
        case(512, 2048, cols=2048, packed=True),
        case(512, 2048, cols=2048, exact=True),
        case(1, 2048, cols=2048, exact=True, swiglu=True),
        *(
            case(rows, depth, cols=cols, packed=True, **fused)
            for rows in (1, 512)
            for depth, cols, fused in (
                (576, 960, {"norm": True}),
                (576, 1536, {"norm": True, "swiglu": True}),
                (1536, 576, {"residual": True}),
                (576, 49152, {"norm": True}),
            )
        ),
    ),
    gpu=(
        *(case(rows, 4096, cols=4096, exact=True) for rows in (1, 16, 8192)),
        *(case(rows, 2048, cols=3072) for rows in (1, 16)),
        *(case(rows, 4096, cols=4096) for rows in (1, 16)),
        *(case(rows, 4096, cols=14336, swiglu=True) for rows in (1, 16)),
    ),
)  # fmt: skip
