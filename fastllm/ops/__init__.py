"""The kernels: one function an op, the same meaning on every device."""

from .embedding import embedding
from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = ["embedding", "rms_norm", "swiglu"]
