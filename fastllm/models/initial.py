"""The weights that a model begins with. Each class is drawn as those were who published it:

Decoder    GPT-2 (Radford et al. 2019): normal with deviation .02; what writes to the residual stream divided by
           sqrt(2 layers), so that its variance does not grow with depth.
Encoder    BERT (Devlin et al. 2018): normal with deviation .02.
Seq2Seq    with relative positions T5 (Raffel et al. 2019, arXiv 1910.10683, and its code in Mesh TensorFlow): normal, a matrix of
           n inputs n^-.5, that of queries (dim D)^-.5 since scores are not scaled; embeddings 1, which a shared head divides
           by sqrt(dim), else dim^-.5 for both; the bias of positions dim^-.5.
           Others the original Transformer (Vaswani et al. 2017, and its code in Tensor2Tensor): uniform within
           sqrt(6 / (inputs + outputs)) (Glorot & Bengio 2010), each of stacked matrices for itself; embeddings normal with
           deviation dim^-.5, learned positions .02.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from .blocks import Embedding, LayerNorm, Projection, RMSNorm
from .decoder import Decoder
from .encoder import Encoder
from .layers import GATED
from .positions import RelativeBias
from .seq2seq import Seq2Seq

STD = 0.02
Model = TypeVar("Model", Decoder, Encoder, Seq2Seq)
Draw = Callable[[str, torch.Size, torch.Generator], Tensor]  # of a module's name and the shape of its weight


@torch.no_grad()
def initialise(model: Model, seed: int) -> Model:
    """Draws every weight anew, in place, and gives the model.

    Norms change nothing, biases are 0; for matrices and tables see the head of this file. The draw depends on the seed and the
    shapes alone, torch's own generator is left as it is. TypeError: packed weights, or a model of another class.
    """
    draw = _draw_of(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = set()
    for name, module in model.named_modules():
        if isinstance(module, (RMSNorm, LayerNorm)):
            module.weight.fill_(1.0 - getattr(module, "offset", 0.0))
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        if not isinstance(module, (Embedding, Projection, RelativeBias)) or id(module.weight) in drawn:
            continue
        if not isinstance(module.weight, nn.Parameter):
            raise TypeError(f"initialise: the weight of {name} is packed for decoding; draw before pack_weights")
        drawn.add(id(module.weight))
        module.weight.copy_(draw(name, module.weight.shape, generator))
    return model


def _draw_of(model: Decoder | Encoder | Seq2Seq) -> Draw:
    if isinstance(model, Decoder):
        return _gpt2(model.config.layers)
    if isinstance(model, Encoder):
        return lambda name, shape, generator: _normal(shape, generator) * STD
    if isinstance(model, Seq2Seq):
        return _t5(model) if model.config.position == "relative" else _transformer(model)
    raise TypeError(f"initialise: {type(model).__name__} is not a Decoder, an Encoder or a Seq2Seq")


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _gpt2(layers: int) -> Draw:
    def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        depth = 1 / math.sqrt(2 * layers) if name.endswith((".out", ".down")) else 1.0
        return _normal(shape, generator) * (STD * depth)

    return draw


def _t5(model: Seq2Seq) -> Draw:
    c = model.config
    inner = c.heads * c.head_dim
    queries = c.head_dim**-0.5 if c.scale == 1.0 else 1.0

    def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if name == "embedding":
            return _normal(shape, generator) * (c.dim**-0.5 if c.tied and c.head_scale == 1.0 else 1.0)
        drawn = _normal(shape, generator) * (c.dim if name.endswith("relative") else shape[1]) ** -0.5
        if name.endswith((".qkv", ".cross_q")):
            drawn[:inner] *= queries
        return drawn

    return draw


def _transformer(model: Seq2Seq) -> Draw:
    c = model.config
    stacked = {"qkv": 3, "cross_kv": 2, "up": 2 if c.activation in GATED else 1}

    def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        kind = name.rpartition(".")[2]
        if kind in ("embedding", "positions"):
            return _normal(shape, generator) * (STD if kind == "positions" else c.dim**-0.5)
        outputs = shape[0] // stacked.get(kind, 1)
        return (2 * torch.rand(shape, generator=generator) - 1) * math.sqrt(6 / (shape[1] + outputs))

    return draw
