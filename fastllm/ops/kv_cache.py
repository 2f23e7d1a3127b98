"""The KV cache of one layer, in pages of 16 tokens. Its layout is its device's own business: use it through kv_append
and paged_attention.

Both devices have the same shapes, k [P, Hk, D, 16] and v [P, Hk, 16, D]; what differs is how k lies in memory:

- columns, on a CPU: for each KV head keys as [D][16] and values as [16][D]. Then 16 scores, or 16 elements of the output,
  are one vector, and no product is summed across a vector.
- rows, elsewhere: keys as [16][D] too, and k is a transposed view of them. A GPU loads a key as one row, in pieces of 16
  bytes, and its matrix units take it from either side.

A large cache in a CPU's memory is asked for in huge pages: a decode step reads it in pieces of some kilobytes in any
order, and would wait for the address of each.
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
COLUMNS = {"cpu"}  # the kinds of device whose kernels want keys as columns


class KVPages(NamedTuple):
    """k [P, Hk, D, 16] and v [P, Hk, 16, D]: one layer's pages, each in one piece, in the layout of their device.

    A token's flat slot is page * 16 + offset.
    """

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
        rows = (pages, kv_heads, PAGE, head_dim)
        if torch.empty(0, device=device).device.type in COLUMNS:
            return cls(_zeros((pages, kv_heads, head_dim, PAGE), dtype, device), _zeros(rows, dtype, device))
        return cls(_zeros(rows, dtype, device).mT, _zeros(rows, dtype, device))

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> "KVPages":
        """Pages with the keys and values k and v, both [P, Hk, 16, D], copied."""
        cache = cls.empty(k.shape[0], k.shape[1], k.shape[3], k.dtype, k.device)
        cache.k.copy_(k.mT)
        cache.v.copy_(v)
        return cache


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
    k, v, in_page = tuple(k_pages.shape), tuple(v_pages.shape), dim * PAGE
    columns = k_pages.device.type in COLUMNS
    good = k_pages.dim() == 4 and v_pages.dim() == 4 and k[2:] == (dim, PAGE) and v == (*k[:2], PAGE, dim)
    good = good and kv_heads in (None, k[1])
    # One page in one piece; pages may lie apart, as they do where a page holds all layers.
    good = good and k_pages.stride()[1:] == ((in_page, PAGE, 1) if columns else (in_page, 1, dim))
    good = good and v_pages.stride()[1:] == (in_page, dim, 1)
    check(
        good,
        lambda: (
            f"{op}: cache pages {k} and {v} must be [P, {kv_heads or 'Hk'}, {dim}, {PAGE}] and "
            f"[P, {kv_heads or 'Hk'}, {PAGE}, {dim}], each page contiguous"
            f"{'' if columns else ', keys as rows (k a transposed view)'}; "
            "make them with KVPages.empty(pages, kv_heads, head_dim)"
        ),
    )
