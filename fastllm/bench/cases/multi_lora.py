"""multi_lora against a loop over the adapters in plain torch."""

import torch

from ... import ops
from ...ops import AdapterPool, Panels
from ..case import Case, Suite

functional = torch.nn.functional


def run(x, pool, adapter_id, weight=None, packed=None, frozen=None, bias=None, norm=None, residual=None):
    held = weight if packed is None else packed
    return ops.multi_lora(x, held, pool, adapter_id, bias, norm=norm, eps=1e-5, residual=residual)


def plain(x, pool, adapter_id, weight=None, packed=None, frozen=None, bias=None, norm=None, residual=None):
    if norm is not None:
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * norm).to(x.dtype)
    y = functional.linear(x, frozen if weight is None else weight)
    for i in adapter_id.unique().tolist():
        if i >= 0:
            low = []
            for part in range(len(pool.held)):
                a, b, scale, gain = pool.get(i, part)
                low.append((scale * functional.linear(functional.linear(x, a.to(x)), b.to(x)), gain))
            with_it = y + torch.cat([z for z, _ in low], -1)
            if pool.gain is not None:
                with_it = with_it * torch.cat([gain for _, gain in low]).to(x)
            y = torch.where((adapter_id == i).unsqueeze(-1), with_it, y)
    y = y if bias is None else y + bias
    if pool.swiglu:
        gate, up = y.chunk(2, -1)
        y = functional.silu(gate) * up
    return y if residual is None else y + residual


def case(
    *shape: int, cols: int, ranks: tuple[int, ...], packed=False, bias=False, dora=False, sort=False, parts=(),
    swiglu=False, around=False, exact=False,
) -> Case:  # fmt: skip
    """An adapter of each rank; rows take them, or none, at random, or (sort) in order. parts: their rows, of `cols`;
    around: norm and residual."""
    rows, depth = torch.Size(shape[:-1]).numel(), shape[-1]
    shown = " ".join(map(str, ranks)) if len(ranks) < 5 else f"{len(ranks)} of {ranks[0]}"
    words = {"panels": packed, "+bias": bias, "+gain": dora, "sorted": sort, "parts": parts, "swiglu": swiglu}
    words |= {"+norm +residual": around, "exact": exact}

    def inputs(make):
        meta = make.device == "meta"
        pool_dtype = torch.float32 if make.device == "cpu" else make.dtype
        place = {"dora": dora, "dtype": pool_dtype, "device": make.device, "swiglu": swiglu, "exact": exact}
        pool = AdapterPool(parts or cols, depth, len(ranks) + 1, max(ranks), **place)
        for rank in ranks if not meta else ():
            gain = make.normal(cols).abs().float() + 0.5 if dora else None
            a = [make.normal(rank, depth, scale=depth**-0.5) for _ in pool.sizes]
            b = [make.normal(size, rank, scale=rank**-0.5) for size in pool.sizes]
            pool.add_parts([(*ab, 1.5) for ab in zip(a, b, strict=True)], gain)
        weight = make.normal(cols, depth, scale=depth**-0.5)
        ids = make.integers(-1, len(ranks), *shape[:-1])
        drawn = {"x": make.normal(*shape), "pool": pool, "adapter_id": ids if meta or not sort else ids.sort()[0]}
        drawn |= (
            {"packed": Panels.pack(weight, swiglu), "frozen": weight}
            if packed and make.device == "cpu"
            else {"weight": weight}
        )
        if around:
            drawn |= {"norm": make.normal(depth), "residual": make.normal(*shape[:-1], cols // (1 + swiglu))}
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
    rows=("x", "adapter_id", "residual"),
    error=3.0,  # sums over K in chains of 128; how torch adds depends on the processor
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
        case(5, 64, cols=80, ranks=(4, 16), parts=(48, 16, 16), around=True),
        case(40, 64, cols=66, ranks=(4, 16), parts=(33, 33), packed=True, swiglu=True, around=True, dora=True),
        case(3, 64, cols=66, ranks=(4, 16), parts=(33, 33), swiglu=True, around=True),
        case(70, 64, cols=80, ranks=(4, 100, 16), parts=(48, 16, 16), around=True, exact=True),
        case(9, 40, cols=33, ranks=(20, 3), bias=True, dora=True, exact=True),
        case(40, 64, cols=66, ranks=(4, 16), parts=(33, 33), swiglu=True, exact=True, dora=True),
    ),
    benchmark=(
        case(32, 4096, cols=4096, ranks=(16,) * 32),
        case(16, 2048, cols=2048, ranks=(16,) * 16, packed=True),
        case(512, 2048, cols=2048, ranks=(16,) * 4, packed=True, sort=True),
    ),
    gpu=tuple(case(32, 4096, cols=4096, ranks=(16,) * 32, exact=exact) for exact in (False, True)),
)  # fmt: skip
