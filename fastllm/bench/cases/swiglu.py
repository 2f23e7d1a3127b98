"""swiglu against torch.nn.functional.silu(gate) * up."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(gate, up):
    return torch.nn.functional.silu(gate) * up


def case(*shape: int, scale: float = 1.0) -> Case:
    count = torch.Size(shape).numel()
    return Case(
        "x".join(map(str, shape)) + (f" scale {scale:g}" if scale != 1 else ""),
        lambda make: {"gate": make.normal(*shape, scale=scale), "up": make.normal(*shape)},
        bytes=lambda size: 3 * count * size,  # read gate and up, write y
        backward_bytes=lambda size: 5 * count * size,  # read dy, gate and up, write dgate and dup
        flops=6 * count,
        backward_flops=12 * count,
    )


def fused(*shape: int) -> Case:
    """gate and up are the halves of one tensor, as one matmul writes them."""

    def inputs(make):
        gate, up = make.normal(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
        return {"gate": gate, "up": up}

    whole = case(*shape)
    label = f"{whole.label} halves of one tensor"
    return Case(label, inputs, whole.bytes, whole.flops, whole.backward_bytes, whole.backward_flops)


def strided(label: str, view, *shape: int) -> Case:
    return Case(label, lambda make: {"gate": view(make.normal(*shape)), "up": view(make.normal(*shape))})


SUITE = Suite(
    op="swiglu",
    run=ops.swiglu,
    reference=plain,
    gradients=("gate", "up"),
    rows=("gate", "up"),
    correct=(
        *(
            case(*shape)
            for shape in ((1, 1), (3, 7), (17,), (2, 3, 64), (4, 1536), (5, 1023), (0, 8), (2, 0, 8), (3, 0))
        ),
        case(40, 300, scale=30.0),
        *(fused(*shape) for shape in ((3, 48), (2, 3, 65), (1, 1536))),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
        case(1030, 1040),  # 4 MB: stores past the cache
    ),
    benchmark=(case(2048, 5632), fused(2048, 5632), case(1, 1536), case(8192, 14336)),
    gpu=(case(8192, 14336), fused(8192, 14336)),
)
