"""kv_append against rope and two indexed assignments."""

import torch

from ... import ops
from ...ops.kv_cache import PAGE, KVPages, quantised
from ..case import Case, Suite
from .paged_attention import QUANTISED
from .rope import plain as plain_rope


def run(k, v, slot, position, table, q=None, pages=0, cache=None):
    """The op on a new cache of `pages` pages, or on `cache`; the rotated q (when given) and the pages."""
    if cache is None:
        cache = KVPages.empty(pages, k.shape[1], k.shape[2], k.dtype, k.device)
    rotated = ops.kv_append(k, v, cache, slot, position, table, q)
    outputs = cache if cache.scales is not None else (cache.k, cache.v)  # no slice: Dynamo of torch 2.6 fails there
    return tuple(outputs) if q is None else (rotated, *outputs)


def plain(k, v, slot, position, table, q=None, pages=0, cache=None):
    if cache is None:
        cache = KVPages.empty(pages, k.shape[1], k.shape[2], k.dtype, k.device)
    new_q, new_k = plain_rope(k if q is None else q, k, position, table)
    written = torch.nonzero(slot >= 0).flatten()
    page, offset = slot[written] // PAGE, slot[written] % PAGE
    new_k, new_v, outputs = new_k[written], v[written], cache[:2]
    if cache.scales is not None:
        (new_k, cache.scales[page, :, 0, offset]), (new_v, cache.scales[page, :, 1, offset]) = (
            quantised(x, cache.k.dtype) for x in (new_k, new_v)
        )
        outputs = cache
    cache.k[page, :, :, offset] = new_k
    cache.v[page, :, offset] = new_v
    return tuple(outputs) if q is None else (new_q, *outputs)


def inputs(make, tokens, heads, kv_heads, dim, rotary, in_order, keep, kv=None):
    pages = tokens // PAGE + 2
    order = torch.arange(pages * PAGE) if in_order else torch.randperm(pages * PAGE, generator=make.generator)
    slot = order[:tokens].clone()
    if not in_order:
        slot[::3] = -1
    return {
        "k": make.normal(tokens, kv_heads, dim),
        "v": make.normal(tokens, kv_heads, dim),
        "slot": slot.to(make.device),
        "position": make.integers(0, 1000, tokens),
        "table": ops.rope_table(1000, rotary or dim, device=make.device),
        "pages": pages,
        **({"q": make.normal(tokens, heads, dim)} if heads else {}),
        **({"cache": KVPages.empty(pages, kv_heads, dim, QUANTISED.get(kv, make.dtype), make.device)} if keep else {}),
    }


def case(tokens, heads, kv_heads, dim, rotary=None, in_order=False, keep=False, kv=None) -> Case:
    label = f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}" + (f", rotary {rotary}" if rotary else "")
    label += f", {kv}" if kv else ""
    elements = tokens * (heads + 2 * kv_heads) * dim
    return Case(
        label,
        lambda make: inputs(make, tokens, heads, kv_heads, dim, rotary, in_order, keep, kv),
        bytes=lambda size: 2 * elements * size,  # of quantised pages: what is read, and more than what is written
        flops=3 * elements,
    )


def fused(make):
    qkv = make.normal(7, 4 + 2 + 2, 48)
    drawn = inputs(make, 7, 4, 2, 48, None, True, False)
    return {**drawn, "q": qkv[:, :4], "k": qkv[:, 4:6], "v": qkv[:, 6:], "position": drawn["position"].int()}


SUITE = Suite(
    op="kv_append",
    run=run,
    reference=plain,
    correct=(
        case(1, 9, 3, 64),
        case(5, 0, 3, 64),
        case(37, 4, 2, 128, in_order=True),
        case(20, 3, 1, 33, rotary=12),
        case(3, 2, 2, 7, rotary=6),
        case(0, 2, 1, 16),
        Case("views of a fused qkv", fused),
    ),
    benchmark=(
        case(1, 9, 3, 64, in_order=True, keep=True),
        case(1, 32, 4, 64, in_order=True, keep=True),
        case(512, 9, 3, 64, in_order=True, keep=True),
        case(512, 9, 3, 64, in_order=True, keep=True, kv="int8"),
        case(512, 9, 3, 64, in_order=True, keep=True, kv="fp8"),
        case(64, 32, 8, 128, in_order=True, keep=True),
    ),
)
