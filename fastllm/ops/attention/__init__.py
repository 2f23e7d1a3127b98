"""Attention: one spec, one arithmetic; dense and packed tensors and the paged cache."""

from .dense import attention, attention_varlen
from .paged import paged_attention
from .spec import AttentionSpec

__all__ = ["AttentionSpec", "attention", "attention_varlen", "paged_attention"]
