"""What the Triton kernels of attention share: the shape of a score, one step of the running softmax, the fold of two
parts, and the sizes of their blocks.

Scores are kept in base 2: a block holds t with score = t / log2(e), so that a weight is one exp2. A part is what a run of
keys gives a row: (acc, sum, top) = (sum of 2^(t - top) v, sum of 2^(t - top), greatest t), and -inf, 0, 0 for no key.
Every sum is an explicit FMA, so a part has the same bits in every kernel that is compiled with the same sizes.
"""

import torch

from .._triton import tl, triton

TILE = 256  # keys of a tile of the arithmetic contract, at absolute positions


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
def shaped(s, scale, softcap, slope, distance, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """q . k -> score in base 2: scaled, capped, less slope * |distance|."""
    s = s * scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    if ALIBI:
        s -= slope * tl.abs(distance).to(tl.float32)
    return s * 1.4426950408889634


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
def advance(acc, total, top, s, v, unit):
    """The part after one more block of keys: s their scores over unit > 0, v their values."""
    new = tl.maximum(top, tl.max(s, 1) * unit)
    base = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(tl.fma(s, unit, -base[:, None]))
    fade = tl.exp2(top - base)
    total = tl.fma(total, fade, tl.sum(p, 1))
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, new


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
    fade = tl.exp2(top - new)
    return acc * fade[:, None], tl.fma(total, fade, tl.exp2(t - new)), new


@triton.jit
def finish(acc, total):
    """The output; zeros for a row without a key."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


def sizes(dim: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_D, and what decides the bits of the exact mode: rows and keys of a block, and warps."""
    block = max(16, triton.next_power_of_2(dim))
    wide = block * dtype.itemsize
    return {
        "BLOCK_D": block,
        "BLOCK_M": 64 if wide <= 512 else 32,
        "BLOCK_N": 64 if wide <= 256 else 32 if wide <= 512 else 16,
        "num_warps": 4 if wide <= 256 else 8,
    }
