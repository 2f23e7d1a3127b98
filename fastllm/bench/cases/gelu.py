"""gelu against torch.nn.functional.gelu."""

import torch

from ... import ops
from ..case import Case, Suite


def case(*shape: int, approximate: str = "none", scale: float = 1.0) -> Case:
    count = torch.Size(shape).numel()
    return Case(
        "x".join(map(str, shape)) + (f" scale {scale:g}" if scale != 1 else "") + f" {approximate}",
        lambda make: {"x": make.normal(*shape, scale=scale), "approximate": approximate},
        bytes=lambda size: 2 * count * size,
        backward_bytes=lambda size: 3 * count * size,  # read dy and x, write dx
        flops=40 * count,
        backward_flops=45 * count,
    )


def strided(label: str, view, *shape: int) -> Case:
    return Case(label, lambda make: {"x": view(make.normal(*shape))})


SUITE = Suite(
    op="gelu",
    run=ops.gelu,
    reference=torch.nn.functional.gelu,
    gradients=("x",),
    rows=("x",),
    correct=(
        *(
            case(*shape, approximate=approximate)
            for approximate in ("none", "tanh")
            for shape in ((1, 1), (3, 7), (17,), (2, 3, 64), (5, 1023), (0, 8), (2, 0, 8))
        ),
        case(40, 300, scale=5.0),
        case(40, 300, scale=5.0, approximate="tanh"),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
        case(1030, 1040),  # 4 MB: stores past the cache
    ),
    benchmark=(case(2048, 3072), case(2048, 3072, approximate="tanh"), case(1, 3072), case(8192, 16384)),
)
