"""How much an engine may hold at once, and in what form: checked before a model is read."""

from dataclasses import dataclass

import torch

from ..models.decoder import DecoderConfig
from .cache import PAGE, page_bytes, pages_for

KV_DTYPES = {"auto": torch.float32, "int8": torch.int8}
KV_BYTES = 1 << 30  # of the cache, where nobody says: 23,000 tokens of the 135M model
MOST_GUESSES = 63


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The arguments of `LLM` beside the model's name, which explains them. ValueError for what is not allowed."""

    quantize: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 16
    kv_bytes: int | None = None
    kv_dtype: str = "auto"
    num_threads: int | None = None
    speculate: int = 0

    def __post_init__(self) -> None:
        if self.quantize not in (None, "int8", "int4"):
            raise ValueError(f"LLM: quantize={self.quantize!r}; allowed: None, 'int8', 'int4'")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"LLM: kv_dtype={self.kv_dtype!r}; allowed: {', '.join(map(repr, KV_DTYPES))}")
        for name in ("max_model_len", "max_num_seqs", "kv_bytes", "num_threads"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"LLM: {name}={value!r}; allowed: an integer of at least 1")
        if not _is_int(self.speculate) or not 0 <= self.speculate <= MOST_GUESSES:
            raise ValueError(f"LLM: speculate={self.speculate!r}; allowed: an integer in [0, {MOST_GUESSES}]")

    def pages(self, config: DecoderConfig) -> int:
        """Pages of the KV cache of a model. ValueError: limits that the model, or the cache, cannot keep."""
        if self.max_model_len and self.max_model_len > config.max_position:
            raise ValueError(
                f"LLM: max_model_len={self.max_model_len}, but the model has {config.max_position} positions"
            )
        if self.kv_dtype == "int8" and config.head_dim % 16:
            raise ValueError(
                f"LLM: kv_dtype='int8' takes heads of a multiple of 16, the model's have {config.head_dim}"
            )
        tokens = self.max_model_len or config.max_position
        size, longest = page_bytes(config, KV_DTYPES[self.kv_dtype]), pages_for(tokens)
        if self.kv_bytes is None:
            return max(longest, min(self.max_num_seqs * longest, KV_BYTES // size))
        if self.kv_bytes < longest * size:
            raise ValueError(
                f"LLM: {tokens} tokens need {longest * size} bytes of KV cache, kv_bytes={self.kv_bytes} allows "
                f"{self.kv_bytes // size * PAGE} tokens; lower max_model_len or raise kv_bytes"
            )
        return self.kv_bytes // size


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
