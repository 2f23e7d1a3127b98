"""embedding against torch.nn.functional.embedding."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(ids, weight):
    if not weight.shape[1]:  # on a GPU torch's backward reads where nothing is
        return weight[:1].sum() * weight.new_zeros((*ids.shape, 0))
    return torch.nn.functional.embedding(ids, weight)


def case(vocabulary: int, cols: int, *shape: int, dtype: torch.dtype = torch.int64) -> Case:
    count = torch.Size(shape).numel()
    label = f"{'x'.join(map(str, shape))} of {vocabulary}x{cols}" + (" int32" if dtype == torch.int32 else "")
    return Case(
        label,
        lambda make: {
            "ids": make.integers(0, vocabulary, *shape, dtype=dtype),
            "weight": make.normal(vocabulary, cols),
        },
        bytes=lambda size: count * (2 * cols * size + dtype.itemsize),
        backward_bytes=lambda size: (count + vocabulary) * cols * size,
        backward_flops=count * cols,
    )


def strided(label: str, view_ids, view_weight) -> Case:
    """Ids [6, 10] below 20 and a table [40, 60], seen through views."""

    def inputs(make):
        ids, weight = make.integers(0, 20, 6, 10), make.normal(40, 60)
        return {"ids": view_ids(ids), "weight": view_weight(weight)}

    return Case(label, inputs)


def same(t):
    return t


SUITE = Suite(
    op="embedding",
    run=ops.embedding,
    reference=plain,
    gradients=("weight",),
    rows=("ids",),
    correct=(
        case(1, 1, 1),
        case(11, 7, 5),
        case(11, 7, 5, dtype=torch.int32),
        case(100, 64, 3, 9),
        case(300, 65, 2, 3, 4, dtype=torch.int32),
        case(7, 130, 100),  # long chains of one id
        case(50, 576, 1),
        case(50, 8, 0),
        case(50, 8, 2, 0),
        case(50, 0, 3),
        case(1100, 1024, 20),  # 4 MB of gradient: stores past the cache
        strided("ids transposed", torch.t, same),
        strided("every second id", lambda t: t[0, ::2], same),
        strided("columns of a wider table", same, lambda t: t[:, 5:38]),
        strided("every second row of the table", same, lambda t: t[::2]),
        strided("table transposed", same, torch.t),
    ),
    benchmark=(case(49152, 576, 2048), case(50257, 768, 4096), case(49152, 576, 1), case(128256, 4096, 8192)),
)
