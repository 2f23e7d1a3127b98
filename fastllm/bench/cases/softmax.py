"""softmax against torch.softmax."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(x, temperature=1.0):
    return torch.softmax(x if temperature == 1 else x / temperature, -1)


def case(*shape: int, temperature: float = 1.0, scale: float = 1.0) -> Case:
    count = torch.Size(shape).numel()
    notes = (f" T {temperature:g}" if temperature != 1 else "") + (f" scale {scale:g}" if scale != 1 else "")
    return Case(
        "x".join(map(str, shape)) + notes,
        lambda make: {"x": make.normal(*shape, scale=scale), "temperature": temperature},
        bytes=lambda size: 2 * count * size,
        backward_bytes=lambda size: 3 * count * size,  # read dy and y, write dx
        flops=20 * count,
        backward_flops=5 * count,
    )


def strided(label: str, view, *shape: int) -> Case:
    return Case(label, lambda make: {"x": view(make.normal(*shape))})


def masked(make):
    """Some of each row is -inf, as a mask leaves it."""
    x = make.normal(6, 200)
    return {"x": x if x.is_meta else x.masked_fill(x < -0.5, float("-inf"))}


SUITE = Suite(
    op="softmax",
    run=ops.softmax,
    reference=plain,
    gradients=("x",),
    rows=("x",),
    correct=(
        *(case(*s) for s in ((1, 1), (3, 7), (2, 3, 64), (5, 1023), (1, 4097), (0, 8), (2, 0, 8), (3, 0))),
        case(4, 100, temperature=0.7),
        case(4, 100, temperature=3.0, scale=20.0),
        case(2, 20000),  # wider than a program of the GPU kernel holds
        case(1, 50257, temperature=0.8),
        Case("with -inf", masked),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
        case(1030, 1040),  # 4 MB: stores past the cache
    ),
    benchmark=(case(2048, 2048), case(64, 32000, temperature=0.8), case(1, 2048), case(8192, 8192)),
    gpu=(case(8192, 8192), case(64, 128256, temperature=0.8)),
)
