"""The arithmetic contract as plain PyTorch: every function gives the exact bits that a kernel must give, in a fixed
order of operations, built from element-wise tensor operations alone (each rounded once by IEEE 754; no reduction, no
matmul and no libm of torch, whose order and whose tails depend on shapes).

Slow on purpose and free of any helper of the kernels. Tests of kernels may demand `torch.equal` with these.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastllm import _C

LANES, CHAINS = 16, 4  # csrc/cpu/simd.h: lanes of a vector; accumulators of a row reduction
TILE = 256  # keys of one attention tile, at absolute positions
LINEAR_CHAIN = 128  # csrc/cpu/gemm.h: k of one chain of a linear
FIXED_POINT = 40  # bits after the point of a sampling weight


# ------------------------------------------------------------------------------------------------------ element-wise


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in fp32 with one rounding (two in the generic tier, as in simd.h).

    The product of two fp32 numbers is exact in fp64. The sum is rounded to odd: where it is inexact, the neighbour
    whose last bit is set is taken, so that the rounding to fp32 that follows sees on which side the exact value lies.
    """
    if _C.isa() == "generic":
        return a * b + c
    product, c = a.double() * b.double(), c.double()
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)  # Knuth's two-sum: total + error is exact
    even = total.view(torch.int64) & 1 == 0
    towards = torch.where(error > 0, math.inf, -math.inf).double()
    odd = torch.where(even & error.isfinite() & (error != 0), torch.nextafter(total, towards), total)
    return odd.float()


def exp(x: Tensor) -> Tensor:
    """e^x by the polynomial of simd.h."""
    clamped = x.clamp(-104.0, 89.0)
    n = (clamped * 1.44269504088896341).round()
    constant = torch.full_like
    f = fma(n, constant(x, -0.693359375), clamped)
    f = fma(n, constant(x, 2.12194440e-4), f)
    p = constant(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, f, constant(x, c))
    p = fma(p, f * f, f) + 1.0
    scaled = torch.ldexp(p.double(), n.double()).float()
    return torch.where(x.isnan(), x, scaled)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) without overflow on either side."""
    t = exp(-x.abs())
    r = torch.ones_like(t) / (t + 1.0)
    return torch.where(x >= 0, r, t * r)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; silu(-inf) is -0, its limit."""
    g = gate.float()
    g = torch.where(g == -math.inf, torch.finfo(torch.float32).min, g)
    return (g * sigmoid(g) * up.float()).to(gate.dtype)


