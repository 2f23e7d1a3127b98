"""The kernels: one function an op, the same meaning on every device."""

from .linear import Panels, linear
from .quant_linear import QWeight, quant_linear
from .rms_norm import rms_norm

__all__ = ["Panels", "QWeight", "linear", "quant_linear", "rms_norm"]
