"""fastllm: fast, exact kernels and a small runtime for the whole life of a language model."""

from importlib.metadata import PackageNotFoundError, version

import torch  # noqa: F401  (first: its OpenMP runtime must be in the process before the core looks for one)

from . import ops
from .sampling_params import SamplingParams

try:
    __version__ = version("fastllm")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["LLM", "SamplingParams", "__version__", "ops"]


def __getattr__(name: str):
    # The runtime stands on more libraries than the kernels do; who embeds the kernels does not wait for them.
    if name == "LLM":
        from . import llm

        return llm.LLM
    raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
