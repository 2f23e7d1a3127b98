"""kv_append: what a layer does between its qkv projection and its attention, in one pass.

k is rotated by rope and written into the cache with v, each token at its flat slot page * 16 + offset; q, when given,
is rotated into a new tensor. The bits of both rotations are those of ops.rope.

Shapes: k, v [T, Hk, D]; q [T, H, D]; cache: KVPages of one layer, of their dtype or quantised; slot [T] int64, unique,
negative where a row is not to be written; position [T] int64 or int32; table from rope_table, float32. Dtypes: float32,
bfloat16, float16, one for the rest. k, v, q may be views of a fused qkv. Into quantised pages k goes as the rotation's float32.
The cache is written in place and receives no gradient. A slot or position out of range raises IndexError; on a GPU, which
a check would make wait, such a slot is not written, and such a position gives NaN.
"""

from typing import overload

import torch
from torch import Tensor

from .. import _C
from . import _cuda
from ._e4m3 import encode
from ._op import DTYPES, Op, check, check_dtype, check_like, pointer
from ._triton import tl, triton
from .kv_cache import PAGE, PAGE_DTYPES, KVPages, check_pages, quantised
from .rope import check_table, turned, unit_stride
from .rope import reference as rotate

# ---------------------------------------------------------------------------------------------------------- reference


def reference(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None,
    slot: Tensor, position: Tensor, table: Tensor, q: Tensor | None,
) -> Tensor:  # fmt: skip
    new_q, new_k = rotate(k if q is None else q, k if scales is None else k.float(), position, table)
    written = slot >= 0
    page, offset = slot[written] // PAGE, slot[written] % PAGE
    new_k, new_v = new_k[written].detach(), v[written].detach()
    if scales is not None:
        dtype = KVPages(k_pages, v_pages).as_numbers().k.dtype
        (new_k, scales[page, :, 0, offset]), (new_v, scales[page, :, 1, offset]) = (
            quantised(x, dtype) for x in (new_k, new_v)
        )
        new_k, new_v, _ = KVPages(new_k, new_v).as_bits()
    k_pages[page, :, :, offset] = new_k.to(k_pages.dtype)
    v_pages[page, :, offset] = new_v.to(v_pages.dtype)
    return k.new_empty(0) if q is None else new_q


# ------------------------------------------------------------------------------------------------------------ Triton


@triton.jit
def largest(x):
    """max |x| of each row, infinite where a NaN is among them."""
    size = tl.where(x == x, tl.abs(x), float("inf"))
    return tl.max(size, 1)[:, None]


@triton.jit
def store_scale(to, top, written, out):
    """Writes top / L, returns L / top for pages `out`: 0 and 0 for numbers that are too small, NaN and 0 where top is not
    finite."""
    FP8: tl.constexpr = out.dtype.element_ty == tl.uint8
    LARGEST: tl.constexpr = 448.0 if FP8 else 127.0
    SMALLEST: tl.constexpr = 1e-32 if FP8 else 1e-35
    finite = top < float("inf")
    plain = finite & (top >= SMALLEST)
    scale = tl.where(plain, top / LARGEST, tl.where(finite, 0.0, float("nan")))
    tl.store(to, scale, mask=written)
    return tl.where(plain, LARGEST / tl.where(plain, top, 1.0), 0.0)


@triton.jit
def stored(x, inverse, out, BYTES: tl.constexpr):
    """x as what `out` holds. BYTES: x * inverse, to nearest, ties to even; 0 where inverse is."""
    if BYTES:
        x = tl.where(inverse > 0, x.to(tl.float32) * inverse, 0.0)
        x = encode(x) if out.dtype.element_ty == tl.uint8 else (x + 12582912.0) - 12582912.0
    return x.to(out.dtype.element_ty)


