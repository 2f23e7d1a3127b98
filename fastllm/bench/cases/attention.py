"""attention against its formula, and against torch's scaled_dot_product_attention."""

import torch

from ... import ops
from ...ops import AttentionSpec
from ..case import Case, Suite

CAUSAL = AttentionSpec()


def visible(spec: AttentionSpec, queries: int, keys: int, device) -> torch.Tensor:
    """[Sq, Sk]: which keys a query sees; queries are the last positions."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance < spec.window) if spec.window else seen


def plain(q, k, v, spec=CAUSAL):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if spec.scale is None else spec.scale)
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    seen = visible(spec, q.shape[2], k.shape[2], q.device)
    weights = torch.softmax(scores.where(seen, -torch.inf), -1).where(seen.any(-1, keepdim=True), 0.0)
    return (weights @ v).transpose(1, 2)


def sdpa(q, k, v, spec=CAUSAL):
    """torch's fused kernel; equal lengths, no window, no cap."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=spec.causal, scale=spec.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def case(batch, queries, keys, heads, kv_heads, dim, label="", **spec) -> Case:
    spec = AttentionSpec(**spec)
    pairs = int(visible(spec, queries, keys, "cpu").sum()) if queries * keys < 1 << 22 else queries * (keys + 1) // 2
    extra = "".join(f" {name} {value}" for name, value in vars(spec).items() if value not in (None, True))
    return Case(
        f"B{batch} Sq{queries} Sk{keys} H{heads}/{kv_heads} D{dim}{extra}",
        lambda make: {
            "q": make.normal(batch, queries, heads, dim),
            "k": make.normal(batch, keys, kv_heads, dim),
            "v": make.normal(batch, keys, kv_heads, dim),
            "spec": spec,
        },
        bytes=lambda size: batch * dim * (2 * queries * heads + 2 * keys * kv_heads) * size,
        flops=4 * batch * heads * dim * pairs,
    )


def fused(make):
    qkv = make.normal(2, 70, 6 + 2 + 2, 48)
    return {"q": qkv[:, :, :6], "k": qkv[:, :, 6:8], "v": qkv[:, :, 8:], "spec": CAUSAL}


SUITE = Suite(
    op="attention",
    run=ops.attention,
    reference=plain,
    rows=("q", "k", "v"),
    dtypes=(torch.float32,),
    correct=(
        case(1, 1, 1, 1, 1, 16),
        case(2, 5, 5, 4, 2, 64),
        case(1, 300, 300, 9, 3, 64),
        case(1, 270, 270, 16, 1, 32),
        case(2, 7, 600, 9, 3, 64),
        case(3, 1, 1500, 8, 2, 128),
        case(1, 530, 530, 3, 3, 80, window=100),
        case(1, 530, 530, 2, 1, 128, window=3),
        case(1, 1030, 1030, 1, 1, 64, window=256),
        case(2, 40, 700, 3, 1, 7, causal=False),
        case(2, 33, 290, 8, 2, 96, softcap=5.0, scale=0.3),
        case(1, 300, 40, 3, 1, 256),
        case(1, 19, 19, 2, 2, 33),
        case(1, 3, 520, 2, 2, 1),
        case(1, 0, 5, 2, 2, 64),
        case(0, 5, 5, 2, 2, 64),
        case(1, 4, 0, 2, 1, 64),
        Case("views of a fused qkv", fused),
        Case(
            "transposed heads and tokens",
            lambda make: {name: make.normal(2, 3, 40, 32).transpose(1, 2) for name in "qkv"},
        ),
        Case(
            "one key and value for the batch",
            lambda make: {
                "q": make.normal(3, 20, 4, 32),
                "k": make.normal(1, 30, 2, 32).expand(3, -1, -1, -1),
                "v": make.normal(1, 30, 2, 32).expand(3, -1, -1, -1),
            },
        ),
    ),
    benchmark=(
        case(1, 1024, 1024, 12, 12, 64),
        case(1, 4096, 4096, 12, 12, 64),
        case(1, 512, 512, 9, 3, 64),
        case(1, 512, 512, 32, 4, 64),
    ),
    peers={"torch sdpa": sdpa},
)
