"""The KV cache of one layer, in pages of 16 tokens. Its layout is its device's own business: use it through kv_append
and paged_attention.

Both devices have the same shapes, k [P, Hk, D, 16] and v [P, Hk, 16, D]; what differs is how k lies in memory:

- columns, on a CPU: for each KV head keys as [D][16] and values as [16][D]. Then 16 scores, or 16 elements of the output,
  are one vector, and no product is summed across a vector.
- rows, elsewhere: keys as [16][D] too, and k is a transposed view of them. A GPU loads a key as one row, in pieces of 16
  bytes, and its matrix units take it from either side.

Quantised pages hold q = round(x * L / max|x|) for each token and head, and the scale max|x| / L beside them: a quarter of
float32's memory, outside the contract with other dtypes. Of int8 L = 127; of fp8 (torch.float8_e4m3fn: 4 bits of exponent,
3 of mantissa) L = 448, its largest number. With a scale of 1 numbers beyond 448 would be cut off and small ones lose bits
below 2^-6; so all 4 bits of the exponent lie below the row's largest, and what reads int8 with its scales reads fp8.
Rounding is to nearest, ties to even. A key or value that holds a NaN or an infinity has the scale NaN and bytes of 0: no
page holds a NaN of fp8, and kernels may take one for 480. An op's schema takes fp8 as its bits, uint8: torch compares,
copies and compiles little of float8, and integers are what every GPU can read.

A large cache in a CPU's memory is asked for in huge pages: a decode step reads it in pieces of some kilobytes in any
order, and would wait for the address of each.
"""

import contextlib
import math
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from ._op import DTYPES, check, check_like
from ._op import _dispatch_modes as dispatch_modes
from ._op import _is_compiling as is_compiling

PAGE = 16  # tokens; csrc/records/kv_append.h: kPage
# Dtypes of quantised pages: (L, rows below which count as zeros); csrc/cpu/page_bytes.h: PageBytes
QUANTISED = {torch.int8: (127, 1e-35), torch.float8_e4m3fn: (448, 1e-32)}
# As an op's schema takes them, fp8 as its bits, and as Inductor of torch 2.6 hands it over, which drops the view.
# csrc/common.h: DType
PAGE_DTYPES = DTYPES | {torch.int8: 3, torch.uint8: 4, torch.float8_e4m3fn: 4}
COLUMNS = {"cpu"}  # the kinds of device whose kernels want keys as columns


class KVPages(NamedTuple):
    """k [P, Hk, D, 16] and v [P, Hk, 16, D]: one layer's pages, each in one piece, in the layout of their device. Of
    quantised pages (int8, float8_e4m3fn) also the scales, float32 [P, Hk, 2, 16]: those of keys, then of values.

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
        """Zero-filled pages, so that no bit pattern of old memory is ever read. dtype: that of the keys, int8 or
        float8_e4m3fn."""
        for name, value, low in (("pages", pages, 0), ("kv_heads", kv_heads, 1), ("head_dim", head_dim, 1)):
            check(value >= low, lambda n=name, v=value, m=low: f"KVPages: {n} is {v}, allowed: >= {m}")
        rows = (pages, kv_heads, PAGE, head_dim)
        scales = _zeros((pages, kv_heads, 2, PAGE), torch.float32, device) if dtype in QUANTISED else None
        if torch.empty(0, device=device).device.type in COLUMNS:
            return cls(_zeros((pages, kv_heads, head_dim, PAGE), dtype, device), _zeros(rows, dtype, device), scales)
        return cls(_zeros(rows, dtype, device).mT, _zeros(rows, dtype, device), scales)

    @classmethod
    def of(cls, k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> "KVPages":
        """Pages with the keys and values k and v, both [P, Hk, 16, D], copied. dtype: int8, float8_e4m3fn, or theirs."""
        cache = cls.empty(k.shape[0], k.shape[1], k.shape[3], dtype or k.dtype, k.device)
        if cache.scales is not None:
            (k, cache.scales[:, :, 0]), (v, cache.scales[:, :, 1]) = (quantised(x, dtype) for x in (k, v))
        cache.k.copy_(k.mT)
        cache.v.copy_(v)
        return cache

    def floats(self, dtype: torch.dtype = torch.float32) -> "KVPages":
        """The same pages, or what quantised pages stand for, in `dtype`; keys and values in any layout."""
        if self.scales is None:
            return self
        k, v = self.scales.to(dtype)[:, :, 0, None], self.scales.to(dtype)[:, :, 1, :, None]
        return KVPages(self.k.to(dtype) * k, self.v.to(dtype) * v)

    def as_bits(self) -> "KVPages":
        """As an op's schema takes them: fp8 as uint8."""
        return self._viewed(torch.float8_e4m3fn, torch.uint8)

    def as_numbers(self) -> "KVPages":
        """From an op's schema."""
        return self._viewed(torch.uint8, torch.float8_e4m3fn)

    def _viewed(self, known: torch.dtype, dtype: torch.dtype) -> "KVPages":
        return self if self.k.dtype != known else KVPages(self.k.view(dtype), self.v.view(dtype), self.scales)


def quantised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., D] as int8 or float8_e4m3fn, and scales float32 [...]: x ~ scale * q."""
    largest, smallest = QUANTISED[dtype]
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)
    plain = top.isfinite() & (top >= smallest)
    q = torch.where(plain, x * (largest / top.where(plain, torch.ones_like(top))), 0).clamp(-largest, largest)
    scale = torch.where(plain, top / largest, torch.zeros_like(top).masked_fill(~top.isfinite(), float("nan")))
    return (q.round() if dtype == torch.int8 else q).to(dtype), scale[..., 0]


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
    """cache: of the dtype of `like`, which the op calls `name`, or quantised with scales."""
    k_pages, v_pages, scales = cache
    if scales is None:
        check_like(op, "k_pages", k_pages, name, like)
        check_like(op, "v_pages", v_pages, name, like)
    else:
        _check_quantised(op, cache, like)
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


def _check_quantised(op: str, cache: KVPages, like: Tensor) -> None:
    k_pages, v_pages, scales = cache
    if k_pages.dtype not in QUANTISED or v_pages.dtype != k_pages.dtype or scales.dtype != torch.float32:
        raise TypeError(
            f"{op}: with scales, pages are int8 or float8_e4m3fn and scales float32, got {k_pages.dtype}, "
            f"{v_pages.dtype} and {scales.dtype}; make them with KVPages.empty(pages, kv_heads, head_dim, torch.int8)"
        )
    shape = (*k_pages.shape[:2], 2, PAGE)
    check(
        scales.shape == shape and scales.stride()[1:] == (2 * PAGE, PAGE, 1) and k_pages.shape[2] % 16 == 0,
        lambda: (
            f"{op}: quantised pages {tuple(k_pages.shape)} with scales {tuple(scales.shape)}: the head dim must be a multiple "
            f"of 16, and scales {shape}, each page contiguous; for other head dims use float pages"
        ),
    )
    check(
        k_pages.device == v_pages.device == scales.device == like.device,
        lambda: (
            f"{op}: pages on {k_pages.device}, scales on {scales.device} and rows on {like.device} must be on one device"
        ),
    )
