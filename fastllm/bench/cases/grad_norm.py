"""grad_norm against the norm of norms, and torch.nn.utils.get_total_norm."""

import torch

from ... import ops
from ..case import Case, Suite


def run(**tensors):
    return ops.grad_norm(list(tensors.values()))


def plain(**tensors):
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors.values()]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in wide]))


def torch_utility(**tensors):
    return torch.nn.utils.get_total_norm(list(tensors.values()))


def case(*shapes: tuple[int, ...]) -> Case:
    count = sum(torch.Size(shape).numel() for shape in shapes)
    return Case(
        ", ".join("x".join(map(str, shape)) for shape in shapes),
        lambda make: {f"g{i}": make.normal(*shape) for i, shape in enumerate(shapes)},
        bytes=lambda size: count * size,
        flops=2 * count,
    )


SUITE = Suite(
    op="grad_norm",
    run=run,
    reference=plain,
    peers={"utility": torch_utility},
    correct=(
        case((1,)),
        case((3, 7), (5,)),
        case((0, 8), (2, 3, 64), (1,)),
        case((16384,), (16385,), (3, 20000)),
        case((0, 8)),
        Case("transposed", lambda make: {"g0": make.normal(40, 6).t(), "g1": make.normal(4, 8)[:, ::2]}),
    ),
    benchmark=(case((4096, 2048), (2048,), (8192, 2048), (2048,)), case((576,)), case((16384, 16384))),
)
