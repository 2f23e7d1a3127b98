"""The neural probabilistic language model (Bengio et al. 2003, JMLR 3): the vectors of the last few tokens, side by side, through
one hidden layer, beside a direct connection.

    x = [e(t), e(t-1), ...]      h = W x + U tanh(H x + d)      p(next) = softmax(E h + b)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...data.packed import Packed
from .parts import tied_head


@dataclass(frozen=True)
class FeedForwardConfig:
    """vocab V; dim: of a token's vector; hidden: width of the hidden layer; context: how many tokens it sees."""

    vocab: int
    dim: int
    hidden: int
    context: int = 5

    def __post_init__(self) -> None:
        if min(self.vocab, self.dim, self.hidden, self.context) < 1:
            raise ValueError(f"FeedForwardConfig: every size must be at least 1, got {self}")


class FeedForward(nn.Module):
    """packed_hidden(batch) -> [T, dim]; norm; head. What stands before a sequence is one learned vector."""

    def __init__(self, config: FeedForwardConfig):
        super().__init__()
        self.config = c = config
        self.embedding, self.head = tied_head(c.vocab, c.dim)
        self.before = nn.Parameter(torch.zeros(c.dim))
        self.first = nn.Linear(c.context * c.dim, c.hidden)
        self.second = nn.Linear(c.hidden, c.dim)
        self.direct = nn.Linear(c.context * c.dim, c.dim, bias=False)
        self.norm = nn.Identity()

    def packed_hidden(self, batch: Packed) -> Tensor:
        """Sequences one after another, of which none sees another: [T, dim]."""
        x = self.embedding(batch.ids)
        seen = [
            x.roll(back, 0).where(batch.position[:, None] >= back, self.before) for back in range(self.config.context)
        ]
        joined = torch.cat(seen, 1)  # [T, context * dim]
        return self.direct(joined) + self.second(torch.tanh(self.first(joined)))
