"""The kernels: one function an op, the same meaning on every device."""

from ._dropout import Dropout
from .adamw import AdamWSpec, AdamWState, adamw
from .advance import advance
from .attention import AttentionSpec, attention, attention_varlen, paged_attention
from .cross_entropy import LossSpec, cross_entropy
from .dropout import dropout
from .embedding import embedding
from .geglu import geglu
from .gelu import gelu
from .grad_norm import grad_norm
from .kv_append import kv_append
from .kv_cache import PAGE, KVPages
from .layer_norm import layer_norm
from .linear import Panels, linear
from .linear_cross_entropy import linear_cross_entropy
from .lora_linear import LoraSpec, lora_linear
from .multi_lora import AdapterPool, multi_lora
from .quant_linear import QWeight, quant_linear
from .rms_norm import rms_norm
from .rope import rope
from .rope_table import RopeScaling, rope_table
from .sample import LogitsError, SampleState, sample
from .softmax import softmax
from .swiglu import swiglu
from .target_logprobs import target_logprobs
from .token_logprobs import token_logprobs
from .top_logprobs import top_logprobs

__all__ = [
    "PAGE",
    "AdamWSpec",
    "AdamWState",
    "AdapterPool",
    "AttentionSpec",
    "Dropout",
    "KVPages",
    "LogitsError",
    "LoraSpec",
    "LossSpec",
    "Panels",
    "QWeight",
    "RopeScaling",
    "SampleState",
    "adamw",
    "advance",
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dropout",
    "embedding",
    "geglu",
    "gelu",
    "grad_norm",
    "kv_append",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "multi_lora",
    "paged_attention",
    "quant_linear",
    "rms_norm",
    "rope",
    "rope_table",
    "sample",
    "softmax",
    "swiglu",
    "target_logprobs",
    "token_logprobs",
    "top_logprobs",
]
