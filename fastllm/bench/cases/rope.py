"""rope against the formula as Hugging Face writes it: x * cos + rotate_half(x) * sin; interleaved, by complex numbers'
rule on neighbours."""

import torch

from ... import ops
from ..case import Case, Suite


def plain(q, k, position, table, interleaved=False):
    cosine, sine = table[position.long()].unsqueeze(-2).chunk(2, -1)
    width = table.shape[1]
    if interleaved:
        cosine, sine = cosine.repeat_interleave(2, -1), sine.repeat_interleave(2, -1)
    else:
        cosine, sine = torch.cat((cosine, cosine), -1), torch.cat((sine, sine), -1)

    def rotated(x):
        x, rest = x[..., :width], x[..., width:]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if interleaved:
            half = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
        else:
            half = torch.cat((-wide[..., width // 2 :], wide[..., : width // 2]), -1)
        return torch.cat(((wide * cosine + half * sine).to(x.dtype), rest), -1)

    return rotated(q), rotated(k)


def case(
    *tokens: int, heads: int, kv_heads: int, dim: int, rotary: int | None = None, interleaved: bool = False
) -> Case:
    shape = "x".join(map(str, tokens))
    elements = torch.Size(tokens).numel() * (heads + kv_heads) * dim
    notes = (f", rotary {rotary}" if rotary else "") + (", interleaved" if interleaved else "")
    return Case(
        f"{shape} tokens, {heads}/{kv_heads} heads of {dim}{notes}",
        lambda make: {
            "q": make.normal(*tokens, heads, dim),
            "k": make.normal(*tokens, kv_heads, dim),
            "position": make.integers(0, 4096, *tokens),
            "table": ops.rope_table(4096, rotary or dim, device=make.device),
            **({"interleaved": True} if interleaved else {}),
        },
        bytes=lambda size: 2 * elements * size,
        flops=3 * elements,
        backward_bytes=lambda size: 2 * elements * size,
        backward_flops=3 * elements,
    )


def table_of(make, positions: int, dim: int) -> torch.Tensor:
    return ops.rope_table(positions, dim, device=None if make.device == "meta" else make.device)


def fused(make):
    """q and k as views of a fused [B, S, (H + 2 Hk) D] projection, positions in int32."""
    qkv = make.normal(2, 9, (6 + 2 * 2) * 40).view(2, 9, 10, 40)
    position = make.integers(0, 100, 2, 9, dtype=torch.int32)
    return {"q": qkv[:, :, :6], "k": qkv[:, :, 6:8], "position": position, "table": table_of(make, 100, 40)}


SUITE = Suite(
    op="rope",
    run=ops.rope,
    reference=plain,
    gradients=("q", "k"),
    rows=("q", "k", "position"),
    correct=(
        case(1, heads=1, kv_heads=1, dim=2),
        case(5, heads=9, kv_heads=3, dim=64),
        case(2, 7, heads=4, kv_heads=4, dim=128),
        case(3, heads=3, kv_heads=1, dim=46),
        case(4, heads=2, kv_heads=2, dim=80, rotary=20),
        case(3, heads=2, kv_heads=1, dim=7, rotary=6),
        case(5, heads=9, kv_heads=3, dim=64, interleaved=True),
        case(2, 3, heads=3, kv_heads=1, dim=46, interleaved=True),
        case(4, heads=2, kv_heads=2, dim=80, rotary=20, interleaved=True),
        case(3, heads=2, kv_heads=1, dim=7, rotary=6, interleaved=True),
        case(0, heads=2, kv_heads=1, dim=16),
        case(2, 0, heads=2, kv_heads=1, dim=16),
        Case("views of a fused qkv", fused),
        *(case(2050, heads=8, kv_heads=8, dim=64, interleaved=i) for i in (False, True)),  # stores past the cache
        Case(
            "transposed heads and tokens",
            lambda make: {
                "q": make.normal(2, 4, 6, 32).transpose(1, 2),
                "k": make.normal(2, 2, 6, 32).transpose(1, 2),
                "position": torch.arange(6, device=make.device).expand(2, -1),
                "table": table_of(make, 6, 32),
            },
        ),
    ),
    benchmark=(
        case(2048, heads=32, kv_heads=4, dim=64),
        case(2048, heads=9, kv_heads=3, dim=64),
        case(1, heads=32, kv_heads=4, dim=64),
        case(2048, heads=32, kv_heads=4, dim=64, interleaved=True),
        case(4, 4096, heads=32, kv_heads=8, dim=128),
    ),
    gpu=(case(4, 4096, heads=32, kv_heads=8, dim=128),),
)