def adamw(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(w, m, v) after a step, all fp32; the constants are computed in fp64 and rounded once."""
    constant = torch.full_like
    m = fma(constant(g, 1 - beta1), g - m, m)
    v = fma(constant(g, 1 - beta2) * g, g, constant(g, beta2) * v)
    root = v.double().sqrt().float()  # fp64 between does not change an fp32 root
    ratio = m / fma(root, constant(g, 1 / (1 - beta2**step) ** 0.5), constant(g, eps))
    return fma(constant(g, -lr / (1 - beta1**step)), ratio, w * constant(g, 1 - lr * weight_decay)), m, v


# -------------------------------------------------------------------------------------------------------- rows


def row_sum(lanes: Tensor) -> Tensor:
    """[..., 16] -> [...], halves folded onto each other."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def chained_sum(step: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """[..., N] -> [...]: acc = step(acc, x) in four chains of 16 lanes over ascending columns, then one tree."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % (LANES * CHAINS)))
    blocks = padded.unflatten(-1, (-1, CHAINS, LANES))
    acc = torch.zeros_like(blocks[..., 0, :, :])
    for i in range(blocks.shape[-3]):
        acc = step(acc, blocks[..., i, :, :])
    return row_sum((acc[..., 0, :] + acc[..., 1, :]) + (acc[..., 2, :] + acc[..., 3, :]))


def sum_of_squares(x: Tensor) -> Tensor:
    """[..., N] -> [...]"""
    return chained_sum(lambda acc, v: fma(v, v, acc), x)


def _rstd(variance: Tensor, eps: float) -> Tensor:
    variance = variance + torch.tensor(eps, dtype=torch.float32)
    return torch.ones_like(variance) / variance.double().sqrt().float()  # fp64 between does not change an fp32 root


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    rstd = _rstd(sum_of_squares(wide) / float(x.shape[-1]), eps)
    return (wide * rstd[..., None] * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    wide, n = x.float(), float(x.shape[-1])
    about = chained_sum(lambda acc, v: acc + v, wide) / n
    d = wide - about[..., None]
    lost = chained_sum(lambda acc, v: acc + v, d) / n
    variance = sum_of_squares(d) / n - lost * lost
    h = (wide - (about + lost)[..., None]) * _rstd(torch.where(variance < 0, 0, variance), eps)[..., None]
    return (h * weight.float() if bias is None else fma(h, weight.float(), bias.float())).to(x.dtype)


def softmax(x: Tensor, temperature: float = 1.0) -> Tensor:
    """For finite x."""
    wide = x.float()
    e = exp((wide - wide.amax(-1, keepdim=True)) * torch.tensor(1 / temperature, dtype=torch.float32))
    share = torch.ones(()) / chained_sum(lambda acc, v: acc + v, e)
    return (e * share[..., None]).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] by weight [N, K]: FMA chains over LINEAR_CHAIN k each, K ascending from zero, added in order; then the bias."""
    total = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for begin in range(0, weight.shape[1], LINEAR_CHAIN):
        acc = torch.zeros_like(total)
        for k in range(begin, min(begin + LINEAR_CHAIN, weight.shape[1])):
            acc = fma(x[..., k, None], weight[:, k], acc)
        total = total + acc if begin else acc
    return total if bias is None else total + bias


def rope_table(positions: int, dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, dim / 2], computed in fp64 and rounded once."""
    frequency = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rope(x: Tensor, position: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """x [..., S, H, D], its halves turned by the angles of position [S]."""
    cos, sin = (t[position][:, None, :] for t in table)  # [S, 1, D/2]
    a, b = x.chunk(2, dim=-1)
    return torch.cat((fma(a, cos, -(b * sin)), fma(a, sin, b * cos)), dim=-1)


# ---------------------------------------------------------------------------------------------------------- attention


def attention(q: Tensor, k: Tensor, v: Tensor, first: int, tile: int = TILE, origin: int = 0) -> Tensor:
    """Causal attention of queries at positions first, first + 1, ... over keys at 0, 1, ...

    q [..., S, H, D]; k, v [..., C, G, D] with H a multiple of G. Keys are cut in tiles that begin at multiples of
    `tile` (counted from `origin`: the contract says 0). Each tile gives (max, sum, accumulator), its keys ascending;
    the tiles are folded left to right. A key that the mask hides leaves the sums untouched.
    """
    groups = q.shape[-2] // k.shape[-2]
    k, v = (t.repeat_interleave(groups, dim=-2).transpose(-2, -3) for t in (k, v))  # [..., H, C, D]
    q = q.transpose(-2, -3)  # [..., H, S, D]
    count, scale = k.shape[-2], torch.tensor(q.shape[-1] ** -0.5, dtype=torch.float32)
    query = first + torch.arange(q.shape[-2])[:, None]
    start = origin % tile
    borders = [0, *range(start or tile, count, tile), count]
    whole = None
    for begin, end in itertools.pairwise(borders):
        part = _tile(q, k[..., begin:end, :], v[..., begin:end, :], query >= torch.arange(begin, end), scale)
        whole = part if whole is None else _fold(whole, part)
    _, total, acc = whole
    return (acc / total[..., None]).transpose(-2, -3)


def _tile(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    score = torch.zeros(*q.shape[:-1], k.shape[-2])
    for d in range(q.shape[-1]):
        score = fma(q[..., :, None, d], k[..., None, :, d], score)
    score = torch.where(seen, score * scale, -math.inf)
    top = score.amax(-1)  # exact in any order
    weight = exp(score - torch.where(top == -math.inf, 0.0, top)[..., None])
    total, acc = torch.zeros_like(top), torch.zeros_like(q)
    for j in range(k.shape[-2]):
        total = torch.where(seen[:, j], total + weight[..., j], total)
        acc = torch.where(seen[:, j, None], fma(weight[..., j, None], v[..., j, None, :], acc), acc)
    return top, total, acc


def _fold(left: tuple[Tensor, Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    top = torch.maximum(left[0], right[0])
    a, b = exp(left[0] - top), exp(right[0] - top)
    total = fma(left[1], a, right[1] * b)
    acc = fma(left[2], a[..., None], right[2] * b[..., None])
    empty = right[0] == -math.inf  # a tile without visible keys changes nothing
    return top, torch.where(empty, left[1], total), torch.where(empty[..., None], left[2], acc)


# ----------------------------------------------------------------------------------------------------------- sampling


def fixed_point(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """exp((x - max) / temperature) as integers of 2^-40: [..., V] int64. Integer sums have no order."""
    x = logits.float()
    x = x - x.amax(-1, keepdim=True)
    weight = exp(x if temperature == 1.0 else x / temperature)
    return (weight.double() * 2.0**FIXED_POINT).long()


def log_probability(logits: Tensor, token: int) -> float:
    """log softmax(logits)[token] for logits [V]; fp32 from the exact integer sum."""
    total = int(fixed_point(logits).sum())
    difference = float(logits[token].float() - logits.float().amax())
    return torch.tensor(difference - math.log(total * 2.0**-FIXED_POINT), dtype=torch.float32).item()


def philox(counter: Iterable[int], key: Iterable[int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 (Salmon, Moraes, Dror & Shaw 2011): four random words from a counter of four and a key of two."""
    c, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return tuple(c)


def sample(logits: Tensor, seed: int, index: int, position: int, temperature: float = 1.0) -> tuple[int, float]:
    """(token, log-probability at temperature 1) of logits [V], by inverse CDF on integers.

    The draw depends on (seed, completion index, position) and the logits: 64 random bits are scaled to the sum of the
    weights; the first token whose running sum exceeds it is taken.
    """
    words = philox(
        (position & 0xFFFFFFFF, position >> 32, index & 0xFFFFFFFF, index >> 32), (seed & 0xFFFFFFFF, seed >> 32)
    )
    weight = fixed_point(logits, temperature)
    point = (words[0] | words[1] << 32) * int(weight.sum()) >> 64
    token = int((weight.cumsum(0) > point).nonzero()[0])
    return token, log_probability(logits, token)
