"""The decoder-only transformer (Vaswani et al. 2017; Llama: Touvron et al. 2023), built from `blocks`.

A layer is four projections with everything around them fused in: norm -> qkv, attention, out + residual, norm -> gate * up,
down + residual. The same layer serves the dense forward (training, scoring) and the paged one (decoding); they differ in the
attention that is passed in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import AttentionSpec
from .blocks import Embedding, PagedBatch, Projection, RMSNorm


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants; `vocab` V, `layers` L, `dim` the width, `ffn` F, `heads` H, `kv_heads` Hk, `head_dim` D."""

    vocab: int
    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        sizes = (
            self.vocab,
            self.layers,
            self.dim,
            self.ffn,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.max_position,
        )
        if min(sizes) < 1:
            raise ValueError(f"DecoderConfig: every size must be at least 1, got {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"DecoderConfig: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")


# Sizes by name, for `fastllm pretrain` and for tests; a file brings its own.
PRESETS = {
    "smollm2-135m": DecoderConfig(49152, 30, 576, 1536, 9, 3, 64, 8192, rope_theta=1e5),
    "tinyllama-1.1b": DecoderConfig(32000, 22, 2048, 5632, 32, 4, 64, 2048, tied=False),
}

Attend = Callable[[Tensor, int], Tensor]


class Layer(nn.Module):
    """One transformer layer: attention and gated MLP, each behind its norm, each added to the residual stream."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.attn_norm, self.mlp_norm = RMSNorm(c.dim, c.eps), RMSNorm(c.dim, c.eps)
        self.qkv = Projection(c.dim, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.out = Projection(c.heads * c.head_dim, c.dim)
        self.gate_up = Projection(c.dim, 2 * c.ffn, swiglu=True)
        self.down = Projection(c.ffn, c.dim)

    def forward(self, x: Tensor, index: int, attend: Attend) -> Tensor:
        """x [..., dim]; attend(qkv [..., H + 2 Hk, D], layer index) -> [..., H, D]."""
        qkv = self.qkv(x, norm=self.attn_norm).unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim))
        x = self.out(attend(qkv, index).flatten(-2), residual=x)
        return self.down(self.gate_up(x, norm=self.mlp_norm), residual=x)


class Decoder(nn.Module):
    """model(ids [B, S]) -> logits [B, S, V]; model.hidden(ids) -> [B, S, dim]; model.step(...) over a paged cache."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.head = Projection(config.dim, config.vocab)
        if config.tied:
            self.head.weight = self.embedding.weight
        self.spec = AttentionSpec(causal=True, window=config.window)
        with torch.device("cpu"):  # real also in a skeleton that is built on the meta device
            table = ops.rope_table(config.max_position, config.head_dim, config.rope_theta)
        self.register_buffer("rope", table, persistent=False)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[..., H + 2 Hk, D] as views q [..., H, D], k and v [..., Hk, D]."""
        c = self.config
        return qkv.split((c.heads, c.kv_heads, c.kv_heads), -2)

    def hidden(self, ids: Tensor) -> Tensor:
        """Residual stream after the last layer, before the final norm: ids int64 [B, S] -> [B, S, dim]."""
        if ids.dim() != 2:
            raise ValueError(f"Decoder: ids have shape {tuple(ids.shape)}; they must be [B, S]")
        if ids.shape[1] > self.config.max_position:
            raise ValueError(f"Decoder: {ids.shape[1]} tokens, the model has {self.config.max_position} positions")
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

        def attend(qkv: Tensor, index: int) -> Tensor:
            q, k, v = self.split(qkv)
            q, k = ops.rope(q, k, position, self.rope)
            return ops.attention(q, k, v, self.spec)

        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, attend)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., V], final norm included."""
        return self.head(hidden, norm=self.norm)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))

    def step(self, ids: Tensor, batch: PagedBatch) -> Tensor:
        """ids int64 [T] of a paged batch -> hidden [T, dim]; writes their keys and values into the batch's pages."""

        def attend(qkv: Tensor, index: int) -> Tensor:
            q, k, v = self.split(qkv)
            pages = batch.pages[index]
            q = ops.kv_append(k, v, pages, batch.slot, batch.position, self.rope, q=q)
            return ops.paged_attention(q, pages, batch.block_table, batch.context_len, batch.cu_q, self.spec)

        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, index, attend)
        return x
