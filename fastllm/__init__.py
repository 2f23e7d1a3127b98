"""fastllm: fast, exact kernels and a small runtime for the whole life of a language model."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: its OpenMP runtime must be in the process before the core looks for one)

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"{__path__[0]} holds no compiled core for this Python ({error}). Where it is a source tree, build it with "
        "`pip install -e .`, or run from another folder to take the installed package"
    ) from None

from . import ops
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from . import hub, models, train
    from .llm import LLM

try:
    __version__ = version("fastllm")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = ["LLM", "SamplingParams", "__version__", "hub", "models", "ops", "train"]


def __getattr__(name: str) -> Any:
    # The runtime stands on more libraries than the kernels do; who embeds the kernels does not wait for them.
    if name == "LLM":
        from .llm import LLM

        return LLM
    if name in ("hub", "models", "train"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
