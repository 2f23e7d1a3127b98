"""geglu against torch.nn.functional.gelu(gate) * up."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(gate, up, approximate="none"):
    return torch.nn.functional.gelu(gate, approximate=approximate) * up


def case(*shape: int, approximate: str = "none", fused: bool = False) -> Case:
    """fused: gate and up are the halves of one tensor, as one matmul writes them."""
    count = torch.Size(shape).numel()

    def inputs(make):
        if fused:
            gate, up = make.normal(*shape[:-1], 2 * shape[-1]).chunk(2, dim=-1)
        else:
            gate, up = make.normal(*shape), make.normal(*shape)
        return {"gate": gate, "up": up, "approximate": approximate}

    return Case(
        f"{'x'.join(map(str, shape))} {approximate}" + (" halves of one tensor" if fused else ""),
        inputs,
        bytes=lambda size: 3 * count * size,  # read gate and up, write y
        backward_bytes=lambda size: 5 * count * size,  # read dy, gate and up, write dgate and dup
        flops=41 * count,
        backward_flops=47 * count,
    )


def strided(label: str, view, *shape: int) -> Case:
    return Case(label, lambda make: {"gate": view(make.normal(*shape)), "up": view(make.normal(*shape))})


SUITE = Suite(
    op="geglu",
    run=ops.geglu,
    reference=plain,
    gradients=("gate", "up"),
    rows=("gate", "up"),
    correct=(
        *(
            case(*shape, approximate=approximate)
            for approximate in ("none", "tanh")
            for shape in ((1, 1), (3, 7), (2, 3, 64), (5, 1023), (0, 8), (2, 0, 8))
        ),
        case(3, 48, fused=True),
        case(2, 3, 65, fused=True, approximate="tanh"),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
        case(1030, 1040),  # 4 MB: stores past the cache
    ),
    benchmark=(
        case(2048, 5632),
        case(2048, 5632, approximate="tanh", fused=True),
        case(1, 2048),
        case(8192, 14336, approximate="tanh"),
    ),
)
