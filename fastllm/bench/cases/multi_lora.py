"""multi_lora against a loop over the adapters in plain torch."""

import torch

from ... import ops
from ...ops import AdapterPool, Panels
from ..case import Case, Suite

functional = torch.nn.functional


def run(x, pool, adapter_id, weight=None, packed=None, frozen=None, bias=None):
    return ops.multi_lora(x, weight if packed is None else packed, pool, adapter_id, bias)


def plain(x, pool, adapter_id, weight=None, packed=None, frozen=None, bias=None):
    y = functional.linear(x, frozen if weight is None else weight)
    for i in adapter_id.unique().tolist():
        if i >= 0:
            a, b, scale, gain = pool.get(i)
            with_it = y + scale * functional.linear(functional.linear(x, a.to(x)), b.to(x))
            y = torch.where((adapter_id == i).unsqueeze(-1), with_it if gain is None else with_it * gain.to(x), y)
    return y if bias is None else y + bias


def case(*shape: int, cols: int, ranks: tuple[int, ...], packed=False, bias=False, dora=False, sort=False) -> Case:
    """An adapter of each rank; rows take them, or none, at random, or (sort) in order."""
    rows, depth = torch.Size(shape[:-1]).numel(), shape[-1]
    shown = " ".join(map(str, ranks)) if len(ranks) < 5 else f"{len(ranks)} of {ranks[0]}"
    words = {"panels": packed, "+bias": bias, "+gain": dora, "sorted": sort}

    def inputs(make):
        meta = make.device == "meta"
        pool_dtype = torch.float32 if make.device == "cpu" else make.dtype
        pool = AdapterPool(cols, depth, len(ranks) + 1, max(ranks), dora, pool_dtype, make.device)
        for rank in ranks if not meta else ():
            gain = make.normal(cols).abs().float() + 0.5 if dora else None
            a, b = make.normal(rank, depth, scale=depth**-0.5), make.normal(cols, rank, scale=rank**-0.5)
            pool.add(a, b, 1.5, gain)
        weight = make.normal(cols, depth, scale=depth**-0.5)
        ids = make.integers(-1, len(ranks), *shape[:-1])
        drawn = {"x": make.normal(*shape), "pool": pool, "adapter_id": ids if meta or not sort else ids.sort()[0]}
        drawn |= (
            {"packed": Panels.pack(weight), "frozen": weight} if packed and make.device == "cpu" else {"weight": weight}
        )
        return {**drawn, "bias": make.normal(cols)} if bias else drawn

    low = sum(ranks) * (depth + cols)
    return Case(
        " ".join(["x".join(map(str, shape)), f"to {cols} ranks {shown}", *(w for w, given in words.items() if given)]),
        inputs,
        bytes=lambda size: (rows * (depth + cols) + depth * cols + low) * size,
        flops=2 * rows * (depth * cols + low // len(ranks)),
    )


SUITE = Suite(
    op="multi_lora",
    run=run,
    reference=plain,
    rows=("x", "adapter_id"),
    error=8.0,  # one chain over k and the rank
    correct=(
        *(
            case(*shape, cols=cols, ranks=ranks, packed=packed)
            for packed in (False, True)
            for shape, cols, ranks in (
                ((1, 1), 1, (1,)), ((4, 33), 17, (1, 3)), ((5, 100), 40, (16, 8, 1)), ((40, 65), 130, (64, 3, 16)),
                ((97, 64), 33, (16, 16)), ((2, 3, 48), 31, (8, 2)), ((2, 2100), 40, (17,)), ((0, 8), 4, (2,)),
                ((3, 8), 9, (5, 20, 256)),
            )
        ),
        case(13, 64, cols=33, ranks=(4, 16), bias=True, dora=True),
        case(60, 64, cols=33, ranks=(4, 16, 2), sort=True, packed=True, dora=True),
        case(3, 64, cols=33, ranks=(4, 16), bias=True, packed=True),
    ),
    benchmark=(
        case(32, 4096, cols=4096, ranks=(16,) * 32),
        case(16, 2048, cols=2048, ranks=(16,) * 16, packed=True),
        case(512, 2048, cols=2048, ranks=(16,) * 4, packed=True, sort=True),
    ),
)  # fmt: skip
