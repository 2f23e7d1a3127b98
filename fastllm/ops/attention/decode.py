"""paged_attention of few rows over long texts in CUDA C++ (csrc/cuda/paged_attention.cu), in the place of Triton's: `refusal`
says what it leaves to that."""

import torch
from torch import Tensor

from .. import _cuda
from .._op import DTYPES, pointer
from .._triton import multiprocessors
from ..rope import unit_stride
from .dense import as_float
from .triton_paged import gpu

DIMS, HEADS = (64, 128), 16
NAME = (
    f"CUDA C++ (16-bit, a row a sequence, not many, heads of 64 and 128, up to {HEADS} a KV head, no cap, ALiBi, exact; "
    "else Triton)"
)


def refusal(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None, batch: int,
    alibi: Tensor | None, causal: bool, window: int, scale: float, softcap: float, exact: bool,
) -> str | None:  # fmt: skip
    """Why this kernel does not take the call; None when it does."""
    blocks = q.shape[0] * k_pages.shape[1]
    at_once = 2 * multiprocessors(q.device.index or 0) if q.is_cuda else blocks
    for asked, what in (
        (exact, "exact"),
        (alibi is not None, "ALiBi"),
        (softcap > 0, "a cap"),
        (scales is not None, "quantised pages"),
    ):
        if asked:
            return what
    if q.dtype == torch.float32:
        return "float32"
    if q.shape[2] not in DIMS:
        return f"head dim {q.shape[2]}: {' or '.join(map(str, DIMS))}"
    if q.shape[1] > HEADS * k_pages.shape[1]:
        return f"{q.shape[1] // k_pages.shape[1]} heads of a KV head: up to {HEADS}"
    if q.shape[0] > batch:  # rows of one sequence read their keys together there
        return f"{q.shape[0]} rows of {batch} sequences: up to one each"
    if blocks > at_once:  # Triton's read 6 % more a second then
        return f"{blocks} rows and KV heads: up to {at_once}"
    if window and not causal:
        return "a window on both sides"
    if scale <= 0:
        return f"scale {scale}: above 0"
    steps, ours = (*q.stride()[:2], k_pages.stride(0), v_pages.stride(0)), (q, k_pages, v_pages)
    if any(step % 8 for step in steps) or any(t.data_ptr() % 16 for t in ours):
        return "q or pages that do not lie multiples of 16 bytes apart"
    return None


def cuda(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, scales: Tensor | None, block_table: Tensor, context_len: Tensor, cu_q: Tensor,
    alibi: Tensor | None, sinks: Tensor | None,
    causal: bool, window: int, scale: float, softcap: float, exact: bool,
) -> Tensor:  # fmt: skip
    shaping = (causal, window, scale, softcap, exact)
    q, block_table = unit_stride(q), unit_stride(block_table)
    if not q.numel() or refusal(q, k_pages, v_pages, scales, block_table.shape[0], alibi, *shaping) is not None:
        return gpu(q, k_pages, v_pages, scales, block_table, context_len, cu_q, alibi, sinks, *shaping)
    out, sinks = torch.empty(q.shape, dtype=q.dtype, device=q.device), as_float(sinks)
    rows, heads, dim = q.shape
    record = (
        out.data_ptr(), q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), block_table.data_ptr(), context_len.data_ptr(),
        cu_q.data_ptr(), 0, pointer(sinks), 0, block_table.shape[0], rows, heads, k_pages.shape[1], dim, k_pages.shape[0],
        block_table.shape[1], block_table.stride(0), q.stride(0), q.stride(1), k_pages.stride(0), v_pages.stride(0), 0,
        DTYPES[q.dtype], DTYPES[q.dtype], causal, window, scale, softcap,
    )  # fmt: skip
    _cuda.launch("paged_attention", record, None, q.device)
    return out
