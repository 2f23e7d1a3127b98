"""Recurrent language models: the network of Elman (1990; as a language model Mikolov et al. 2010), LSTM (Hochreiter & Schmidhuber
1997; Sundermeyer et al. 2012), GRU (Cho et al. 2014, arXiv 1406.1078), and any of them with attention over its own past states
(Bahdanau et al. 2014, arXiv 1409.0473; in the form of Luong et al. 2015, arXiv 1508.04025; within one sequence Cheng et al. 2016,
arXiv 1601.06733):

    s(t) = cell(e(t), s(t-1))      c(t) = sum_u softmax_u(s(t) A s(u) / sqrt(H)) s(u), u <= t      s'(t) = tanh(C [s(t), c(t)])

The cells are those of torch.nn. A state begins at zero in every sequence of a batch, and no gradient crosses a border.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from ...data.packed import Packed
from .parts import tied_head

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class RecurrentConfig:
    """vocab V; dim: of a token's vector; hidden: of a state; cell: "rnn", "lstm" or "gru"; attention: over past states."""

    vocab: int
    dim: int
    hidden: int
    layers: int = 1
    cell: str = "lstm"
    attention: bool = False

    def __post_init__(self) -> None:
        if min(self.vocab, self.dim, self.hidden, self.layers) < 1:
            raise ValueError(f"RecurrentConfig: every size must be at least 1, got {self}")
        if self.cell not in CELLS:
            raise ValueError(f"RecurrentConfig: cell={self.cell!r}; allowed: {', '.join(CELLS)}")


class Recurrent(nn.Module):
    """packed_hidden(batch) -> [T, dim]; norm; head."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.config = c = config
        self.embedding, self.head = tied_head(c.vocab, c.dim)
        self.cell = CELLS[c.cell](c.dim, c.hidden, c.layers, batch_first=True)
        self.score = nn.Linear(c.hidden, c.hidden, bias=False) if c.attention else None
        self.combine = nn.Linear(2 * c.hidden, c.hidden) if c.attention else None
        self.out = nn.Linear(c.hidden, c.dim)
        self.norm = nn.Identity()

    def packed_hidden(self, batch: Packed) -> Tensor:
        """Sequences one after another, of which none sees another: [T, dim]."""
        lengths = batch.cu.diff()
        x = self.embedding(batch.ids).split(lengths.tolist())
        states, _ = self.cell(
            pad_sequence(list(x), batch_first=True)
        )  # [B, S, hidden]; what follows an end is not read
        if self.score is not None:
            past = states[:, None]
            seen = scaled_dot_product_attention(self.score(past), past, past, is_causal=True)[:, 0]
            states = torch.tanh(self.combine(torch.cat((states, seen), -1)))
        real = torch.arange(states.shape[1], device=lengths.device) < lengths[:, None]
        return self.out(states[real])
