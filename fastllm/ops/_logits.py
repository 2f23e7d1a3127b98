"""Triton functions that read a row of logits: what `sample`, `target_logprobs` and `top_logprobs` share on a GPU.

The arithmetic is that of csrc/cpu/fixed.h, operation for operation, so that both devices get the same bits: weights
exp(x - max) as integers of 2^-40, whose sums have no order; every other rounding is stated by an explicit fma.
Kernels that use them are launched with OPTIONS: no contraction of products and sums beyond those.
"""

from ._triton import tl, triton

BLOCK = 4096  # group maxima of a row
LIST = 128  # candidates that are compared pair by pair
OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}

_LARGEST = tl.constexpr(3.4028234663852886e38)

# ------------------------------------------------------------------------------------------------------- fixed point


@triton.jit
def _constant(x, c):
    """c in the shape of x: tl.fma takes tensors alone."""
    return tl.full(x.shape, c, tl.float32)


@triton.jit
def exponent(x, top, scale):
    """scale * (x - top) within [-80, 0]; top is finite, see `finite_top`."""
    return tl.minimum(tl.maximum((x - top) * scale, -80.0), 0.0)


@triton.jit
def exponential(z):
    """2^20 exp(z) for z in [-80, 0]."""
    n = z * 1.44269504088896341 + 12582932.0  # 1.5 * 2^23 + 20: z / ln 2, rounded, is in the low bits
    power = n.to(tl.int32, bitcast=True) << 23
    n = n - 12582932.0
    f = tl.fma(n, _constant(z, -0.693359375), z)
    f = tl.fma(n, _constant(z, 2.12194440e-4), f)
    e = tl.fma(_constant(z, 1.9875691500e-4), f, _constant(z, 1.3981999507e-3))
    e = tl.fma(e, f, _constant(z, 8.3334519073e-3))
    e = tl.fma(e, f, _constant(z, 4.1665795894e-2))
    e = tl.fma(e, f, _constant(z, 1.6666665459e-1))
    e = tl.fma(e, f, _constant(z, 5.0000001201e-1))
    e = tl.fma(e, f * f, f) + 1.0
    return (e.to(tl.int32, bitcast=True) + power).to(tl.float32, bitcast=True)


@triton.jit
def fixed(e):
    """e 2^20 rounded to an integer, as 2^20 high + low: both are read from the bits of a sum with 1.5 * 2^23."""
    high = e + 12582912.0
    low = tl.fma(e - (high - 12582912.0), _constant(e, 1048576.0), _constant(e, 12582912.0))
    return high.to(tl.int32, bitcast=True) - 0x4B400000, low.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def weight(x, top, scale):
    """The weight of a logit, int64, and its 2^20 exp."""
    e = exponential(exponent(x, top, scale))
    high, low = fixed(e)
    return (high.to(tl.int64) << 20) + low, e


@triton.jit
def total(high, low):
    """Sum of lanes of sums: up to 2^11 weights a lane."""
    return (tl.sum(high.to(tl.uint32, bitcast=True).to(tl.int64), 0) << 20) + tl.sum(low.to(tl.int64), 0)


@triton.jit
def finite_top(top):
    return tl.minimum(top, _LARGEST)


