"""Which forward takes the place of a module's own, or why none does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ops._op import DTYPES
from . import forwards

# model_type of a config -> how the names of its classes begin
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma3_text": "Gemma3",
    "gpt2": "GPT2",
    "bert": "Bert",
    "t5": "T5",
}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Swap:
    """A forward, and the kernels that it runs, for the report."""

    forward: Callable[..., Any]
    kernels: str


@dataclass(frozen=True)
class Left:
    """A module that keeps its own forward."""

    reason: str


RMS_NORM = Swap(forwards.rms_norm, "rms_norm")
RESIDUAL_NORM = Swap(forwards.add_and_layer_norm, "layer_norm with residual")
ROTARY = Swap(forwards.rotary_table, "the table of rope")
ATTENTION = Swap(forwards.rotary_attention, "rope, attention")
LAYER = Swap(forwards.prenorm_layer, "rms_norm with residual")
SILU, GELU, GELU_TANH = "silu", "gelu", "gelu by tanh"

# The class's name without its family's -> swap; of a gated MLP by its activation.
PLAIN = {
    "LlamaRMSNorm": RMS_NORM,
    "MistralRMSNorm": RMS_NORM,
    "Qwen2RMSNorm": RMS_NORM,
    "Qwen3RMSNorm": RMS_NORM,
    "T5LayerNorm": RMS_NORM,
    "Gemma3RMSNorm": Swap(forwards.rms_norm_plus_one, "rms_norm"),
    "BertSelfOutput": RESIDUAL_NORM,
    "BertOutput": RESIDUAL_NORM,
    "LlamaDecoderLayer": LAYER,
    "MistralDecoderLayer": LAYER,
    "Qwen2DecoderLayer": LAYER,
    "Qwen3DecoderLayer": LAYER,
}
PLAIN |= {f"{f}RotaryEmbedding": ROTARY for f in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")}
PLAIN |= {f"{f}Attention": ATTENTION for f in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")}
MLP = {
    SILU: Swap(forwards.swiglu_mlp, "swiglu"),
    GELU: Swap(forwards.geglu_mlp, "geglu"),
    GELU_TANH: Swap(forwards.geglu_tanh_mlp, "geglu"),
}
T5_MLP = {
    SILU: Swap(forwards.t5_swiglu, "swiglu"),
    GELU: Swap(forwards.t5_geglu, "geglu"),
    GELU_TANH: Swap(forwards.t5_geglu_tanh, "geglu"),
}
GATED = {"T5DenseGatedActDense": ("act", T5_MLP)}
GATED |= {f"{f}MLP": ("act_fn", MLP) for f in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")}
ALONE = {GELU: Swap(forwards.gelu, "gelu"), GELU_TANH: Swap(forwards.gelu_tanh, "gelu")}
WITH_ACTIVATION = {"GPT2MLP": "act", "BertIntermediate": "intermediate_act_fn", "T5DenseActDense": "act"}
WITH_ACTIVATION |= {"BertPredictionHeadTransform": "transform_act_fn"}
ACTIVATIONS = {
    "SiLUActivation": SILU,
    "SiLU": SILU,
    "GELUActivation": GELU,
    "NewGELUActivation": GELU_TANH,
    "GELUTanh": GELU_TANH,
    "PytorchGELUTanh": GELU_TANH,  # transformers 4
}


def refusal(module: nn.Module) -> str | None:
    """Why a module's forward may not be replaced, whatever it computes; None when it may."""
    if "forward" in vars(module):
        return "its forward was replaced by somebody else (device_map hooks, another library)"
    for tensor in module.parameters(recurse=False):
        if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
            return f"its weight is a {type(tensor.data).__name__}"
        if tensor.device.type not in DEVICES:
            return f"its weight is on the device {tensor.device.type}; kernels run on {' and '.join(DEVICES)}"
        if tensor.dtype not in DTYPES:
            return f"its weight is {str(tensor.dtype).removeprefix('torch.')}"
    return None


def choose(module: nn.Module) -> Swap | Left | None:
    """What takes the place of a module's forward, or why nothing does; None for a module that is no concern of ours."""
    name = type(module).__name__
    if name in PLAIN:
        swap = PLAIN[name]
    elif type(module) is nn.LayerNorm:
        swap = Swap(forwards.layer_norm, "layer_norm")
        if len(module.normalized_shape) != 1 or module.weight is None:
            return Left("it has no weight, or norms more than one dimension")
    elif type(module) is nn.Linear:
        swap = Swap(forwards.linear, "linear")
        if module.weight.dtype != torch.float32 or not module.weight.is_cpu:
            return Left("matrix products of 16 bits or on a GPU are torch's")
    elif name in GATED:
        attribute, swaps = GATED[name]
        act = getattr(module, attribute)
        swap = swaps.get(ACTIVATIONS.get(type(act).__name__)) or Left(f"its activation is {type(act).__name__}")
    else:
        return None
    reason = refusal(module)
    return Left(reason) if reason else swap


def choose_activation(module: nn.Module) -> tuple[nn.Module, Swap | Left] | None:
    """The activation inside an MLP without a gate, which is a module of its own, and what takes its place."""
    attribute = WITH_ACTIVATION.get(type(module).__name__)
    act = getattr(module, attribute) if attribute else None
    if not isinstance(act, nn.Module):
        return None
    swap = ALONE.get(ACTIVATIONS.get(type(act).__name__))
    if swap is None:
        return act, Left(f"{type(act).__name__} has no kernel")
    reason = refusal(act)
    return act, Left(reason) if reason else swap
