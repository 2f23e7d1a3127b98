"""Where a token stands: sinusoids (Vaswani et al. 2017) and the relative bias of T5 (Raffel et al. 2019, arXiv 1910.10683)."""

import math

import torch
from torch import Tensor, nn

from .. import ops


class Sinusoids(nn.Module):
    """Rows [dim] of sin(p / 10000^(2i/dim)) and cos(...), side by side (the original Transformer) or in halves (Marian)."""

    def __init__(self, count: int, dim: int, halves: bool = False):
        super().__init__()
        with torch.device("cpu"):  # real also in a skeleton that is built on the meta device
            place = torch.arange(count, dtype=torch.float64)[:, None]
            angle = place / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            pairs = torch.stack((angle.sin(), angle.cos()), 1 if halves else 2)
            table = pairs.flatten(1)[:, :dim].float()
        self.register_buffer("table", table, persistent=False)

    def forward(self, position: Tensor) -> Tensor:
        """position int64 [...] -> [..., dim]"""
        return ops.embedding(position, self.table)


class RelativeBias(nn.Module):
    """A learned number for each head and each bucket of distances; one for all layers. weight [buckets, H].

    Half of the buckets are single distances, the rest grow with the logarithm up to max_distance, beyond which all are one.
    both: keys behind the query have buckets of their own (an encoder); else they are not seen (a decoder).
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, both: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.weight, std=0.02)
        self.max_distance = max_distance
        with torch.device("cpu"):
            table = bucket_of(torch.arange(-max_distance, max_distance + 1), buckets, max_distance, both)
        self.register_buffer("buckets", table, persistent=False)

    def forward(self, queries: int, keys: int) -> Tensor:
        """The bias [1, H, queries, keys] of the last `queries` of `keys` positions."""
        place = torch.arange(keys, device=self.weight.device)
        distance = place - place[keys - queries :, None]  # [queries, keys], key - query
        index = self.buckets[distance.clamp(-self.max_distance, self.max_distance) + self.max_distance]
        return ops.embedding(index, self.weight).permute(2, 0, 1)[None].contiguous()


def bucket_of(distance: Tensor, buckets: int, max_distance: int, both: bool) -> Tensor:
    """The bucket of each distance key - query, int64."""
    if both:
        buckets //= 2
        first, distance = (distance > 0).long() * buckets, distance.abs()
    else:
        first, distance = torch.zeros_like(distance), -distance.clamp(max=0)
    exact = buckets // 2
    # in float32 and in this order, for a distance on the border of two buckets falls where the weights were trained
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)
