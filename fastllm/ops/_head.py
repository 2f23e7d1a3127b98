"""What the ops over a language model's head share: logits made, used and turned into gradients one block of rows at a
time, so that [T, V] never lies in memory.

A block's logits x W^T + bias are handed to a step, which may leave their gradient in their place; from that come the
block's dx = d W and its share of dW = d^T x. On a CPU all is fp32: the logits are those of `ops.linear`, bit for bit, and
16-bit inputs are widened first (of the weight, a copy). On a GPU the products are cuBLAS's in the inputs' dtype; logits
are rounded to it unless a step asks for them wide, or exact: then they are those of `exact_logits`. dW is added up in fp32
on both, block after block, and rounded once, within its own memory: a gradient of 16 bits has room for twice its elements
behind it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._linear_exact import exact_product
from ._op import check, check_dtype, check_like
from .linear import ROWS, ROWS_ACROSS, add_outer, product

CPU_BYTES = 52 << 20  # of logits: enough rows that the products run at full speed, 256 of a vocabulary of 50,257
CPU_DEPTH = 4096  # of the vocabulary that dx takes at a time: as many rows of the weight as stay in cache
GPU_BYTES, GPU_ROWS = 100 << 20, (1280, 4096)  # with fewer rows reading and writing dW takes longer than the products
GPU_ROWS_ALONE = 768  # without a dW; fewer starve the products
Step = Callable[[slice, Tensor], None]


def rows_at_once(rows: int, vocab: int, itemsize: int, cpu: bool, gathers: bool) -> int:
    """How many rows a block has. gathers: dW is added up over blocks."""
    if cpu:
        return min(rows, max(32, CPU_BYTES // (vocab * itemsize) // 32 * 32))
    least = GPU_ROWS[0] if gathers else min(GPU_ROWS[0], GPU_ROWS_ALONE)
    return min(rows, max(least, min(GPU_ROWS[1], GPU_BYTES // (vocab * itemsize) // 128 * 128)))


def outputs(x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple[Tensor, ...]:
    """dx, dweight, dbias, uninitialised; empty where not needed."""
    wanted = zip((x, weight, x if bias is None else bias), needs, strict=True)
    return tuple(torch.empty(t.shape if need else (0,), dtype=t.dtype, device=t.device) for t, need in wanted)


def over_blocks(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], step: Step, cpu: bool, wide=False, exact=False,
    unit: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Runs step(rows, logits) on every block; dx, dweight and dbias, empty where not needed. wide: logits are float32,
    whatever the inputs are (without a bias); exact: that too, and on a GPU in one order for any number of rows. unit: a power
    of two that the step left out of the logits' gradients."""
    (rows, depth), vocab = x.shape, weight.shape[0]
    dtype = torch.float32 if cpu else x.dtype
    logits_dtype = torch.float32 if wide or exact else dtype
    size = max(1, rows_at_once(rows, vocab, logits_dtype.itemsize, cpu, needs[1]))
    w = weight.to(dtype)
    w = w if w.stride(1) == 1 else w.contiguous()
    b = None if bias is None else bias.to(dtype).contiguous()
    width = -(-vocab // 16) * 16  # aligned rows, not a power of two apart: they would meet in the same cache sets
    width += 16 * (width % 1024 == 0)
    buffer = torch.empty((size, width), dtype=logits_dtype, device=x.device)[:, :vocab]
    summed = dtype if rows <= size and unit is None else torch.float32  # one block's product is rounded once anyway
    dx = torch.empty((rows, depth) if needs[0] else (0,), dtype=dtype, device=x.device)
    fresh = torch.empty if rows else torch.zeros
    dw = fresh((vocab, depth) if needs[1] else (0,), dtype=summed, device=x.device)
    db = torch.zeros((vocab,) if needs[2] else (0,), dtype=torch.float32, device=x.device)
    for begin in range(0, rows, size):
        block = slice(begin, min(begin + size, rows))
        part, logits = x[block].to(dtype), buffer[: block.stop - begin]
        part = part if part.stride(1) == 1 else part.contiguous()
        if cpu:
            product(logits, part, w, ROWS, b)
        elif exact:
            exact_product(logits, part, w, b)
        elif b is None:
            _product(logits, part, w.t())
        else:
            torch.addmm(b, part, w.t(), out=logits)
        step(block, logits)
        if any(needs):
            logits = logits.to(dtype)
        if needs[0]:
            _across(dx[block], logits, w) if cpu else torch.mm(logits, w, out=dx[block])
        if needs[1]:
            add_outer(dw, logits, part, begin > 0) if cpu else _product(dw, logits.t(), part, beta=float(begin > 0))
        if needs[2]:
            db += logits.sum(0, dtype=torch.float32)
    if unit is not None:
        for gradient in (dx, dw, db):
            gradient.mul_(unit)
    return dx.to(x.dtype), narrowed(dw, weight.dtype), db.to((x if bias is None else bias).dtype)


def power_of_two(x: Tensor) -> Tensor:
    """The largest that is not above x, a float32 number; 1 where there is none. Nothing waits for x."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where((power > 0) & (power < torch.inf), power, torch.ones_like(power))


def narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """wide, contiguous, rounded to a dtype of half its size in its own memory, or as it is where it has that dtype already."""
    if wide.dtype == dtype or not wide.numel():
        return wide.to(dtype)
    rows = wide.shape[0]
    narrow = wide.view(dtype).view(-1)[: wide.numel()].view(wide.shape)
    done = max(1, rows >> 6)
    narrow[:done] = wide[:done].to(dtype)
    while done < rows:  # twice as many rows each time: they come to lie where rows were that have been read
        block = slice(done, min(2 * done, rows))
        narrow[block] = wide[block]
        done = block.stop
    return narrow


def _across(out: Tensor, d: Tensor, w: Tensor) -> None:
    """out = d w, in pieces of the vocabulary, on a CPU."""
    for k in range(0, w.shape[0], CPU_DEPTH):
        piece = slice(k, k + CPU_DEPTH)
        product(out, d[:, piece], w[piece], ROWS_ACROSS, residual=out if k else None)


def _product(out: Tensor, a: Tensor, b: Tensor, beta: float = 0.0) -> None:
    """out = beta out + a b, on a GPU, where out may be float32 and the factors narrower."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, out=out) if beta else torch.mm(a, b, out=out)
    elif a.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8 and later
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, beta=beta, alpha=1, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


def check_head(op: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """x [T, H], weight [V, H], bias [V], of one dtype and device."""
    check_dtype(op, "x", x)
    check_like(op, "weight", weight, "x", x)
    check(
        x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1] and weight.shape[0] > 0,
        lambda: f"{op}: x {tuple(x.shape)} must be [T, H] and weight {tuple(weight.shape)} [V, H] with the same H",
    )
    if bias is not None:
        check_like(op, "bias", bias, "x", x)
        check(bias.shape == weight.shape[:1], lambda: f"{op}: bias {tuple(bias.shape)} must be [{weight.shape[0]}]")
