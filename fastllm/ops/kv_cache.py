"""The KV cache of one layer, in pages of 16 tokens. Its layout is its device's own business: use it through kv_append
and paged_attention.

On a CPU a page holds, for each KV head, keys as [D][16] and values as [16][D]: then 16 scores, or 16 elements of the
output, are one vector, and no product is summed across a vector.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._op import check

PAGE = 16  # tokens; csrc/common.h: kPage


class KVPages(NamedTuple):
    """k [P, Hk, D, 16] and v [P, Hk, 16, D]: one layer's pages. A token's flat slot is page * 16 + offset."""

    k: Tensor
    v: Tensor

    @classmethod
    def empty(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "KVPages":
        """Zero-filled pages, so that no bit pattern of old memory is ever read."""
        for name, value, low in (("pages", pages, 0), ("kv_heads", kv_heads, 1), ("head_dim", head_dim, 1)):
            check(value >= low, lambda n=name, v=value, m=low: f"KVPages: {n} is {v}, allowed: >= {m}")
        k = torch.zeros(pages, kv_heads, head_dim, PAGE, dtype=dtype, device=device)
        return cls(k, torch.zeros(pages, kv_heads, PAGE, head_dim, dtype=dtype, device=device))


def check_pages(op: str, k_pages: Tensor, v_pages: Tensor, kv_heads: int | None, dim: int) -> None:
    k, v = tuple(k_pages.shape), tuple(v_pages.shape)
    good = k_pages.dim() == 4 and v_pages.dim() == 4 and k[2:] == (dim, PAGE) and v == (*k[:2], PAGE, dim)
    good = good and kv_heads in (None, k[1]) and k_pages.is_contiguous() and v_pages.is_contiguous()
    check(
        good,
        lambda: (
            f"{op}: cache pages {k} and {v} must be contiguous [P, {kv_heads or 'Hk'}, {dim}, {PAGE}] and "
            f"[P, {kv_heads or 'Hk'}, {PAGE}, {dim}]; make them with KVPages.empty(pages, kv_heads, head_dim)"
        ),
    )
