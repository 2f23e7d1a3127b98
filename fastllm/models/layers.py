"""What encoders and encoder-decoders are built from: a projection with bias, norms, one layer for all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Panels, QWeight
from . import blocks
from .blocks import (
    GATED,
    Embedding,
    LayerNorm,
    Projection,
    Recomputable,
    RMSNorm,
    activated,
    make_gains,
    recomputable,
    replace_weight,
)  # fmt: skip

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = blocks.ACTIVATIONS | {
    "relu": torch.relu,
    # not torch's: its last few elements differ in their bits from the others, and so would a row from the same row in a batch
    "silu": lambda x: ops.swiglu(x, torch.ones_like(x)),
}
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
Norm = LayerNorm | RMSNorm
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Keys = tuple[Tensor, Tensor]


def linear(inputs: int, outputs: int, bias: bool = True) -> Projection:
    """A projection to train from scratch."""
    made = Projection(inputs, outputs, bias=bias)
    nn.init.normal_(made.weight, std=inputs**-0.5)
    return made


@dataclass(frozen=True)
class LayerConfig:
    """One transformer layer. `dim` the width, `ffn` F, `heads` H, `head_dim` D.

    norm: "layer" or "rms"; norm_first: in front of each part (GPT-2, T5), or behind its sum (the original Transformer, BERT).
    activation: of `ACTIVATIONS`; those of `GATED` take twice F, act(x W_gate) * (x W_up).
    """

    dim: int
    ffn: int
    heads: int
    head_dim: int
    eps: float
    norm: str = "layer"
    norm_first: bool = False
    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        if min(self.dim, self.ffn, self.heads, self.head_dim) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not supported; allowed: {', '.join(ACTIVATIONS)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is not supported; allowed: {', '.join(NORMS)}")
        if self.norm == "rms" and not self.norm_first:
            raise ValueError("norm='rms' stands in front of a part: give norm_first=True")


class Layer(Recomputable):
    """Self-attention, attention to a memory where there is one (`cross`), and the feed-forward part."""

    def __init__(self, config: LayerConfig, cross: bool = False):
        super().__init__()
        c, inner = config, config.heads * config.head_dim
        self.heads = (c.heads, c.head_dim)
        self.norm_first, self.activation = c.norm_first, c.activation
        self.attn_norm = NORMS[c.norm](c.dim, c.eps)
        self.qkv, self.out = linear(c.dim, 3 * inner, c.bias), linear(inner, c.dim, c.bias)
        if cross:
            self.cross_norm = NORMS[c.norm](c.dim, c.eps)
            self.cross_q, self.cross_out = linear(c.dim, inner, c.bias), linear(inner, c.dim, c.bias)
            self.cross_kv = linear(c.dim, 2 * inner, c.bias)
        self.mlp_norm = NORMS[c.norm](c.dim, c.eps)
        width = c.ffn * (2 if c.activation in GATED else 1)
        self.up, self.down = linear(c.dim, width, c.bias), linear(c.ffn, c.dim, c.bias)

    def memory(self, hidden: Tensor) -> Keys:
        """Keys and values of a memory [..., dim] for this layer's cross-attention: [..., H, D] each."""
        heads, dim = self.heads
        return self.cross_kv(hidden).unflatten(-1, (2 * heads, dim)).chunk(2, -2)

    @recomputable
    def forward(
        self, x: Tensor, attend: Attend, cross: Attend | None = None, memory: Tensor | Keys | None = None
    ) -> Tensor:
        """x [..., dim]; attend(q, k, v) and cross(q, k, v) of [..., H, D] -> [..., H, D]; memory: what cross attends to, hidden
        [..., dim], or the keys and values that were made of it."""
        x = self._add(self.attn_norm, x, self.out, lambda h, norm: attend(*self._qkv(h, norm)).flatten(-2))
        if cross is not None:
            keys = self.memory(memory) if isinstance(memory, Tensor) else memory
            x = self._add(
                self.cross_norm, x, self.cross_out, lambda h, norm: cross(self._query(h, norm), *keys).flatten(-2)
            )
        return self._add(self.mlp_norm, x, self._down, lambda h, norm: self.up(h, norm=norm))

    def _add(
        self, norm: Norm, x: Tensor, last: Callable[..., Tensor], part: Callable[[Tensor, Norm | None], Tensor]
    ) -> Tensor:
        """x + last(part(norm(x))), or norm(x + last(part(x))); a part's first projection takes the norm in."""
        if self.norm_first:
            return last(part(x, norm), residual=x)
        return norm(last(part(x, None)), residual=x)[0]

    def _qkv(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, ...]:
        heads, dim = self.heads
        return self.qkv(x, norm=norm).unflatten(-1, (3 * heads, dim)).chunk(3, -2)

    def _query(self, x: Tensor, norm: Norm | None) -> Tensor:
        return self.cross_q(x, norm=norm).unflatten(-1, self.heads)

    def _down(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        if self.activation == "relu":  # its backward reads its result, which is there then
            return self.down(activation(h), residual=residual)
        return activated(self, activation, h, lambda y: self.down(y, residual=residual))


# --------------------------------------------------------------------------------------------------- weights for decoding


def pack_weights(model: nn.Module, quantize: str | None = None) -> nn.Module:
    """Puts panels in place of every projection's weight, which then is no Parameter: for running on a CPU, where a row-major
    weight would be packed anew on every call. An embedding that is tied to a projection shares its panels.

    quantize: None (float32 panels: the same bits), "int8" or "int4" in groups of 32, the rows of a weight a multiple of 32.
    """
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"pack_weights: quantize={quantize!r}; allowed: None, 'int8', 'int4'")
    panels: dict[int, Panels | QWeight] = {}
    for module in model.modules():
        if isinstance(module, Projection) and isinstance(module.weight, Tensor):
            key, weight = id(module.weight), module.weight
            if key not in panels:
                panels[key] = (
                    QWeight.quantize(weight, int(quantize[3:]), module.swiglu)
                    if quantize
                    else Panels.pack(weight, module.swiglu)
                )
            tied = [m for m in model.modules() if isinstance(m, Embedding) and m.weight is weight]
            for other in (module, *tied):
                replace_weight(other, panels[key])
    model.requires_grad_(False).eval()
    make_gains(model)
    return model


def packed(model: nn.Module) -> bool:
    """Whether `pack_weights` was here."""
    return any(isinstance(m, Projection) and not isinstance(m.weight, Tensor) for m in model.modules())
