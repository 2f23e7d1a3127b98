"""attention against its formula."""

from dataclasses import replace

import torch

from ... import ops
from ...ops import AttentionSpec, Dropout
from ...ops._dropout import keep
from ..case import Case, Suite

CAUSAL = AttentionSpec()


def run(q, k, v, spec=CAUSAL, cu_q=None, cu_k=None, **learned):
    """The op; `learned`, a bias or sinks, belongs to the spec, but is an input where gradients are checked."""
    spec = replace(spec, **learned) if learned else spec
    return ops.attention(q, k, v, spec) if cu_q is None else ops.attention_varlen(q, k, v, cu_q, cu_k, spec)


def visible(spec: AttentionSpec, queries: int, keys: int, device) -> torch.Tensor:
    """[Sq, Sk]: which keys a query sees; queries are the last positions."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance.abs() < spec.window) if spec.window else seen


def seen_pairs(spec: AttentionSpec, queries: int, keys: int) -> int:
    """How many products of a query and a key a head needs: the sum of `visible`."""
    row = torch.arange(keys - queries, keys)
    window = spec.window or keys + queries
    end = row + 1 if spec.causal else row + window
    return int((end.clamp(max=keys) - (row - window + 1).clamp(min=0)).clamp(min=0).sum())


def plain(q, k, v, spec=CAUSAL, cu_q=None, cu_k=None, bias=None, sinks=None):
    if cu_q is not None:
        return plain_varlen(q, k, v, spec, cu_q.tolist(), cu_k.tolist(), bias, sinks)
    return plain_rows(q, k, v, spec, bias, sinks, 0)


def plain_varlen(q, k, v, spec, ends_q, ends_k, bias, sinks):
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        part = None
        if bias is not None:
            part = bias[b : b + 1] if len(bias) > 1 else bias
            part = part[:, :, : rows.stop - rows.start, : keys.stop - keys.start]
        piece = (q[None, rows], k[None, keys], v[None, keys])
        out[rows] = plain_rows(*piece, spec, part, sinks, rows.start * q.shape[1])[0]
    return out


def plain_rows(q, k, v, spec, bias, sinks, first_row):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if spec.scale is None else spec.scale)
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    queries, keys = scores.shape[-2:]
    if bias is not None:
        scores = scores + bias
    if spec.alibi is not None:
        i, j = torch.arange(keys - queries, keys, device=q.device)[:, None], torch.arange(keys, device=q.device)
        scores = scores - (spec.alibi[:, None, None] * (i - j).abs()).to(scores.dtype)
    scores = scores.where(visible(spec, queries, keys, q.device), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)), -1)
    seen = (scores > -torch.inf).any(-1, keepdim=True)
    weights = torch.softmax(scores.where(seen, 0.0), -1).where(seen, 0.0)[..., :keys]
    if spec.dropout:
        rows = first_row + torch.arange(weights.shape[:3].numel(), device=q.device).view(*weights.shape[:3], 1)
        kept = keep(rows, torch.arange(keys, device=q.device), *spec.dropout.arguments())
        weights = weights.where(kept, 0.0) / (1 - spec.dropout.p)
    return (weights @ v).transpose(1, 2)


def extra(spec: AttentionSpec) -> str:
    """What a label says of a spec."""
    fields = {n: v for n, v in vars(spec).items() if not torch.is_tensor(v) and v is not None and n != "exact"}
    words = [f"{n} {v.p if n == 'dropout' else v}" for n, v in fields.items() if n != "causal"]
    words += ["full"] * (not spec.causal) + ["alibi"] * (spec.alibi is not None)
    return "".join(f" {w}" for w in words)


def slopes(heads: int) -> torch.Tensor:
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


def spec_of(heads: int, alibi: bool = False, dropout: float = 0.0, **fields) -> AttentionSpec:
    drop = Dropout(dropout, seed=11, call=3) if dropout else None
    return AttentionSpec(alibi=slopes(heads) if alibi else None, dropout=drop, **fields)


def on_device(spec: AttentionSpec, make) -> AttentionSpec:
    return spec if spec.alibi is None else AttentionSpec(**{**vars(spec), "alibi": spec.alibi.to(make.device)})


def learned(make, heads: int, bias: tuple[int, ...], sinks: bool) -> dict:
    return {
        **({"bias": make.normal(*bias)} if bias else {}),
        **({"sinks": make.normal(heads, scale=2.0)} if sinks else {}),
    }


def case(batch, queries, keys, heads, kv_heads, dim, bias=(), sinks=False, plain=True, **fields) -> Case:
    spec = spec_of(heads, **fields)
    pairs = seen_pairs(spec, queries, keys)
    words = (f" bias {'x'.join(map(str, bias))}" if bias else "") + (" sinks" if sinks else "")
    return Case(
        f"B{batch} Sq{queries} Sk{keys} H{heads}/{kv_heads} D{dim}{extra(spec)}{words}",
        lambda make: {
            "q": make.normal(batch, queries, heads, dim),
            "k": make.normal(batch, keys, kv_heads, dim),
            "v": make.normal(batch, keys, kv_heads, dim),
            "spec": on_device(spec, make),
            **learned(make, heads, bias, sinks),
        },
        bytes=lambda size: batch * dim * (2 * queries * heads + 2 * keys * kv_heads) * size,
        flops=4 * batch * heads * dim * pairs,
        backward_bytes=lambda size: batch * dim * (4 * queries * heads + 4 * keys * kv_heads) * size,
        backward_flops=10 * batch * heads * dim * pairs,
        apart=not spec.dropout and bias[:1] in ((), (1,)),
        plain=plain,
    )


def varlen(lengths_q, lengths_k, heads, kv_heads, dim, unclaimed=0, bias=(), sinks=False, **fields) -> Case:
    spec = spec_of(heads, **fields)
    words = (f" bias {'x'.join(map(str, bias))}" if bias else "") + (" sinks" if sinks else "")
    brief = " ".join(f"{q}:{k}" for q, k in zip(lengths_q, lengths_k, strict=True))

    def inputs(make):
        ends = (torch.tensor([0, *lengths]).cumsum(0).int().to(make.device) for lengths in (lengths_q, lengths_k))
        return {
            "q": make.normal(sum(lengths_q) + unclaimed, heads, dim),
            "k": make.normal(sum(lengths_k), kv_heads, dim),
            "v": make.normal(sum(lengths_k), kv_heads, dim),
            "spec": on_device(spec, make),
            **dict(zip(("cu_q", "cu_k"), ends, strict=True)),
            **learned(make, heads, bias, sinks),
        }

    pairs = sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))
    label = f"packed {brief} H{heads}/{kv_heads} D{dim}{extra(spec)}{words}"
    return Case(label, inputs, flops=4 * heads * dim * pairs, apart=False)


def fused(make):
    qkv = make.normal(2, 70, 6 + 2 + 2, 48)
    return {"q": qkv[:, :, :6], "k": qkv[:, :, 6:8], "v": qkv[:, :, 8:], "spec": CAUSAL}


SUITE = Suite(
    op="attention",
    run=run,
    reference=plain,
    gradients=("q", "k", "v", "bias", "sinks"),
    rows=("q", "k", "v"),
    cancelled=2.0**-22,
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
        case(1, 290, 310, 4, 2, 32, causal=False, window=40),
        case(2, 33, 290, 8, 2, 96, softcap=5.0, scale=0.3),
        case(1, 300, 40, 3, 1, 256),
        case(1, 19, 19, 2, 2, 33),
        case(1, 3, 520, 2, 2, 1),
        case(1, 0, 5, 2, 2, 64),
        case(0, 5, 5, 2, 2, 64),
        case(1, 4, 0, 2, 1, 64),
        case(1, 50, 290, 6, 2, 40, alibi=True),
        case(2, 70, 30, 4, 4, 16, alibi=True, causal=False, window=50),
        case(2, 40, 270, 6, 3, 32, sinks=True),
        case(1, 20, 5, 4, 1, 32, sinks=True, window=3),
        case(2, 37, 300, 6, 2, 32, bias=(1, 6, 37, 300), causal=False),
        case(3, 40, 40, 4, 2, 24, bias=(3, 1, 1, 40), causal=False, softcap=4.0),
        case(2, 30, 33, 4, 1, 16, bias=(2, 4, 30, 1), sinks=True),
        case(2, 50, 270, 6, 2, 32, dropout=0.3),
        case(1, 40, 290, 4, 4, 48, bias=(1, 4, 40, 290), sinks=True, dropout=0.1, softcap=8.0, window=200),
        varlen([5, 0, 300, 1], [5, 3, 300, 270], 6, 2, 32),
        varlen([40, 7], [20, 290], 4, 4, 33, causal=False, sinks=True, unclaimed=3),
        varlen([30, 20], [30, 50], 4, 2, 16, bias=(2, 4, 30, 50), dropout=0.2, alibi=False),
        varlen([0], [0], 2, 1, 16, unclaimed=2),
        Case("views of a fused qkv", fused, flops=4 * 2 * 6 * 48 * 70 * 71 // 2),
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
        case(4, 512, 512, 12, 12, 64, causal=False),
        case(1, 512, 512, 8, 8, 64, bias=(1, 8, 512, 512), sinks=True, softcap=8.0, window=256, dropout=0.1),
    ),
    gpu=(
        *(
            case(batch, length, length, heads, heads, dim, plain=False, causal=causal)
            for batch, heads, length, dim, causal in (
                (4, 32, 4096, 64, True),
                (1, 32, 16384, 64, True),
                (16, 16, 1024, 128, True),
                (4, 16, 4096, 128, True),
                (1, 16, 16384, 128, True),
                (1, 16, 16384, 128, False),
            )
        ),
        case(4, 4096, 4096, 32, 8, 128, plain=False, window=1024, softcap=30.0),
    ),
)