@triton.jit
def natural_log(x):
    """Of a positive normal float64: the series of 2 atanh((m - 1) / (m + 1)), as in fixed.h."""
    u = x.to(tl.int64, bitcast=True)
    e = (u >> 52 & 2047) - 1023
    m = ((u & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    large = m > 1.4142135623730951
    m = tl.where(large, m * 0.5, m)
    e = e + large.to(tl.int64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = z * 0.0 + 1.0 / 23
    for i in tl.static_range(11):
        p = p * z + 1.0 / (21 - 2 * i)
    e = e.to(tl.float64)
    return e * 0.69314718055989033 + (2.0 * s * p + e * 5.4979230187083712e-14)


@triton.jit
def log_weight(sum):
    return natural_log(sum.to(tl.float64) * 9.094947017729282379150390625e-13)  # 2^-40


@triton.jit
def log_probability(x, top, sum, temperature):
    """log of exp((x - top) / temperature) / sum; top may be +inf: then infinities share the mass."""
    x, top, log = x.to(tl.float64), top.to(tl.float64), log_weight(sum)
    at_infinity = tl.where(x < top, float("-inf"), -log)
    return tl.where(top == float("inf"), at_infinity, (x - top) / temperature.to(tl.float64) - log).to(tl.float32)


# ------------------------------------------------------------------------------------------------------------- order


@triton.jit
def key(x):
    """A float as an int32 of the same order; both zeros are 0."""
    u = x.to(tl.int32, bitcast=True)
    return tl.where(u < 0, -(u & 0x7FFFFFFF), u)


@triton.jit
def value(key):
    """The float of a key."""
    return tl.where(key < 0, -key ^ -0x80000000, key).to(tl.float32, bitcast=True)


@triton.jit
def order(key, index):
    """One integer for the order "larger logit first, lower index first among equals"; no two of a row are equal. V <= 2^23."""
    return (key.to(tl.int64) << 24) - index


@triton.jit
def sum_ahead(order, weights):
    """For every element of a list [N]: the sum of the weights (up to 2^40 each) that stand before it in the order."""
    ahead = order[None, :] > order[:, None]
    high, low = (weights >> 20).to(tl.int32), (weights & 0xFFFFF).to(tl.int32)  # 32 bits take half the registers
    high, low = tl.sum(tl.where(ahead, high[None, :], 0), 1), tl.sum(tl.where(ahead, low[None, :], 0), 1)
    return (high.to(tl.int64) << 20) + low


# --------------------------------------------------------------------------------------------------- passes over a row


@triton.jit
def maxima(x, begin, end, BLOCK: tl.constexpr):
    """Lane maxima [BLOCK] of x[begin:end]; a lane with a NaN is NaN. Four blocks at a time: 64 KB on their way."""
    lanes = tl.arange(0, 4)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    top = tl.full([4, BLOCK], float("-inf"), tl.float32)
    for start in range(begin, end, 4 * BLOCK):
        at = start + lanes
        v = tl.load(x + at, mask=at < end, other=float("-inf"))
        top = tl.maximum(top, v, propagate_nan=tl.PropagateNan.ALL)
    nan = tl.max((top != top).to(tl.int32), 0) > 0
    return tl.where(nan, float("nan"), tl.max(top, 0))


@triton.jit
def any_nan(x):
    return tl.max((x != x).to(tl.int32), 0) > 0


@triton.jit
def bound_of_best(groups, k, top):
    """A value that at least k of the group maxima reach, and not many more; the least finite float where fewer do.

    Halving between values; it may stop early where logits lie on very different scales: the selection that follows is
    exact. Groups partition the row, so k logits reach it too.
    """
    enough = k + k // 4 + 8
    low, high, width = top - 1.0, top, 1.0
    found = tl.sum((groups >= low).to(tl.int32), 0)
    while (found < k) & (low > -_LARGEST):
        width *= 4.0
        high = low
        low = tl.maximum(top - width, -_LARGEST)
        found = tl.sum((groups >= low).to(tl.int32), 0)
    step = 0
    while (found > enough) & (step < 16):
        step += 1
        middle = low + (high - low) * 0.5
        count = tl.sum((groups >= middle).to(tl.int32), 0)
        reached = count >= k
        low = tl.where(reached, middle, low)
        found = tl.where(reached, count, found)
        high = tl.where(reached, high, middle)
    return tl.where(found < k, -_LARGEST, low)


@triton.jit
def collect(x, at, keep, keys, index, count, LIST: tl.constexpr):
    """Appends logits to a list in memory, in no order. `count` counts them all; LIST of them are stored."""
    place = tl.atomic_add(count + tl.zeros_like(at), 1, mask=keep, sem="relaxed")
    keep = keep & (place < LIST)
    tl.store(keys + place, key(x), mask=keep)
    tl.store(index + place, at, mask=keep)


@triton.jit
def load_list(keys, index, count, LIST: tl.constexpr):
    """(key, order, which exist) of a list's elements."""
    i = tl.arange(0, LIST)
    exist = i < count
    k = tl.load(keys + i, mask=exist, other=0)
    return k, order(k, tl.load(index + i, mask=exist, other=0)), exist


@triton.jit
def mass(x, begin, end, top, BLOCK: tl.constexpr):
    """The sum of the weights of x[begin:end] at temperature 1."""
    none = tl.zeros([BLOCK], tl.int32)
    sum = (begin * 0).to(tl.int64)
    for first in range(begin, end, 1 << 21):  # lanes of 32 bits hold the sum of as many
        last = tl.minimum(first + (1 << 21), end)
        high, low = none, none
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            v = tl.load(x + at, mask=at < last, other=float("-inf"))
            a, b = fixed(exponential(exponent(v, top, 1.0)))
            high += a
            low += b
        sum += total(high, low)
    return sum
