"""paged_attention against its formula: pages gathered, then a dense softmax for each sequence."""

import copy

import torch

from ... import ops
from ...ops import AttentionSpec, KVPages
from ...ops.kv_cache import PAGE
from ..case import Case, Suite
from .attention import CAUSAL, extra, learned, on_device, seen_pairs, spec_of
from .attention import plain as plain_attention

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def run(q, k_pages, v_pages, block_table, context_len, cu_q, spec=CAUSAL, sinks=None, scales=None):
    spec = spec if sinks is None else AttentionSpec(**{**vars(spec), "sinks": sinks})
    return ops.paged_attention(q, KVPages(k_pages, v_pages, scales), block_table, context_len, cu_q, spec)


def gather(pages: torch.Tensor, table: torch.Tensor, keys: int, transposed: bool) -> torch.Tensor:
    """One sequence's keys or values, [keys, Hk, D]."""
    rows = pages[table.long()[: -(-keys // PAGE)]]
    rows = rows.permute(0, 3, 1, 2) if transposed else rows.transpose(1, 2)
    return rows.reshape(-1, rows.shape[2], rows.shape[3])[:keys]


def plain(q, k_pages, v_pages, block_table, context_len, cu_q, spec=CAUSAL, sinks=None, scales=None):
    k_pages, v_pages, _ = KVPages(k_pages, v_pages, scales).floats(q.dtype)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b, keys in enumerate(context_len.tolist()):
        k, v = gather(k_pages, block_table[b], keys, True), gather(v_pages, block_table[b], keys, False)
        rows = slice(int(cu_q[b]), int(cu_q[b + 1]))
        out[rows] = plain_attention(q[None, rows], k[None], v[None], spec, sinks=sinks)[0]
    return out


def inputs(make, queries, contexts, heads, kv_heads, dim, spec, unclaimed=0, sinks=False, kv=None):
    pages = [-(-c // PAGE) for c in contexts]
    shuffled = torch.randperm(sum(pages) + 2, generator=make.generator).int()
    table = torch.full((len(contexts), max(pages, default=0) + 1), -1, dtype=torch.int32)  # -1: never read
    for b, count in enumerate(pages):
        begin = sum(pages[:b])
        table[b, :count] = shuffled[begin : begin + count]
    ends = torch.tensor([0, *queries]).cumsum(0).int()
    rows = (len(shuffled), kv_heads, PAGE, dim)
    cache = KVPages.of(make.normal(*rows), make.normal(*rows), QUANTISED.get(kv))
    return {
        "q": make.normal(int(ends[-1]) + unclaimed, heads, dim),
        "k_pages": cache.k,
        "v_pages": cache.v,
        "block_table": table.to(make.device),
        "context_len": torch.tensor(contexts, dtype=torch.int32, device=make.device),
        "cu_q": ends.to(make.device),
        "spec": on_device(spec, make),
        **learned(make, heads, (), sinks),
        **({"scales": cache.scales} if kv else {}),
    }


def copied(inputs):
    """A deepcopy would take the pages out of their huge pages."""
    cache = KVPages.empty(*inputs["k_pages"].shape[:3], inputs["k_pages"].dtype, inputs["q"].device)
    cache.k.copy_(inputs["k_pages"]), cache.v.copy_(inputs["v_pages"])
    others = {name: value for name, value in inputs.items() if name not in ("k_pages", "v_pages")}
    return {**copy.deepcopy(others), "k_pages": cache.k, "v_pages": cache.v}


def case(queries, contexts, heads, kv_heads, dim, unclaimed=0, sinks=False, kv=None, plain=True, **fields) -> Case:
    spec = spec_of(heads, **fields)
    pairs = sum(seen_pairs(spec, n, c) for n, c in zip(queries, contexts, strict=True))
    read = sum(min(c, (spec.window or c) + n - 1) for n, c in zip(queries, contexts, strict=True))  # keys
    words = extra(spec) + (" sinks" if sinks else "") + (f" {kv}" if kv else "")
    words += " exact" if spec.exact else ""
    brief = ", ".join(f"{n}@{c}" for n, c in zip(queries, contexts, strict=True))
    if len(queries) >= 16 and len({*queries}) == len({*contexts}) == 1:
        brief = f"{len(queries)} x {queries[0]}@{contexts[0]}"
    return Case(
        f"{brief} H{heads}/{kv_heads} D{dim}{words}",
        lambda make: inputs(make, queries, contexts, heads, kv_heads, dim, spec, unclaimed, sinks, kv),
        bytes=lambda size: (
            2 * sum(queries) * heads * dim * size + 2 * read * kv_heads * (dim + 4 if kv else dim * size)
        ),
        flops=4 * heads * dim * pairs,
        plain=plain,
    )


SUITE = Suite(
    op="paged_attention",
    run=run,
    reference=plain,
    copy=copied,
    correct=(
        case([1], [1], 1, 1, 16),
        case([1], [128], 9, 3, 64),
        case([1, 1, 1], [5, 300, 1100], 9, 3, 64),
        case([1, 1], [1500, 20], 32, 4, 64),
        case([1], [2000], 16, 1, 128),
        case([1], [1300], 3, 3, 80),
        case([7, 1, 30], [600, 33, 30], 6, 2, 64),
        case([130], [130], 9, 3, 64),
        case([64, 1], [1200, 1200], 4, 2, 48, window=100),
        case([3, 0, 2], [40, 17, 0], 4, 4, 33, unclaimed=2),
        case([5], [1050], 2, 1, 7, causal=False),
        case([2, 2], [500, 400], 8, 2, 256, softcap=3.0),
        case([1, 40], [1300, 300], 6, 2, 64, alibi=True, window=400),
        case([2, 3], [50, 290], 6, 2, 32, alibi=True, sinks=True),
        case([4], [300], 4, 4, 16, causal=False, window=40),
        case([], [], 2, 1, 16, unclaimed=1),
        case([1, 1], [1500, 20], 9, 3, 64, kv="int8"),
        case([1], [1100], 32, 4, 80, kv="int8"),
        case([130, 7], [130, 600], 6, 2, 48, kv="int8", window=100, softcap=3.0),
        case([3, 0, 2], [40, 17, 0], 4, 4, 16, unclaimed=2, kv="int8", sinks=True),
        case([1, 1], [1500, 20], 9, 3, 64, kv="fp8"),
        case([1], [1100], 32, 4, 80, kv="fp8"),
        case([130, 7], [130, 600], 6, 2, 48, kv="fp8", window=100, softcap=3.0),
        case([3, 0, 2], [40, 17, 0], 4, 4, 16, unclaimed=2, kv="fp8", sinks=True),
        case([1, 20], [300, 20], 6, 2, 32, kv="fp8", alibi=True, exact=True),
    ),
    benchmark=(
        case([1], [4096], 32, 4, 64),
        case([1], [4096], 32, 4, 64, kv="int8"),
        case([1], [4096], 32, 4, 64, kv="fp8"),
        case([1], [4096], 32, 4, 64, kv="fp8", exact=True),
        case([1], [4096], 32, 4, 128),
        case([1], [4096], 32, 8, 128, exact=True, window=1024, softcap=30.0),
        case([1], [128], 9, 3, 64),
        case([1] * 16, [512] * 16, 9, 3, 64),
        case([1] * 16, [512] * 16, 9, 3, 64, kv="int8"),
        case([1] * 16, [512] * 16, 9, 3, 64, kv="fp8"),
        case([512], [512], 9, 3, 64),
    ),
    gpu=(
        *(
            case([1] * batch, [keys] * batch, 32, 8, 128, plain=False)
            for batch, keys in ((1, 4096), (1, 32768), (16, 4096), (64, 4096), (128, 1024))
        ),
        case([1] * 16, [4096] * 16, 32, 8, 128, plain=False, kv="int8"),
        case([1] * 16, [4096] * 16, 32, 8, 128, plain=False, kv="fp8"),
        case([1] * 16, [4096] * 16, 32, 8, 128, plain=False, kv="fp8", exact=True),
        case([1] * 16, [4096] * 16, 32, 8, 128, plain=False, exact=True),
    ),
)
