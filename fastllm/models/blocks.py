"""The pieces that models are built from: a projection and an embedding whose weights may be packed, norms, activations, and the
batch of a paged forward. They call the ops and hold no arithmetic of their own."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops import Panels, QWeight
from ..ops.linear import one_kernel

Weight = Tensor | Panels | QWeight
Result = TypeVar("Result")
Adapted = tuple[ops.AdapterPool, Tensor]  # the pool of a projection, and which of its adapters each row takes


class Projection(nn.Module):
    """y = norm(x) W^T + bias, then + residual or swiglu.

    The weight [N, K] is a Parameter until `pack` replaces it by panels or quantised panels for decoding on a CPU. A swiglu
    projection stacks gate over up, [2F, K], and has no bias. exact: as in ops.linear; quantised weights always are.
    """

    exact = False

    def __init__(self, inputs: int, outputs: int, swiglu: bool = False, bias: bool = False):
        super().__init__()
        self.swiglu = swiglu
        self.weight: Weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(
        self,
        x: Tensor,
        norm: "RMSNorm | LayerNorm | None" = None,
        residual: Tensor | None = None,
        adapted: Adapted | None = None,
        gate: bool = True,
    ) -> Tensor:
        """x [..., K] -> [..., N]; norm is applied to x first, residual [..., N] is added last. gate: False leaves what swiglu
        would take, [..., 2F], of a weight that is not packed."""
        fused: dict[str, Any] = {"residual": residual}
        if isinstance(norm, RMSNorm):
            fused |= {"norm": norm.gain, "eps": norm.eps}
        elif norm is not None:
            x = norm(x)
        if adapted is not None:
            return ops.multi_lora(x, self.weight, *adapted, self.bias, **fused)
        fused["swiglu"] = self.swiglu and gate
        if isinstance(self.weight, QWeight):
            return ops.quant_linear(x, self.weight, self.bias, **fused)
        return ops.linear(x, self.weight, self.bias, exact=self.exact, **fused)

    def gates_apart(self, x: Tensor) -> bool:
        """Whether the gate of x is to be an op of its own, for `activated`: in training, where that has the bits of the fused
        call, which rounds the product once on a CPU."""
        if not torch.is_grad_enabled() or not isinstance(self.weight, Tensor):
            return False
        return (x.requires_grad or self.weight.requires_grad) and (x.is_cuda or x.dtype == torch.float32)

    def adds(self, x: Tensor) -> bool:
        """Whether on a GPU a residual is added, and a norm taken, on the way: by the one kernel of few rows. Else that takes a
        kernel more, which the next norm is anyway."""
        w = self.weight
        if not isinstance(w, Tensor) or self.exact or torch.compiler.is_compiling():
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)) and one_kernel(x, w)

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
    """x / sqrt(mean(x^2) + eps) * gain, where gain = (offset + weight) * scale; a projection that follows takes it in as a
    prologue."""

    def __init__(self, dim: int, eps: float, offset: float = 0.0, scale: float = 1.0):
        super().__init__()
        self.eps, self.offset, self.scale = eps, offset, scale
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self._made: tuple[Any, Tensor] | None = None

    @property
    def gain(self) -> Tensor:
        """[K]. Without a gradient it is made once for each state of the weight, so that a captured step finds it made."""
        w = self.weight
        if self.offset == 0 and self.scale == 1:
            return w
        if (torch.is_grad_enabled() and w.requires_grad) or torch.compiler.is_compiling():
            return self._gain()
        state = (w.data_ptr(), w.dtype, w.device, 0 if w.is_inference() else w._version)
        if self._made is None or self._made[0] != state:
            self._made = state, self._gain().detach()
        return self._made[1]

    def _gain(self) -> Tensor:
        return ((self.weight.float() + self.offset) * self.scale).to(self.weight.dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x [..., K]; with a residual (the norm of the sum, the sum)."""
        return ops.rms_norm(x, self.gain, self.eps, residual)


