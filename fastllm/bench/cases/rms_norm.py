"""rms_norm against torch.nn.functional.rms_norm."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(x, weight, eps=1e-6, residual=None):
    s = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(s, weight.shape, weight, eps)
    return y if residual is None else (y, s)


def case(*shape: int, residual: bool = False) -> Case:
    rows, cols = torch.Size(shape[:-1]).numel(), shape[-1]
    passes = 4 if residual else 2  # read x (and the residual), write y (and s)
    return Case(
        "x".join(map(str, shape)) + (" +residual" if residual else ""),
        lambda make: {
            "x": make.normal(*shape),
            "weight": make.normal(cols),
            **({"residual": make.normal(*shape)} if residual else {}),
        },
        bytes=lambda size: (passes * rows + 1) * cols * size,
        backward_bytes=lambda size: (3 * rows + 2) * cols * size,
        flops=4 * rows * cols,
        backward_flops=8 * rows * cols,
    )


def strided(label: str, view, *shape: int) -> Case:
    """x is a view of a larger tensor."""
    return Case(
        label, lambda make: {"x": view(make.normal(*shape)), "weight": make.normal(view(torch.empty(shape)).shape[-1])}
    )


SUITE = Suite(
    op="rms_norm",
    run=ops.rms_norm,
    reference=plain,
    gradients=("x", "weight", "residual"),
    rows=("x", "residual"),
    correct=(
        *(
            case(*shape)
            for shape in ((1, 1), (3, 7), (2, 3, 64), (5, 100), (4, 576), (1, 4097), (33, 128), (0, 8), (2, 0, 8))
        ),
        *(case(*shape, residual=True) for shape in ((3, 7), (4, 576), (2, 3, 65))),
        strided("columns of a wider tensor", lambda t: t[:, 5:70], 6, 100),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
    ),
    benchmark=(case(2048, 2048), case(2048, 2048, residual=True), case(1, 576), case(8192, 4096)),
    gpu=(case(8192, 4096), case(8192, 4096, residual=True)),
)
