"""rope: rotary position embedding of q and k (Su et al. 2021, arXiv 2104.09864), half-split as in NeoX and Llama, or
interleaved as in GPT-J and the paper.

With c, s the cosine and sine of pair i at a token's position, from the table, and (a, b) = (x[i], x[i + R/2]), or
(x[2i], x[2i + 1]) when interleaved: a' = a c - b s, b' = b c + a s. R is the table's width; elements past R pass through
(partial rotary).

Shapes: q [T, H, D] or [B, S, H, D]; k likewise, with its own number of heads; position [T] or [B, S] (or [S], the same
for every sequence); table [max_position, R], R even and at most D. Results are new contiguous tensors; q and k may be
views of a fused qkv (they are copied only where the elements of a head are not contiguous). Dtypes: float32, bfloat16,
float16; the table is float32; position int64 or int32. Rounding: fp32 products with FMA, one rounding to the dtype at
the end. A position outside the table raises IndexError on the CPU; on a GPU, where asking would stall the stream, what
it turns is NaN.
Backward: the inverse rotation of the gradients (the table's own, attention factor included); none for the table.
"""

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, check, check_dtype, check_like
from ._triton import grid_of, row_of_grid, tl, triton

# ---------------------------------------------------------------------------------------------------------- reference


def reference(
    q: Tensor, k: Tensor, position: Tensor, table: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    wide, rotary = torch.promote_types(q.dtype, torch.float32), table.shape[1]
    cosine, sine = table[position.long()].to(wide).unsqueeze(-2).chunk(2, -1)

    def rotated(x: Tensor) -> Tensor:
        turning = x[..., :rotary].to(wide)
        a, b = turning.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turning.chunk(2, -1)
        a, b = a * cosine - b * sine, b * cosine + a * sine
        turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
        return torch.cat((turned.to(x.dtype), x[..., rotary:]), -1)

    return rotated(q), rotated(k)


def reference_backward(
    dq: Tensor, dk: Tensor, position: Tensor, table: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cosine, sine = table.chunk(2, -1)
    return reference(dq, dk, position, torch.cat((cosine, -sine), -1), interleaved)


# ------------------------------------------------------------------------------------------------------------- Triton


@triton.jit
def turned(a, b, cosine, sine):
    """Every rounding stated: the bits of the CPU, and of kv_append."""
    return tl.fma(a, cosine, -(b * sine)), tl.fma(a, sine, b * cosine)


@triton.jit(do_not_specialize=["batch"])
def kernel(
    q_out, k_out, q, k, position, table,
    batch, tokens, heads, kv_heads, dim, rotary, positions,
    q_batch, q_row, q_head, k_batch, k_row, k_head, position_batch, position_row, sign,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # A program turns HEADS heads of one token, of q or of k.
    t, block = row_of_grid(), tl.program_id(0)
    if t >= batch * tokens:
        return
    b, row = t.to(tl.int32) // tokens, t.to(tl.int32) % tokens
    b, row, q_blocks = b.to(tl.int64), row.to(tl.int64), tl.cdiv(heads, HEADS)
    if block < q_blocks:
        count, first = heads, block * HEADS
        x, out, stride = q + b * q_batch + row * q_row, q_out + t * heads * dim, q_head
    else:
        count, first = kv_heads, (block - q_blocks) * HEADS
        x, out, stride = k + b * k_batch + row * k_row, k_out + t * kv_heads * dim, k_head
    half, pair, both = rotary // 2, tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    head = first + tl.arange(0, HEADS)
    x += head[:, None].to(tl.int64) * stride
    out += head[:, None].to(tl.int64) * dim
    if INTERLEAVED:
        inside = (head[:, None] < count) & (both[None, :] < rotary)
        v = tl.load(x + both[None, :], mask=inside, other=0.0).to(tl.float32)
    else:
        inside = (head[:, None] < count) & (pair[None, :] < half)
        left = tl.load(x + pair[None, :], mask=inside, other=0.0).to(tl.float32)
        right = tl.load(x + half + pair[None, :], mask=inside, other=0.0).to(tl.float32)
    at = tl.load(position + b * position_batch + row * position_row).to(tl.int64)
    readable = tl.where((at >= 0) & (at < positions), half, 0)  # pairs; none for an unknown position
    cosine = tl.load(table + at * rotary + pair, mask=pair < readable, other=float("nan"))
    sine = tl.load(table + at * rotary + half + pair, mask=pair < readable, other=float("nan")) * sign
    if INTERLEAVED:
        left, right = tl.split(tl.reshape(v, (HEADS, HALF, 2)))
        new_left, new_right = turned(left, right, cosine[None, :], sine[None, :])
        both_new = tl.reshape(tl.join(new_left, new_right), (HEADS, 2 * HALF))
        tl.store(out + both[None, :], both_new.to(q_out.dtype.element_ty), mask=inside)
    else:
        new_left, new_right = turned(left, right, cosine[None, :], sine[None, :])
        tl.store(out + pair[None, :], new_left.to(q_out.dtype.element_ty), mask=inside)
        tl.store(out + half + pair[None, :], new_right.to(q_out.dtype.element_ty), mask=inside)
    if REST > 0:
        rest = rotary + tl.arange(0, REST)
        inside = (head[:, None] < count) & (rest[None, :] < dim)
        tl.store(out + rest[None, :], tl.load(x + rest[None, :], mask=inside), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launchers


def _outputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)


def unit_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _batched(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head of [B, S, H, D] or [T, H, D]."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, strides[0], strides[1])


def _cpu(q: Tensor, k: Tensor, position: Tensor, table: Tensor, interleaved: bool, inverse: bool):
    q_out, k_out = _outputs(q, k)
    if position.numel() and (q.numel() or k.numel()):
        q, k, table = unit_stride(q), unit_stride(k), table.contiguous()
        batch = q.shape[0] if q.dim() == 4 else 1
        status = _C.rope(
            q_out.data_ptr(), k_out.data_ptr(), q.data_ptr(), k.data_ptr(), position.data_ptr(), table.data_ptr(),
            batch, q.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1], table.shape[1], table.shape[0],
            *_batched(q), *_batched(k), position.stride(0) if position.dim() == 2 else 0, position.stride(-1),
            position.dtype == torch.int64, DTYPES[q.dtype], interleaved, inverse,
        )  # fmt: skip
        if status:
            raise IndexError(
                f"rope: positions from {position.min()} to {position.max()}, the table has {table.shape[0]}; "
                "build a longer one with rope_table(max_position, dim)"
            )
    return q_out, k_out


HEADS, WARPS = 8, 2  # a program


def _gpu(q: Tensor, k: Tensor, position: Tensor, table: Tensor, interleaved: bool, inverse: bool):
    q_out, k_out = _outputs(q, k)
    if position.numel() and (q.numel() or k.numel()):
        q, k, table = unit_stride(q), unit_stride(k), table.contiguous()
        batch, (tokens, heads, dim), kv_heads = q.shape[0] if q.dim() == 4 else 1, q.shape[-3:], k.shape[-2]
        rotary = table.shape[1]
        blocks = triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
        kernel[grid_of(batch * tokens, blocks, 1)](
            q_out, k_out, q, k, position, table, batch, tokens, heads, kv_heads, dim, rotary, table.shape[0],
            *_batched(q), *_batched(k), position.stride(0) if position.dim() == 2 else 0, position.stride(-1),
            -1.0 if inverse else 1.0,
            INTERLEAVED=interleaved, HALF=triton.next_power_of_2(rotary // 2),
            REST=triton.next_power_of_2(dim - rotary) if dim > rotary else 0, HEADS=HEADS, num_warps=WARPS,
        )  # fmt: skip
    return q_out, k_out


def cpu(q: Tensor, k: Tensor, position: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _cpu(q, k, position, table, interleaved, False)


def cpu_backward(dq: Tensor, dk: Tensor, position: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _cpu(dq, dk, position, table, interleaved, True)


def gpu(q: Tensor, k: Tensor, position: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _gpu(q, k, position, table, interleaved, False)


def gpu_backward(dq: Tensor, dk: Tensor, position: Tensor, table: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _gpu(dq, dk, position, table, interleaved, True)


# -------------------------------------------------------------------------------------------------------- registration


def _save(ctx, inputs, output) -> None:
    _, _, position, table, ctx.interleaved = inputs
    ctx.save_for_backward(position, table)


def _backward(ctx, dq, dk):
    return *backward(dq, dk, *ctx.saved_tensors, ctx.interleaved), None, None, None


forward = Op(
    "rope(Tensor q, Tensor k, Tensor position, Tensor table, bool interleaved) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda q, k, position, table, interleaved: _outputs(q, k),
    cpu=cpu,
    triton=gpu,
    save=_save,
    backward=_backward,
)
backward = Op(
    "rope_backward(Tensor dq, Tensor dk, Tensor position, Tensor table, bool interleaved) -> (Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda dq, dk, position, table, interleaved: _outputs(dq, dk),
    cpu=cpu_backward,
    triton=gpu_backward,
)


def check_table(op: str, position: Tensor, table: Tensor, dim: int) -> None:
    check_dtype(op, "position", position, (torch.int64, torch.int32))
    check_dtype(op, "table", table, (torch.float32,))
    check(
        table.dim() == 2 and table.shape[1] % 2 == 0 and table.shape[1] <= dim,
        lambda: (
            f"{op}: table {tuple(table.shape)} must be [max_position, R] with R even and at most head dim {dim}; "
            "build it with rope_table(max_position, dim)"
        ),
    )


def rope(q: Tensor, k: Tensor, position: Tensor, table: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """q [T, H, D] or [B, S, H, D] and k, rotated by the angles of `position` ([T], [B, S] or [S]): two new tensors.

    interleaved: pairs are neighbours (GPT-J), not halves. Raises ValueError for shapes that do not fit, TypeError for
    dtypes, IndexError for positions outside the table (on the CPU; see the head of this file).
    """
    check_dtype("rope", "q", q)
    check_like("rope", "k", k, "q", q)
    fits = q.dim() in (3, 4) and k.dim() == q.dim() and k.shape[:-2] == q.shape[:-2] and k.shape[-1] == q.shape[-1]
    check(
        fits,
        lambda: f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} must be [T, H, D] or [B, S, H, D], equal but in H",
    )
    check(
        position.shape == q.shape[:-2] or position.shape == q.shape[-3:-2],
        lambda: (
            f"rope: position {tuple(position.shape)} must be {tuple(q.shape[:-2])}, the tokens of q {tuple(q.shape)}"
        ),
    )
    check_table("rope", position, table, q.shape[-1])
    return forward(q, k, position, table, interleaved)
