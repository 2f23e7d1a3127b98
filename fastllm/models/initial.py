"""The weights that a model begins with, drawn as GPT-2's are (Radford et al. 2019)."""

import math

import torch
from torch import nn

from .blocks import Embedding, LayerNorm, Projection, RMSNorm
from .decoder import Decoder

STD = 0.02


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> Decoder:
    """Draws every weight anew, in place, and gives the model.

    Matrices and embeddings: normal, mean 0, deviation .02; those that write to the residual stream divided by sqrt(2 layers), so
    that its variance does not grow with depth. Norms change nothing, biases are 0. The draw depends on the seed and the shapes
    alone, torch's own generator is left as it is. TypeError: packed weights, or a model of another class.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"initialise: {type(model).__name__} is not a Decoder")
    generator = torch.Generator().manual_seed(seed)
    depth = 1 / math.sqrt(2 * model.config.layers)
    drawn = set()
    for name, module in model.named_modules():
        if isinstance(module, (RMSNorm, LayerNorm)):
            module.weight.fill_(1.0 - getattr(module, "offset", 0.0))
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        if not isinstance(module, (Embedding, Projection)) or id(module.weight) in drawn:
            continue
        if not isinstance(module.weight, nn.Parameter):
            raise TypeError(f"initialise: the weight of {name} is packed for decoding; draw before pack_weights")
        drawn.add(id(module.weight))
        std = STD * (depth if name.endswith((".out", ".down")) else 1.0)
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
    return model
