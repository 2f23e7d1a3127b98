"""The pieces that models are built from: a projection and an embedding whose weights may be packed, and the batch of a paged
forward. They call the ops and hold no arithmetic of their own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Panels, QWeight

Weight = Tensor | Panels | QWeight


class Projection(nn.Module):
    """y = norm(x) W^T, then + residual or swiglu.

    The weight [N, K] is a Parameter until `pack` replaces it by panels or quantised panels for decoding on a CPU. A swiglu
    projection stacks gate over up: [2F, K].
    """

    def __init__(self, inputs: int, outputs: int, swiglu: bool = False):
        super().__init__()
        self.swiglu = swiglu
        self.weight: Weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor, norm: "RMSNorm | None" = None, residual: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]; norm is applied to x first, residual [..., N] is added last."""
        fused: dict[str, Any] = {"residual": residual, "swiglu": self.swiglu}
        if norm is not None:
            fused |= {"norm": norm.weight, "eps": norm.eps}
        linear = ops.quant_linear if isinstance(self.weight, QWeight) else ops.linear
        return linear(x, self.weight, **fused)

    def pack(self, weight: Panels | QWeight) -> None:
        replace_weight(self, weight)


class Embedding(nn.Module):
    """Rows of a table [V, K]; shares a packed table with the output projection where the two are tied."""

    def __init__(self, vocab: int, dim: int):
        super().__init__()
        self.weight: Weight = nn.Parameter(torch.empty(vocab, dim))

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., K]. IndexError for an id out of the vocabulary."""
        if isinstance(self.weight, Tensor):
            return ops.embedding(ids, self.weight)
        return self.weight.rows_at(ids)

    def pack(self, weight: Panels | QWeight) -> None:
        replace_weight(self, weight)


class RMSNorm(nn.Module):
    """Weight [K] and eps; where a projection follows, it takes the norm in as a prologue."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def replace_weight(module: nn.Module, weight: Panels | QWeight) -> None:
    """A packed weight is no Parameter: nothing can train it, and `state_dict` does not list it."""
    module._parameters.pop("weight", None)
    module.weight = weight


@dataclass
class PagedBatch:
    """What a forward over a paged KV cache must know about its rows: T tokens of B sequences, packed.

    position int64 [T]; slot int64 [T], where the cache takes each token; block_table int32 [B, P]; context_len int32 [B],
    keys per sequence with these tokens included; cu_q int32 [B + 1]; pages: one record of K and V pages a layer.
    """

    position: Tensor
    slot: Tensor
    block_table: Tensor
    context_len: Tensor
    cu_q: Tensor
    pages: list[ops.KVPages]
