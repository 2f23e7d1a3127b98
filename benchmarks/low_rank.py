"""Low-rank factors on every linear of a model's layers, for `train.py`: the same draws for ours and for PEFT's."""

import zlib

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.models.blocks import GATED, Projection
from fastllm.models.decoder import Decoder
from fastllm.peft.lora import modules

SCALE = 2.0  # lora_alpha is twice the rank


def drawn(name: str, rank: int, depth: int) -> Tensor:
    """A [R, K] of a linear, by its name in transformers; B begins with zeros."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(rank, depth, generator=generator) * depth**-0.5


class LowRank(Projection):
    """A frozen projection with factors for each linear that it stacks: A of all of them [P R, K], and a B [N, R] for each, which
    stand on the diagonal of one."""

    def __init__(self, base: Projection, parts: dict[str, tuple[int, int]], rank: int):
        nn.Module.__init__(self)
        self.swiglu, self.weight, self.bias = base.swiglu, base.weight, base.bias
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.Parameter(torch.cat([drawn(name, rank, depth) for name, (_, depth) in parts.items()]).to(**like))
        self.b = nn.ParameterList(torch.zeros(rows, rank, **like) for rows, _ in parts.values())

    def forward(self, x, norm=None, residual=None, adapted=None, gate=True):
        assert adapted is None  # of a batch that is served
        b = self.b[0] if len(self.b) == 1 else torch.block_diag(*self.b)
        y = ops.lora_linear(x if norm is None else norm(x), self.weight, self.a, b, ops.LoraSpec(SCALE), bias=self.bias)
        if self.swiglu and gate:
            y = GATED["swiglu"](y)
        return y if residual is None else y + residual


def with_factors(model: Decoder, rank: int) -> Decoder:
    """The model, frozen but for factors on every linear of its layers."""
    model.requires_grad_(False)
    for (layer, name), parts in modules(model).items():
        owner = model.layers[layer]
        owner.add_module(name, LowRank(owner.get_submodule(name), parts, rank))
    return model


def with_factors_of_peft(model: nn.Module, rank: int) -> nn.Module:
    """The same of transformers' model by PEFT, as PEFT has it by default: the factors in float32."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_A." in name:
                where = name.removeprefix("base_model.model.").split(".lora_A.")[0]
                parameter.copy_(drawn(where, *parameter.shape))
    return made
