"""The kernels: one function an op, the same meaning on every device."""

from .rms_norm import rms_norm

__all__ = ["rms_norm"]
