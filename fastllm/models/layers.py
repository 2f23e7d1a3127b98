"""What encoders and encoder-decoders are built from: a projection with bias, norms, one layer for all of them, and a batch of
sequences of different lengths laid one after another, so that nothing is computed for padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import Panels, QWeight
from . import blocks
from .blocks import GATED, Embedding, LayerNorm, Projection, RMSNorm, replace_weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = blocks.ACTIVATIONS | {
    "relu": torch.relu,
    # not torch's: its last few elements differ in their bits from the others, and so would a row from the same row in a batch
    "silu": lambda x: ops.swiglu(x, torch.ones_like(x)),
}
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
Norm = LayerNorm | RMSNorm
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Cross = Callable[[Tensor], Tensor]


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


class Layer(nn.Module):
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

    def memory(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory [..., dim] for this layer's cross-attention: [..., H, D] each."""
        heads, dim = self.heads
        return self.cross_kv(hidden).unflatten(-1, (2 * heads, dim)).chunk(2, -2)

    def forward(self, x: Tensor, attend: Attend, cross: Cross | None = None) -> Tensor:
        """x [..., dim]; attend(q, k, v) and cross(q) of [..., H, D] -> [..., H, D]."""
        x = self._add(self.attn_norm, x, self.out, lambda h, norm: attend(*self._qkv(h, norm)).flatten(-2))
        if cross is not None:
            x = self._add(self.cross_norm, x, self.cross_out, lambda h, norm: cross(self._query(h, norm)).flatten(-2))
        return self._add(self.mlp_norm, x, self.down, self._inner)

    def _add(self, norm: Norm, x: Tensor, last: Projection, part: Callable[[Tensor, Norm | None], Tensor]) -> Tensor:
        """x + last(part(norm(x))), or norm(x + last(part(x))); a part's first projection takes the norm in."""
        if self.norm_first:
            return last(part(x, norm), residual=x)
        return norm(last(part(x, None)), residual=x)[0]

    def _qkv(self, x: Tensor, norm: Norm | None) -> tuple[Tensor, ...]:
        heads, dim = self.heads
        return self.qkv(x, norm=norm).unflatten(-1, (3 * heads, dim)).chunk(3, -2)

    def _query(self, x: Tensor, norm: Norm | None) -> Tensor:
        return self.cross_q(x, norm=norm).unflatten(-1, self.heads)

    def _inner(self, x: Tensor, norm: Norm | None) -> Tensor:
        return ACTIVATIONS[self.activation](self.up(x, norm=norm))


# ------------------------------------------------------------------------------------------------------- packed sequences


@dataclass(frozen=True)
class Packed:
    """B sequences, one after another, of T tokens together.

    ids int64 [T]; position int64 [T], the place in its sequence (of a padded batch: the column); cu int32 [B + 1], where each
    begins; longest: tokens of the longest. Of a padded batch also its shape (B, S), and rows int64 [T], the place of each
    token in it, None where it has no padding.
    """

    ids: Tensor
    position: Tensor
    cu: Tensor
    longest: int
    shape: tuple[int, int] | None = None
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        """B"""
        return self.cu.shape[0] - 1

    @classmethod
    def of_lists(cls, sequences: Sequence[Sequence[int]], device: torch.device | str | None = None) -> "Packed":
        """Sequences of token ids."""
        lengths = [len(s) for s in sequences]
        ids = torch.tensor([i for s in sequences for i in s], dtype=torch.int64)
        position = torch.cat([torch.arange(n) for n in lengths]) if lengths else ids
        cu = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()
        return cls(ids.to(device), position.to(device), cu.to(device), max(lengths, default=0))

    @classmethod
    def of_padded(cls, ids: Tensor, mask: Tensor | None = None) -> "Packed":
        """ids int64 [B, S]; mask [B, S], true or not 0 where there is a token: anywhere, left, right or with gaps."""
        if ids.dim() != 2:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; they must be [B, S]")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, the ids {tuple(ids.shape)}; they must be the same"
            )
        batch, columns = shape = tuple(ids.shape)
        position = torch.arange(columns, device=ids.device).expand(shape).reshape(-1)
        if mask is None or bool((kept := mask != 0).all()):
            cu = torch.arange(0, batch * columns + 1, columns or 1, dtype=torch.int32, device=ids.device)
            return cls(ids.reshape(-1), position, cu if columns else cu.new_zeros(batch + 1), columns, shape)
        rows, lengths = kept.reshape(-1).nonzero()[:, 0], kept.sum(1)
        cu = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return cls(ids.reshape(-1)[rows], position[rows], cu, int(lengths.max()), shape, rows)

    def select(self, padded: Tensor) -> Tensor:
        """What stands at the tokens in [B, S, ...]: [T, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows]

    def unpack(self, x: Tensor) -> Tensor:
        """[T, ...] in the padded batch that it came from: [B, S, ...], zeros where there is no token."""
        if self.shape is None:
            raise ValueError("these sequences came as lists; they have no padded form")
        if self.rows is not None:
            x = x.new_zeros((self.shape[0] * self.shape[1], *x.shape[1:])).index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)

    def first(self, x: Tensor) -> Tensor:
        """The first token of each sequence: [T, N] -> [B, N]. ValueError for a sequence without one."""
        self._check_filled()
        return x[self.cu[:-1].long()]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the tokens of each sequence: [T, N] -> [B, N]. ValueError for a sequence without one."""
        self._check_filled()
        # first to last, in float32, whatever stands beside it: the same bits in any batch
        return torch.segment_reduce(x.float(), "mean", lengths=self.cu.diff().long(), unsafe=True).to(x.dtype)

    def _check_filled(self) -> None:
        empty = (self.cu.diff() == 0).nonzero()
        if len(empty):
            raise ValueError(f"sequence {empty[0].item()} has no token; there is nothing to pool")


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
                panels[key] = QWeight.quantize(weight, int(quantize[3:])) if quantize else Panels.pack(weight)
            tied = [m for m in model.modules() if isinstance(m, Embedding) and m.weight is weight]
            for other in (module, *tied):
                replace_weight(other, panels[key])
    return model.requires_grad_(False).eval()


def packed(model: nn.Module) -> bool:
    """Whether `pack_weights` was here."""
    return any(isinstance(m, Projection) and not isinstance(m.weight, Tensor) for m in model.modules())
