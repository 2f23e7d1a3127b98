"""The kernels: one function an op, the same meaning on every device."""

from .attention import AttentionSpec, attention, paged_attention
from .kv_append import kv_append
from .kv_cache import KVPages
from .rms_norm import rms_norm
from .rope import rope, rope_table

__all__ = ["AttentionSpec", "KVPages", "attention", "kv_append", "paged_attention", "rms_norm", "rope", "rope_table"]
