"""The encoder (BERT: Devlin et al. 2018, arXiv 1810.04805; RoBERTa: Liu et al. 2019, arXiv 1907.11692), built from `layers`.

Every token sees every other one of its sequence. A batch is packed: sequences lie one after another, attention keeps them
apart, and nothing is computed for padding. So a sequence has the same bits alone, in a batch and in a padded batch (all but
what comes from the pooler, whose tanh is torch's and may round its last elements differently).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..data.packed import Packed
from ..ops import AttentionSpec
from .blocks import Embedding, LayerNorm
from .layers import ACTIVATIONS, Layer, LayerConfig, linear

HEADS = (None, "mlm", "classify", "tokens")
POOLS = ("mean", "cls", "pooler")
EVERYTHING = AttentionSpec(causal=False)


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants; `vocab` V, `layers` L, `dim` the width, `ffn` F, `heads` H, `types` segment kinds.

    max_position: the longest sequence. skip_padding: tokens that are no padding are counted from pad_id + 1 on, and the table
    of positions has as many rows more (RoBERTa); else a token's position is its column (BERT). head: None (hidden states),
    "mlm" (a logit for each word), "classify" (`labels` logits a sequence) or "tokens" (`labels` logits a token).
    label_names: what these are called, where they have names. pooler: a dense layer and tanh over the first token; a head of
    "classify" stands on it.
    """

    vocab: int
    layers: int
    dim: int
    ffn: int
    heads: int
    max_position: int
    types: int = 2
    eps: float = 1e-12
    activation: str = "gelu"
    pad_id: int = 0
    skip_padding: bool = False
    head: str | None = None
    labels: int = 0
    pooler: bool = False
    tied: bool = True
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = (self.vocab, self.layers, self.dim, self.ffn, self.heads, self.max_position, self.types)
        if min(sizes) < 1:
            raise ValueError(f"EncoderConfig: every size must be at least 1, got {self}")
        if self.dim % self.heads:
            raise ValueError(f"EncoderConfig: dim={self.dim} must be a multiple of heads={self.heads}")
        if self.head not in HEADS:
            raise ValueError(f"EncoderConfig: head={self.head!r}; allowed: {', '.join(map(repr, HEADS))}")
        if (self.head in ("classify", "tokens")) != (self.labels > 0):
            raise ValueError(
                f"EncoderConfig: head={self.head!r} with labels={self.labels}; heads of labels need one or more"
            )
        if len(self.label_names) not in (0, self.labels):
            raise ValueError(
                f"EncoderConfig: {len(self.label_names)} label_names for {self.labels} labels; give as many, or none"
            )
        if self.head == "classify" and not self.pooler:
            raise ValueError("EncoderConfig: head='classify' stands on the pooler: give pooler=True")

    @property
    def layer(self) -> LayerConfig:
        """Of each layer."""
        return LayerConfig(self.dim, self.ffn, self.heads, self.dim // self.heads, self.eps, activation=self.activation)

    @property
    def first_position(self) -> int:
        """The row of the table of positions that the first token takes."""
        return self.pad_id + 1 if self.skip_padding else 0


# Sizes by name, for training from scratch (see presets.py) and for tests; a file brings its own.
PRESETS = {
    "nano": EncoderConfig(4096, 5, 128, 512, 4, 512, head="mlm"),
    "micro": EncoderConfig(4096, 5, 256, 1024, 4, 512, head="mlm"),
    "mini": EncoderConfig(4096, 6, 384, 1536, 6, 512, head="mlm"),
    "minilm-l6": EncoderConfig(30522, 6, 384, 1536, 12, 512, pooler=True),
    "bert-base": EncoderConfig(30522, 12, 768, 3072, 12, 512, head="mlm"),
    "bert-large": EncoderConfig(30522, 24, 1024, 4096, 16, 512, head="mlm"),
    "roberta-base": EncoderConfig(
        50265, 12, 768, 3072, 12, 512, types=1, eps=1e-5, pad_id=1, skip_padding=True, head="mlm"
    ),
}


class MaskedHead(nn.Module):
    """Logits of the words that belong in a place: dense, activation, norm, and the table of words with a bias."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.dense, self.norm = linear(config.dim, config.dim), LayerNorm(config.dim, config.eps)
        self.activation = "gelu" if config.skip_padding else config.activation  # RoBERTa's, whatever its layers have
        self.words = linear(config.dim, config.vocab)

    def transform(self, x: Tensor) -> Tensor:
        """What the table of words reads: [..., dim] -> [..., dim]."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.words(self.transform(x))


class Encoder(nn.Module):
    """model(ids [B, S], mask) -> hidden states [B, S, dim], or what its head gives; model.embed(batch) -> [B, dim].

    ids int64; mask [B, S], true or not 0 where there is a token; types int64 [B, S], 0 where not given. What stands at
    padding in a result is 0.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = c = config
        self.embedding = Embedding(c.vocab, c.dim)
        self.positions, self.types = Embedding(c.max_position + c.first_position, c.dim), Embedding(c.types, c.dim)
        for table in (self.embedding, self.positions, self.types):
            nn.init.normal_(table.weight, std=0.02)
        self.norm = LayerNorm(c.dim, c.eps)
        self.layers = nn.ModuleList(Layer(c.layer) for _ in range(c.layers))
        self.pooler = linear(c.dim, c.dim) if c.pooler else None
        self.head = None
        if c.head == "mlm":
            self.head = MaskedHead(c)
            if c.tied:
                self.head.words.weight = self.embedding.weight
        elif c.head:
            self.head = linear(c.dim, c.labels)

    # ------------------------------------------------------------------------------------------------------ packed batches

    def pack(self, ids: Tensor, mask: Tensor | None = None) -> Packed:
        """A padded batch without its padding."""
        batch = Packed.of_padded(ids, mask)
        self._check_length(batch)
        if not self.config.skip_padding:
            return batch
        position = _count_tokens(ids, self.config.pad_id)  # in the padded batch, whatever the mask says
        return Packed(batch.ids, batch.select(position), batch.cu, batch.longest, batch.shape, batch.rows)

    def pack_lists(self, sequences: Sequence[Sequence[int]]) -> Packed:
        """Sequences of token ids, of any lengths."""
        return self.placed(Packed.of_lists(sequences, self.norm.weight.device))

    def placed(self, batch: Packed) -> Packed:
        """Sequences that begin at position 0, with positions as this model counts them."""
        self._check_length(batch)
        if not self.config.skip_padding:
            return batch
        parts = [_count_tokens(ids[None], self.config.pad_id)[0] for ids in batch.ids.split(batch.cu.diff().tolist())]
        position = torch.cat(parts) if parts else batch.position
        return Packed(batch.ids, position, batch.cu, batch.longest)

    def packed_hidden(self, batch: Packed, types: Tensor | None = None) -> Tensor:
        """Final hidden states [T, dim] of a packed batch; types int64 [T]."""
        place, kind = (
            self.positions(batch.position),
            self.types(torch.zeros_like(batch.ids) if types is None else types),
        )
        x, _ = self.norm(self.embedding(batch.ids) + kind, residual=place)
        keys = batch.cu_keys
        for layer in self.layers:
            x = layer(x, lambda q, k, v: ops.attention_varlen(q, k, v, batch.cu, keys, EVERYTHING))
        return x

    def pool(self, x: Tensor, batch: Packed, how: str = "mean") -> Tensor:
        """One vector a sequence, [T, dim] -> [B, dim]: the mean of its tokens, its first token ("cls"), or the pooler."""
        if how not in POOLS:
            raise ValueError(f"pool: how={how!r}; allowed: {', '.join(map(repr, POOLS))}")
        if how == "mean":
            return batch.mean(x)
        first = batch.first(x)
        if how == "cls":
            return first
        if self.pooler is None:
            raise ValueError("pool: this model has no pooler; pool by 'mean' or 'cls'")
        return torch.tanh(self.pooler(first))

    def embed(self, batch: Packed, how: str = "mean", normalize: bool = True) -> Tensor:
        """One vector a sequence, of length 1 where normalize: [B, dim]."""
        pooled = self.pool(self.packed_hidden(batch), batch, how)
        return nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    # ------------------------------------------------------------------------------------------------------ padded batches

    def hidden(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Final hidden states: [B, S, dim]."""
        batch = self.pack(ids, mask)
        return batch.unpack(self.packed_hidden(batch, self._select_types(batch, types)))

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """hidden [B, S, dim] without a head; logits [B, S, V] (mlm), [B, labels] (classify), [B, S, labels] (tokens)."""
        batch = self.pack(ids, mask)
        x = self.packed_hidden(batch, self._select_types(batch, types))
        if self.head is None:
            return batch.unpack(x)
        if self.config.head == "classify":
            return self.head(self.pool(x, batch, "pooler"))
        return batch.unpack(self.head(x))

    def _select_types(self, batch: Packed, types: Tensor | None) -> Tensor | None:
        if types is None:
            return None
        if types.shape != batch.shape:
            raise ValueError(f"types have shape {tuple(types.shape)}, the ids {batch.shape}; they must be the same")
        return batch.select(types)

    def _check_length(self, batch: Packed) -> None:
        columns = batch.shape[1] if batch.shape else batch.longest
        if columns > self.config.max_position:
            raise ValueError(
                f"{columns} tokens, the model has {self.config.max_position} positions; shorten the sequence"
            )


def _count_tokens(ids: Tensor, pad_id: int) -> Tensor:
    """Positions of RoBERTa: what is no padding is counted from pad_id + 1, padding has pad_id. [B, S]."""
    kept = (ids != pad_id).long()
    return kept.cumsum(1) * kept + pad_id
