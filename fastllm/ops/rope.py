"""rope: rotary position embedding of q and k (Su et al. 2021, arXiv 2104.09864), half-split as in NeoX and Llama.

With c = cos(position * w_i), s = sin(position * w_i), w_i = theta^(-2i / R) and (a, b) = (x[i], x[i + R/2]):
x'[i] = a c - b s, x'[i + R/2] = b c + a s. R is the table's width; elements past R pass through (partial rotary).

Shapes: q [T, H, D] or [B, S, H, D]; k likewise, with its own number of heads; position [T] or [B, S] (or [S], the same
for every sequence); table [max_position, R], R even and at most D. Results are new contiguous tensors; q and k may be
views of a fused qkv (they are copied only where the elements of a head are not contiguous). Dtypes: float32, bfloat16,
float16; the table is float32; position int64 or int32. Rounding: fp32 products with FMA, one rounding to the dtype at
the end. A position outside the table raises IndexError.
"""

import torch
from torch import Tensor

from .. import _C
from ._op import DTYPES, Op, check, check_dtype, check_like

# ---------------------------------------------------------------------------------------------------------- reference


def reference(q: Tensor, k: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    rotary = table.shape[1]
    cosine, sine = table[position.long()].to(wide).unsqueeze(-2).chunk(2, -1)

    def rotated(x: Tensor) -> Tensor:
        a, b = x[..., :rotary].to(wide).chunk(2, -1)
        turned = torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)
        return torch.cat((turned.to(x.dtype), x[..., rotary:]), -1)

    return rotated(q), rotated(k)


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


def cpu(q: Tensor, k: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    q_out, k_out = _outputs(q, k)
    if position.numel() and (q.numel() or k.numel()):
        q, k, table = unit_stride(q), unit_stride(k), table.contiguous()
        batch = q.shape[0] if q.dim() == 4 else 1
        status = _C.rope(
            q_out.data_ptr(), k_out.data_ptr(), q.data_ptr(), k.data_ptr(), position.data_ptr(), table.data_ptr(),
            batch, q.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1], table.shape[1], table.shape[0],
            *_batched(q), *_batched(k), position.stride(0) if position.dim() == 2 else 0, position.stride(-1),
            position.dtype == torch.int64, DTYPES[q.dtype],
        )  # fmt: skip
        if status:
            raise IndexError(
                f"rope: positions from {position.min()} to {position.max()}, the table has {table.shape[0]}; "
                "build a longer one with rope_table(max_position, dim)"
            )
    return q_out, k_out


# -------------------------------------------------------------------------------------------------------- registration

forward = Op(
    "rope(Tensor q, Tensor k, Tensor position, Tensor table) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda q, k, position, table: _outputs(q, k),
    cpu=cpu,
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


def rope(q: Tensor, k: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, H, D] or [B, S, H, D] and k, rotated by the angles of `position` ([T], [B, S] or [S]): two new tensors.

    Raises ValueError for shapes that do not fit, TypeError for dtypes, IndexError for positions outside the table.
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
    return forward(q, k, position, table)


def rope_table(max_position: int, dim: int, theta: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """[max_position, dim] in float32: per position dim/2 cosines, then dim/2 sines; angles computed in float64."""
    if dim < 2 or dim % 2:
        raise ValueError(f"rope_table: dim is {dim}; it must be even and positive")
    if max_position < 1 or theta <= 0:
        raise ValueError(f"rope_table: max_position is {max_position}, theta {theta}; both must be positive")
    inverse = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(max_position, dtype=torch.float64)[:, None] * inverse
    return torch.cat((angle.cos(), angle.sin()), 1).float().to(device or "cpu")
