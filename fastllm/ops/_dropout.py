"""Dropout by counter: whether an element is kept depends on (seed, call, row, column) and on nothing else, so a backward
draws the same mask again instead of storing it, and a CPU and a GPU drop the same elements.

    bits(row, column) = word column % 4 of Philox4x32-10 (Salmon et al. 2011)
                        with key = seed and counter = (column // 4, row low, row high, call)
    kept              = bits >= round(p * 2^32);   a kept value is multiplied by 1 / (1 - p)

`row` is the flat index over all dimensions but the last; for attention it is (batch * H + head) * Sq + query and the
column is the key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import tl, triton

_ROUNDS, _FACTORS, _KEYS = 10, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 2**32 - 1


@dataclass(frozen=True)
class Dropout:
    """p: probability to drop, in [0, 1). seed: int64. call: which dropout of the model and step, 0 .. 2^32 - 1; two
    dropouts with the same seed and call drop the same places."""

    p: float
    seed: int
    call: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"Dropout: p is {self.p}, allowed: 0 <= p < 1")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"Dropout: seed is {self.seed}, allowed: a signed 64-bit integer")
        if not 0 <= self.call <= _WORD:
            raise ValueError(f"Dropout: call is {self.call}, allowed: 0 to {_WORD}")

    def arguments(self) -> tuple[float, int, int]:
        """p, seed, call as the raw ops take them."""
        return float(self.p), self.seed, self.call


def threshold(p: float) -> int:
    """The least 32-bit word that is kept."""
    return min(round(p * 2**32), _WORD)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low words of a * b, a in [0, 2^32) as int64, whose own product would overflow."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def keep(rows: Tensor, columns: Tensor, p: float, seed: int, call: int) -> Tensor:
    """Which elements (rows, columns) are kept: bool, of the shape to which the two int64 tensors broadcast."""
    rows, columns = torch.broadcast_tensors(rows, columns)
    c0, c1, c2, c3 = columns >> 2, rows & _WORD, (rows >> 32) & _WORD, torch.full_like(rows, call)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        (h0, l0), (h1, l1) = _multiply(c0, _FACTORS[0]), _multiply(c2, _FACTORS[1])
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + _KEYS[0]) & _WORD, (k1 + _KEYS[1]) & _WORD
    words = torch.stack((c0, c1, c2, c3), -1).gather(-1, (columns & 3).unsqueeze(-1)).squeeze(-1)
    return words >= threshold(p)


@triton.jit
def keep_tile(row, column, seed, call, threshold, N: tl.constexpr):
    """Bool [M, N]: the mask of the int64 rows [M] at columns column .. column + N - 1, N and column multiples of 4."""
    group = (column // 4 + tl.arange(0, N // 4))[None, :].to(tl.uint32)
    row = row[:, None].to(tl.int64)
    zero = (group * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.cast(seed, tl.int64),
        group + (row * 0).to(tl.uint32),
        (row & 0xFFFFFFFF).to(tl.uint32) + zero,
        ((row >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero,
        zero + (row * 0).to(tl.uint32) + tl.cast(call, tl.uint32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 4, 2, 2]: word 2a + b
    return tl.reshape(words, (row.shape[0], N)) >= tl.cast(threshold, tl.uint32)
