"""The kernels: one function an op, the same meaning on every device."""

from .linear import Panels, linear
from .rms_norm import rms_norm

__all__ = ["Panels", "linear", "rms_norm"]
