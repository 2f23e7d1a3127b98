"""What the neural baselines share."""

from torch import Tensor, nn

SPAN = 0.1  # embeddings begin uniform within it (Zaremba et al. 2014, arXiv 1409.2329)


class Embedding(nn.Embedding):
    """An embedding whose weight is the head's, too: what is read is times sqrt(dim), for numbers that suit logits are too small
    for what stands behind (Vaswani et al. 2017, section 3.4)."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., dim]"""
        return super().forward(ids) * self.embedding_dim**0.5


def tied_head(vocab: int, dim: int) -> tuple[Embedding, nn.Linear]:
    """An embedding and the head that shares its weight [V, dim]."""
    embedding, head = Embedding(vocab, dim), nn.Linear(dim, vocab)
    nn.init.uniform_(embedding.weight, -SPAN, SPAN)
    nn.init.zeros_(head.bias)
    head.weight = embedding.weight
    return embedding, head
