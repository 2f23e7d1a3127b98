"""How much an engine may hold at once, and in what form: checked before a model is read."""

from dataclasses import dataclass

import torch

from ..models.decoder import DecoderConfig
from ..ops import _triton
from .cache import PAGE, page_bytes, pages_for

KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # None: of the activations
KV_BYTES = 1 << 30  # of the cache on a CPU, where nobody says: 23,000 tokens of the 135M model
KV_SHARE = 0.8  # of what is free on a GPU, likewise
MOST_GUESSES = 63
CHUNKS = {"cpu": 512, "cuda": 2048}  # tokens of a prompt that are read at once
DEVICES = ("auto", "cpu", "cuda")


def decoding_device(name: str) -> torch.device:
    """Where a model is to decode; "auto": on the GPU where there is one that our kernels run on. ValueError for another
    name, or for a GPU that is not there."""
    if name not in DEVICES:
        raise ValueError(f"LLM: device={name!r}; allowed: {', '.join(map(repr, DEVICES))}")
    if name == "cpu" or (name == "auto" and not _triton.available()):
        return torch.device("cpu")
    if not _triton.available():
        raise ValueError(f"LLM: device='cuda', but {_triton.unavailable_reason()}; `fastllm info` tells more")
    return torch.device("cuda", torch.cuda.current_device())


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
    exact: bool = False

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
        if not isinstance(self.exact, bool):
            raise ValueError(f"LLM: exact={self.exact!r}; allowed: True, False")

    def cache_dtype(self, model: torch.dtype) -> torch.dtype:
        """Of keys and values; `model`: of the activations."""
        return KV_DTYPES[self.kv_dtype] or model

    def pages(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> int:
        """Pages of `dtype` of the KV cache of a model on `device`, whose weights are there. ValueError: limits that the model,
        or the cache, cannot keep."""
        if self.max_model_len and self.max_model_len > config.max_position:
            raise ValueError(
                f"LLM: max_model_len={self.max_model_len}, but the model has {config.max_position} positions"
            )
        if KV_DTYPES[self.kv_dtype] and config.head_dim % 16:
            raise ValueError(
                f"LLM: kv_dtype={self.kv_dtype!r} takes heads of a multiple of 16, the model's have {config.head_dim}; "
                "allowed: 'auto'"
            )
        tokens = self.max_model_len or config.max_position
        size, longest = page_bytes(config, dtype), pages_for(tokens)
        if self.kv_bytes is None:
            share = int(KV_SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else KV_BYTES
            return max(longest, min(self.max_num_seqs * longest, share // size))
        if self.kv_bytes < longest * size:
            raise ValueError(
                f"LLM: {tokens} tokens need {longest * size} bytes of KV cache, kv_bytes={self.kv_bytes} allows "
                f"{self.kv_bytes // size * PAGE} tokens; lower max_model_len or raise kv_bytes"
            )
        return self.kv_bytes // size


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
