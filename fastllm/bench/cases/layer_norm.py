"""layer_norm against torch.nn.functional.layer_norm."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(x, weight, bias=None, eps=1e-5, residual=None):
    s = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(s, weight.shape, weight, bias, eps)
    return y if residual is None else (y, s)


def case(*shape: int, bias: bool = True, residual: bool = False, mean: float = 0.0) -> Case:
    rows, cols = torch.Size(shape[:-1]).numel(), shape[-1]
    passes = 4 if residual else 2  # read x (and the residual), write y (and s)
    notes = ("" if bias else " no bias") + (" +residual" if residual else "") + (f" mean {mean:g}" if mean else "")
    return Case(
        "x".join(map(str, shape)) + notes,
        lambda make: {
            "x": make.normal(*shape) + mean,
            "weight": make.normal(cols),
            **({"bias": make.normal(cols)} if bias else {}),
            **({"residual": make.normal(*shape)} if residual else {}),
        },
        bytes=lambda size: (passes * rows + 1 + bias) * cols * size,
        backward_bytes=lambda size: (3 * rows + 2 + bias) * cols * size,
        flops=7 * rows * cols,
        backward_flops=12 * rows * cols,
    )


def strided(label: str, view, *shape: int) -> Case:
    """x is a view of a larger tensor."""

    def inputs(make):
        x = view(make.normal(*shape))
        return {"x": x, "weight": make.normal(x.shape[-1]), "bias": make.normal(x.shape[-1])}

    return Case(label, inputs)


SUITE = Suite(
    op="layer_norm",
    run=ops.layer_norm,
    reference=plain,
    gradients=("x", "weight", "bias", "residual"),
    rows=("x", "residual"),
    correct=(
        *(case(*s) for s in ((3, 7), (2, 3, 64), (5, 100), (4, 768), (1, 4097), (130, 128), (0, 8), (2, 0, 8))),
        *(case(*s, bias=False) for s in ((5, 33), (2, 3, 64))),
        *(case(*s, residual=True) for s in ((3, 7), (4, 576), (2, 3, 65))),
        case(6, 300, mean=20.0),
        case(70, 300, bias=False, residual=True),
        strided("columns of a wider tensor", lambda t: t[:, 5:70], 6, 100),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
        case(1030, 1040),  # 4 MB: stores past the cache
    ),
    benchmark=(case(2048, 2048), case(2048, 2048, residual=True), case(1, 768), case(8192, 4096)),
    gpu=(case(8192, 4096), case(8192, 4096, residual=True)),
)