def make_gains(model: nn.Module) -> None:
    """Makes the gains of a model that trains no more: now, not in a step that is being captured."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            _ = module.gain


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x [..., K]; with a residual (the norm of the sum, the sum)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual)


def _gated(op: Callable[..., Tensor], *options: str) -> Callable[[Tensor], Tensor]:
    return lambda h: op(*h.chunk(2, -1), *options)


# What stands between the two projections of an MLP. The gated ones take [..., 2F], gate before up, and give [..., F].
GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": _gated(ops.swiglu),
    "geglu": _gated(ops.geglu),
    "geglu_tanh": _gated(ops.geglu, "tanh"),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = GATED | {
    "gelu": ops.gelu,
    "gelu_tanh": lambda h: ops.gelu(h, "tanh"),
}


def activated(
    layer: "Recomputable", activation: Callable[[Tensor], Tensor], h: Tensor, last: Callable[[Tensor], Result]
) -> Result:
    """last(activation(h)), of which the backward keeps h alone: it computes the activation again, which costs little beside the
    products around it and gives the same bits."""
    y = activation(h)
    # a layer that is computed again as a whole keeps nothing, and hooks within it would; a compiler chooses for itself
    if not (torch.is_grad_enabled() and h.requires_grad) or layer.recompute or torch.compiler.is_compiling():
        return last(y)
    place, count, given = y.data_ptr(), y.numel(), h.detach()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        is_y = kept.data_ptr() == place and kept.numel() == count and kept.is_contiguous()
        return kept.shape if is_y else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return activation(given).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return last(y)


class Recomputable(nn.Module):
    """A layer that can keep its inputs alone for the backward, which then computes the rest anew: the same bits (what ops draw at
    random comes from counters), for one more forward: see `recomputing`. Its `forward` is decorated by `recomputable`."""

    recompute = False


def recomputable(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that looks at `recompute`."""

    @functools.wraps(forward)
    def either(layer: Recomputable, *inputs: Any) -> Any:
        if layer.recompute and torch.is_grad_enabled():
            return checkpoint(forward, layer, *inputs, use_reentrant=False)
        return forward(layer, *inputs)

    return either


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within it the layers of a model keep no more than their inputs for the backward. ValueError: it has none that can."""
    layers = [m for m in model.modules() if isinstance(m, Recomputable)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that can be recomputed; train it with recompute=False")
    before = [layer.recompute for layer in layers]
    try:
        for layer in layers:
            layer.recompute = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.recompute = was


def replace_weight(module: nn.Module, weight: Panels | QWeight) -> None:
    """A packed weight is no Parameter: nothing can train it, and `state_dict` does not list it."""
    module._parameters.pop("weight", None)
    module.weight = weight


@dataclass
class Adapters:
    """Which adapter each row of a forward takes: ids int64 [...], -1: none; pools: of (layer, name of the projection), those
    that any adapter changes."""

    ids: Tensor
    pools: Mapping[tuple[int, str], ops.AdapterPool]

    def of(self, layer: int, name: str) -> Adapted | None:
        """What a projection is to know."""
        pool = self.pools.get((layer, name))
        return None if pool is None else (pool, self.ids)


@dataclass
class PagedBatch:
    """What a forward over a paged KV cache must know about its rows: T tokens of B sequences, packed.

    position int64 [T]; slot int64 [T], where the cache takes each token; block_table int32 [B, P]; context_len int32 [B],
    keys per sequence with these tokens included; cu_q int32 [B + 1]; pages: one record of K and V pages a layer; adapters of
    the tokens, None where no token has one.
    """

    position: Tensor
    slot: Tensor
    block_table: Tensor
    context_len: Tensor
    cu_q: Tensor
    pages: list[ops.KVPages]
    adapters: Adapters | None = None

    def to(self, device: torch.device) -> "PagedBatch":
        """With its numbers there, where the pages are."""
        numbers = (self.position, self.slot, self.block_table, self.context_len, self.cu_q)
        adapters = self.adapters and Adapters(self.adapters.ids.to(device), self.adapters.pools)
        return PagedBatch(*(n.to(device) for n in numbers), self.pages, adapters)
