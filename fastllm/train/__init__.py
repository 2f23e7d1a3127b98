"""Training: one loop, stages over it, and what a run leaves behind."""

from .pretrain import PretrainOptions, pretrain  # the functions take the names of their modules
from .sft import SftOptions, sft

__all__ = ["PretrainOptions", "SftOptions", "pretrain", "sft"]
