"""The kernels: one function an op, the same meaning on every device."""

from ._dropout import Dropout
from .advance import advance
from .attention import AttentionSpec, attention, paged_attention
from .dropout import dropout
from .embedding import embedding
from .kv_append import kv_append
from .kv_cache import PAGE, KVPages
from .linear import Panels, linear
from .lora_linear import lora_linear
from .multi_lora import AdapterPool, multi_lora
from .quant_linear import QWeight, quant_linear
from .rms_norm import rms_norm
from .rope import rope, rope_table
from .sample import LogitsError, SampleState, sample
from .swiglu import swiglu
from .target_logprobs import target_logprobs
from .top_logprobs import top_logprobs

__all__ = [
    "PAGE",
    "AdapterPool",
    "AttentionSpec",
    "Dropout",
    "KVPages",
    "LogitsError",
    "Panels",
    "QWeight",
    "SampleState",
    "advance",
    "attention",
    "dropout",
    "embedding",
    "kv_append",
    "linear",
    "lora_linear",
    "multi_lora",
    "paged_attention",
    "quant_linear",
    "rms_norm",
    "rope",
    "rope_table",
    "sample",
    "swiglu",
    "target_logprobs",
    "top_logprobs",
]
