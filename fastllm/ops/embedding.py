"""embedding: y[...] = weight[ids[...]], a row of the table for every id.

Shapes: ids [...] of int64 or int32, weight [V, N], y [..., N]. Dtypes of weight and y: float32, bfloat16, float16.
The rows of weight may lie apart (any stride); where its columns do, PyTorch gathers instead. Nothing is rounded.
An id outside [0, V) raises IndexError on the CPU, and nothing is read for it. On a GPU, where asking would stall the
stream, and in a replayed plan, which reports it by its status, its row is NaN.
Backward: dweight[v] = sum of dy over the positions that hold v, first to last, in fp32 with one rounding: each row is
written once, by one thread, so the bits depend on nothing else.
"""

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, as_rows, check_dtype, row_stride
from ._triton import tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(ids: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.embedding(ids, weight)


def reference_backward(dy: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    dweight = torch.zeros(vocabulary, dy.shape[-1], dtype=wide, device=dy.device)
    rows = dy.reshape(ids.numel(), dy.shape[-1]).to(wide)
    return dweight.index_add(0, ids.reshape(-1), rows).to(dy.dtype)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def forward_kernel(y, ids, weight, vocabulary, cols, ids_stride, weight_stride, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(ids + t * ids_stride).to(tl.int64)
    readable = tl.where((v >= 0) & (v < vocabulary), cols, 0)  # columns; none for an unknown id
    row = tl.load(weight + v * weight_stride + col, mask=col < readable, other=float("nan"))
    tl.store(y + t * cols + col, row, mask=col < cols)


@triton.jit
def backward_kernel(dweight, dy, order, begin, cols, dy_stride, BLOCK: tl.constexpr):
    # One program per row of the vocabulary (and block of columns): `order` lists the positions sorted by id, those of
    # row v from begin[v] to begin[v + 1]. No atomics: one order of additions, and rows without an id become zero here.
    v = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(begin + v), tl.load(begin + v + 1)):
        t = tl.load(order + i)
        total += tl.load(dy + t * dy_stride + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(dweight + v * cols + col, total.to(dweight.dtype.element_ty), mask=col < cols)


BLOCK = 1024  # columns a program

# ----------------------------------------------------------------------------------------------------------- launchers


def _flat(ids: Tensor) -> tuple[Tensor, int]:
    """ids as one row, and its stride: a view where the strides allow it (a replayed plan reads it again)."""
    if ids.is_contiguous():
        return ids, 1
    ids = ids.reshape(-1)
    return ids, ids.stride(0)


def _check_ids(status: int, ids: Tensor, vocabulary: int) -> None:
    if status:
        bad = ((ids < 0) | (ids >= vocabulary)).nonzero()[0].tolist()
        raise IndexError(
            f"embedding: id {ids[tuple(bad)].item()} at position {tuple(bad)} is outside [0, {vocabulary}); "
            "the tokenizer and the table do not fit together"
        )


def _empty(ids: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((*ids.shape, weight.shape[1]), dtype=weight.dtype, device=weight.device)


def cpu(ids: Tensor, weight: Tensor) -> Tensor:
    vocabulary, cols = weight.shape
    if weight.stride(1) != 1 and cols > 1:
        return reference(ids, weight)
    y, count = _empty(ids, weight), ids.numel()
    if count:
        flat, stride = _flat(ids)
        status = _C.embedding(
            y.data_ptr(), flat.data_ptr(), weight.data_ptr(),
            count, cols, vocabulary, stride, weight.stride(0), ids.dtype == torch.int64, DTYPES[weight.dtype],
        )  # fmt: skip
        _check_ids(status, ids, vocabulary)
    return y


def cpu_backward(dy: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    dweight = torch.empty((vocabulary, dy.shape[-1]), dtype=dy.dtype, device=dy.device)
    if dweight.numel():
        (dy, dy_stride), (flat, stride) = row_stride(dy), _flat(ids)
        status = _C.embedding_backward(
            dweight.data_ptr(), dy.data_ptr(), flat.data_ptr(),
            ids.numel(), dy.shape[-1], vocabulary, dy_stride, stride, ids.dtype == torch.int64, DTYPES[dy.dtype],
        )  # fmt: skip
        _check_ids(status, ids, vocabulary)
    return dweight


def gpu(ids: Tensor, weight: Tensor) -> Tensor:
    vocabulary, cols = weight.shape
    if weight.stride(1) != 1 and cols > 1:
        return reference(ids, weight)
    y = _empty(ids, weight)
    if y.numel():
        flat, stride = _flat(ids)
        forward_kernel[(ids.numel(), triton.cdiv(cols, BLOCK))](
            y, flat, weight, vocabulary, cols, stride, weight.stride(0), BLOCK=BLOCK
        )
    return y


def gpu_backward(dy: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    rows = as_rows(dy) if ids.numel() else dy.reshape(0, dy.shape[-1])
    cols = rows.shape[1]
    dweight = torch.empty((vocabulary, cols), dtype=dy.dtype, device=dy.device)
    if dweight.numel():
        flat, order = ids.reshape(-1).sort(stable=True)
        begin = torch.searchsorted(flat, torch.arange(vocabulary + 1, dtype=flat.dtype, device=dy.device))
        backward_kernel[(vocabulary, triton.cdiv(cols, BLOCK))](
            dweight, rows, order, begin, cols, rows.stride(0), BLOCK=BLOCK
        )
    return dweight


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    ids, weight = inputs
    ctx.save_for_backward(ids)
    ctx.vocabulary = weight.shape[0]


def _backward(ctx, dy):
    return None, backward(dy, *ctx.saved_tensors, ctx.vocabulary)


forward = Op(
    "embedding(Tensor ids, Tensor weight) -> Tensor",
    reference=reference,
    fake=_empty,
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "embedding_backward(Tensor dy, Tensor ids, SymInt vocabulary) -> Tensor",
    reference=reference_backward,
    fake=lambda dy, ids, vocabulary: dy.new_empty((vocabulary, dy.shape[-1])),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, N] for ids [...] of int64 or int32: [..., N].

    Raises IndexError for an id outside [0, V) (on the CPU; see the head of this file), ValueError for shapes or devices
    that do not fit, TypeError for dtypes.
    """
    check_dtype("embedding", "ids", ids, (torch.int64, torch.int32))
    check_dtype("embedding", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight {tuple(weight.shape)} must be [V, N]")
    if ids.device != weight.device:
        raise ValueError(f"embedding: ids are on {ids.device}, weight on {weight.device}; move one with .to(device)")
    return forward(ids, weight)
