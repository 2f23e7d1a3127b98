"""The KV cache of one layer, in pages of 16 tokens. Its layout is its device's own business: use it through kv_append
and paged_attention.

Both devices have the same shapes, k [P, Hk, D, 16] and v [P, Hk, 16, D]; what differs is how k lies in memory:

- columns, on a CPU: for each KV head keys as [D][16] and values as [16][D]. Then 16 scores, or 16 elements of the output,
  are one vector, and no product is summed across a vector.
- rows, elsewhere: keys as [16][D] too, and k is a transposed view of them. A GPU loads a key as one row, in pieces of 16
  bytes, and its matrix units take it from either side.

Pages of int8 hold q = round(x * 127 / max|x|) for each token and head, and the scale max|x| / 127 beside them: a quarter of
float32's memory, outside the contract with other dtypes. A key or value that holds a NaN or an infinity has the scale NaN.

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
from ._op import check, check_like

PAGE = 16  # tokens; csrc/records/kv_append.h: kPage
SMALLEST = 1e-35  # int8: numbers below this count as zeros; csrc/cpu/s8.h: kSmallest
COLUMNS = {"cpu"}  # the kinds of device whose kernels want keys as columns


class KVPages(NamedTuple):
    """k [P, Hk, D, 16] and v [P, Hk, 16, D]: one layer's pages, each in one piece, in the layout of their device. Of int8 pages
    also the scales, float32 [P, Hk, 2, 16]: those of keys, then of values.

    A token's flat slot is page * 16 + offset.
    """

    k: Tensor
    v: Tensor
    scales: Tensor | None = None

    @classmethod
    def empty(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "KVPages":
        """Zero-filled pages, so that no bit pattern of old memory is ever read. dtype: that of the keys, or int8."""
        for name, value, low in (("pages", pages, 0), ("kv_heads", kv_heads, 1), ("head_dim", head_dim, 1)):
            check(value >= low, lambda n=name, v=value, m=low: f"KVPages: {n} is {v}, allowed: >= {m}")
        rows = (pages, kv_heads, PAGE, head_dim)
        scales = _zeros((pages, kv_heads, 2, PAGE), torch.float32, device) if dtype == torch.int8 else None
        if torch.empty(0, device=device).device.type in COLUMNS:
            return cls(_zeros((pages, kv_heads, head_dim, PAGE), dtype, device), _zeros(rows, dtype, device), scales)
        return cls(_zeros(rows, dtype, device).mT, _zeros(rows, dtype, device), scales)

    @classmethod
    def of(cls, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> "KVPages":
        """Pages with the keys and values k and v, both [P, Hk, 16, D], copied. dtype: int8, or theirs."""
        cache = cls.empty(k.shape[0], k.shape[1], k.shape[3], dtype or k.dtype, k.device)
        if cache.scales is not None:
            (k, cache.scales[:, :, 0]), (v, cache.scales[:, :, 1]) = to_int8(k), to_int8(v)
        cache.k.copy_(k.mT)
        cache.v.copy_(v)
        return cache

    def floats(self, dtype: torch.dtype = torch.float32) -> "KVPages":
        """The same pages, or what int8 pages stand for, in `dtype`; keys and values in any layout."""
        if self.scales is None:
            return self
        k, v = self.scales.to(dtype)[:, :, 0, None], self.scales.to(dtype)[:, :, 1, :, None]
        return KVPages(self.k * k, self.v * v)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 and scales float32 [...]: x ~ scale * q."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)
    plain = top.isfinite() & (top >= SMALLEST)
    q = torch.where(plain, x * (127 / top.where(plain, torch.ones_like(top))), 0).round().to(torch.int8)
    scale = torch.where(plain, top / 127, torch.where(top.isfinite(), 0.0, float("nan")))
    return q, scale[..., 0]


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


def check_pages(op: str, cache: KVPages, name: str, like: Tensor, kv_heads: int | None, dim: int) -> None:
    """cache: of the dtype of `like`, which the op calls `name`, or of int8 with scales."""
    k_pages, v_pages, scales = cache
    if scales is None:
        check_like(op, "k_pages", k_pages, name, like)
        check_like(op, "v_pages", v_pages, name, like)
    else:
        _check_int8(op, cache, like)
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


def _check_int8(op: str, cache: KVPages, like: Tensor) -> None:
    k_pages, v_pages, scales = cache
    if k_pages.dtype != torch.int8 or v_pages.dtype != torch.int8 or scales.dtype != torch.float32:
        raise TypeError(
            f"{op}: with scales, pages are int8 and scales float32, got {k_pages.dtype}, {v_pages.dtype} and "
            f"{scales.dtype}; make them with KVPages.empty(pages, kv_heads, head_dim, torch.int8)"
        )
    shape = (*k_pages.shape[:2], 2, PAGE)
    check(
        scales.shape == shape and scales.stride()[1:] == (2 * PAGE, PAGE, 1) and k_pages.shape[2] % 16 == 0,
        lambda: (
            f"{op}: int8 pages {tuple(k_pages.shape)} with scales {tuple(scales.shape)}: the head dim must be a multiple "
            f"of 16, and scales {shape}, each page contiguous; for other head dims use float pages"
        ),
    )
    check(
        k_pages.device == v_pages.device == scales.device == like.device,
        lambda: (
            f"{op}: pages on {k_pages.device}, scales on {scales.device} and rows on {like.device} must be on one device"
        ),
    )
