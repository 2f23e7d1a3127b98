"""The kernels: one function an op, the same meaning on every device."""

from .advance import advance
from .rms_norm import rms_norm
from .sample import LogitsError, SampleState, sample
from .top_logprobs import top_logprobs

__all__ = ["LogitsError", "SampleState", "advance", "rms_norm", "sample", "top_logprobs"]
