"""What the Triton kernels of attention share: the shape of a score, one step of the running softmax, the fold of two
parts, and the sizes of their blocks.

Scores are kept in base 2: a block holds t with score = t / log2(e), so that a weight is one exp2. A part is what a run of
keys gives a row: (acc, sum, top) = (sum of 2^(t - top) v, sum of 2^(t - top), greatest t), and -inf, 0, 0 for no key.
Every sum is an explicit FMA, so a part has the same bits in every kernel that is compiled with the same sizes.
"""

from typing import Any, NamedTuple

import torch

from .._triton import matrix, roomy, tl, triton

TILE = 256  # keys of a tile of the arithmetic contract, at absolute positions
LENGTHS = [
    "batch",
    "queries",
    "keys",
]  # arguments of which a 1 is not compiled in: ptxas 12.9 crashes on some such kernels


@triton.jit
def begin_of(tensor, entry, batch_stride, head, head_stride, first, row_stride, PACKED: tl.constexpr):
    """Where a head of a batch entry begins; in packed tensors, its sequence, whose row there is `first`."""
    tensor += entry * batch_stride + head * head_stride
    if PACKED:
        tensor += first.to(tl.int64) * row_stride
    return tensor


@triton.jit
def tanh(x):
    z = tl.abs(x)
    e = tl.exp2(z * -2.8853900817779268)  # e^(-2 |x|)
    far = (1.0 - e) / (1.0 + e)
    w = x * x  # near 0, where 1 - e cancels: odd polynomial of Cephes (Moshier 1989), |x| < 0.625
    p = tl.fma(w, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(w, p, -5.37397155531e-2)
    p = tl.fma(w, p, 1.33314422036e-1)
    p = tl.fma(w, p, -3.33332819422e-1)
    return tl.where(z < 0.625, tl.fma(x * w, p, x), tl.where(x < 0, -far, far))


@triton.jit
def shaped(s, scale, softcap, bias, slope, distance, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr):
    """q . k -> score in base 2, and the derivative of the cap."""
    s, damp = s * scale, 1.0
    if SOFTCAP:
        t = tanh(s / softcap)
        s, damp = softcap * t, 1.0 - t * t
    if BIAS:
        s += bias
    if ALIBI:
        s -= slope * tl.abs(distance).to(tl.float32)
    return s * 1.4426950408889634, damp


@triton.jit
def sight(row, key, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a query at `row` sees."""
    seen = key < keys
    if CAUSAL:
        seen = seen & (key <= row)
    if WINDOW:
        seen = seen & (key > row - window)
        if not CAUSAL:
            seen = seen & (key < row + window)
    return seen


@triton.jit
def span(first, last, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """[begin, end) of the keys that queries at first .. last see, begin at a multiple of STEP."""
    begin, end = 0, keys
    if CAUSAL:
        end = tl.minimum(end, last + 1)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // STEP * STEP
        if not CAUSAL:
            end = tl.minimum(end, last + window)
    return begin, end


@triton.jit
def clear(begin, end, first, last, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, STEP: tl.constexpr):
    """[from, to) of [begin, end): keys that the queries at first .. last all see, in whole blocks of STEP."""
    start, stop = begin, keys
    if CAUSAL:
        stop = tl.minimum(first + 1, keys)
    if WINDOW:
        start = tl.cdiv(tl.maximum(last - window + 1, 0), STEP) * STEP
        if not CAUSAL:
            stop = tl.minimum(first + window, keys)
    stop = tl.maximum(stop, 0) // STEP * STEP
    end = tl.maximum(end, begin)
    start = tl.minimum(tl.maximum(start, begin), end)
    return start, tl.minimum(tl.maximum(stop, start), end)


@triton.jit
def nothing(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The part of no key."""
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return acc, tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -float("inf"), tl.float32)


@triton.jit
def weigh(total, top, s, unit):
    """One more block of keys, s their scores over unit > 0: their weights, what earlier weights fade by, sum and top."""
    new = tl.maximum(top, tl.max(s, 1) * unit)
    base = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(tl.fma(s, unit, -base[:, None]))
    fade = tl.exp2(top - base)
    return p, fade, tl.fma(total, fade, tl.sum(p, 1)), new


@triton.jit
def fold(acc, total, top, acc_b, total_b, top_b):
    """Two parts as one."""
    new = tl.maximum(top, top_b)
    base = tl.where(new == -float("inf"), 0.0, new)
    a, b = tl.exp2(top - base), tl.exp2(top_b - base)
    total = tl.fma(total, a, total_b * b)
    acc = tl.fma(acc, a[:, None], acc_b * b[:, None])
    return acc, total, new


@triton.jit
def with_sink(acc, total, top, sink):
    """The part after a score (natural, not base 2) that carries no value."""
    t = sink * 1.4426950408889634
    new = tl.maximum(top, t)
    base = tl.where(new == -float("inf"), 0.0, new)
    fade = tl.exp2(top - base)
    return acc * fade[:, None], tl.fma(total, fade, tl.exp2(t - base)), new


@triton.jit
def finish(acc, total):
    """The output; zeros for a row without a key."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def owner(cu_q, batch, rows, at, TOKENS: tl.constexpr, BATCH: tl.constexpr):
    """The sequence of block `at` and its rows [first, end); sequence -1 and `batch` are the rows that nobody claims,
    before and behind. Sequence b's blocks begin at cu_q[b] / TOKENS + b + 1: room for each, known without a sum."""
    i = tl.arange(0, BATCH)
    begins = tl.load(cu_q + i, mask=i <= batch, other=0) // TOKENS + i + 1
    b = tl.sum(((begins <= at) & (i <= batch)).to(tl.int32), 0) - 1
    first = tl.load(cu_q + b, mask=b >= 0, other=0)
    end = tl.load(cu_q + b + 1, mask=b < batch, other=rows)
    begin = tl.where(b >= 0, first // TOKENS + b + 1, 0)
    return b, first, tl.minimum(end, rows), first + (at - begin) * TOKENS


class Sizes(NamedTuple):
    """Rows and keys of a block, warps, and blocks on their way at a time."""

    rows: int
    keys: int
    warps: int
    stages: int = 2


# By dtype (bfloat16 stands for both halves), then by the largest head dim: blocks that spill no register on sm_80 and sm_90.
# fp32 products run without tensor cores and hold their operands in registers: there one block is on its way at a time.
# In exact mode these sizes decide the bits. `python benchmarks/tune.py` compares others on a GPU.
Table = dict[torch.dtype, dict[int, Sizes]]
EXACT: Table = {
    torch.float32: {128: Sizes(16, 32, 8, 1), 1024: Sizes(16, 16, 8, 1)},
    torch.bfloat16: {64: Sizes(64, 64, 4), 128: Sizes(64, 64, 8), 256: Sizes(64, 32, 8), 1024: Sizes(32, 32, 8)},
}
DENSE: Table = {
    torch.float32: EXACT[torch.float32],
    torch.bfloat16: {128: Sizes(128, 64, 8), 256: Sizes(64, 32, 8), 1024: Sizes(32, 32, 8)},
}
QUERIES: Table = {  # dq
    torch.float32: {64: Sizes(32, 32, 8, 1), 256: Sizes(16, 32, 8, 1), 1024: Sizes(16, 16, 8, 1)},
    torch.bfloat16: {128: Sizes(64, 64, 8), 1024: Sizes(32, 32, 8)},
}
KEYS: Table = QUERIES  # dk and dv


def _faster(table: Table, sizes: dict[int, Sizes]) -> Table:
    return table | {torch.bfloat16: table[torch.bfloat16] | sizes}


ROOMY: dict[str, Table] = {  # in the place of these where `roomy` says so: measured on an H200, see benchmarks/LOG.md
    "DENSE": _faster(DENSE, {64: Sizes(64, 64, 4, 3), 128: Sizes(128, 128, 8, 3)}),
    "KEYS": _faster(KEYS, {64: Sizes(64, 64, 4), 128: Sizes(32, 64, 4, 3)}),
    "QUERIES": _faster(QUERIES, {64: Sizes(64, 64, 4, 3), 128: Sizes(128, 64, 8, 3)}),
}
BIAS: Table = {  # dbias: its loops over what the bias is broadcast to leave few registers
    torch.float32: {256: Sizes(16, 16, 8, 1)},
    torch.bfloat16: {256: Sizes(32, 64, 8)},
}
DECODE: Table = {
    torch.float32: {128: Sizes(16, 32, 8, 3), 256: Sizes(16, 16, 8, 3)},
    torch.bfloat16: {64: Sizes(16, 128, 4, 3), 128: Sizes(16, 64, 4, 3), 256: Sizes(16, 32, 4, 3)},
}


def heads_of_rows(x: torch.Tensor, rows: int) -> Any:
    """A descriptor of x [B, S, H, D] as a matrix [B S, H D], of which blocks of rows x D are read; None where it is none,
    where the GPU takes none, and for float32, whose kernels have no register left for it."""
    batch, length, heads, dim = x.shape
    whole = x.stride(2) == dim or heads == 1
    if (
        x.dtype == torch.float32
        or not whole
        or padded(dim) != dim
        or (batch > 1 and x.stride(0) != length * x.stride(1))
    ):
        return None
    return matrix(x.as_strided((batch * length, heads * dim), (x.stride(1), 1)), rows, dim)


def padded(dim: int) -> int:
    """The block that holds a head: a power of two, at least what a matrix unit takes."""
    return max(16, triton.next_power_of_2(dim))


def fitting(name: str, device: torch.device, plain: bool) -> Table:
    """The table of that name for a device. plain: no feature but a causal mask, which leaves registers for larger blocks."""
    return ROOMY[name] if plain and roomy(device) else {"DENSE": DENSE, "KEYS": KEYS, "QUERIES": QUERIES}[name]


def sizes(table: Table, dim: int, dtype: torch.dtype, heavy: bool = False) -> Sizes:
    """The table's entry; heavy, with a bias, dropout or a scale for each key, that of heads four times as wide, which leaves
    registers for them."""
    entries = table[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    return next(size for limit, size in sorted(entries.items()) if dim * (4 if heavy else 1) <= limit)
