"""Random LoRA adapters of a model, and the model with one of them in place, layer by layer by `lora_linear`: the oracle."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from fastllm import ops
from fastllm.models.blocks import Projection, RMSNorm
from fastllm.models.decoder import Decoder
from fastllm.ops import Panels, QWeight
from fastllm.peft.lora import Lora, Pair, Parts, modules, parts


def draw(model: Decoder, seed: int, rank: int | Callable[[str], int] = 4, dora: bool = False, **fields) -> Lora:
    """An adapter that shows. rank: of a module by its name; 0: it has none."""
    random = torch.Generator().manual_seed(seed)
    pairs, ranks = {}, {}
    for name, (size, depth) in ((n, shape) for stacked in modules(model).values() for n, shape in stacked.items()):
        if r := rank if isinstance(rank, int) else rank(name):
            a, b = torch.randn(r, depth, generator=random), torch.randn(size, r, generator=random)
            magnitude = torch.rand(size, generator=random) + 0.5 if dora else None
            pairs[name], ranks[name] = Pair(a * depth**-0.5, b * 0.3, magnitude), r
    most = max(ranks.values())
    pattern = {name: r for name, r in ranks.items() if r != most}
    given = {"r": most, "lora_alpha": 2 * most, "rank_pattern": pattern, "target_modules": tuple(pairs)} | fields
    return Lora(pairs, **given)


def rows_of(weight, first: int, count: int, half: int):
    """Rows [first, first + count) of a weight, packed as it is. half: of which half, where the panels alternate."""
    if isinstance(weight, torch.Tensor):
        return weight[first : first + count]
    data = weight.data[half::2] if weight.swiglu else weight.data[first // 16 : (first + count) // 16]
    assert not (weight.swiglu and count % 16) and not first % 16
    if isinstance(weight, Panels):
        return Panels(data.contiguous(), count)
    return QWeight(data.contiguous(), count, weight.depth, weight.bits, weight.has_min)


class Adapted(nn.Module):
    """A projection with one adapter."""

    def __init__(self, plain: Projection, given: Parts, sizes: tuple[int, ...]):
        super().__init__()
        self.swiglu, self.exact, self.held, self.given, first = plain.swiglu, plain.exact, [], given, 0
        for i, size in enumerate(sizes):
            bias = None if plain.bias is None else plain.bias[first : first + size]
            self.held.append((rows_of(plain.weight, first, size, i), bias))
            first += size

    def gates_apart(self, x):
        return False

    def adds(self, x):
        return False

    def forward(self, x, norm=None, residual=None, adapted=None, gate=True):
        if isinstance(norm, RMSNorm):
            x = ops.rms_norm(x, norm.gain, norm.eps)
        elif norm is not None:
            x = norm(x)
        each = []
        for (weight, bias), part in zip(self.held, self.given, strict=True):
            if part is None:
                quantised, more = isinstance(weight, QWeight), {"exact": self.exact}
                each.append(ops.quant_linear(x, weight, bias) if quantised else ops.linear(x, weight, bias, **more))
            else:
                pair, scale = part
                a, b, magnitude = (None if t is None else t.to(x) for t in (pair.a, pair.b, pair.magnitude))
                spec = ops.LoraSpec(scale, exact=self.exact)
                each.append(ops.lora_linear(x, weight, a, b, spec, bias=bias, magnitude=magnitude))
        y = ops.swiglu(*each) if self.swiglu else torch.cat(each, -1)
        return y if residual is None else y + residual


def adapted(model: Decoder, lora: Lora) -> Decoder:
    """The model with the adapter in place."""
    arena = getattr(model, "arena", None)
    model = copy.deepcopy(model, {id(arena): arena})
    for (layer, ours), given in parts(lora, model).items():
        owner = model.layers[layer]
        plain = owner.get_submodule(ours)
        sizes = model.config.stacks[ours] if len(given) > 1 else (plain.weight.shape[0],)
        owner._modules[ours] = Adapted(plain, given, sizes)
    return model
