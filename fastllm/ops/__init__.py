"""The kernels: one function an op, the same meaning on every device."""

from .embedding import embedding
from .linear import Panels, linear
from .quant_linear import QWeight, quant_linear
from .rms_norm import rms_norm
from .swiglu import swiglu

__all__ = [
    "Panels",
    "QWeight",
    "embedding",
    "linear",
    "quant_linear",
    "rms_norm",
    "swiglu",
]