@triton.jit
def turn(
    out, scales, x, out_head, out_element, x_head, head, written, cosine, sine, half, dim,
    PAGE: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Rotates heads `head` of one token from x, elements side by side, to out; element i pairs with i + half. BYTES: as bytes
    with a scale each."""
    i = tl.arange(0, PAIRS)[None, :]
    inside = written & (i < half)
    first, second = x + head * x_head + i, x + head * x_head + half + i
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(second, mask=inside, other=0.0).to(tl.float32)
    a, b = turned(a, b, cosine, sine)
    to = out + head * out_head + i * out_element
    if REST > 0:  # elements past the table's width
        j = 2 * half + tl.arange(0, REST)[None, :]
        beyond = written & (j < dim)
        rest = tl.load(x + head * x_head + j, mask=beyond, other=0.0)
    inverse = 1.0
    if BYTES:
        top = tl.maximum(largest(tl.where(inside, a, 0.0)), largest(tl.where(inside, b, 0.0)))
        if REST > 0:
            top = tl.maximum(top, largest(rest.to(tl.float32)))
        inverse = store_scale(scales + head * 2 * PAGE, top, written, out)
    tl.store(to, stored(a, inverse, out, BYTES), mask=inside)
    tl.store(to + half * out_element, stored(b, inverse, out, BYTES), mask=inside)
    if REST > 0:
        tl.store(out + head * out_head + j * out_element, stored(rest, inverse, out, BYTES), mask=beyond)


@triton.jit
def append_kernel(
    q_out, k_pages, v_pages, scales, q, k, v, slot, position, table,
    heads, kv_heads, dim, half, positions, slots,
    q_row, q_head, k_row, k_head, v_row, v_head, k_page, v_page, scale_page, k_token, k_element,
    PAGE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    # A program takes HEADS heads of one token: of q first, then of k and v.
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    at = tl.load(position + token).to(tl.int64)
    known = (at >= 0) & (at < positions)
    angle = table + tl.where(known, at, 0) * 2 * half + pair
    cosine = tl.load(angle, mask=known & (pair < half), other=float("nan"))[None, :]
    sine = tl.load(angle + half, mask=known & (pair < half), other=float("nan"))[None, :]
    q_blocks = tl.cdiv(heads, HEADS)
    if block < q_blocks:
        head = (block * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
        to = q_out + token * heads * dim
        turn(
            to, None, q + token * q_row, dim, 1, q_head, head, head < heads, cosine, sine, half, dim,
            PAGE, PAIRS, REST, False,
        )  # fmt: skip
    else:
        head = ((block - q_blocks) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
        s = tl.load(slot + token)
        written = (head < kv_heads) & (s >= 0) & (s < slots)
        page, offset = s // PAGE, s % PAGE
        keys = k_pages + page * k_page + offset * k_token
        own = scales + page * scale_page + offset if BYTES else None
        i = tl.arange(0, DIM)[None, :]  # values are read before keys are written, across which no load moves
        values = tl.load(v + token * v_row + head * v_head + i, mask=written & (i < dim), other=0.0)
        turn(
            keys, own, k + token * k_row, PAGE * dim, k_element, k_head, head, written, cosine, sine, half, dim,
            PAGE, PAIRS, REST, BYTES,
        )  # fmt: skip
        inverse = 1.0
        if BYTES:
            inverse = store_scale(own + head * 2 * PAGE + PAGE, largest(values.to(tl.float32)), written, v_pages)
        row = v_pages + page * v_page + head * PAGE * dim + offset * dim + i
        tl.store(row, stored(values, inverse, v_pages, BYTES), mask=written & (i < dim))


# ----------------------------------------------------------------------------------------------------------- launchers


def _output(k: Tensor, q: Tensor | None) -> Tensor:
    return torch.empty(0 if q is None else q.shape, dtype=k.dtype, device=k.device)


def _laid_out(k, v, slot, position, table, q: Tensor | None) -> tuple:
    """As kernels read them: the elements of a head side by side."""
    q = None if q is None else unit_stride(q)
    return unit_stride(k), unit_stride(v), slot.contiguous(), position.contiguous(), table.contiguous(), q


def _fields(
    q_out: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None,
    k: Tensor, v: Tensor, slot: Tensor, position: Tensor, table: Tensor, q: Tensor | None,
) -> tuple:  # fmt: skip
    """csrc/records/kv_append.h, of tensors that are `_laid_out`. The caller keeps them."""
    tokens, kv_heads, dim = k.shape
    return (
        q_out.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), pointer(q), k.data_ptr(), v.data_ptr(),
        slot.data_ptr(), position.data_ptr(), table.data_ptr(), pointer(scales),
        tokens, 0 if q is None else q.shape[1], kv_heads, dim, table.shape[1], table.shape[0], k_pages.shape[0],
        *((0, 0) if q is None else q.stride()[:2]), *k.stride()[:2], *v.stride()[:2], position.dtype == torch.int64,
        k_pages.stride(0), v_pages.stride(0), 0 if scales is None else scales.stride(0),
        DTYPES[k.dtype], PAGE_DTYPES[k_pages.dtype],
    )  # fmt: skip


def cpu(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None,
    slot: Tensor, position: Tensor, table: Tensor, q: Tensor | None,
) -> Tensor:  # fmt: skip
    q_out = _output(k, q)
    if slot.numel():
        laid_out = _laid_out(k, v, slot, position, table, q)
        if _C.kv_append(*_fields(q_out, k_pages, v_pages, scales, *laid_out)):
            raise IndexError(
                f"kv_append: slots up to {slot.max()} in {k_pages.shape[0]} pages of {PAGE} tokens, positions from "
                f"{position.min()} to {position.max()} in a table of {table.shape[0]}; one is out of range"
            )
    return q_out


CUDA_TOKENS = 64  # a thread has two elements: of many tokens Triton's wider loads are the faster ones


def cuda_refusal(k: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None) -> str | None:
    """Why csrc/cuda/kv_append.cu does not take the call; None when it does."""
    if scales is not None:
        return "quantised pages"
    if k.dtype == torch.float32:
        return "float32"
    if k.shape[0] > CUDA_TOKENS:
        return f"{k.shape[0]} tokens: up to {CUDA_TOKENS}"
    dim = k.shape[2]
    if k_pages.stride()[1:] != (PAGE * dim, 1, dim) or v_pages.stride()[1:] != (PAGE * dim, dim, 1):
        return "pages that are not [heads, 16, dim]"
    return None


def cuda(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None,
    slot: Tensor, position: Tensor, table: Tensor, q: Tensor | None,
) -> Tensor:  # fmt: skip
    """A few tokens in CUDA C++; in a captured step, on its way before the projection is done."""
    if not slot.numel() or cuda_refusal(k, k_pages, v_pages, scales) is not None:
        return gpu(k, v, k_pages, v_pages, scales, slot, position, table, q)
    q_out, laid_out = _output(k, q), _laid_out(k, v, slot, position, table, q)
    _cuda.launch("kv_append", _fields(q_out, k_pages, v_pages, scales, *laid_out), None, k.device)
    return q_out


def gpu(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None,
    slot: Tensor, position: Tensor, table: Tensor, q: Tensor | None,
) -> Tensor:  # fmt: skip
    q_out = _output(k, q)
    if slot.numel():
        asked = q is not None
        k, v, slot, position, table, q = _laid_out(k, v, slot, position, table, q if asked else k)
        tokens, kv_heads, dim = k.shape
        heads, half = q.shape[1] if asked else 0, table.shape[1] // 2
        block = min(8, triton.next_power_of_2(max(heads, kv_heads)))  # heads a program: 2 KiB of 128 bf16 elements
        append_kernel[(tokens, triton.cdiv(heads, block) + triton.cdiv(kv_heads, block))](
            q_out, k_pages, v_pages, scales, q, k, v, slot, position, table,
            heads, kv_heads, dim, half, table.shape[0], k_pages.shape[0] * PAGE,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], k_pages.stride(0), v_pages.stride(0),
            0 if scales is None else scales.stride(0), k_pages.stride(3), k_pages.stride(2),
            PAGE=PAGE, HEADS=block, PAIRS=triton.next_power_of_2(max(half, 1)),
            REST=triton.next_power_of_2(dim - 2 * half) if dim > 2 * half else 0, DIM=triton.next_power_of_2(dim),
            BYTES=scales is not None, num_warps=2,
        )  # fmt: skip
    return q_out


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "kv_append(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? scales, Tensor slot, "
    "Tensor position, Tensor table, Tensor? q) -> Tensor",
    reference=reference,
    fake=lambda k, v, k_pages, v_pages, scales, slot, position, table, q: _output(k, q),
    cpu=cpu,
    triton=gpu,
    cuda=cuda,
    cuda_name=f"CUDA C++ (16 bits, up to {CUDA_TOKENS} tokens; else Triton)",
)


@overload
def kv_append(
    k: Tensor, v: Tensor, cache: KVPages, slot: Tensor, position: Tensor, table: Tensor, q: None = ...
) -> None: ...
@overload
def kv_append(
    k: Tensor, v: Tensor, cache: KVPages, slot: Tensor, position: Tensor, table: Tensor, q: Tensor
) -> Tensor: ...
def kv_append(
    k: Tensor, v: Tensor, cache: KVPages, slot: Tensor, position: Tensor, table: Tensor, q: Tensor | None = None
) -> Tensor | None:
    """Writes the rotated k [T, Hk, D] and v into `cache` at `slot` [T]; returns the rotated q [T, H, D] if q is given.

    Raises ValueError for shapes that do not fit, TypeError for dtypes, IndexError for slots or positions out of range
    (rows in range are written then).
    """
    check_dtype("kv_append", "k", k)
    for name, other in (("v", v), *((("q", q),) if q is not None else ())):
        check_like("kv_append", name, other, "k", k)
    check(
        k.dim() == 3 and k.shape == v.shape,
        lambda: f"kv_append: k {tuple(k.shape)} and v {tuple(v.shape)} must both be [T, Hk, D]",
    )
    check(
        q is None or (q.dim() == 3 and q.shape[::2] == k.shape[::2]),
        lambda: f"kv_append: q {tuple(q.shape)} must be [{k.shape[0]}, H, {k.shape[2]}] beside k {tuple(k.shape)}",
    )
    check(k.shape[2] <= 256, lambda: f"kv_append: head dim {k.shape[2]}, allowed: up to 256")
    check_pages("kv_append", cache, "k", k, k.shape[1], k.shape[2])
    check_dtype("kv_append", "slot", slot, (torch.int64,))
    check(
        slot.shape == k.shape[:1] and position.shape == k.shape[:1],
        lambda: f"kv_append: slot {tuple(slot.shape)} and position {tuple(position.shape)} must be [{k.shape[0]}]",
    )
    check_table("kv_append", position, table, k.shape[2])
    rotated = forward(k, v, *cache.as_bits(), slot, position, table, q)
    return None if q is None else rotated
