"""Attention: one spec, one arithmetic; dense tensors and the paged cache."""

from .dense import attention
from .paged import paged_attention
from .spec import AttentionSpec

__all__ = ["AttentionSpec", "attention", "paged_attention"]
