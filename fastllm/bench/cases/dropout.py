"""dropout against torch.nn.functional.dropout in time, and against the mask written out in values."""

import torch

from ... import ops
from ...ops import Dropout
from ...ops._dropout import keep
from ..case import Case, Suite


def plain(x, spec):
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)
    mask = keep(rows, torch.arange(x.shape[-1], device=x.device), *spec.arguments())
    return torch.where(mask, x / (1 - spec.p), torch.zeros_like(x))


def case(*shape: int, p: float = 0.1, seed: int = 7, call: int = 0) -> Case:
    count = torch.Size(shape).numel()
    return Case(
        "x".join(map(str, shape)) + f" p {p:g}" + (f" seed {seed}" if seed != 7 else ""),
        lambda make: {"x": make.normal(*shape), "spec": Dropout(p, seed, call)},
        bytes=lambda size: 2 * count * size,
        backward_bytes=lambda size: 2 * count * size,
        flops=count,
        backward_flops=count,
    )


def strided(label: str, view, *shape: int) -> Case:
    return Case(label, lambda make: {"x": view(make.normal(*shape)), "spec": Dropout(0.3, 3)})


SUITE = Suite(
    op="dropout",
    run=ops.dropout,
    reference=plain,
    gradients=("x",),
    correct=(
        *(case(*shape) for shape in ((1, 1), (3, 7), (17,), (2, 3, 64), (4, 576), (5, 1023), (0, 8), (3, 0))),
        case(5, 300, p=0.5, seed=-(2**63)),
        case(5, 300, p=0.999, seed=2**63 - 1, call=2**32 - 1),
        strided("transposed", lambda t: t.t(), 40, 6),
        strided("every second row", lambda t: t[::2], 7, 48),
        strided("broadcast row", lambda t: t.expand(5, -1), 1, 33),
    ),
    benchmark=(case(256, 576), case(2048, 2048)),
    gpu=(case(2048, 2048), case(8192, 4096)),
    peers={"torch dropout": lambda x, spec: torch.nn.functional.dropout(x, spec.p)},
)
