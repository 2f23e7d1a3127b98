"""The KV cache of one layer, in pages of 16 tokens. Its layout is its device's own business: use it through kv_append
and paged_attention.

On a CPU a page holds, for each KV head, keys as [D][16] and values as [16][D]: then 16 scores, or 16 elements of the
output, are one vector, and no product is summed across a vector. A large cache is asked for in huge pages of memory: a
decode step reads it in pieces of some kilobytes in any order, and would wait for the address of each.
"""

import contextlib
import math
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from ._op import _dispatch_modes as dispatch_modes
from ._op import _is_compiling as is_compiling
from ._op import check

PAGE = 16  # tokens; csrc/records/kv_append.h: kPage


class KVPages(NamedTuple):
    """k [P, Hk, D, 16] and v [P, Hk, 16, D]: one layer's pages, each contiguous. A token's flat slot is page * 16 + offset."""

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
        k = _zeros((pages, kv_heads, head_dim, PAGE), dtype, device)
        return cls(k, _zeros((pages, kv_heads, PAGE, head_dim), dtype, device))


_HUGE = 2 << 20  # bytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    real_cpu = torch.empty(0, device=device).device.type == "cpu" and not (is_compiling() or dispatch_modes())
    if not real_cpu or size < 2 * _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # private: a shared mapping, Python's default, gets no huge pages, and a forked child would write into its parent's cache
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=dtype)
    start = -whole.data_ptr() % _HUGE // dtype.itemsize
    return whole[start : start + math.prod(shape)].zero_().view(shape)  # touched now, not in the first decode steps


def check_pages(op: str, k_pages: Tensor, v_pages: Tensor, kv_heads: int | None, dim: int) -> None:
    k, v = tuple(k_pages.shape), tuple(v_pages.shape)
    good = k_pages.dim() == 4 and v_pages.dim() == 4 and k[2:] == (dim, PAGE) and v == (*k[:2], PAGE, dim)
    good = good and kv_heads in (None, k[1])
    # One page in one piece; pages may lie apart, as they do where a page holds all layers.
    good = good and all(t.stride()[1:] == (dim * PAGE, t.shape[3], 1) for t in (k_pages, v_pages))
    check(
        good,
        lambda: (
            f"{op}: cache pages {k} and {v} must be [P, {kv_heads or 'Hk'}, {dim}, {PAGE}] and "
            f"[P, {kv_heads or 'Hk'}, {PAGE}, {dim}], each page contiguous; "
            "make them with KVPages.empty(pages, kv_heads, head_dim)"
        ),
    )
